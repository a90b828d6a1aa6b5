"""Normalisation without parameters."""

import jax
import jax.numpy as jnp


def layer_norm(x, eps=1e-5):
    """LayerNorm over the last axis without scale or bias; statistics in float32, output in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype)
