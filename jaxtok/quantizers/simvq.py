"""SimVQ (Zhu et al., arXiv 2411.02038): the codebook is one learned linear map of a frozen random table."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import codebook
from jaxtok.nn.linear import Linear
from jaxtok.quantizers.vq import quantize


class SimVQ(nn.Module):
    """Latents [B N D] -> Codes, one index a token; float32 inside.

    The codes are table @ W + b with a table [K D] of normal entries of variance 1 / D, which lies in the collection
    "codebook" and never changes. Only W and b learn, so that every step moves every code, used or not. The losses are
    `commitment` and `codebook`, as of VQ.

    Attributes:
      size: K, the vocabulary.
      rotation: the gradient passes by the rotation trick (arXiv 2410.06424), not straight through.
      temperature: of the aux entropies `sample_entropy` and `batch_entropy` in training; None: they are not computed.
    """

    size: int
    rotation: bool = False
    temperature: float | None = None

    @property
    def vocabulary(self):
        """The number of codes."""
        return self.size

    @nn.compact
    def __call__(self, latents, *, train=False):
        width = latents.shape[-1]
        draw = lambda: jax.random.normal(self.make_rng("params"), (self.size, width)) / jnp.sqrt(width)
        table = self.variable("codebook", "table", draw).value
        codes = Linear(width, name="map")(table)
        temperature = self.temperature if train else None
        return quantize(latents.astype(jnp.float32), codes, rotation=self.rotation, temperature=temperature)

    def lookup(self, indices):
        """int [B N] -> z float32 [B N D]. An index outside raises ValueError; inside a jitted function it gives NaN."""
        return codebook.take(self.codes(), indices, "SimVQ")

    def codes(self):
        """float32 [K D], what the indices stand for."""
        weights = self.get_variable("params", "map")
        return self.get_variable("codebook", "table") @ weights["kernel"] + weights["bias"]
