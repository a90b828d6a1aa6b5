"""Feed-forward layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.linear import Linear


class SwiGLU(nn.Module):
    """W_o (SiLU(W_gate x) * W_value x) without biases, hidden width 2/3 of 4 D. [... D] -> [... D]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden = 2 * (4 * width) // 3
        gate = Linear(hidden, bias=False, dtype=self.dtype, name="gate")(x)
        value = Linear(hidden, bias=False, dtype=self.dtype, name="value")(x)
        return Linear(width, bias=False, dtype=self.dtype, name="out")(jax.nn.silu(gate) * value)
