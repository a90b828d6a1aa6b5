"""Nested dropout (arXiv 1402.0915): only the first k tokens survive, so that tokens order themselves by worth."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.masks import keep_prefix


def powers_of_two(n):
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def uniform(key, batch, n):
    """k uniform in 1 ... n."""
    return jax.random.randint(key, (batch,), 1, n + 1)


def uniform_batch(key, batch, n):
    """One k for the whole batch, uniform in 1 ... n (One-D-Piece, arXiv 2501.10064)."""
    return jnp.broadcast_to(uniform(key, 1, n), batch)


def pow2(key, batch, n):
    """k uniform over 1, 2, 4, ... n (FlexTok, arXiv 2502.13967)."""
    return jax.random.choice(key, jnp.array(powers_of_two(n)), (batch,))


def uniform_pow2(key, batch, n):
    """k uniform in 1 ... n, rounded up to a power of two (or n): large k are the more frequent."""
    powers = jnp.array(powers_of_two(n))
    return powers[jnp.searchsorted(powers, uniform(key, batch, n))]


LAWS = {"uniform": uniform, "uniform_batch": uniform_batch, "pow2": pow2, "uniform_pow2": uniform_pow2}


class NestedDropout(nn.Module):
    """In training, keeps a random prefix of every sample's tokens: sets `Codes.keep`, never slices. Else, keeps all.

    Attributes:
      law: of k: "pow2", "uniform", "uniform_batch" or "uniform_pow2".
      full: share of samples that keep all tokens whatever the law.

    Draws from the rng stream "train".
    """

    law: str = "pow2"
    full: float = 0.0

    def __call__(self, codes, *, train=False):
        if self.law not in LAWS:
            raise ValueError(f'NestedDropout.law is one of {sorted(LAWS)}, not "{self.law}".')
        if not train:
            return codes
        batch, n = codes.keep.shape
        law_key, full_key = jax.random.split(self.make_rng("train"))
        k = LAWS[self.law](law_key, batch, n)
        k = jnp.where(jax.random.bernoulli(full_key, self.full, (batch,)), n, k)
        return codes.replace(keep=codes.keep & keep_prefix(k, n))
