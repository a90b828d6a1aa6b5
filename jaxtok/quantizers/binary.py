"""Codes that are bits: lookup-free quantization and its spherical and sampled relatives. No codebook is searched."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import codebook
from jaxtok.structs import Codes


def pack(bits, sizes):
    """Bits [... n] (0 or 1), n = sum(sizes) -> int32 [... G], one number a group; its first bit is the least."""
    bits = bits.astype(jnp.int32)
    return jnp.stack([(part << np.arange(part.shape[-1])).sum(-1) for part in _groups(bits, sizes)], -1)


def unpack(indices, sizes):
    """The inverse of pack: int [... G] -> int32 [... n] of 0 and 1."""
    return jnp.concatenate([indices[..., g, None] >> np.arange(n) & 1 for g, n in enumerate(sizes)], -1)


def entropies(logits, sizes, pooled=False):
    """Log odds of bits [M n], n = sum(sizes) -> (sample_entropy, batch_entropy), means over groups, in nats.

    What nn.codebook.entropies gives for the 2^size codes of a group, whose probabilities are products of those of
    bits. So the entropy of a row is a sum over bits, and the mean over rows of all 2^size probabilities one matrix
    product of the two halves of a group's bits: the largest arrays are [M 2^(size/2)] and [2^size].

    pooled: the groups, of equal size, count as more rows of one distribution (as WeTok has it, arXiv 2508.05599): a
    group that always gives the same code then goes unseen if others differ.
    """
    p = jax.nn.sigmoid(logits)
    own = -(p * jax.nn.log_sigmoid(logits) + (1 - p) * jax.nn.log_sigmoid(-logits)).sum(-1).mean() / len(sizes)
    groups = _groups(logits, sizes)
    if pooled:
        groups = [jnp.concatenate(groups)]
    shared = [-(mean * jnp.log(mean + 1e-5)).sum() for mean in map(_mean_over_rows, groups)]
    return own, sum(shared) / len(shared)


def _mean_over_rows(logits):
    """Log odds [M n] -> the probability of each of the 2^n codes, averaged over rows, as a matrix of two halves."""
    low, high = (_probabilities(half) for half in jnp.split(logits, [logits.shape[-1] // 2], -1))
    return jnp.matmul(low.T, high, precision="highest") / len(logits)


def _probabilities(logits):
    """Log odds [M n] -> probabilities [M 2^n] of all codes."""
    n = logits.shape[-1]
    ones = np.arange(2**n)[:, None] >> np.arange(n) & 1  # [2^n n]
    log_p = jnp.matmul(jax.nn.log_sigmoid(logits), ones.T.astype(np.float32), precision="highest")
    return jnp.exp(
        log_p + jnp.matmul(jax.nn.log_sigmoid(-logits), (1 - ones.T).astype(np.float32), precision="highest")
    )


def _groups(x, sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1], -1)


def _sizes(bits, who):
    """The groups of a `bits` field, checked."""
    sizes = (bits,) if isinstance(bits, int) else tuple(bits)
    if not sizes or any(int(n) != n or not 1 <= n <= 30 for n in sizes):
        raise ValueError(f"{who}.bits is a number from 1 to 30 or several, for indices are int32; got {bits}.")
    return sizes


def _check_width(latents, sizes, who):
    if latents.shape[-1] != sum(sizes):
        raise ValueError(
            f"{who} has {sum(sizes)} bits {sizes} but the encoder gives {latents.shape[-1]} channels: "
            "set the encoder's `channels` to the number of bits."
        )


def _vocabulary(bits):
    return 2**bits if isinstance(bits, int) else tuple(2**n for n in bits)


class LFQ(nn.Module):
    """Latents [B N D], D bits -> Codes with z the signs, 1 or -1 (of 0: -1); float32 inside.

    LFQ (MAGVIT-v2, arXiv 2310.05737); with several groups that of WeTok (arXiv 2508.05599) and the token
    factorisation of Open-MAGVIT2 (arXiv 2409.04410); `spherical` is BSQ (arXiv 2406.07548). The gradient passes
    straight through. The aux loss is `commitment`, the mean of (z - sg q)^2.

    Attributes:
      bits: of an index. A number gives one index a token, [B N]; several, as (6, 12), give indices [B N G]. Channels
        fall to groups in order, and channel 0 of a group is its least bit.
      spherical: latents are scaled to length 1 first, and z has the entries 1 and -1 over the root of D.
      temperature: of the aux entropies `sample_entropy` and `batch_entropy` in training, means over groups, of codes
        with logits 2 <latent, code> / temperature; None: they are not computed.
      pooled: batch_entropy takes all groups for one, as WeTok's code does.
    """

    bits: int | tuple[int, ...] = 18
    spherical: bool = False
    temperature: float | None = None
    pooled: bool = False

    @property
    def vocabulary(self):
        """The number of codes; a tuple, one number a group, if `bits` is one."""
        return _vocabulary(self.bits)

    def __call__(self, latents, *, train=False):
        sizes = _sizes(self.bits, "LFQ")
        _check_width(latents, sizes, "LFQ")
        if self.pooled and len(set(sizes)) > 1:
            raise ValueError(f"LFQ.pooled needs groups of equal size, not {sizes}.")
        z = latents.astype(jnp.float32)
        if self.spherical:
            z = codebook.l2_normalize(z)
        indices = pack(z > 0, sizes)
        q = jnp.where(z > 0, self._scale(), -self._scale())
        aux = {"commitment": jnp.square(z - q).mean()}
        if train and self.temperature is not None:
            odds = 4 * self._scale() / self.temperature * z.reshape(-1, z.shape[-1])
            aux["sample_entropy"], aux["batch_entropy"] = entropies(odds, sizes, self.pooled)
        return Codes(
            z=codebook.straight_through(z, q),
            indices=indices[..., 0] if isinstance(self.bits, int) else indices,
            keep=jnp.ones(z.shape[:2], bool),
            aux=aux,
        )

    def lookup(self, indices):
        """int [B N] or [B N G] -> z [B N D]. An index outside raises ValueError; in a jitted function it gives NaN."""
        bits = _lookup_bits(indices, self.bits, "LFQ")
        return (2 * bits - 1) * self._scale()

    def _scale(self):
        return 1 / math.sqrt(sum(_sizes(self.bits, "LFQ"))) if self.spherical else 1.0


def _lookup_bits(indices, bits, who):
    """Indices as a `bits` field gives them -> float32 [B N n] of 0 and 1; NaN for an index outside."""
    sizes = _sizes(bits, who)
    valid = codebook.in_range(indices, _vocabulary(bits), who)
    if isinstance(bits, int):
        indices, valid = indices[..., None], valid[..., None]
    valid = jnp.repeat(valid, np.array(sizes), axis=-1, total_repeat_length=sum(sizes))
    return jnp.where(valid, unpack(indices, sizes), jnp.nan).astype(jnp.float32)


class Bernoulli(nn.Module):
    """Latents [B N n], log odds of n bits -> Codes whose bits are drawn in training and thresholded otherwise.

    ELM's binary autoencoder (arXiv 2410.16257), Instella-T2I (arXiv 2506.21022): p = sigmoid(latents / temperature);
    in training each bit is 1 with probability p, else if p > 0.5; the gradient is that of p. Draws from the rng
    stream "train". The aux terms are `uncertainty`, the mean of p (1 - p), and `bit_entropy`, how evenly a bit is
    used: the entropy of its mean, averaged over bits, in bits.

    Attributes:
      bits: of an index. A number gives one index a token, [B N]; several give indices [B N G]; (1,) * 64 keeps 64
        bits apart.
      width: of z, a sum of one learned vector a bit; None: z [B N n] is the bits themselves, 0 and 1.
      temperature: of the draw.
      draws: False: bits are thresholded in training too, ELM's deterministic variant.
    """

    bits: int | tuple[int, ...]
    width: int | None = None
    temperature: float = 1.0
    draws: bool = True

    @property
    def vocabulary(self):
        """The number of codes; a tuple, one number a group, if `bits` is one."""
        return _vocabulary(self.bits)

    @nn.compact
    def __call__(self, latents, *, train=False):
        sizes = _sizes(self.bits, "Bernoulli")
        _check_width(latents, sizes, "Bernoulli")
        if self.width is not None:
            init = nn.initializers.normal(1 / math.sqrt(sum(sizes)))
            self.param("vectors", init, (sum(sizes), self.width))
        p = jax.nn.sigmoid(latents.astype(jnp.float32) / self.temperature)
        ones = jax.random.bernoulli(self.make_rng("train"), p) if train and self.draws else p > 0.5
        indices = pack(ones, sizes)
        mean = p.reshape(-1, p.shape[-1]).mean(0)
        return Codes(
            z=self._embed(codebook.straight_through(p, ones.astype(jnp.float32))),
            indices=indices[..., 0] if isinstance(self.bits, int) else indices,
            keep=jnp.ones(p.shape[:2], bool),
            aux={"uncertainty": (p * (1 - p)).mean(), "bit_entropy": _bit_entropy(mean).mean()},
        )

    def lookup(self, indices):
        """int [B N] or [B N G] -> z. An index outside raises ValueError; inside a jitted function it gives NaN."""
        return self._embed(_lookup_bits(indices, self.bits, "Bernoulli"))

    def _embed(self, bits):
        if self.width is None:
            return bits
        return jnp.matmul(bits, self.get_variable("params", "vectors"), precision="highest")


def _bit_entropy(p):
    return -(p * jnp.log2(p + 1e-9) + (1 - p) * jnp.log2(1 - p + 1e-9))
