"""Continuous tokens: a Gaussian a token, held near the standard normal (arXiv 1312.6114; 2112.10752, KL-reg)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import gaussian
from jaxtok.structs import Codes


class Gaussian(nn.Module):
    """Latents [B N 2C], means and log variances -> Codes with z [B N C] and no indices; float32 inside.

    z is a sample in training (rng stream "train") and the mean otherwise. `aux` has "kl", the divergence from the
    standard normal in nats a picture, and "std", the deviation of z over the batch: 1 / std is the `scaling_factor`
    of a codec made from such a tokenizer.
    """

    vocabulary = None

    def __call__(self, latents, *, train=False):
        if latents.shape[-1] % 2:
            raise ValueError(
                f"Gaussian takes a mean and a log variance for each channel, but the encoder gives "
                f"{latents.shape[-1]} channels: set the encoder's `out` to twice the channels of a token."
            )
        mean, logvar = gaussian.moments(latents)  # each [B N C]
        z = gaussian.sample(mean, logvar, jax.random.normal(self.make_rng("train"), mean.shape)) if train else mean
        aux = {"kl": gaussian.kl(mean, logvar).mean(), "std": z.std()}
        return Codes(z=z, indices=None, keep=jnp.ones(z.shape[:2], bool), aux=aux)

    def lookup(self, indices):
        """Raises ValueError: there are none."""
        raise ValueError("Tokens of quantizers.gaussian.Gaussian are continuous: they have no indices to look up.")
