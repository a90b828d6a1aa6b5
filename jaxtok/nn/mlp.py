"""Feed-forward layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.linear import Linear


class FeedForward(nn.Module):
    """W_o (SiLU(W_gate x) * W_value x), or W_2 GELU(W_1 x). [... D] -> [... D].

    Attributes:
      kind: "swiglu" or "gelu" (the exact one).
      hidden: width inside; None: 2/3 of 4 D for "swiglu", 4 D for "gelu".
      bias: whether the linear layers have one.
      dtype: of the computation.
    """

    kind: str = "swiglu"
    hidden: int | None = None
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        linear = lambda features, name: Linear(features, bias=self.bias, dtype=self.dtype, name=name)
        if self.kind == "swiglu":
            hidden = self.hidden or 2 * (4 * width) // 3
            return linear(width, "out")(jax.nn.silu(linear(hidden, "gate")(x)) * linear(hidden, "value")(x))
        if self.kind == "gelu":
            hidden = self.hidden or 4 * width
            return linear(width, "fc2")(jax.nn.gelu(linear(hidden, "fc1")(x), approximate=False))
        raise ValueError(f'FeedForward.kind is "swiglu" or "gelu", not "{self.kind}".')
