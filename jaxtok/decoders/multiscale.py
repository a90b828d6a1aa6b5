"""A grid of tokens as a picture in one pass, by a transformer that sees it at several scales, the coarse ones first."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.decoders.vit import pixels
from jaxtok.nn import masks, pyramid
from jaxtok.nn.linear import Linear
from jaxtok.nn.vit import free, trunk
from jaxtok.structs import Decoded


class MultiScale(nn.Module):
    """The tokens' means over s x s squares, for every scale s, and the tokens themselves (HieraTok, arXiv 2509.23736).

    They stand in one sequence, coarse before fine; a token sees its own scale and coarser ones. What a scale says thus
    follows from it and from coarser ones alone, and the picture, from the finest, is told what all of them say. The
    coarse ones follow from the finest, so a generator still has one grid to model. A token that is not kept is 0.

    Attributes:
      scales: rising; all divide the side of the grid, which must be square, and the last is that side. Of one scale,
        this is decoders.vit.ViT.
      width, depth, head_dim: of the transformer.
      patch: side of a patch.
      causal: False: all scales see all.
      dtype: of the computation. remat: see nn.transformer.Transformer.
    """

    scales: tuple[int, ...]
    width: int
    depth: int
    patch: int = 16
    head_dim: int = 64
    causal: bool = True
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def picture(self, codes, train=False, scale=None):
        """Codes with a grid (n, n) -> float32 [B n*p n*p 3]. scale: see sample."""
        if codes.grid is None or codes.grid != (self.scales[-1],) * 2 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(
                f"MultiScale.scales {tuple(self.scales)} must rise to n, of codes with a grid of n x n; these have "
                f"{'no grid' if codes.grid is None else f'one of {codes.grid[0]} x {codes.grid[1]}'}."
            )
        z = jnp.where(codes.keep[..., None], codes.z, 0).reshape(len(codes.z), *codes.grid, -1)
        if scale is not None:
            z = pyramid.coarsen(z, scale)
        x = Linear(self.width, dtype=self.dtype, name="embed")(pyramid.pool(z, self.scales))  # [B L D]
        x = x + free(self, "pos_embed", x.shape[1], self.width)  # of every place of every scale
        x = trunk(self, x, masks.scale_causal(self.scales) if self.causal else None, train=train)
        return pixels(x[:, -codes.keep.shape[1] :], codes.grid, self.patch, 3)

    def __call__(self, codes, *, target, context=None, train=False):
        """Decoded: the picture, and the target [B H W 3] as it came."""
        return Decoded(self.picture(codes, train), target)

    def sample(self, codes, rng=None, scale=None):
        """The picture, float32 [B H W 3]; nothing is drawn. scale: s, and only the means over s x s squares count."""
        return self.picture(codes, scale=scale)
