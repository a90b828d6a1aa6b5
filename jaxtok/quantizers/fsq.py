"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505): every channel rounds to a few levels, no codebook."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import codebook
from jaxtok.structs import Codes


def bound(z, levels):
    """Squashes z [... C] so that rounding gives `levels` values a channel: for L = 8, -4 ... 3; for L = 5, -2 ... 2."""
    levels = np.asarray(levels, np.float32)
    half = (levels - 1) * 1.001 / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0).astype(np.float32)
    return jnp.tanh(z + np.arctanh(offset / half)) * half - offset


def round_straight_through(z):
    """Rounds half to even; the gradient passes as if nothing had happened."""
    return z + jax.lax.stop_gradient(jnp.round(z) - z)


def digits_to_indices(digits, levels):
    """Integer-valued digits [... C], centred on 0 -> int32 [...]; channel 0 is the least significant digit."""
    levels = np.asarray(levels)
    basis = np.cumprod(np.r_[1, levels[:-1]]).astype(np.int32)
    return ((jnp.round(digits).astype(jnp.int32) + levels // 2) * basis).sum(-1).astype(jnp.int32)


def indices_to_digits(indices, levels):
    """The inverse of digits_to_indices: int [...] -> int32 [... C]."""
    levels = np.asarray(levels, np.int32)
    basis = np.cumprod(np.r_[1, levels[:-1]]).astype(np.int32)
    return indices[..., None] // basis % levels - levels // 2


class FSQ(nn.Module):
    """Latents [B N C], C = len(levels) -> Codes with z in [-1, 1] and one index a token; float32 inside.

    Attributes:
      levels: values per channel, each at least 2; the vocabulary is their product, below 2^31.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    @property
    def vocabulary(self):
        """The number of codes."""
        return math.prod(self._levels())

    def _levels(self):
        levels = tuple(self.levels)
        if not levels or any(int(n) != n or n < 2 for n in levels) or math.prod(levels) >= 2**31:
            raise ValueError(
                f"FSQ.levels must be integers of at least 2 whose product is below 2^31, got {levels}; "
                "(8, 8, 8, 5, 5, 5) gives 64,000 codes."
            )
        return levels

    def __call__(self, latents, *, train=False):
        levels = self._levels()
        if latents.shape[-1] != len(levels):
            raise ValueError(
                f"FSQ has {len(levels)} levels {levels} but the encoder gives {latents.shape[-1]} channels: "
                "set the encoder's `channels` to the number of levels."
            )
        digits = round_straight_through(bound(latents.astype(jnp.float32), levels))  # [B N C]
        indices = digits_to_indices(jax.lax.stop_gradient(digits), levels)  # [B N]
        return Codes(z=digits / (np.array(levels) // 2), indices=indices, keep=jnp.ones(indices.shape, bool))

    def lookup(self, indices):
        """int [B N] -> z float32 [B N C].

        An index outside 0 ... vocabulary - 1 raises ValueError; inside a jitted function, where values cannot be read,
        it gives NaN.
        """
        valid = codebook.in_range(indices, self.vocabulary, "FSQ")
        levels = self._levels()
        z = indices_to_digits(indices, levels) / (np.array(levels, np.float32) // 2)
        return jnp.where(valid[..., None], z, jnp.nan).astype(jnp.float32)  # [B N C]
