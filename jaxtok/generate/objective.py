"""What a generator's loss returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """Of every token, or of every sample.

    Attributes:
      loss: float32 [B N].
      weight: float32 [B N], of each in the mean; `loss` counts tokens of weight 0 not at all.
      correct: float32 [B N], 1 where the likeliest code was the true one; None where there are no codes.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array | None = None

    def mean(self):
        """The scalar that training minimises."""
        return (self.loss * self.weight).sum() / jnp.maximum(self.weight.sum(), 1e-8)


def score(logits, targets, weight=None, smoothing=0.0) -> Scores:
    """Cross-entropy of logits [B N K] against targets int [B N], in float32.

    smoothing: share of the target that is spread evenly over all K codes (arXiv 1512.00567).
    """
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, -1)
    at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    aim = (1 - smoothing) * at_target
    if smoothing:
        aim = aim + smoothing * logits.mean(-1)
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    return Scores(normaliser - aim, jnp.ones_like(correct) if weight is None else weight, correct)
