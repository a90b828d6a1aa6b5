"""Critics of pictures: how real does each part of a picture look? [B H W 3] -> logits float32 [B h w 1]."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.conv import GroupNorm, conv

NORMAL = nn.initializers.normal(0.02)


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
