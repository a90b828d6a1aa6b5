"""Index backpropagation quantization (IBQ; Shi et al., arXiv 2412.02692): every code learns from every latent."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import codebook
from jaxtok.structs import Codes


class IBQ(nn.Module):
    """Latents [B N D] -> Codes, one index a token, the code with the largest inner product; float32 inside.

    z is one_hot(index) @ codes, where the gradient takes softmax(<z, codes>) for the one-hot row: it reaches all
    codes and the latent. The aux losses are `joint`, the mean of (z - q)^2 with that gradient, `commitment` (z - sg
    q)^2 and `codebook` (sg z - q)^2; published weights 1, 1 and 0.25. The softmax over K codes is never whole.

    Attributes:
      size: K, the vocabulary.
      temperature: of the aux entropies `sample_entropy` and `batch_entropy` in training; None: they are not computed.
    """

    size: int
    temperature: float | None = None

    @property
    def vocabulary(self):
        """The number of codes."""
        return self.size

    @nn.compact
    def __call__(self, latents, *, train=False):
        z = latents.astype(jnp.float32)
        rows = z.reshape(-1, z.shape[-1])
        bound = 1 / self.size
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        codes = self.param("codebook", init, (self.size, z.shape[-1]))
        indices = codebook.best(rows, codes).reshape(z.shape[:-1])  # [B N]
        soft = codebook.expected(rows, codes).reshape(z.shape)
        q = codes[indices]
        through = q + (soft - jax.lax.stop_gradient(soft))  # [B N D]
        stop = jax.lax.stop_gradient
        aux = {
            "joint": jnp.square(z - through).mean(),
            "commitment": jnp.square(z - stop(q)).mean(),
            "codebook": jnp.square(stop(z) - q).mean(),
        }
        if train and self.temperature is not None:
            pair = codebook.entropies(rows, codes, None, self.temperature)
            aux["sample_entropy"], aux["batch_entropy"] = pair
        return Codes(z=through, indices=indices, keep=jnp.ones(indices.shape, bool), aux=aux)

    def lookup(self, indices):
        """int [B N] -> z float32 [B N D]. An index outside raises ValueError; inside a jitted function it gives NaN."""
        return codebook.take(self.codes(), indices, "IBQ")

    def codes(self):
        """float32 [K D], what the indices stand for."""
        return self.get_variable("params", "codebook")
