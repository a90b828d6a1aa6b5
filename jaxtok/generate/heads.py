"""From a transformer's features to codes: what a code is made of, and how likely each is."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.generate.objective import Scores, score
from jaxtok.nn.linear import Linear


class Digits(nn.Module):
    """Codes of digits, such as FSQ's: each digit is predicted from the features and from the digits before it.

    p(code | x) = prod_g p(d_g | x, d_0 ... d_{g-1}): nothing is assumed to be independent, and there are sum(levels)
    logits instead of prod(levels). A code that training never showed is made of digits that it did. Where digits are
    the groups of a token or its channels, this is autoregression inside a token: WeTok (arXiv 2508.05599), TokenBridge
    (arXiv 2503.16430).

    Attributes:
      levels: of every digit, the first the least significant (quantizers.fsq).
      width: D of the transformer.
      apart: codes come digit by digit, int [... G], and not each as one number, int [...].
    """

    levels: tuple[int, ...]
    width: int
    apart: bool = False

    def setup(self):
        table = lambda n: nn.Embed(n, self.width, embedding_init=nn.initializers.normal(0.02))
        self.embeds = [table(n) for n in self.levels]
        self.before = [table(n) for n in self.levels[:-1]]
        self.hidden = [Linear(self.width) for _ in self.levels]
        self.heads = [Linear(n, init="zeros") for n in self.levels]

    def embed(self, codes):
        """Codes -> [... D], the sum of their digits' vectors."""
        return sum(embed(digit) for embed, digit in zip(self.embeds, self._digits(codes), strict=True))

    def score(self, x, codes) -> Scores:
        """Scores of codes at features [... D]; right is a code of which every digit is."""
        digits = self._digits(codes)
        each = [score(self._logits(x, digits[:g]), digit) for g, digit in enumerate(digits)]
        correct = math.prod(one.correct for one in each)
        return Scores(sum(one.loss for one in each), jnp.ones_like(correct), correct)

    def draw(self, x, choose):
        """Codes at features [... D]; choose(logits [... levels[g]], g) -> the g-th digit int [...]."""
        digits = []
        for g in range(len(self.levels)):
            digits.append(choose(self._logits(x, digits), g))
        return self._codes(digits)

    def _logits(self, x, before):
        """float32 [... levels[g]] of digit g, given the g before it."""
        g = len(before)
        x = x + sum((table(digit) for table, digit in zip(self.before, before, strict=False)), 0.0)
        return self.heads[g](x + jax.nn.gelu(self.hidden[g](x))).astype(jnp.float32)

    def _digits(self, codes):
        return list(jnp.moveaxis(codes, -1, 0)) if self.apart else split(codes, self.levels)

    def _codes(self, digits):
        return jnp.stack(digits, -1) if self.apart else join(digits, self.levels)


class Parallel(Digits):
    """The same of digits that do not hear of each other: given the features, they are independent (arXiv 2410.16257).

    p(code | x) = prod_g p(d_g | x), ELM's heads of sub-codes; of single bits, Instella-T2I's (arXiv 2506.21022). What
    digits have in common beyond the features is lost: choose groups so that little is. One table and one matrix serve
    all digits; they have places for the largest.
    """

    def setup(self):
        sizes = len(self.levels), max(self.levels)
        self.table = self.param("table", nn.initializers.normal(0.02), (*sizes, self.width))
        self.head = Linear(sizes, init="zeros")

    def embed(self, codes):
        """Codes -> [... D], the sum of their digits' vectors: what a matrix makes of shorter ones side by side."""
        return self.table[np.arange(len(self.levels)), jnp.stack(self._digits(codes), -1)].sum(-2)

    def score(self, x, codes) -> Scores:
        """Scores of codes at features [... D]; right is a code of which every digit is."""
        each = score(self._all_logits(x), jnp.stack(self._digits(codes), -1))  # of [... G]
        correct = each.correct.prod(-1)
        return Scores(each.loss.sum(-1), jnp.ones_like(correct), correct)

    def draw(self, x, choose):
        """Codes at features [... D]; choose(logits [... G K], 0) -> all digits int [... G], at once."""
        return self._codes(list(jnp.moveaxis(choose(self._all_logits(x), 0), -1, 0)))

    def _all_logits(self, x):
        """float32 [... G K], K the largest level; what is no value of a digit has no chance."""
        there = np.arange(max(self.levels)) < np.array(self.levels)[:, None]  # [G K]
        return jnp.where(there, self.head(x).astype(jnp.float32), -1e30)  # finite, for guidance takes differences


def split(codes, levels):
    """Codes int [...] -> their digits, a list of int [...], the least significant first."""
    return [codes // base % n for base, n in zip(bases(levels), levels, strict=True)]


def join(digits, levels):
    """The inverse of split: int32 [...]."""
    return sum(digit * int(base) for digit, base in zip(digits, bases(levels), strict=True)).astype(jnp.int32)


def bases(levels):
    """What a unit of each digit counts."""
    return np.cumprod([1, *levels[:-1]])
