"""A vision transformer makes a picture, or the codes of one, in one pass: from a grid of tokens or a row of them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.conv import conv
from jaxtok.nn.linear import Linear
from jaxtok.nn.patch import unpatchify
from jaxtok.nn.vit import free, free_prefix, place, read, trunk
from jaxtok.structs import Decoded


def pixels(x, grid, patch, channels):
    """Tokens [B P D] -> [B h*p w*p C]: a linear layer "head" gives each patch, a 3x3 "conv_out" smooths the seams."""
    x = Linear(patch * patch * channels, name="head")(x.astype(jnp.float32))
    return conv(channels, 3, dtype=jnp.float32, name="conv_out")(unpatchify(x, grid, patch))


class ViT(nn.Module):
    """Tokens with places, one a patch, through a transformer. A token that is not kept is 0, and its place stays.

    Attributes:
      width, depth, head_dim: of the transformer.
      patch: side of a patch.
      mlp, positions: see encoders.vit.ViT.
      dtype: of the computation. remat: see nn.transformer.Transformer.
    """

    width: int
    depth: int
    patch: int = 16
    head_dim: int = 64
    mlp: str = "gelu"
    positions: str = "learned"
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def picture(self, codes, train=False):
        """Codes with a grid (h, w) -> float32 [B h*p w*p 3]. ValueError for tokens without places."""
        if codes.grid is None:
            raise ValueError(
                "decoders.vit.ViT needs tokens with places, as encoders.vit.ViT gives; these have no grid."
            )
        z = jnp.where(codes.keep[..., None], codes.z, 0)
        x = Linear(self.width, dtype=self.dtype, name="embed")(z)
        x, rotary = place(self, x, codes.grid)
        x = trunk(self, x, rotary=rotary, mlp=self.mlp, train=train)
        return pixels(x, codes.grid, self.patch, 3)

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: the picture, and the target [B H W 3] as it came."""
        return Decoded(self.picture(codes, train), target)

    def sample(self, codes, rng=None):
        """The picture, float32 [B H W 3]; nothing is drawn."""
        return self.picture(codes)


class MaskTokens(nn.Module):
    """A class token and a mask token in every place read the code's tokens, which have none (arXiv 2406.07550).

    A token that is not kept is not attended to, which is the same as if it were not there: the first k tokens, cut off
    from the others, give the same picture.

    Attributes:
      shape: (H, W, 3) of a picture.
      text: whether a text, the `context`, stands behind the tokens and is read too (arXiv 2412.05796, 2501.07730).
      vocabulary: None for pictures; else logits over so many codes of another tokenizer, one for each patch.
      others: as of ViT; the feed-forward layers are "gelu", and places are learned.
    """

    shape: tuple[int, int, int]
    width: int
    depth: int
    patch: int = 16
    head_dim: int = 64
    text: bool = False
    vocabulary: int | None = None
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def predict(self, codes, context=None, train=False):
        """Codes, context as of nn.vit.read -> float32 [B H W 3], or [B H/p W/p vocabulary]."""
        batch, tokens, _ = codes.z.shape
        grid, width = (self.shape[0] // self.patch, self.shape[1] // self.patch), self.width
        patches = grid[0] * grid[1]
        first, mask = free(self, "class_token", 1, width), free(self, "mask_token", 1, width)
        seen = jnp.concatenate([first, jnp.broadcast_to(mask, (patches, width))])
        seen = seen + free(self, "pos_embed", 1 + patches, width)
        latents = Linear(width, dtype=self.dtype, name="embed")(codes.z) + free_prefix(
            self, "latents_pos", tokens, width
        )
        parts = [jnp.broadcast_to(seen, (batch, *seen.shape)), latents]
        keep = [jnp.ones((batch, 1 + patches), bool), codes.keep]
        if self.text:
            text, counts = read(self, context)
            parts.append(text)
            keep.append(counts)
        x = trunk(self, jnp.concatenate(parts, 1), jnp.concatenate(keep, 1)[:, None], train=train)
        x = x[:, 1 : 1 + patches]
        if self.vocabulary is None:
            return pixels(x, grid, self.patch, self.shape[2])
        x = jnp.tanh(Linear(2 * width, dtype=self.dtype, name="head1")(x)).astype(jnp.float32)
        return Linear(self.vocabulary, name="head2")(x).reshape(batch, *grid, -1)

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: what `predict` gives, and the target [B H W 3] as it came."""
        return Decoded(self.predict(codes, context, train), target)

    def sample(self, codes, rng=None, context=None):
        """What `predict` gives; nothing is drawn."""
        return self.predict(codes, context)
