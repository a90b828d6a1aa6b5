"""A picture as a grid of tokens, by convolutions."""

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.conv import ConvEncoder, conv


class CNN(ConvEncoder):
    """The encoder of latent diffusion (arXiv 2112.10752): the trunk and a 1x1 convolution. Attributes: as ConvEncoder.

    Its parameters have the paths of `codecs.vae.VAE`, but for quant_conv, which lies one deeper here.
    """

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B H W C] -> latents [B H/f W/f out], float32."""
        return conv(self.out, 1, dtype=jnp.float32, name="quant_conv")(super().__call__(x))
