"""Feed-forward layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.linear import Linear

GATED = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}  # the second in the form with tanh, which is jax's own
PLAIN = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


class FeedForward(nn.Module):
    """W_o (act(W_gate x) * W_value x) (arXiv 2002.05202), or W_2 act(W_1 x). [... D] -> [... D].

    Attributes:
      kind: gated, "swiglu" or "geglu" (GELU by tanh); or "gelu" (exact) or "quick_gelu" (x sigmoid(1.702 x)).
      hidden: width inside; None: 2/3 of 4 D for the gated ones, 4 D for the others.
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
        if self.kind in GATED:
            hidden = self.hidden or 2 * (4 * width) // 3
            return linear(width, "out")(GATED[self.kind](linear(hidden, "gate")(x)) * linear(hidden, "value")(x))
        if self.kind in PLAIN:
            hidden = self.hidden or 4 * width
            return linear(width, "fc2")(PLAIN[self.kind](linear(hidden, "fc1")(x)))
        raise ValueError(f'FeedForward.kind is one of {", ".join((*GATED, *PLAIN))}, not "{self.kind}".')
