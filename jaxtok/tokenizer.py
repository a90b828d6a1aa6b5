"""Every tokenizer is these parts, in this order."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.structs import Codes


class Tokenizer(nn.Module):
    """pixels -> codec -> encoder -> quantizer -> Codes -> decoder -> codec^-1 -> pixels.

    Attributes:
      codec, encoder, quantizer, decoder: the parts; docs/design.md says what each promises.
      nested_dropout: None, or a part that sets `Codes.keep` in training.
      text_tower: None, or a module that reads texts, int [B T], 0 where there is no more of one, as (features [B T C],
        mask bool [B T]). `context` is then such texts, and encoder and decoder get {"tokens", "mask"} of them; those
        that have a field `text` read it where that is set.
      text_dropout: the share of pictures that go without their text in training.
    """

    codec: nn.Module
    encoder: nn.Module
    quantizer: nn.Module
    decoder: nn.Module
    nested_dropout: nn.Module | None = None
    text_tower: nn.Module | None = None
    text_dropout: float = 0.0

    def __call__(self, pixels, *, context=None, train=False, **options):
        """The training pass: pixels [B H W 3] (uint8, or floats in the codec's range) -> {"codes", "decoded"}.

        `options` go to the decoder (a given time or noise).
        """
        x, context = self.codec.encode(pixels), self.read(context, train)
        if self.is_initializing():
            self.codec.decode(x)  # which training never calls
        codes = self.quantize(self.encoder(x, context=context, train=train), train=train)
        if self.nested_dropout is not None:
            codes = self.nested_dropout(codes, train=train)
        decoded = self.decoder(codes, target=x, context=context, train=train, **options)
        return {"codes": codes, "decoded": decoded}

    def encode(self, pixels, *, context=None, **options) -> Codes:
        """pixels [B H W 3] -> Codes, every token kept. `options` go to the encoder (how many tokens)."""
        return self.quantize(self.encoder(self.codec.encode(pixels), context=self.read(context), **options))

    def read(self, context, train=False):
        """What encoder and decoder get as `context`: without a text_tower, what there is. A text of zeros is no text.

        ValueError where there is a tower and no text for it.
        """
        if self.text_tower is None:
            return context
        if context is None:
            raise ValueError(
                "This tokenizer has a text_tower and needs the texts of its pictures: pass `context`, their ids int "
                "[B T]; zeros alone are no text."
            )
        if train and self.text_dropout:
            dropped = jax.random.bernoulli(self.make_rng("train"), self.text_dropout, (len(context), 1))
            context = jnp.where(dropped, 0, context)
        tokens, mask = self.text_tower(context)
        return {"tokens": tokens, "mask": mask & (context > 0).any(1, keepdims=True)}

    def quantize(self, latents, *, train=False) -> Codes:
        """Latents [B N D], or a dict of streams of them -> Codes.

        Those with places, [B h w D], become a row of them, and Codes keep the grid, which all streams share.
        """
        rows = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), latents)
        codes, grid = self.quantizer(rows, train=train), jax.tree.leaves(latents)[0].shape[1:-1]
        return codes.replace(grid=grid) if len(grid) > 1 else codes

    def decode(self, codes, rng=None, *, context=None, **options):
        """Codes -> pixels float32 [B H W 3] in [0, 1]. `options` go to the decoder's `sample`."""
        if (context := self.read(context)) is not None:
            options["context"] = context
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
        pad = lambda x: jnp.pad(x, ((0, 0), (0, length - k), *[(0, 0)] * (x.ndim - 2))) if k < length else x
        discrete = jnp.issubdtype(codes.dtype, jnp.integer)
        return Codes(
            z=pad(self.quantizer.lookup(codes) if discrete else codes),
            indices=pad(codes) if discrete else None,
            keep=jnp.broadcast_to(jnp.arange(length) < k, (batch, length)),
            grid=grid and tuple(grid),
        )
