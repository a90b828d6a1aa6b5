"""The convolutional autoencoder of latent diffusion (arXiv 2112.10752), which most 2D tokenizers share.

Its encoder and decoder are levels of residual blocks; between levels the picture halves or doubles, and at the lowest
resolution every place attends to every other.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat

from jaxtok.nn.linear import Linear


def conv(features, size, *, dtype, name, stride=1, padding="SAME"):
    """A square convolution with bias, kernel [size size in out]."""
    return nn.Conv(features, (size, size), (stride, stride), padding, dtype=dtype, name=name)


class GroupNorm(nn.Module):
    """Normalises over positions and the channels of a group, eps 1e-6; scale and bias a channel. [B ... C] -> same.

    Statistics are float32, of a channel first and then averaged over its group: faster on a CPU than all at once.
    """

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {self.groups} groups.")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def over_group(y):  # [B C] -> [B 1 C]
            means = y.reshape(batch, self.groups, -1).mean(-1)
            return jnp.repeat(means, channels // self.groups, -1)[:, None]

        y = x.astype(jnp.float32).reshape(batch, -1, channels)
        y = y - over_group(y.mean(1))
        y = y * (scale * jax.lax.rsqrt(over_group(jnp.square(y).mean(1)) + 1e-6)) + bias
        return y.reshape(x.shape).astype(self.dtype)


class ResBlock(nn.Module):
    """x + f(x), f twice norm, SiLU, 3x3; x goes through a 1x1 if the width changes. [B h w C] -> [B h w features]."""

    features: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        y = conv(self.features, 3, dtype=self.dtype, name="conv1")(y)
        y = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y))
        y = conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + y


class SpatialAttention(nn.Module):
    """x + attention over all places, one head as wide as x, after a group norm. [B h w C] -> same."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        y = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(batch, height * width, 1, channels)
        q, k, v = (Linear(channels, dtype=self.dtype, name=name)(y) for name in "qkv")  # [B N 1 C]
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + Linear(channels, dtype=self.dtype, name="out")(y)


class Downsample(nn.Module):
    """Halves height and width: 3x3 with stride 2, one row and column of zeros at the bottom and the right."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return conv(x.shape[-1], 3, dtype=self.dtype, name="conv", stride=2, padding=((0, 1), (0, 1)))(x)


class Upsample(nn.Module):
    """Doubles height and width: every pixel four times, then 3x3."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)  # a broadcast, faster than jnp.repeat
        return conv(x.shape[-1], 3, dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
    """Blocks of one resolution, then `resample`: "downsample", "upsample" or None."""

    features: int
    blocks: int
    resample: str | None
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for j in range(self.blocks):
            x = ResBlock(self.features, self.groups, self.dtype, name=f"block_{j}")(x)
        if self.resample:
            part = {"downsample": Downsample, "upsample": Upsample}[self.resample]
            x = part(self.dtype, name=self.resample)(x)
        return x


class Middle(nn.Module):
    """A block, attention and a block at the lowest resolution."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = ResBlock(x.shape[-1], self.groups, self.dtype, name="block_0")(x)
        x = SpatialAttention(self.groups, self.dtype, name="attn")(x)
        return ResBlock(x.shape[-1], self.groups, self.dtype, name="block_1")(x)


class ConvEncoder(nn.Module):
    """[B H W C] -> float32 [B H/f W/f out], f = 2^(levels - 1).

    Attributes:
      out: channels that come out.
      channels: of the levels, the first at full resolution.
      blocks: residual blocks a level.
      groups: of every group norm; must divide all channels.
      dtype: of the computation; the norms' statistics are float32.
    """

    out: int
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        check_divisible(x, self.channels)
        x = conv(self.channels[0], 3, dtype=self.dtype, name="conv_in")(x)
        for i, features in enumerate(self.channels):
            resample = "downsample" if i < len(self.channels) - 1 else None
            x = Level(features, self.blocks, resample, self.groups, self.dtype, name=f"down_{i}")(x)
        x = Middle(self.groups, self.dtype, name="mid")(x)
        x = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        return conv(self.out, 3, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class ConvDecoder(nn.Module):
    """[B h w C] -> float32 [B h*f w*f out], f = 2^(levels - 1); each level has one block more than the encoder's.

    `channels` are in the order of the encoder's, so up_0, the lowest resolution, has the last. Attributes: as there.
    """

    out: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = conv(self.channels[-1], 3, dtype=self.dtype, name="conv_in")(x)
        x = Middle(self.groups, self.dtype, name="mid")(x)
        for i, features in enumerate(reversed(self.channels)):
            resample = "upsample" if i < len(self.channels) - 1 else None
            x = Level(features, self.blocks + 1, resample, self.groups, self.dtype, name=f"up_{i}")(x)
        x = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        return conv(self.out, 3, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


def check_divisible(x, channels):
    """Raises ValueError unless x [B H W C] halves evenly len(channels) - 1 times."""
    factor, (height, width) = 2 ** (len(channels) - 1), x.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"A picture of {height} x {width} does not shrink evenly by {factor}, which {len(channels)} levels do: "
            f"resize it to multiples of {factor} in the data's transforms, or change the model's `channels`."
        )
