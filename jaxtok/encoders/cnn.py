"""A picture as a grid of tokens, by convolutions."""

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.conv import ConvEncoder, conv


class CNN(ConvEncoder):
    """The encoder of latent diffusion (arXiv 2112.10752): the trunk and a 1x1 convolution.

    Its parameters have the paths of `codecs.vae.VAE`, but for quant_conv, which lies one deeper here.

    Attributes: as ConvEncoder, and

      latent: channels that the 1x1 makes of the trunk's `out`; None: as many, 0: there is none.
    """

    latent: int | None = None

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B H W C] -> latents [B H/f W/f latent], float32."""
        x, latent = super().__call__(x), self.out if self.latent is None else self.latent
        return conv(latent, 1, dtype=jnp.float32, name="quant_conv")(x) if latent else x
