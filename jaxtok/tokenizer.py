"""Every tokenizer is these parts, in this order."""

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.structs import Codes


class Tokenizer(nn.Module):
    """pixels -> codec -> encoder -> quantizer -> Codes -> decoder -> codec^-1 -> pixels.

    Attributes:
      codec, encoder, quantizer, decoder: the parts; docs/design.md says what each promises.
      nested_dropout: None, or a part that sets `Codes.keep` in training.
    """

    codec: nn.Module
    encoder: nn.Module
    quantizer: nn.Module
    decoder: nn.Module
    nested_dropout: nn.Module | None = None

    def __call__(self, pixels, *, context=None, train=False, **options):
        """The training pass: pixels [B H W 3] (uint8, or floats in the codec's range) -> {"codes", "decoded"}.

        `options` go to the decoder (a given time or noise).
        """
        x = self.codec.encode(pixels)
        if self.is_initializing():
            self.codec.decode(x)  # which training never calls
        codes = self.quantize(self.encoder(x, context=context, train=train), train=train)
        if self.nested_dropout is not None:
            codes = self.nested_dropout(codes, train=train)
        decoded = self.decoder(codes, target=x, context=context, train=train, **options)
        return {"codes": codes, "decoded": decoded}

    def encode(self, pixels, *, context=None, **options) -> Codes:
        """pixels [B H W 3] -> Codes, every token kept. `options` go to the encoder (how many tokens)."""
        return self.quantize(self.encoder(self.codec.encode(pixels), context=context, **options))

    def quantize(self, latents, *, train=False) -> Codes:
        """Latents [B N D] -> Codes. Those with places, [B h w D], become a row of them, and Codes keep the grid."""
        batch, *grid, width = latents.shape
        codes = self.quantizer(latents.reshape(batch, -1, width), train=train)
        return codes.replace(grid=tuple(grid)) if len(grid) > 1 else codes

    def decode(self, codes, rng=None, **options):
        """Codes -> pixels float32 [B H W 3] in [0, 1]. `options` go to the decoder's `sample`."""
        return self.codec.decode(self.decoder.sample(codes, rng, **options))

    def lookup(self, codes, length, grid=None) -> Codes:
        """The first k tokens of each picture -> Codes of `length` tokens of which k are kept.

        Args:
          codes: indices int [B k], or [B k G]; or latents float [B k D], or [B h w D] of tokens with places.
          grid: (h, w), of indices of tokens with places.
        """
        if not jnp.issubdtype(codes.dtype, jnp.integer):
            grid = codes.shape[1:-1] if codes.ndim > 3 else grid
            codes = codes.reshape(codes.shape[0], -1, codes.shape[-1])
        batch, k = codes.shape[:2]
        if not 1 <= k <= length:
            raise ValueError(f"lookup takes 1 to {length} tokens a picture, got {k}.")
        indices, z = None, codes
        if jnp.issubdtype(codes.dtype, jnp.integer):
            indices = jnp.pad(codes, ((0, 0), (0, length - k), *[(0, 0)] * (codes.ndim - 2)))
            z = self.quantizer.lookup(codes)
        return Codes(
            z=jnp.pad(z, ((0, 0), (0, length - k), (0, 0))),
            indices=indices,
            keep=jnp.broadcast_to(jnp.arange(length) < k, (batch, length)),
            grid=grid and tuple(grid),
        )
