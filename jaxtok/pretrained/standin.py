"""A tower for who has no pretrained one: what a tokenizer that was trained here sees in a picture."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.attention import everything
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.patch import patchify
from jaxtok.nn.position import sincos_2d
from jaxtok.nn.transformer import Transformer
from jaxtok.pretrained.vit import at_size, resize


class PatchTokens(nn.Module):
    """The patch tokens of a `Latent1D` encoder: uint8 pictures [B H W 3] -> features [B h w D], float32.

    Those that the encoder's last block reads, layer-normalised: what that block makes of patches, nothing ever read.
    Patches do not see registers, so these are the tokens of that very encoder, of a run without a codec. Their mean
    over the picture is taken off, for most of a token is the same in all: without, one constant vector has a cosine of
    0.84 with the tokens of the default run, and 0.09 so. They come from reconstructing pictures and know little of what
    is in them: a stand-in for a pretrained tower, no replacement.

    Attributes: those of the encoder, and
      size: side of its pictures, to which others are resized.
    """

    width: int
    depth: int
    patch: int
    size: int
    head_dim: int = 64
    dtype: Any = jnp.float32

    def __call__(self, images):
        x = self.tokens(resize(images, self.size))[1]
        side = self.size // self.patch
        return (x - x.mean(1, keepdims=True)).reshape(len(x), side, side, -1)

    def layers(self, pictures, blocks):
        """Floats [B H W 3] in [0, 1] -> float32 ([B h*w D], ...), layer-normalised tokens; blocks: 0 and depth - 1."""
        there = (0, self.depth - 1)
        if not set(blocks) <= set(there):
            raise ValueError(f"PatchTokens shows the tokens after {there} blocks, not after {tuple(blocks)}.")
        found = dict(zip(there, self.tokens(at_size(255 * pictures.astype(jnp.float32), self.size)), strict=True))
        return tuple(found[i] for i in blocks)

    @nn.compact
    def tokens(self, x):
        """Float32 [B size size 3] in [0, 255] -> ([B P D], [B P D]): before the first block, and before the last."""
        if self.depth < 2:
            raise ValueError(f"PatchTokens needs an encoder of at least two blocks, not {self.depth}.")
        x = patchify(x / 127.5 - 1, self.patch)
        side = self.size // self.patch
        x = Linear(self.width, dtype=self.dtype, name="patch_embed")(x)
        x = first = (x + sincos_2d(side, side, self.width).reshape(1, -1, self.width)).astype(self.dtype)  # [B P D]
        blocks = Transformer(self.depth, self.head_dim, dtype=self.dtype, name="blocks")
        _, x = blocks(x, everything(x.shape[1]), tap=self.depth - 2)
        return layer_norm(first).astype(jnp.float32), layer_norm(x).astype(jnp.float32)
