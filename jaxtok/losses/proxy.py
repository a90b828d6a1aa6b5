"""Learning the codes of another tokenizer instead of pixels (TiTok's first stage, arXiv 2406.07550)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class CodeCrossEntropy(nn.Module):
    """The mean cross-entropy of the decoder's logits [B h w K] to the tower's codes of the same picture, float32.

    Attributes:
      tower: a Tokenizer whose codes lie on the grid of the logits; it is frozen, and only encodes.
    """

    tower: nn.Module

    @nn.compact
    def __call__(self, outputs, batch):
        logits = outputs["decoded"].prediction
        indices = self.tower.encode(batch["image"]).indices  # [B h*w]
        return cross_entropy(logits, jax.lax.stop_gradient(indices))


def cross_entropy(logits, indices):
    """Logits [B h w K], codes int [B h*w], rows first -> scalar. ValueError where there are not as many of each."""
    logits = logits.astype(jnp.float32).reshape(len(logits), -1, logits.shape[-1])
    if logits.shape[:2] != indices.shape:
        raise ValueError(
            f"The decoder gives {logits.shape[1]} logits a picture, and the tower {indices.shape[1]} codes: their "
            "grids must be the same, so choose the decoder's `patch` by the tower's levels."
        )
    log = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log, indices[..., None], -1).mean()
