"""Residual quantization (arXiv 2107.03312, 2203.01941): what one level leaves over, the next one quantizes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import codebook
from jaxtok.nn.interpolate import cubic
from jaxtok.structs import Codes


def _code(quantizer, latents, train):
    """(its Codes, q): q has the value of its z and the gradient of the codebook, not of the latents."""
    codes = quantizer(latents, train=train)
    found = quantizer.lookup(codes.indices)  # in training, of a moving codebook that has already moved on
    return codes, codebook.straight_through(found, codes.z)


def _collect(z, sums, levels):
    """aux of several levels from z [B N D], the running sums after each, and the aux of each.

    `commitment` and `codebook` compare z with every running sum; whatever else a level reports is averaged.
    """
    stop = jax.lax.stop_gradient
    aux = {name: sum(level[name] for level in levels) / len(levels) for name in levels[0]}
    aux["commitment"] = sum(jnp.square(z - stop(total)).mean() for total in sums) / len(sums)
    if "codebook" in aux:
        aux["codebook"] = sum(jnp.square(stop(z) - total).mean() for total in sums) / len(sums)
    return aux


class Residual(nn.Module):
    """Latents [B N D] -> Codes with an index a level, [B N G]; z is the sum of all levels.

    The gradient passes the sum straight through, whatever a level would do by itself. The aux loss `commitment` is
    the mean over levels d of the mean of (z - sg sum of q_1 ... q_d)^2, and `codebook`, if the levels have it, the
    same with the other side held constant; other aux terms are averaged over levels.

    Attributes:
      levels: quantizers of latents [B N D], the coarsest first.
      repeat: how many times `levels` is gone through: 4 and a single level is a depth of 4 with one codebook.
    """

    levels: tuple[nn.Module, ...]
    repeat: int = 1

    @property
    def vocabulary(self):
        """The numbers of codes of the levels, one for each of the G indices."""
        return codebook.flat(level.vocabulary for level in self._levels())

    def _levels(self):
        return tuple(self.levels) * self.repeat

    def __call__(self, latents, *, train=False):
        z = latents.astype(jnp.float32)
        rest, total = jax.lax.stop_gradient(z), jnp.zeros_like(z)
        sums, indices, aux = [], [], []
        for level in self._levels():
            codes, q = _code(level, rest, train)
            rest, total = rest - jax.lax.stop_gradient(q), total + q
            sums, indices, aux = [*sums, total], [*indices, codes.indices], [*aux, codes.aux]
        return Codes(
            z=codebook.straight_through(z, total),
            indices=codebook.join(indices),
            keep=jnp.ones(z.shape[:2], bool),
            aux=_collect(z, sums, aux),
        )

    def lookup(self, indices):
        """int [B N G] -> z float32 [B N D]; with fewer than G columns, what the first levels give.

        An index outside raises ValueError; inside a jitted function it gives NaN.
        """
        columns, levels = 0, []
        for level in self._levels():
            columns += 1 if isinstance(level.vocabulary, int) else len(level.vocabulary)
            if columns <= indices.shape[-1]:
                levels.append(level)
        parts = codebook.split(indices, [level.vocabulary for level in levels])
        return sum(level.lookup(part) for level, part in zip(levels, parts, strict=True))


def area(size, to):
    """[to size], averages of the inputs that each output covers (adaptive average pooling)."""
    matrix = np.zeros((to, size), np.float32)
    for i in range(to):
        begin, end = i * size // to, -(-(i + 1) * size // to)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def resize(x, grid, to, matrix):
    """x [B N D] on a grid, (h, w), (n,) or (t, h, w), to another one, an axis at a time by matrix(size, to size)."""
    batch, width = x.shape[0], x.shape[-1]
    x = x.reshape(batch, *grid, width)
    for axis, (size, target) in enumerate(zip(grid, to, strict=True), 1):
        if size != target:
            x = jnp.moveaxis(jnp.tensordot(x, matrix(size, target), (axis, 1), precision="highest"), -1, axis)
    return x.reshape(batch, -1, width)


class _Smoothing(nn.Module):
    """Half of x and half of a convolution over 3 neighbours an axis of the grid."""

    grid: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        y = x.reshape(x.shape[0], *self.grid, x.shape[-1])
        y = nn.Conv(x.shape[-1], (3,) * len(self.grid), name="conv")(y)
        return (x + y.reshape(x.shape)) / 2


class MultiScale(nn.Module):
    """Latents [B N D] of a grid -> Codes with the indices of all scales in a row, [B n_1 + ... + n_S]; z is [B N D].

    VAR (arXiv 2404.02905): what is left over is averaged down to a scale, quantized, brought back by cubic
    interpolation and subtracted, from the coarsest scale to the finest, which is the grid of the latents. Gradient
    and aux are those of Residual, at full size.

    Attributes:
      quantizer: of latents [B n D], with one index a token; all scales share it.
      scales: the grids, coarsest first, as ((1, 1), (2, 2), (4, 4)); the last is that of the latents. (n,) is a
        sequence.
      smooth: so many 3x3 convolutions, shared by neighbouring scales, of which one smooths each scale after
        interpolation.
      drop: how often a training step leaves out one random scale other than the first (TokenFlow, arXiv 2412.03069);
        draws from the rng stream "train".
    """

    quantizer: nn.Module
    scales: tuple[tuple[int, ...], ...]
    smooth: int = 0
    drop: float = 0.0

    @property
    def vocabulary(self):
        """The number of codes, the same at every scale."""
        return self.quantizer.vocabulary

    def setup(self):
        self.smoothing = [_Smoothing(tuple(self.scales[-1])) for _ in range(self.smooth)]

    def __call__(self, latents, *, train=False):
        grid = tuple(self.scales[-1])
        if latents.shape[1] != math.prod(grid):
            raise ValueError(
                f"MultiScale.scales end with {grid}, {math.prod(grid)} tokens, the encoder gives {latents.shape[1]}."
            )
        if not isinstance(self.vocabulary, int):
            raise ValueError("MultiScale.quantizer must give one index a token.")
        z = latents.astype(jnp.float32)
        rest, total = jax.lax.stop_gradient(z), jnp.zeros_like(z)
        dropped = self._dropped() if train and self.drop else -1
        sums, indices, aux = [], [], []
        for s, scale in enumerate(self.scales):
            codes, q = _code(self.quantizer, resize(rest, grid, scale, area), train)
            q = jnp.where(s == dropped, 0.0, self._expand(q, s))
            rest, total = rest - jax.lax.stop_gradient(q), total + q
            sums, indices, aux = [*sums, total], [*indices, codes.indices], [*aux, codes.aux]
        return Codes(
            z=codebook.straight_through(z, total),
            indices=jnp.concatenate(indices, 1),
            keep=jnp.ones(z.shape[:2], bool),
            grid=grid,
            aux=_collect(z, sums, aux),
        )

    def lookup(self, indices):
        """int [B n_1 + ... + n_s] -> z float32 [B N D], what the first s scales give, S or fewer.

        An index outside raises ValueError; inside a jitted function it gives NaN.
        """
        counts = np.cumsum([math.prod(scale) for scale in self.scales])
        if indices.shape[1] not in counts:
            raise ValueError(
                f"MultiScale.lookup takes whole scales, {counts.tolist()} indices, not {indices.shape[1]}."
            )
        present = int(np.searchsorted(counts, indices.shape[1])) + 1
        parts = jnp.split(indices, counts[: present - 1], 1)
        return sum(self._expand(self.quantizer.lookup(part), s) for s, part in enumerate(parts))

    def _expand(self, q, s):
        """What scale s adds, [B n_s D] -> [B N D]."""
        q = resize(q, self.scales[s], self.scales[-1], cubic)
        if not self.smoothing:
            return q
        # VAR spreads the convolutions over the scales at these places between 0, the first scale, and 1, the last.
        k = len(self.smoothing)
        ends = 1 / (3 * k) if k == 4 else 1 / (2 * k)
        places = np.linspace(ends, 1 - ends, k)
        return self.smoothing[int(np.argmin(np.abs(places - s / max(len(self.scales) - 1, 1))))](q)

    def _dropped(self):
        """The number of the scale to leave out, or -1."""
        drop_key, scale_key = jax.random.split(self.make_rng("train"))
        scale = jax.random.randint(scale_key, (), 1, len(self.scales))
        return jnp.where(jax.random.bernoulli(drop_key, self.drop), scale, -1)
