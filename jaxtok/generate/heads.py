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
    logits instead of prod(levels). A code that training never showed is made of digits that it did.

    Attributes:
      levels: of every digit, the first the least significant (quantizers.fsq).
      width: D of the transformer.
    """

    levels: tuple[int, ...]
    width: int

    def setup(self):
        table = lambda n: nn.Embed(n, self.width, embedding_init=nn.initializers.normal(0.02))
        self.embeds = [table(n) for n in self.levels]
        self.before = [table(n) for n in self.levels[:-1]]
        self.hidden = [Linear(self.width) for _ in self.levels]
        self.heads = [Linear(n, init="zeros") for n in self.levels]

    def embed(self, codes):
        """Codes int [...] -> [... D], the sum of their digits' vectors."""
        return sum(embed(digit) for embed, digit in zip(self.embeds, split(codes, self.levels), strict=True))

    def score(self, x, codes) -> Scores:
        """Scores of codes int [...] at features [... D]; right is a code of which every digit is."""
        digits = split(codes, self.levels)
        each = [score(self._logits(x, digits[:g]), digit) for g, digit in enumerate(digits)]
        correct = math.prod(one.correct for one in each)
        return Scores(sum(one.loss for one in each), jnp.ones_like(correct), correct)

    def draw(self, x, choose):
        """Codes int32 [...] at features [... D]; choose(logits [... levels[g]], g) -> the g-th digit int [...]."""
        digits = []
        for g in range(len(self.levels)):
            digits.append(choose(self._logits(x, digits), g))
        return join(digits, self.levels)

    def _logits(self, x, before):
        """float32 [... levels[g]] of digit g, given the g before it."""
        g = len(before)
        x = x + sum((table(digit) for table, digit in zip(self.before, before, strict=False)), 0.0)
        return self.heads[g](x + jax.nn.gelu(self.hidden[g](x))).astype(jnp.float32)


def split(codes, levels):
    """Codes int [...] -> their digits, a list of int [...], the least significant first."""
    return [codes // base % n for base, n in zip(bases(levels), levels, strict=True)]


def join(digits, levels):
    """The inverse of split: int32 [...]."""
    return sum(digit * int(base) for digit, base in zip(digits, bases(levels), strict=True)).astype(jnp.int32)


def bases(levels):
    """What a unit of each digit counts."""
    return np.cumprod([1, *levels[:-1]])
