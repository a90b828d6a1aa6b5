"""Multi-head self-attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm


class Attention(nn.Module):
    """Multi-head self-attention without biases, queries and keys layer-normalised per head. [B N D] -> [B N D].

    Attributes:
      head_dim: width of a head; the number of heads is D / head_dim.
      scale: of the logits; the default 8 / head_dim is muP's, and head_dim^-0.5 at the usual 64.
      dtype: of the computation; the softmax is float32.
    """

    head_dim: int = 64
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None):
        width = x.shape[-1]
        if width % self.head_dim:
            raise ValueError(f"Attention: width {width} is not divisible by head_dim {self.head_dim}.")
        heads = width // self.head_dim
        qkv = Linear((heads, 3, self.head_dim), stacked=3, bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]  # [B N h d]
        mask = None if mask is None else jnp.asarray(mask)[None, None]  # [1 1 N N]
        scale = 8.0 / self.head_dim if self.scale is None else self.scale
        x = jax.nn.dot_product_attention(layer_norm(q), layer_norm(k), v, mask=mask, scale=scale)  # [B N h d]
        return Linear(width, inputs=2, bias=False, dtype=self.dtype, name="out")(x)
