"""A decoder that learns another tokenizer's codes, and then how these become a picture (TiTok's two stages)."""

import flax.linen as nn
import jax

from jaxtok.structs import Decoded


class SoftCodes(nn.Module):
    """Logits over another tokenizer's codes -> the codes' expectation -> that tokenizer's decoder (arXiv 2406.07550).

    Attributes:
      body: Codes -> logits [B h w K], as decoders.vit.MaskTokens with a `vocabulary`.
      pixels: expected codes [B h w C] -> pictures [B H W 3], as nn.conv.ConvDecoder.
      channels: C.
      trains: what a training call predicts: "codes", the logits, and then codebook and `pixels` get no gradient; or
        "pixels".
    """

    body: nn.Module
    pixels: nn.Module
    channels: int
    trains: str = "pixels"

    @property
    def shape(self):
        """(H, W, 3) of a picture."""
        return self.body.shape

    def setup(self):
        if self.trains not in ("codes", "pixels"):
            raise ValueError(f'SoftCodes.trains is "codes" or "pixels", not "{self.trains}".')
        shape = self.body.vocabulary, self.channels
        self.codebook = self.param("codebook", nn.initializers.normal(0.02), shape)

    def picture(self, logits):
        """[B h w K] -> float32 [B H W 3]."""
        return self.pixels(self.expected(logits))

    def expected(self, logits):
        """[B h w K] -> [B h w C], the mean of the codes under the softmax."""
        return jax.nn.softmax(logits) @ self.codebook

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: logits or the picture, as `trains` says, and the target [B H W 3] as it came."""
        logits = self.body.predict(codes, context, train)
        if self.trains == "codes" and not self.is_initializing():
            return Decoded(logits, target)
        picture = self.picture(logits)
        return Decoded(logits if self.trains == "codes" else picture, target)

    def sample(self, codes, rng=None, context=None):
        """The picture, float32 [B H W 3]; nothing is drawn."""
        return self.picture(self.body.predict(codes, context))
