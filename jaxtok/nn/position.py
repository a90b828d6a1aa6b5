"""Positions and times as vectors."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.linear import Linear


def sincos_2d(height, width, dim, grid=None):
    """Fixed 2D table [height width dim], float32: [sin(y w), cos(y w), sin(x w), cos(x w)], w_m = 10000^(-m / (dim/4)).

    `grid`: (rows, columns) of the table that a model was trained with; another height and width are laid over the same
    square, cell centres on cell centres, and equal ones change nothing. None: positions count from 0.

    Raises ValueError unless dim is divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_2d needs a width divisible by 4, got {dim}.")
    omega = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    rows, columns = grid or (height, width)
    y = ((np.arange(height) + 0.5) * rows / height - 0.5)[:, None] * omega
    x = ((np.arange(width) + 0.5) * columns / width - 0.5)[:, None] * omega
    y = np.broadcast_to(y[:, None], (height, width, dim // 4))
    x = np.broadcast_to(x[None, :], (height, width, dim // 4))
    return np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], -1).astype(np.float32)  # [h w D]


def sincos_1d(length, dim):
    """Fixed 1D table [length dim], float32: [sin(n w), cos(n w)], w_m = 10000^(-m / (dim/2)).

    Raises ValueError unless dim is divisible by 2.
    """
    if dim % 2:
        raise ValueError(f"sincos_1d needs a width divisible by 2, got {dim}.")
    angle = np.arange(length)[:, None] * 10000.0 ** -(np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(np.float32)  # [N D]


def timestep_embedding(t, dim=256, max_timestep=1000.0, max_period=256.0):
    """Sinusoid of a time in [0, 1]: float32 [B] -> [B dim], cosines first (FlexTok's order and period)."""
    half = dim // 2
    frequency = 1000.0 / max_timestep * np.exp(-math.log(max_period) * np.arange(half) / half).astype(np.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)  # [B dim]


class TimeEmbedding(nn.Module):
    """A time in [0, 1] as a vector: sinusoid, then an MLP with SiLU. [B] -> [B width]."""

    width: int
    max_timestep: float = 1000.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t):
        x = timestep_embedding(t, max_timestep=self.max_timestep)
        x = jax.nn.silu(Linear(self.width, dtype=self.dtype, name="fc1")(x))
        return Linear(self.width, dtype=self.dtype, name="fc2")(x)  # [B D]
