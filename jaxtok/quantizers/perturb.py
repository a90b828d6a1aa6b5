"""Wrong codes on purpose: a decoder that has seen them forgives a generator's mistakes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import codebook
from jaxtok.quantizers import binary


def anneal(position, start, end, last):
    """1 up to `start`, from there in a line to `last` at `end`, then `last`; of numbers or arrays."""
    xp = jnp if isinstance(position, jax.Array) else np
    return 1 - (1 - last) * xp.clip((position - start) / (end - start), 0, 1)


def replace(indices, ranked, uniform, rank, alpha):
    """Where uniform [...] <= alpha, entry rank [...] of the neighbours ranked [... delta]; else the index [...]."""
    return jnp.where(uniform <= alpha, jnp.take_along_axis(ranked, rank[..., None], -1)[..., 0], indices)


def latent_perturb(key, indices, codes, points, alpha, delta, ratio=1.0):
    """Puts one of the `delta` codes nearest to a point in place of the index, with probability alpha.

    indices int [B N], codes [K D], points [B N D] -> int32 [B N]. The nearest itself counts among the delta, so the
    share that changes is alpha (1 - 1 / delta). `ratio` scales alpha and delta; it may be traced.
    """
    ranked = codebook.neighbours(points.reshape(-1, points.shape[-1]), codes, delta).reshape(*indices.shape, delta)
    change_key, rank_key = jax.random.split(key)
    rank = jax.random.randint(rank_key, indices.shape, 0, _scaled(delta, ratio))
    return replace(indices, ranked, jax.random.uniform(change_key, indices.shape), rank, alpha * ratio)


def bit_perturb(key, indices, sizes, alpha, delta, ratio=1.0):
    """Flips floor(log2 delta) random bits of a token, indices int [... G] of `sizes` bits, with probability alpha."""
    change_key, bit_key = jax.random.split(key)
    bits = binary.unpack(indices, sizes)  # [... n]
    places = jnp.argsort(jnp.argsort(jax.random.uniform(bit_key, bits.shape), -1), -1)
    flips = jnp.floor(jnp.log2(_scaled(delta, ratio)))
    change = jax.random.uniform(change_key, (*indices.shape[:-1], 1)) <= alpha * ratio
    return binary.pack(bits ^ (change & (places < flips)), sizes)


def _scaled(delta, ratio):
    return jnp.maximum(jnp.floor(delta * ratio), 1).astype(jnp.int32)


def perturb(key, quantizer, indices, alpha, delta, ratio=1.0, points=None):
    """Indices of a bound quantizer, int [B N] or [B N G], each replaced by one near to it with probability alpha.

    latent_perturb where the quantizer has codes(), around `points` [B N D] or else around the codes themselves;
    bit_perturb for LFQ and Bernoulli. ValueError for a quantizer that has neither, or fewer than delta codes.
    """
    while isinstance(quantizer, (Perturbed, Swapped)):
        quantizer = quantizer.quantizer
    strength = alpha, delta, ratio
    if isinstance(quantizer, (binary.LFQ, binary.Bernoulli)):
        if isinstance(quantizer.bits, int):
            return bit_perturb(key, indices[..., None], (quantizer.bits,), *strength)[..., 0]
        return bit_perturb(key, indices, quantizer.bits, *strength)
    if not hasattr(quantizer, "codes"):
        raise ValueError(f"Perturbed needs a quantizer with codes() or bits, which {type(quantizer).__name__} has not.")
    if not 1 <= delta <= quantizer.vocabulary:
        raise ValueError(f"Perturbed.delta is {delta}, but there are {quantizer.vocabulary} codes.")
    table = jax.lax.stop_gradient(quantizer.codes())
    return latent_perturb(key, indices, table, table[indices] if points is None else points, *strength)


class Perturbed(nn.Module):
    """A quantizer whose codes, in training, are perturbed on a random share of pictures (RobustTok, arXiv
    2503.08354).

    The losses in aux are those of the true codes; z and indices are the perturbed ones, with the gradient of the true
    z. For quantizers that have codes(), a neighbour is a near code; for LFQ and Bernoulli, some flipped bits. Draws
    from the rng stream "train".

    Attributes:
      quantizer: the quantizer.
      alpha: with what probability a token of such a picture is replaced.
      beta: the share of pictures; at least one of a batch, if it is not 0.
      delta: how many neighbours a replacement is drawn from, the code itself among them.
      rank_from: whose neighbours: those of the "code" (as in the paper) or of the latent "z" (as in its code).
      schedule: (start, end, last): alpha and delta are multiplied by 1 until training step `start`, from there in a
        line to `last` at `end`; None: always 1. The step is counted in the collection "codebook".
    """

    quantizer: nn.Module
    alpha: float = 1.0
    beta: float = 0.1
    delta: int = 100
    rank_from: str = "code"
    schedule: tuple[float, float, float] | None = None

    @property
    def vocabulary(self):
        """That of the quantizer."""
        return self.quantizer.vocabulary

    def lookup(self, indices):
        """That of the quantizer."""
        return self.quantizer.lookup(indices)

    def codes(self):
        """That of the quantizer."""
        return self.quantizer.codes()

    @nn.compact
    def __call__(self, latents, *, train=False):
        if self.rank_from not in ("code", "z"):
            raise ValueError(f'Perturbed.rank_from is "code" or "z", not "{self.rank_from}".')
        codes = self.quantizer(latents, train=train)
        ratio = 1.0
        if self.schedule is not None:
            step = self.variable("codebook", "step", jnp.zeros, (), jnp.int32)
            ratio = anneal(step.value, *self.schedule)
            if train and self.is_mutable_collection("codebook") and not self.is_initializing():
                step.value += 1
        if not train or not self.beta or self.is_initializing():
            return codes
        batch = len(codes.indices)
        picture_key, key = jax.random.split(self.make_rng("train"))
        chosen = jax.random.permutation(picture_key, batch)[: max(1, round(self.beta * batch))]
        points = jax.lax.stop_gradient(latents[chosen].astype(jnp.float32)) if self.rank_from == "z" else None
        strength = self.alpha, self.delta, ratio
        indices = perturb(key, self.quantizer, codes.indices[chosen], *strength, points)
        z = codebook.straight_through(codes.z[chosen], self.quantizer.lookup(indices))
        return codes.replace(z=codes.z.at[chosen].set(z), indices=codes.indices.at[chosen].set(indices))


def swap_codes(key, codes, pictures, tokens):
    """Replaces codes by those at the same place of another picture of the batch (ILLUME+, arXiv 2504.01934).

    Codes -> Codes; a picture is touched with probability `pictures`, and then each of its tokens with probability
    `tokens`. The gradient stays that of the true z.
    """
    batch, n = codes.keep.shape
    shift_key, picture_key, token_key = jax.random.split(key, 3)
    shift = jax.random.randint(shift_key, (batch,), 1, max(batch, 2))
    other = (jnp.arange(batch) + shift) % batch  # [B], never the picture itself
    touched = jax.random.bernoulli(picture_key, pictures, (batch, 1)) & jax.random.bernoulli(
        token_key, tokens, (batch, n)
    )
    pick = lambda x: jnp.where(touched.reshape(batch, n, *[1] * (x.ndim - 2)), x[other], x)
    return codes.replace(z=codebook.straight_through(codes.z, pick(codes.z)), indices=pick(codes.indices))


class Swapped(nn.Module):
    """A quantizer some of whose codes, in training, come from other pictures of the batch: see swap_codes.

    Attributes:
      quantizer: the quantizer.
      pictures, tokens: the two probabilities.

    Draws from the rng stream "train".
    """

    quantizer: nn.Module
    pictures: float = 0.1
    tokens: float = 0.1

    @property
    def vocabulary(self):
        """That of the quantizer."""
        return self.quantizer.vocabulary

    def lookup(self, indices):
        """That of the quantizer."""
        return self.quantizer.lookup(indices)

    @nn.compact
    def __call__(self, latents, *, train=False):
        codes = self.quantizer(latents, train=train)
        return swap_codes(self.make_rng("train"), codes, self.pictures, self.tokens) if train else codes
