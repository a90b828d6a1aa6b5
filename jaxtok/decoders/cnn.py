"""A grid of tokens as a picture, by convolutions, in one pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.conv import ConvDecoder, conv
from jaxtok.structs import Decoded


class CNN(ConvDecoder):
    """The decoder of latent diffusion (arXiv 2112.10752): a 1x1 convolution and the trunk.

    It predicts the picture itself. A token that is not kept is 0, the mean of its prior, and its place stays.
    Parameters have the paths of `codecs.vae.VAE`, but for post_quant_conv, which lies one deeper here.

    Attributes: as ConvDecoder, and

      first: channels that the 1x1 makes of a latent's; None: as many, 0: there is none.
      generative: beside the tokens it reads noise, normal and as wide as they, drawn at each call: one of the pictures
        that belong to the codes, not their mean (WeTok, arXiv 2508.05599). A decoder that begins with the weights of
        one without it, by `init_from`, begins with its pictures too, for the noise has weights 0 at first: the same as
        to widen `conv_in` with zeros.
    """

    first: int | None = None
    generative: bool = False

    @nn.compact
    def picture(self, codes, noise=None):
        """Codes with a grid (h, w), noise [B N D] or None -> float32 [B h*f w*f out].

        ValueError for tokens without places.
        """
        if codes.grid is None:
            raise ValueError(
                "decoders.cnn.CNN needs tokens with places, as encoders.cnn.CNN gives them; these Codes have no grid."
            )
        batch, _, channels = codes.z.shape
        z = jnp.where(codes.keep[..., None], codes.z, 0).reshape(batch, *codes.grid, channels)
        noise = None if noise is None else noise.reshape(z.shape)
        first = channels if self.first is None else self.first
        z = conv(first, 1, dtype=jnp.float32, name="post_quant_conv")(z) if first else z
        return super().__call__(z, noise)

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: the picture, and the target [B H W out] as it came. Noise comes from the rng stream "train"."""
        noise = jax.random.normal(self.make_rng("train"), codes.z.shape) if self.generative else None
        return Decoded(self.picture(codes, noise), target)

    def sample(self, codes, rng=None, *, noise=None):
        """The picture, float32 [B H W out].

        A generative decoder takes its noise from the key `rng`, or the noise itself, [B N D]; another draws nothing.
        """
        if not self.generative:
            return self.picture(codes)
        if noise is None:
            if rng is None:
                raise ValueError("This decoders.cnn.CNN is generative: give `sample` a key, or the noise.")
            noise = jax.random.normal(rng, codes.z.shape)
        return self.picture(codes, noise)
