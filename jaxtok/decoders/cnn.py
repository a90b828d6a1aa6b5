"""A grid of tokens as a picture, by convolutions, in one pass."""

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.conv import ConvDecoder, conv
from jaxtok.structs import Decoded


class CNN(ConvDecoder):
    """The decoder of latent diffusion (arXiv 2112.10752): a 1x1 convolution and the trunk.

    It predicts the picture itself. A token that is not kept is 0, the mean of its prior, and its place stays.
    Parameters have the paths of `codecs.vae.VAE`, but for post_quant_conv, which lies one deeper here.

    Attributes: as ConvDecoder, and

      first: channels that the 1x1 makes of a latent's; None: as many, 0: there is none.
    """

    first: int | None = None

    @nn.compact
    def picture(self, codes):
        """Codes with a grid (h, w) -> float32 [B h*f w*f out]. ValueError for tokens without places."""
        if codes.grid is None:
            raise ValueError(
                "decoders.cnn.CNN needs tokens with places, as encoders.cnn.CNN gives them; these Codes have no grid."
            )
        batch, _, channels = codes.z.shape
        z = jnp.where(codes.keep[..., None], codes.z, 0).reshape(batch, *codes.grid, channels)
        first = channels if self.first is None else self.first
        return super().__call__(conv(first, 1, dtype=jnp.float32, name="post_quant_conv")(z) if first else z)

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: the picture, and the target [B H W out] as it came."""
        return Decoded(self.picture(codes), target)

    def sample(self, codes, rng=None):
        """The picture, float32 [B H W out]; nothing is drawn."""
        return self.picture(codes)
