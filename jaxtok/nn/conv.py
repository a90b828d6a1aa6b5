"""The convolutional autoencoder of latent diffusion (arXiv 2112.10752), which most 2D tokenizers share.

Its encoder and decoder are levels of residual blocks; between levels the picture halves or doubles, and at the lowest
resolution every place attends to every other. Fields make it MaskGIT's VQGAN (arXiv 2202.04200), which has no
attention, LlamaGen's (arXiv 2406.06525), which has more of it, and that of Open-MAGVIT2 (arXiv 2409.04410), whose
norms adapt to the picture.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax.core import FrozenDict

from jaxtok.nn.linear import Linear


def conv(features, size, *, dtype, name, stride=1, padding="SAME", bias=True):
    """A square convolution, kernel [size size in out]."""
    return nn.Conv(features, (size, size), (stride, stride), padding, use_bias=bias, dtype=dtype, name=name)


class GroupNorm(nn.Module):
    """Normalises over positions and the channels of a group; scale and bias a channel, if `affine`. [B ... C] -> same.

    Statistics are float32, of a channel first and then averaged over its group: faster on a CPU than all at once.
    """

    groups: int = 32
    dtype: Any = jnp.float32
    eps: float = 1e-6
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        batch, channels = x.shape[0], x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {self.groups} groups.")
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (channels,)) if self.affine else 1.0
        bias = self.param("bias", zeros, (channels,)) if self.affine else 0.0

        def over_group(y):  # [B C] -> [B 1 C]
            means = y.reshape(batch, self.groups, -1).mean(-1)
            return jnp.repeat(means, channels // self.groups, -1)[:, None]

        y = x.astype(jnp.float32).reshape(batch, -1, channels)
        y = y - over_group(y.mean(1))
        y = y * (scale * jax.lax.rsqrt(over_group(jnp.square(y).mean(1)) + self.eps)) + bias
        return y.reshape(x.shape).astype(self.dtype)


class AdaptiveNorm(nn.Module):
    """A group norm whose scale and bias are linear in what the tokens z [B h w D] say of the whole picture.

    The scale in their deviation over places, the bias in their mean: Open-MAGVIT2 and WeTok (arXiv 2409.04410,
    2508.05599). (x [B ... C], z) -> like x.
    """

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, z):
        z = z.astype(jnp.float32).reshape(z.shape[0], -1, z.shape[-1])  # [B N D]
        mean = z.mean(1)
        variance = jnp.square(z - mean[:, None]).sum(1) / max(z.shape[1] - 1, 1)  # unbiased, as there
        scale = Linear(x.shape[-1], name="scale")(jnp.sqrt(variance + 1e-6))[:, None, None]  # [B 1 1 C]
        bias = Linear(x.shape[-1], name="bias")(mean)[:, None, None]
        y = GroupNorm(self.groups, affine=False, name="norm")(x)
        return (y * scale + bias).astype(self.dtype)


class ResBlock(nn.Module):
    """x + f(x), f twice norm, SiLU, 3x3; x goes through a 1x1 if the width changes. [B h w C] -> [B h w features].

    Attributes:
      features, groups, dtype: as of ConvEncoder.
      bias: whether the convolutions have one.
      shortcut: what that 1x1 reads: "input", which is x, or "branch", which is f(x): then x is lost (MaskGIT's VQGAN).
    """

    features: int
    groups: int = 32
    dtype: Any = jnp.float32
    bias: bool = True
    shortcut: str = "input"

    @nn.compact
    def __call__(self, x):
        if self.shortcut not in ("input", "branch"):
            raise ValueError(f'ResBlock.shortcut is "input" or "branch", not "{self.shortcut}".')
        y = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        y = conv(self.features, 3, dtype=self.dtype, name="conv1", bias=self.bias)(y)
        y = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y))
        y = conv(self.features, 3, dtype=self.dtype, name="conv2", bias=self.bias)(y)
        if x.shape[-1] != self.features:
            x = y if self.shortcut == "branch" else x
            x = conv(self.features, 1, dtype=self.dtype, name="shortcut", bias=self.bias)(x)
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


class Stride(nn.Module):
    """Halves height and width: 3x3 with stride 2, zeros on all sides (Open-MAGVIT2)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return conv(x.shape[-1], 3, dtype=self.dtype, name="conv", stride=2, padding=1)(x)


class Shuffle(nn.Module):
    """Doubles height and width: 3x3 to four times the channels, which then lie in 2x2 places (Open-MAGVIT2)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = conv(4 * x.shape[-1], 3, dtype=self.dtype, name="conv")(x)
        return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)


class Pool(nn.Module):
    """Halves height and width: the mean of each 2x2."""

    dtype: Any = jnp.float32

    def __call__(self, x):
        return nn.avg_pool(x, (2, 2), (2, 2))


RESAMPLE = {"downsample": Downsample, "stride": Stride, "pool": Pool, "upsample": Upsample, "shuffle": Shuffle}


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention if `attends`, then `resample`: a name of RESAMPLE, or None.

    `block`: further fields of the blocks.
    """

    features: int
    blocks: int
    resample: str | None
    groups: int = 32
    dtype: Any = jnp.float32
    block: Mapping[str, Any] = FrozenDict()
    attends: bool = False

    @nn.compact
    def __call__(self, x):
        for j in range(self.blocks):
            x = ResBlock(self.features, self.groups, self.dtype, **self.block, name=f"block_{j}")(x)
            if self.attends:
                x = SpatialAttention(self.groups, self.dtype, name=f"attn_{j}")(x)
        if self.resample:
            x = RESAMPLE[self.resample](self.dtype, name=self.resample)(x)
        return x


class Middle(nn.Module):
    """Blocks at the lowest resolution, attention behind the first if `attends`. `block`: more fields of the blocks."""

    blocks: int = 2
    groups: int = 32
    dtype: Any = jnp.float32
    block: Mapping[str, Any] = FrozenDict()
    attends: bool = True

    @nn.compact
    def __call__(self, x):
        for j in range(self.blocks):
            x = ResBlock(x.shape[-1], self.groups, self.dtype, **self.block, name=f"block_{j}")(x)
            if self.attends and j == 0:
                x = SpatialAttention(self.groups, self.dtype, name="attn")(x)
        return x


class ConvEncoder(nn.Module):
    """[B H W C] -> float32 [B H/f W/f out], f = 2^(levels - 1).

    Attributes:
      out: channels that come out; 0: what the middle gives, as wide as the last level, without a norm and convolution.
      channels: of the levels, the first at full resolution.
      blocks: residual blocks a level.
      groups: of every group norm; must divide all channels.
      dtype: of the computation; the norms' statistics are float32.
      block: further fields of ResBlock; its `bias` is that of the first convolution too.
      attention: where there is some: "middle", that is between two blocks behind the lowest level; "last", in that
        level too; "none", and then the middle has `blocks` blocks.
      down: what halves the picture between levels, "downsample", "stride" or "pool".
      last: side of the last convolution.
    """

    out: int
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    dtype: Any = jnp.float32
    block: Mapping[str, Any] = FrozenDict()
    attention: str = "middle"
    down: str = "downsample"
    last: int = 3

    @nn.compact
    def __call__(self, x):
        check_divisible(x, self.channels)
        shared = dict(groups=self.groups, dtype=self.dtype, block=self.block)
        x = conv(self.channels[0], 3, dtype=self.dtype, name="conv_in", bias=self.block.get("bias", True))(x)
        for i, features in enumerate(self.channels):
            lowest = i == len(self.channels) - 1
            resample, attends = None if lowest else self.down, lowest and self.attention == "last"
            x = Level(features, self.blocks, resample, **shared, attends=attends, name=f"down_{i}")(x)
        x = middle(self.attention, self.blocks, shared)(x)
        if not self.out:
            return x.astype(jnp.float32)
        x = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        return conv(self.out, self.last, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class ConvDecoder(nn.Module):
    """[B h w C] -> float32 [B h*f w*f out], f = 2^(levels - 1).

    `channels` are in the order of the encoder's, so up_0, the lowest resolution, has the last.

    Attributes: as there, and

      more: how many blocks a level has beyond `blocks`.
      up: what doubles the picture between levels, "upsample" or "shuffle".
      adaptive: before each level there is an AdaptiveNorm by what came in.
    """

    out: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    dtype: Any = jnp.float32
    block: Mapping[str, Any] = FrozenDict()
    attention: str = "middle"
    more: int = 1
    up: str = "upsample"
    adaptive: bool = False

    @nn.compact
    def __call__(self, z, noise=None):
        """noise [B h w D]: a second input of the first convolution, whose weights for it begin at 0."""
        shared = dict(groups=self.groups, dtype=self.dtype, block=self.block)
        x = conv(self.channels[-1], 3, dtype=self.dtype, name="conv_in")(z)
        if noise is not None:
            fields = dict(use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="conv_noise")
            x = x + nn.Conv(self.channels[-1], (3, 3), **fields)(noise)
        x = middle(self.attention, self.blocks, shared)(x)
        for i, features in enumerate(reversed(self.channels)):
            if self.adaptive:
                x = AdaptiveNorm(self.groups, self.dtype, name=f"adaptive_{i}")(x, z)
            resample, attends = self.up if i < len(self.channels) - 1 else None, i == 0 and self.attention == "last"
            x = Level(features, self.blocks + self.more, resample, **shared, attends=attends, name=f"up_{i}")(x)
        x = jax.nn.silu(GroupNorm(self.groups, self.dtype, name="norm_out")(x))
        return conv(self.out, 3, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


def middle(attention, blocks, shared):
    """The module in the middle of a trunk: two blocks around attention, or `blocks` without it."""
    if attention not in ("none", "middle", "last"):
        raise ValueError(f'attention is "none", "middle" or "last", not "{attention}".')
    attends = attention != "none"
    return Middle(2 if attends else blocks, **shared, attends=attends, name="mid")


def check_divisible(x, channels):
    """Raises ValueError unless x [B H W C] halves evenly len(channels) - 1 times."""
    factor, (height, width) = 2 ** (len(channels) - 1), x.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"A picture of {height} x {width} does not shrink evenly by {factor}, which {len(channels)} levels do: "
            f"resize it to multiples of {factor} in the data's transforms, or change the model's `channels`."
        )
