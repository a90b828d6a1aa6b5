"""Normalisation over the last axis, without parameters and with them."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def layer_norm(x, eps=1e-5):
    """LayerNorm over the last axis without scale or bias; statistics in float32, output in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def rms_norm(x, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467); in float32, output in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class Norm(nn.Module):
    """`layer_norm` with a learned scale and bias, `rms_norm` with a learned scale, or `layer_norm` alone; last axis.

    Attributes:
      kind: "layer", "rms" or "plain".
      eps: added to the variance, or to the mean square.
    """

    kind: str = "layer"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        if self.kind not in ("layer", "rms", "plain"):
            raise ValueError(f'Norm.kind is "layer", "rms" or "plain", not "{self.kind}".')
        if self.kind == "plain":
            return layer_norm(x, self.eps)
        y = (layer_norm if self.kind == "layer" else rms_norm)(x.astype(jnp.float32), self.eps)
        y = y * self.param("scale", nn.initializers.ones, x.shape[-1:])
        if self.kind == "layer":
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return y.astype(x.dtype)
