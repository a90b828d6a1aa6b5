"""Pixels straight into the tokenizer."""

import flax.linen as nn
import jax.numpy as jnp


class Identity(nn.Module):
    """The codec that only sets the pixel range.

    Attributes:
      low, high: the range that encoder and decoder see.
    """

    low: float = -1.0
    high: float = 1.0

    def encode(self, pixels):
        """uint8 [B H W 3] -> float32 in [low, high]; floats are taken to be in that range already."""
        if pixels.dtype == jnp.uint8:
            return pixels.astype(jnp.float32) / 255 * (self.high - self.low) + self.low
        return pixels.astype(jnp.float32)

    def decode(self, x):
        """[B H W 3] in [low, high] (clipped) -> float32 in [0, 1]."""
        return (jnp.clip(x, self.low, self.high) - self.low) / (self.high - self.low)
