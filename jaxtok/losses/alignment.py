"""Alignment of a decoder's tokens with what a frozen tower sees in the picture (REPA, arXiv 2410.06940)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm


class Alignment(nn.Module):
    """Minus the mean cosine between projected decoder tokens and the tower's patch features, float32 in [-1, 1].

    The projector is an MLP with SiLU on layer-normalised tokens, 4 times as wide as they, whose last layer begins at
    zero (FlexTok's, arXiv 2502.13967). It works on the decoder's grid and its output is interpolated to the tower's,
    which is the cheaper order: a tower of 37 x 37 patches has five times as many as a decoder of 16 x 16.

    Call: (outputs, batch) -> scalar, as a loss. Reads `outputs["decoded"].features` and `batch["image"]`, uint8.

    Attributes:
      tower: uint8 pictures [B H W 3] -> features [B h w C]; it gets no gradient.
      feature: which of the decoder's features, [B P D]; a flow decoder shows "patches" where its `tap` is set.
      layers: of the projector.
      dtype: of the projector's computation.
    """

    tower: nn.Module
    feature: str = "patches"
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, outputs, batch):
        decoded = outputs["decoded"]
        if self.feature not in decoded.features:
            raise ValueError(
                f'The decoder shows no feature "{self.feature}", only {sorted(decoded.features) or "none"}: set its '
                "`tap` to the index of the block to align, or drop this loss."
            )
        tokens = decoded.features[self.feature]  # [B P D]
        target = jax.lax.stop_gradient(self.tower(batch["image"]))  # [B h w C]
        grid = grid_of(tokens.shape[1], decoded.target)
        x = layer_norm(tokens)
        for i in range(1, self.layers):
            x = jax.nn.silu(Linear(4 * tokens.shape[-1], dtype=self.dtype, name=f"fc{i}")(x))
        x = Linear(target.shape[-1], init="zeros", dtype=self.dtype, name=f"fc{self.layers}")(x)
        x = x.astype(jnp.float32).reshape(len(x), *grid, -1)
        x = jax.image.resize(x, target.shape, "linear")  # [B h w C]
        return -cosine(x, target).mean()


def off(outputs, batch):
    """A term that a run goes without: 0, under the term's name in every log. Its weight is 0 too."""
    return jnp.zeros(())


def cosine(x, y, floor=0.01):
    """The cosine of x and y over the last axis, float32.

    Where the root mean square of x or y is below `floor`, that takes its place, and there it grows with them. At 0,
    where a projector with a zero last layer begins, the cosine itself has no gradient, and near 0 one of size 1 / |x|:
    Adam would remember the first of them, and that layer hardly move, for hundreds of steps.
    """
    unit = lambda v: v * jax.lax.rsqrt(jnp.maximum(jnp.square(v).mean(-1, keepdims=True), floor**2))
    return (unit(x.astype(jnp.float32)) * unit(y.astype(jnp.float32))).mean(-1)


def grid_of(n, x):
    """(rows, columns) of the n square patches that x [B H W ...] was cut into. ValueError if there is no such grid."""
    height, width = x.shape[1:3]
    patch = max(1, math.isqrt(height * width // n))
    grid = height // patch, width // patch
    if (grid[0] * patch, grid[1] * patch, grid[0] * grid[1]) != (height, width, n):
        raise ValueError(f"{n} tokens are no grid of square patches of a target of {height} x {width}.")
    return grid
