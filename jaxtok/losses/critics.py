"""Critics of pictures: how real does each part of a picture look? [B H W 3] -> logits float32 [B h w 1]."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.conv import GroupNorm, conv
from jaxtok.nn.linear import Linear

NORMAL = nn.initializers.normal(0.02)
HE = nn.initializers.he_normal()


class BatchNorm(nn.Module):
    """Normalises each channel over a batch and its places, eps 1e-5; scale and bias a channel. [B h w C] -> same.

    There are no running statistics: a critic is only ever used in training. Statistics are float32, and over the whole
    batch, on however many devices that lies.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", lambda *args: 1 + NORMAL(*args), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y - y.mean((0, 1, 2))
        y = y * (scale * jax.lax.rsqrt(jnp.square(y).mean((0, 1, 2)) + 1e-5)) + bias
        return y.astype(self.dtype)


class PatchGAN(nn.Module):
    """The critic of pix2pix (arXiv 1611.07004), as VQGAN and LlamaGen have it: 4x4 convolutions, the first halving.

    A logit sees 70 x 70 pixels where there are 3 layers.

    Attributes:
      features: of the first convolution; each of the next ones has twice as many, up to 8 times.
      layers: convolutions of stride 2. Pictures need 3 * 2^layers pixels a side.
      norm: behind all convolutions but the first and the last: "batch", as published, "group" (of 32 groups) or "none".
      dtype: of the computation.
    """

    features: int = 64
    layers: int = 3
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f'PatchGAN.norm is "batch", "group" or "none", not "{self.norm}".')
        if min(x.shape[1:3]) < (smallest := 3 * 2**self.layers):
            raise ValueError(
                f"PatchGAN with {self.layers} layers needs pictures of at least {smallest} pixels a side, got "
                f"{x.shape[1]} x {x.shape[2]}: lower the critic's `layers`."
            )
        for i in range(self.layers + 1):
            features = self.features * min(2**i, 8)
            stride, normed = 2 if i < self.layers else 1, i > 0 and self.norm != "none"
            x = self._conv(features, f"conv_{i}", stride, bias=not normed)(x)
            if normed and self.norm == "batch":
                x = BatchNorm(self.dtype, name=f"norm_{i}")(x)
            elif normed:
                x = GroupNorm(dtype=self.dtype, eps=1e-5, name=f"norm_{i}")(x)
            x = jax.nn.leaky_relu(x, 0.2)
        return self._conv(1, "conv_out", 1, bias=True)(x).astype(jnp.float32)

    def _conv(self, features, name, stride, bias):
        sizes = dict(strides=(stride, stride), padding=1, use_bias=bias)
        return nn.Conv(features, (4, 4), **sizes, kernel_init=NORMAL, dtype=self.dtype, name=name)


class Blurred(nn.Module):
    """A critic that blurs where it halves, as TiTok has it (arXiv 2406.07550): a logit for each of 16 x 16 parts.

    Attributes:
      features: of the first convolution.
      multipliers: of `features`, one for each stage, which is a 3x3 convolution, a blur that halves, and a norm.
      places: logits a side: features go there by the maximum of what falls to each place.
      groups: of the norms.
      dtype: of the computation.
    """

    features: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    places: int = 16
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        leaky = lambda x: jax.nn.leaky_relu(x, 0.1)
        x = leaky(conv(self.features, 5, dtype=self.dtype, name="conv_in")(x))
        for i, multiplier in enumerate(self.multipliers):
            x = blur(conv(multiplier * self.features, 3, dtype=self.dtype, name=f"conv_{i}")(x))
            x = leaky(GroupNorm(self.groups, self.dtype, eps=1e-5, name=f"norm_{i}")(x))
        x = max_pool_to(max_pool_to(x, self.places, 1), self.places, 2)
        x = leaky(conv(x.shape[-1], 1, dtype=self.dtype, name="conv_mid")(x))
        return conv(1, 5, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class Projected(nn.Module):
    """A critic that looks through a frozen tower, after StyleGAN-T (arXiv 2301.09515): a small head on several blocks.

    A head is a linear layer, a convolution along the row of tokens that goes round, added to its input, and a linear
    layer that gives a logit a token; kernels are divided by their largest singular value (arXiv 1802.05957).

    Attributes:
      tower: has a method `layers`: (pictures float [B H W 3] in [0, 1], blocks) -> tokens ([B N D], ...); it is frozen.
      blocks: after how many of the tower's blocks the tokens are looked at; 0: as they come in.
      size: of the convolution along the row.
      low, high: the range of the pictures, as the codec has it.
      dtype: of the heads' computation.

    Logits are [B heads N 1].
    """

    tower: nn.Module
    blocks: tuple[int, ...] = (0, 3, 6, 9, 12)
    size: int = 9
    low: float = -1.0
    high: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        self.heads = [Head(self.size, self.dtype) for _ in self.blocks]

    def __call__(self, x):
        return self.judge(self.see(x))

    def see(self, x):
        """Pictures [B H W 3] -> the tower's tokens ([B N D], ...): no parameter here trains."""
        return self.tower.layers((x - self.low) / (self.high - self.low), self.blocks)

    def judge(self, tokens):
        """What `see` gives -> logits."""
        return jnp.stack([head(x) for head, x in zip(self.heads, tokens, strict=True)], 1)


class Head(nn.Module):
    """Tokens [B N D] -> logits float32 [B N 1]. See Projected."""

    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def layer(x, size, name):
            x = SpectralConv(x.shape[-1], size, self.dtype, name=f"conv_{name}")(x)
            x = BatchNorm(self.dtype, name=f"norm_{name}")(x[:, None])[:, 0]
            return jax.nn.leaky_relu(x, 0.2)

        x = layer(x, 1, "in")
        x = (x + layer(x, self.size, "mid")) * 0.5**0.5
        return SpectralConv(1, 1, self.dtype, name="conv_out")(x).astype(jnp.float32)


class SpectralConv(nn.Module):
    """A convolution along tokens [B N C], which are a ring, its kernel [size C out] divided by its `spectral_norm`."""

    features: int
    size: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = (kernel / spectral_norm(kernel)).astype(self.dtype)
        before = self.size // 2
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (before, self.size - 1 - before), (0, 0)), mode="wrap")
        x = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return x + bias.astype(self.dtype)


def spectral_norm(kernel):
    """The largest singular value of kernel [... out] as a matrix with a column an output, float32.

    By 256 steps of the power method in eight products, from no kept vector: nothing to carry from step to step. The
    singular vectors are constants, which gives the gradient of the value itself (arXiv 1802.05957).
    """
    matrix = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x), 1e-12)
    held = jax.lax.stop_gradient(matrix)
    power = unit(held.T @ held)  # [out out]
    for _ in range(8):
        power = unit(power @ power)
    right = unit(power[:, jnp.argmax(jnp.diagonal(power))])
    return unit(held @ right) @ matrix @ right


class StyleGAN(nn.Module):
    """The residual critic of StyleGAN2 (arXiv 1912.04958): one logit a picture, [B 1 1 1].

    Each block halves the picture: two 3x3 convolutions beside a 1x1, either blurred where it halves. Convolutions begin
    at the variance of their rectifiers; they are not rescaled at each step, as there.

    Attributes:
      features: channels at full size; they double with every halving, up to `widest`.
      widest: see there.
      least: pixels a side at which the blocks end, of pictures that are a power of two times that.
      group: pictures that share a statistic, how much they differ from each other (arXiv 1710.10196); 1: none.
      dtype: of the computation.
    """

    features: int = 64
    widest: int = 512
    least: int = 4
    group: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        halvings = max(0, min(x.shape[1:3]) // self.least).bit_length() - 1
        if halvings < 1 or any(n != self.least << halvings for n in x.shape[1:3]):
            raise ValueError(
                f"StyleGAN needs square pictures of {self.least} pixels times a power of two, got {x.shape[1]} x "
                f"{x.shape[2]}: set the critic's `least`, or another critic."
            )
        layer = lambda x, features, size, name: nn.Conv(
            features, (size, size), kernel_init=HE, dtype=self.dtype, name=name
        )(x)
        leaky = lambda x: jax.nn.leaky_relu(x, 0.2)
        x = leaky(layer(x, self.features, 1, "conv_in"))
        for i in range(halvings):
            features = min(self.features << i + 1, self.widest)
            y = leaky(layer(x, x.shape[-1], 3, f"conv_{i}"))
            y = leaky(blur(layer(y, features, 3, f"down_{i}")))
            x = (y + layer(blur(x), features, 1, f"skip_{i}")) * 0.5**0.5
        if self.group > 1:
            x = jnp.concatenate([x, differences(x, self.group)], -1)
        x = leaky(layer(x, features, 3, "conv_out")).reshape(len(x), -1)
        x = leaky(Linear(features, dtype=self.dtype, name="fc")(x))
        return Linear(1, name="out")(x.astype(jnp.float32))[:, None, None]


def differences(x, group):
    """How much pictures differ: [B h w C] -> [B h w 1], the deviation over a group, its mean over places and channels.

    Groups are of every B/group-th picture, so that each has some of every device. (arXiv 1710.10196, section 3)
    """
    if len(x) % group:
        raise ValueError(f"StyleGAN.group is {group}, which does not divide a batch of {len(x)} pictures.")
    y = x.astype(jnp.float32).reshape(group, -1, *x.shape[1:])
    deviation = jnp.sqrt(jnp.square(y - y.mean(0)).mean(0) + 1e-8).mean((1, 2, 3))  # [B/group]
    return jnp.broadcast_to(jnp.tile(deviation, group)[:, None, None, None], (*x.shape[:3], 1)).astype(x.dtype)


def blur(x):
    """[B h w C] -> [B h/2 w/2 C], rounded up: each axis by (1 3 3 1)/8 with stride 2, zeros beyond the edges.

    (arXiv 1904.11486.) Sums of slices: faster on a CPU than a convolution of each channel.
    """
    for axis in (1, 2):
        size = -(-x.shape[axis] // 2)
        pad = [(0, 0)] * 4
        pad[axis] = (1, 2)
        padded = jnp.pad(x, pad)
        part = lambda k, padded=padded, axis=axis, size=size: jax.lax.slice_in_dim(padded, k, k + 2 * size - 1, 2, axis)
        x = (part(0) + 3 * part(1) + 3 * part(2) + part(3)) / 8
    return x


def max_pool_to(x, size, axis):
    """x with `size` entries on an axis: entry i is the maximum from floor(i n / size) to ceil((i + 1) n / size)."""
    n = x.shape[axis]
    if n == size:
        return x
    ends = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    longest = max(stop - start for start, stop in ends)
    places = np.array([[min(start + k, stop - 1) for start, stop in ends] for k in range(longest)])  # [longest size]
    taken = [jnp.take(x, row, axis) for row in places]
    return jnp.stack(taken).max(0)
