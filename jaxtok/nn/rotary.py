"""Rotary positions (arXiv 2104.09864): pairs of channels turn by an angle that grows with the place."""

import jax.numpy as jnp
import numpy as np


def rotary_1d(length, dim, base=10000.0):
    """Tables (cos, sin), float32 [length dim/2]: pair i of place n turns by n base^(-2i / dim).

    Raises ValueError unless dim is divisible by 2.
    """
    if dim % 2:
        raise ValueError(f"rotary_1d needs a head width divisible by 2, got {dim}.")
    angle = np.arange(length)[:, None] * base ** -(np.arange(0, dim, 2) / dim)  # [N d/2]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotary_2d(height, width, dim, base=10000.0):
    """Tables (cos, sin), float32 [height*width dim/2], rows first: half the pairs turn by the row, half by the column.

    The halves are two tables of rotary_1d with dim/2 channels (LlamaGen's form, arXiv 2406.06525).

    Raises ValueError unless dim is divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"rotary_2d needs a head width divisible by 4, got {dim}.")
    tables = []
    for of_rows, of_columns in zip(rotary_1d(height, dim // 2, base), rotary_1d(width, dim // 2, base), strict=True):
        rows, columns = np.repeat(of_rows, width, 0), np.tile(of_columns, (height, 1))
        tables.append(np.concatenate([rows, columns], -1))  # [h*w d/2]
    return tuple(tables)


def rotate(x, cos, sin):
    """Turns the channels 2i and 2i+1 of x [B N h d] by the angles of tables [N d/2], in float32; x's dtype."""
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)  # each [B N h d/2]
    cos, sin = cos[:, None], sin[:, None]  # [N 1 d/2]
    y = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return y.reshape(x.shape).astype(x.dtype)
