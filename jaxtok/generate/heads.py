"""From a transformer's features to codes: what a code is made of, and how likely each is."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from jaxtok.generate import cache
from jaxtok.generate.objective import Scores, score
from jaxtok.nn import masks
from jaxtok.nn.decoder_block import Block, Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm, layer_norm
from jaxtok.nn.rotary import rotary_2d
from jaxtok.nn.transformer import modulate


class Digits(nn.Module):
    """Codes of digits, such as FSQ's: each digit is predicted from the features and from the digits before it.

    p(code | x) = prod_g p(d_g | x, d_0 ... d_{g-1}): nothing is assumed to be independent, and there are sum(levels)
    logits instead of prod(levels). A code that training never showed is made of digits that it did. Where digits are
    the groups of a token or its channels, this is autoregression inside a token, by one small layer each.

    Attributes:
      levels: of every digit, the first the least significant (quantizers.fsq).
      width: D of the transformer.
      apart: codes come digit by digit, int [... G], and not each as one number, int [...].
    """

    levels: tuple[int, ...]
    width: int
    apart: bool = False

    def setup(self):
        self.embeds = [table(n, self.width) for n in self.levels]
        self.before = [table(n, self.width) for n in self.levels[:-1]]
        self.hidden = [Linear(self.width) for _ in self.levels]
        self.heads = [Linear(n, init="zeros") for n in self.levels]

    def embed(self, codes):
        """Codes -> [... D], the sum of their digits' vectors."""
        return sum(embed(digit) for embed, digit in zip(self.embeds, self._digits(codes), strict=True))

    def score(self, x, codes) -> Scores:
        """Scores of codes at features [... D]; right is a code of which every digit is."""
        digits = self._digits(codes)
        return of_all(score(self._logits(x, digits[:g]), digit) for g, digit in enumerate(digits))

    def draw(self, x, choose, layers=None):
        """Codes at features [... D]; choose(logits [... levels[g]], g) -> digit g, int [...].

        layers: of `take_apart`, or None.
        """
        digits = []
        for g in range(len(self.levels)):
            digits.append(choose(self._logits(x, digits), g))
        return self._codes(digits)

    def _logits(self, x, before):
        """float32 [... levels[g]] of digit g, given the g before it."""
        g = len(before)
        x = x + sum((embed(digit) for embed, digit in zip(self.before, before, strict=False)), 0.0)
        return self.heads[g](x + jax.nn.gelu(self.hidden[g](x))).astype(jnp.float32)

    def _digits(self, codes):
        return list(jnp.moveaxis(codes, -1, 0)) if self.apart else split(codes, self.levels)

    def _codes(self, digits):
        return jnp.stack(digits, -1) if self.apart else join(digits, self.levels)


class Depth(Digits):
    """The same by a small causal transformer: [x, d_0 ... d_{G-2}] -> logits of [d_0 ... d_{G-1}].

    The head of FQGAN (arXiv 2411.16681), Open-MAGVIT2 (arXiv 2409.04410) and WeTok (arXiv 2508.05599). As theirs it has
    the places of LlamaGen's first row: x has none, its queries and keys are zero, and d_g stands in column g.

    Attributes:
      depth: how many layers.
      block: their fields, see nn.decoder_block.Block; its norm is also the last one.
      remat: see nn.decoder_block.stack.
    """

    depth: int = 1
    block: Mapping[str, Any] = FrozenDict()
    remat: str = "none"

    def setup(self):
        sizes = [self.levels[i] for i in self._order()]
        self.embeds = [table(n, self.width) for n in self.levels]
        self.before = [table(n, self._inner()) for n in sizes[:-1]]
        self.blocks = stack(self.depth, remat=self.remat, **self.block)
        self.norm = Norm(self._block().norm, self._block().eps)
        self.heads = [Linear(n, init="zeros") for n in sizes]

    def score(self, x, codes) -> Scores:
        """Scores of codes at features [... D]; right is a code of which every digit is."""
        digits = self._digits(codes)
        digits = [digits[i] for i in self._order()]
        return of_all(score(logits, digit) for logits, digit in zip(self.logits(x, digits), digits, strict=True))

    def logits(self, x, digits):
        """Of every digit, float32 [... K_g] each, given those before it: features [... D], digits int [...] in turn."""
        x, everywhere = self._enter(x), slice(len(self.levels))
        before = (embed(digit) for embed, digit in zip(self.before, digits, strict=False))
        y = jnp.stack([x, *before], -2)  # [... G D]
        flat, first = y.reshape(-1, *y.shape[-2:]), x.reshape(-1, 1, x.shape[-1])
        side = self._side(first, everywhere)._replace(mask=masks.prefix_causal(0, len(self.levels)))
        flat, _ = self.blocks(self._place(flat, everywhere), side, False)
        y = self._leave(flat, side).reshape(y.shape)
        return [head(y[..., g, :]).astype(jnp.float32) for g, head in enumerate(self.heads)]

    def draw(self, x, choose, layers=None):
        """Codes at features [... D]; choose(logits [... K_g], g) -> the digit in turn, int [...]. On a cache."""
        x, block = self._enter(x), self._block()
        layers = layers or cache.layers(self.blocks.variables["params"], block.dtype)
        first = y = x.reshape(-1, 1, x.shape[-1])
        kept, digits = cache.empty(block, layers, len(y), y.shape[-1], len(self.levels)), []
        for g, head in enumerate(self.heads):
            here = slice(g, g + 1)
            side = self._side(first, here)._replace(at=g)
            y, kept = cache.advance(block, layers, self._place(y, here), kept, side)
            logits = head(self._leave(y, side)[:, 0]).astype(jnp.float32)
            digits.append(choose(logits.reshape(*x.shape[:-1], -1), g))
            if g < len(self.before):
                y = self.before[g](digits[g].reshape(-1, 1))
        return self._codes([digits[g] for g in np.argsort(self._order())])

    # ---- in what TokenBridge's differs ----

    def _inner(self):
        """The width of the layers."""
        return self.width

    def _order(self):
        """In which digits are predicted."""
        return range(len(self.levels))

    def _enter(self, x):
        """Features [... D] -> the first of the sequence [... W]."""
        return x

    def _place(self, y, places):
        """y [M n W] with the vectors of its places, if they have any."""
        return y.astype(self._block().dtype)

    def _side(self, first, places):
        """What the layers see of the first [M 1 W] and of places."""
        tables = rotary_2d(1, len(self.levels) - 1, self._block().head_dim)
        return Side(rotary=tuple(np.pad(t, ((1, 0), (0, 0)))[places] for t in tables))

    def _leave(self, y, side):
        """What the heads read of the last layer's [M n W]."""
        return self.norm(y)

    def _block(self):
        return Block(**self.block, parent=None)


class Channels(Depth):
    """The same with vectors for places, modulated by the features (adaLN-zero): TokenBridge's (arXiv 2503.16430).

    Attributes:
      inner: W, the width of the layers.
      order: in which the channels are predicted, a permutation of them; (): their own.
    """

    inner: int = 0
    order: tuple[int, ...] = ()

    def setup(self):
        if sorted(self._order()) != list(range(len(self.levels))):
            raise ValueError(f"Channels.order {self.order} is no permutation of the {len(self.levels)} channels.")
        super().setup()
        normal = nn.initializers.normal(0.02)
        self.enter = Linear(self.inner)
        self.pos_embed = self.param("pos_embed", normal, (len(self.levels), self.inner))
        self.number_embed = self.param("number_embed", normal, (len(self.levels), self.inner))
        self.head_adaln = Linear((2, self.inner), init="zeros")

    def _inner(self):
        return self.inner

    def _order(self):
        return self.order or super()._order()

    def _enter(self, x):
        return self.enter(x)

    def _place(self, y, places):
        return super()._place(y + self.pos_embed[places], places)

    def _side(self, first, places):
        return Side(condition=(first + self.number_embed[places]).astype(self._block().dtype))

    def _leave(self, y, side):
        scale, shift = jnp.split(self.head_adaln(jax.nn.silu(side.condition)), 2, -2)  # each [M n 1 W]
        return modulate(layer_norm(self.norm(y), self._block().eps), shift[..., 0, :], scale[..., 0, :])


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

    def draw(self, x, choose, layers=None):
        """Codes at features [... D]; choose(logits [... G K], 0) -> all digits int [... G], at once."""
        return self._codes(list(jnp.moveaxis(choose(self._all_logits(x), 0), -1, 0)))

    def _all_logits(self, x):
        """float32 [... G K], K the largest level; what is no value of a digit has no chance."""
        there = np.arange(max(self.levels)) < np.array(self.levels)[:, None]  # [G K]
        return jnp.where(there, self.head(x).astype(jnp.float32), -1e30)  # finite, for guidance takes differences


def take_apart(params, dtype):
    """Parameters of a head -> (without its layers, these one by one, kernels in `dtype`, or None: it has none).

    Taken apart before a loop and given to `draw` in it: what is sliced from a stack in a loop is copied in every turn.
    """
    params = dict(params)
    return params, cache.layers(params.pop("blocks"), dtype) if "blocks" in params else None


def table(n, width):
    """Vectors of the n values of a digit."""
    return nn.Embed(n, width, embedding_init=nn.initializers.normal(0.02))


def of_all(scores):
    """Scores of digits -> those of a code, which is right if they all are."""
    losses, _, corrects = zip(*scores, strict=True)
    correct = math.prod(corrects)
    return Scores(sum(losses), jnp.ones_like(correct), correct)


def split(codes, levels):
    """Codes int [...] -> their digits, a list of int [...], the least significant first."""
    return [codes // base % n for base, n in zip(bases(levels), levels, strict=True)]


def join(digits, levels):
    """The inverse of split: int32 [...]."""
    return sum(digit * int(base) for digit, base in zip(digits, bases(levels), strict=True)).astype(jnp.int32)


def bases(levels):
    """What a unit of each digit counts."""
    return np.cumprod([1, *levels[:-1]])
