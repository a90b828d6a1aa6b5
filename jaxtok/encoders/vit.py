"""A vision transformer reads patches; what comes out are these, a grid, or tokens that it was given beside them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.linear import Linear
from jaxtok.nn.vit import embed, free, place, read, trunk


class ViT(nn.Module):
    """Patches through a transformer: a grid of tokens (arXiv 2010.11929; 2110.04627).

    Attributes:
      width, depth, head_dim: of the transformer.
      channels: of each latent.
      patch: side of a patch; pictures must divide by it.
      mlp: the feed-forward layers: "gelu", or "swiglu" (arXiv 2501.09755).
      positions: of patches: "learned", for pictures of one size, or "rotary", for any (nn.vit.place).
      dtype: of the computation. remat: see nn.transformer.Transformer.
    """

    width: int
    depth: int
    channels: int
    patch: int = 16
    head_dim: int = 64
    mlp: str = "gelu"
    positions: str = "learned"
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B H W C] -> latents [B H/p W/p channels], before quantization, float32."""
        grid = x.shape[1] // self.patch, x.shape[2] // self.patch
        x, rotary = place(self, embed(self, x), grid)  # [B P D]
        x = trunk(self, x, rotary=rotary, mlp=self.mlp, train=train)
        z = Linear(self.channels, name="head")(x.astype(jnp.float32))
        return z.reshape(z.shape[0], *grid, -1)


class Latents(nn.Module):
    """A class token, patches and N learned tokens attend to each other; the last become the latents (arXiv 2406.07550).

    Attributes:
      tokens: N, how many latents a picture has.
      text: whether a text, the `context`, stands behind the latents and is read too (arXiv 2412.05796).
      misread: the last layer reads the numbers of a picture's latents, token by token [N D], as [D N]: so do TiTok's
        models of 4,096 codes and One-D-Piece, and nothing else should. For their weights.
      others: as of ViT; the feed-forward layers are "gelu", and places are learned.
    """

    width: int
    depth: int
    tokens: int
    channels: int
    patch: int = 16
    head_dim: int = 64
    text: bool = False
    misread: bool = False
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B H W C], context as of nn.vit.read -> latents [B N channels], before quantization, float32."""
        batch, width = x.shape[0], self.width
        patches = embed(self, x)  # [B P D]
        first = jnp.broadcast_to(free(self, "class_token", 1, width), (batch, 1, width))
        seen = jnp.concatenate([first, patches], 1) + free(self, "pos_embed", 1 + patches.shape[1], width)
        latents = free(self, "latents", self.tokens, width) + free(self, "latents_pos", self.tokens, width)
        x = jnp.concatenate([seen, jnp.broadcast_to(latents, (batch, self.tokens, width))], 1)  # [B 1+P+N D]
        n, mask = x.shape[1], None
        if self.text:
            text, counts = read(self, context)
            x = jnp.concatenate([x, text], 1)
            mask = jnp.concatenate([jnp.ones((batch, n), bool), counts], 1)[:, None]
        x = trunk(self, x, mask, train=train)
        x = x[:, n - self.tokens : n].astype(jnp.float32)
        if self.misread:
            x = x.reshape(batch, width, self.tokens).swapaxes(1, 2)
        return Linear(self.channels, name="head")(x)
