"""A picture as a short 1D sequence: a ViT reads patches, learned register tokens carry what is kept."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn import masks
from jaxtok.nn.attention import Attend, everything
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.patch import patchify
from jaxtok.nn.position import sincos_2d
from jaxtok.nn.transformer import Transformer


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
      grid: patches of the pictures that the positions were made for; see nn.position.sincos_2d.
      dtype: of the computation. remat, unroll: see nn.transformer.Transformer.
      shortcuts: which of the exact savings to make (docs/performance.md): "split" (the empty block of the mask is not
        computed), "last" (the last block computes registers only).
    """

    width: int
    depth: int
    registers: int
    channels: int
    patch: int = 2
    head_dim: int = 64
    batch_norm: bool = False
    grid: tuple[int, int] | None = None
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    shortcuts: tuple[str, ...] = ("split", "last")

    @nn.compact
    def __call__(self, x, *, context=None, train=False, tokens=None):
        """x [B h w C] -> latents [B R channels], before quantization, float32; or only the first `tokens` of them."""
        batch, height, width = x.shape[0], x.shape[1] // self.patch, x.shape[2] // self.patch
        tokens = self.registers if tokens is None else tokens
        if not 1 <= tokens <= self.registers:
            raise ValueError(f"Latent1D gives 1 to {self.registers} tokens a picture, not {tokens}.")
        patches = Linear(self.width, dtype=self.dtype, name="patch_embed")(patchify(x, self.patch))  # [B P D]
        patches = patches + sincos_2d(height, width, self.width, self.grid).reshape(1, -1, self.width)
        registers = self.param("registers", nn.initializers.normal(0.02), (self.registers, self.width))[:tokens]
        registers = jnp.broadcast_to(registers, (batch, *registers.shape))
        x = jnp.concatenate([patches, registers], 1).astype(self.dtype)  # [B P+R D]
        self.sow("intermediates", "sequence", x)
        p, n = patches.shape[1], x.shape[1]
        mask = masks.prefix_causal(p, n)
        read = (Attend(slice(p, n), slice(0, n), mask[p:]),)
        attends = (Attend(slice(0, p), slice(0, p)), *read) if "split" in self.shortcuts else everything(n, mask)
        blocks = Transformer(
            self.depth, self.head_dim, dtype=self.dtype, remat=self.remat, unroll=self.unroll, name="blocks"
        )
        x = blocks(x, attends, read if "last" in self.shortcuts else None, train=train)
        x = layer_norm(x[:, -tokens:]).astype(jnp.float32)
        z = Linear(self.channels, init="xavier" if self.batch_norm else "zeros", name="head")(x)  # [B R C]
        if self.batch_norm:
            norm = nn.BatchNorm(not train, axis=(1, 2), use_bias=False, use_scale=False, name="batch_norm")
            z = jnp.pad(z, ((0, 0), (0, self.registers - tokens), (0, 0))) if tokens < self.registers else z
            z = norm(z)[:, :tokens]
        return z
