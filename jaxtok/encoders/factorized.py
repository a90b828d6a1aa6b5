"""One trunk, several branches: each gives a latent of its own for every place, for a codebook of its own."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.conv import GroupNorm, conv
from jaxtok.nn.vit import free, trunk


class Adapter(nn.Module):
    """A transformer over the places of a feature map, as wide as it: [B h w D] -> float32 [B h w D].

    Attributes:
      width: D. depth, head_dim: of the transformer.
      dtype: of the computation. remat: see nn.transformer.Transformer.
    """

    width: int
    depth: int = 6
    head_dim: int = 64
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, train=False):
        y = x.reshape(len(x), -1, self.width)
        y = trunk(self, y + free(self, "pos_embed", y.shape[1], self.width), train=train)
        return y.reshape(x.shape).astype(jnp.float32)


class Branch(nn.Module):
    """Adapter, group norm, SiLU, 3x3, 1x1: [B h w D] -> float32 [B h w channels]. Attributes: as of Factorized."""

    channels: int
    depth: int
    between: int
    head_dim: int
    groups: int
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x, train=False):
        fields = dict(depth=self.depth, head_dim=self.head_dim, dtype=self.dtype, remat=self.remat)
        x = Adapter(x.shape[-1], **fields, name="adapter")(x, train)
        x = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        x = conv(self.between, 3, dtype=self.dtype, name="conv_out")(x)
        return conv(self.channels, 1, dtype=jnp.float32, name="quant_conv")(x)


class Factorized(nn.Module):
    """The encoder of FQGAN (arXiv 2411.16681): a trunk, and a branch for each codebook of quantizers.product.Product.

    Attributes:
      trunk: pictures [B H W C] -> features [B h w D], as nn.conv.ConvEncoder with out=0.
      branches: their names, those of the books.
      channels: of each latent.
      depth: of a branch's transformer, as wide as the trunk's features.
      between: channels of the convolution behind it.
      head_dim: of the transformers. groups: of the branches' group norms.
      dtype: of the branches. remat: see nn.transformer.Transformer.
    """

    trunk: nn.Module
    branches: Sequence[str]
    channels: int
    depth: int = 6
    between: int = 256
    head_dim: int = 64
    groups: int = 32
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B H W C] -> {branch: latents [B h w channels]}, float32."""
        x = self.trunk(x)
        sizes = self.channels, self.depth, self.between, self.head_dim, self.groups, self.dtype, self.remat
        return {name: Branch(*sizes, name=name)(x, train) for name in self.branches}
