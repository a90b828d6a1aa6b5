"""Telling the right partner from the others of the batch (InfoNCE, arXiv 1807.03748)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.codebook import l2_normalize
from jaxtok.nn.linear import Linear
from jaxtok.nn.vit import free, trunk


def info_nce(x, y, temperature=1.0):
    """x, y [B D] -> scalar: the mean cross-entropy of naming y_i among all y by the cosines of x_i and y_j, float32."""
    logits = l2_normalize(x.astype(jnp.float32)) @ l2_normalize(y.astype(jnp.float32)).T / temperature
    return -jnp.diagonal(jax.nn.log_softmax(logits)).mean()


class FeatureHead(nn.Module):
    """Reads tokens into one vector: an MLP with ReLU, then a transformer in which a class token looks at them.

    Call: [B N C] -> [B 1+N width], the class token's first. FQGAN's (arXiv 2411.16681).

    Attributes:
      width, depth, head_dim: of the transformer.
      dtype: of the computation. remat: see nn.transformer.Transformer.
    """

    width: int = 1024
    depth: int = 3
    head_dim: int = 128
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(Linear(self.width, dtype=self.dtype, name="fc1")(x))
        x = Linear(self.width, dtype=self.dtype, name="fc2")(x)
        first = jnp.broadcast_to(free(self, "class_token", 1, self.width), (len(x), 1, self.width))
        x = jnp.concatenate([first, x], 1)
        return trunk(self, x + free(self, "pos_embed", x.shape[1], self.width), train=True)


class Prediction(nn.Module):
    """Some channels of the code must name the picture's feature among those of the batch (arXiv 2411.16681).

    InfoNCE of what `head` reads from them and the target, which gets no gradient. Reads `outputs["codes"]` and the
    batch, over all devices.

    Attributes:
      head: tokens [B N C] -> [B 1+N D], of which the first is taken; a linear layer "out" follows if the target is not
        as wide.
      channels: (first, stop) of the code's.
      tower: uint8 pictures [B H W 3] -> features [B h w D], whose mean is the target; it is frozen. None: the target is
        the class, `batch["label"]`.
      classes: how many, without a tower.
      temperature: by which cosines are divided.
    """

    head: nn.Module
    channels: tuple[int, int]
    tower: nn.Module | None = None
    classes: int = 0
    temperature: float = 1.0

    @nn.compact
    def __call__(self, outputs, batch):
        if (self.tower is None) == (not self.classes):
            raise ValueError("Prediction has either a tower or a number of `classes`, to predict one or the other.")
        if self.tower is None:
            target = jax.nn.one_hot(batch["label"], self.classes)  # [B D]
        else:
            target = jax.lax.stop_gradient(self.tower(batch["image"]).astype(jnp.float32).mean((1, 2)))
        x = self.head(outputs["codes"].z[..., slice(*self.channels)])[:, 0].astype(jnp.float32)
        if x.shape[-1] != target.shape[-1]:
            x = Linear(target.shape[-1], name="out")(x)
        return info_nce(x, target, self.temperature)
