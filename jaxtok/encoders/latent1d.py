"""A picture as a short 1D sequence: a ViT reads patches, learned register tokens carry what is kept."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn import masks
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.patch import patchify
from jaxtok.nn.position import sincos_2d
from jaxtok.nn.transformer import stack


class Latent1D(nn.Module):
    """FlexTok's encoder (arXiv 2502.13967): patches and R registers through one ViT under a prefix-causal mask.

    Patches see patches and no register; register i sees all patches and the registers up to i: the first k outputs
    are the same whether or not later registers exist.

    Attributes:
      width, depth, head_dim: of the transformer.
      registers: R, how many tokens come out.
      channels: of each latent.
      patch: side of a patch; the picture (or codec latent) must divide by it.
      batch_norm: latents leave with mean 0 and variance 1 per register and channel (over the batch in training, running
        statistics otherwise): without it a small model's latents drift into a corner of FSQ's range.
      dtype: of the computation. remat, unroll: see nn.transformer.stack.
    """

    width: int
    depth: int
    registers: int
    channels: int
    patch: int = 2
    head_dim: int = 64
    batch_norm: bool = False
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x, *, context=None, train=False):
        """x [B h w C] -> latents [B R channels], before quantization, float32."""
        batch, height, width, _ = x.shape
        patches = Linear(self.width, dtype=self.dtype, name="patch_embed")(patchify(x, self.patch))  # [B P D]
        patches = patches + sincos_2d(height // self.patch, width // self.patch, self.width).reshape(1, -1, self.width)
        registers = self.param("registers", nn.initializers.normal(0.02), (self.registers, self.width))
        registers = jnp.broadcast_to(registers, (batch, *registers.shape))
        x = jnp.concatenate([patches, registers], 1).astype(self.dtype)  # [B P+R D]
        self.sow("intermediates", "sequence", x)
        mask = masks.prefix_causal(patches.shape[1], x.shape[1])
        blocks = stack(
            self.depth, remat=self.remat, unroll=self.unroll, name="blocks", head_dim=self.head_dim, dtype=self.dtype
        )
        x, _ = blocks(x, mask)
        x = layer_norm(x[:, patches.shape[1] :]).astype(jnp.float32)
        z = Linear(self.channels, init="xavier" if self.batch_norm else "zeros", name="head")(x)  # [B R C]
        if self.batch_norm:
            norm = nn.BatchNorm(not train, axis=(1, 2), use_bias=False, use_scale=False, name="batch_norm")
            z = norm(z)
        return z
