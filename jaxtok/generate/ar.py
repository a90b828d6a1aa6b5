"""Autoregressive models over codes: token after token in the order they have."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxtok.generate import cache, sampling
from jaxtok.generate.condition import batch_size, is_guided, labels
from jaxtok.generate.heads import Depth, Digits, Parallel, take_apart
from jaxtok.generate.objective import score
from jaxtok.nn import masks, rotary
from jaxtok.nn.decoder_block import Block, Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm
from jaxtok.nn.position import sincos_1d

POSITIONS = ("learned", "sincos", "rotary", "rotary_2d")


class AR(nn.Module):
    """A causal transformer: [start, t_0 ... t_{N-2}] -> logits of [t_0 ... t_{N-1}].

    The contract is that of generate/__init__.py. Of k tokens only k are computed, each once, and the first k of a
    longer sample are the sample of k.

    Attributes:
      vocabulary: K codes; or of tokens [N G] the sizes of their G indices, which are digits then.
      length: N, the most tokens there can be.
      width, depth: of the transformer.
      block: fields of nn.decoder_block.Block, {} for its defaults.
      levels: (): a code is one of K, with a vector and a logit of its own. Else a code is so many digits, as FSQ's are.
        Digits are embedded and predicted by generate.heads.Digits, each from those before it.
      parallel: digits are predicted independently, by generate.heads.Parallel.
      head_depth: 0, or digits are predicted by so many causal layers over them, by generate.heads.Depth.
      position: "learned" or "sincos" vectors added to every token, or "rotary" (1D) or "rotary_2d" (tokens are a square
        grid; the start has no place and its queries and keys are zero, as in LlamaGen, arXiv 2406.06525).
      classes: how many, 0: no labels.
      class_token: the class IS the start, and the null class has a vector too (LlamaGen). Otherwise the class is added
        to a learned start, and the null class adds nothing (FlexTok, arXiv 2502.13967).
      text: every block reads condition["text"] [B T D] by cross-attention, and of it what "text_mask" (if it is there)
        says; the null text is one learned vector.
      null_rate: share of training samples whose condition is dropped.
      dropout: rate on the embedded tokens and on what each layer adds, in training.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    vocabulary: int | tuple[int, ...]
    length: int
    width: int
    depth: int
    block: Mapping[str, Any] = FrozenDict()
    levels: tuple[int, ...] = ()
    parallel: bool = False
    head_depth: int = 0
    position: str = "learned"
    classes: int = 0
    class_token: bool = False
    text: bool = False
    null_rate: float = 0.1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def setup(self):
        if self.position not in POSITIONS:
            raise ValueError(f'AR.position is one of {POSITIONS}, not "{self.position}".')
        if self.class_token and not self.classes:
            raise ValueError("AR.class_token needs classes: without any there is no class to start with.")
        several = not isinstance(self.vocabulary, int)
        if several and self.levels:
            raise ValueError("AR.levels are the digits of a single index; these tokens have several: leave it out.")
        if self.levels and math.prod(self.levels) != self.vocabulary:
            raise ValueError(f"AR.levels {self.levels} make {math.prod(self.levels)} codes, and not {self.vocabulary}.")
        if (self.parallel or self.head_depth) and not self._levels():
            raise ValueError("AR.parallel and head_depth need digits: a `vocabulary` of several sizes, or `levels`.")
        if self.parallel and self.head_depth:
            raise ValueError(f"AR.parallel has no layers over digits: leave out head_depth={self.head_depth}.")
        normal = nn.initializers.normal(0.02)
        if self._levels():
            layers = dict(depth=self.head_depth, block=self._fields(), remat=self.remat) if self.head_depth else {}
            head = Depth if layers else Parallel if self.parallel else Digits
            self.digits = head(self._levels(), self.width, several, **layers)
        else:
            self.token_embed = nn.Embed(self.vocabulary, self.width, embedding_init=normal)
            self.head = Linear(self.vocabulary, bias=False, init="zeros", dtype=self.dtype)
        if self.classes:
            self.class_embed = nn.Embed(self.classes + self.class_token, self.width, embedding_init=normal)
        if not self.class_token:
            self.start = self.param("start", normal, (self.width,))
        if self.position == "learned":
            self.pos_embed = self.param("pos_embed", normal, (self.length, self.width))
        if self.text:
            self.text_mlp = TextMLP(self.width, self.dtype)
            self.null_text = self.param("null_text", normal, (self.width,))
        self.drop = nn.Dropout(self.dropout, rng_collection="train")
        self.blocks = stack(self.depth, remat=self.remat, unroll=self.unroll, **self._fields())
        self.norm = Norm(self._block().norm, self._block().eps)

    def __call__(self, indices, condition=None, *, null=None, train=False):
        """Logits [B n K] of n <= N tokens, each given those before it; null bool [B]: whose condition is dropped.

        Without a condition, it is null for all. Of digits there are no logits but the features [B n D] before them.
        """
        batch, n = indices.shape[:2]
        if n > self.length:
            raise ValueError(f"AR has places for {self.length} tokens, got {n}.")
        null = jnp.zeros(batch, bool) if null is None else null
        start, memory, memory_mask = self._condition(condition, null)
        x = jnp.concatenate([start[:, None], self._vectors(indices[:, :-1])], 1)  # [B n D]
        x = self.drop(self._place(x, 0), deterministic=not train).astype(self.dtype)
        side = Side(masks.prefix_causal(0, n), self._rotary(n), memory=memory, memory_mask=memory_mask)
        x, _ = self.blocks(x, side, train)
        return self._head(x)

    def loss(self, indices, condition=None, *, train=False, step=0):
        """Scores [B N] of codes int32 [B N] or [B N G]."""
        if condition is None and (self.classes or self.text):
            raise ValueError("This AR has a condition: its loss needs the labels or texts that belong to the codes.")
        null = jax.random.bernoulli(self.make_rng("train"), self.null_rate, indices.shape[:1]) if train else None
        y = self(indices, condition, null=null, train=train)
        return self.digits.score(y, indices) if self._levels() else score(y, indices)

    def sample(self, rng, condition=None, **options):
        """Codes int32 [B tokens] or [B tokens G]; options as `rollout`."""
        return self.rollout(rng, condition, **options)[0]

    def rollout(self, rng, condition=None, *, tokens=None, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, batch=1):
        """Draws token after token on a cache.

        Args:
          rng: key; token i draws from fold_in(rng, i).
          condition: see generate/__init__.py; None: the null condition, for `batch` samples.
          tokens: k, how many, all N by default.
          guidance: scale, or a schedule over the N tokens (generate/sampling.py).
          temperature, top_k, top_p: see sampling.draw.

        Returns (codes int32 [B k] or [B k G], float32 logits [B k K], guided, of each; of digits the features instead).
        """
        k = self.length if tokens is None else tokens
        if not 1 <= k <= self.length:
            raise ValueError(f"AR samples 1 to {self.length} tokens, not {k}.")
        guided = is_guided(guidance, condition)
        none = jnp.zeros(batch_size(condition, batch), bool)
        given = self._condition(condition, none)
        if guided:
            given = jax.tree.map(sampling.pair, given, self._condition(condition, ~none))
        start, *memory = given
        prefix = self._place(start[:, None], 0).astype(self.dtype)
        block, tables = self._block(), self._rotary(k)
        module, variables = self.unbind()  # a bound module must not be called inside a scan
        params = dict(variables["params"])
        layers, of_digits = cache.layers(params.pop("blocks"), self.dtype), None
        if self._levels():
            params["digits"], of_digits = take_apart(params["digits"], self.dtype)
        params = cache.cast(params, self.dtype)

        def step(x, place, kept):
            row = (
                None
                if tables is None
                else [jax.lax.dynamic_slice_in_dim(t, place, 1) for t in map(jnp.asarray, tables)]
            )
            x, kept = cache.advance(block, layers, x[:, None], kept, Side(rotary=row, at=place))
            logits = module.apply({"params": params}, x[:, 0], method="_head")
            if guided and not self._levels():
                logits = sampling.guide_pairs(logits, guidance, place, self.length)
            return logits, kept

        def embed(codes, place):
            x = module.apply({"params": params}, codes[:, None], place, method="_embed")[:, 0]
            return sampling.pair(x, x) if guided else x

        def choose(y, i):
            key = jax.random.fold_in(rng, i)
            if not self._levels():
                return sampling.draw(key, y, temperature, top_k, top_p)

            def digit(logits, g):  # of the pair's two passes, where it is one
                logits = sampling.guide_pairs(logits, guidance, i, self.length) if guided else logits
                chosen = sampling.draw(jax.random.fold_in(key, g), logits, temperature, top_k, top_p)
                return sampling.pair(chosen, chosen) if guided else chosen

            codes = module.apply({"params": params}, y, digit, of_digits, method="_draw")
            return sampling.unpair(codes)[0] if guided else codes

        kept = cache.empty(block, layers, prefix.shape[0], self.width, k, *memory)
        return cache.unroll(step, embed, choose, prefix, kept, k)

    # ---- pieces ----

    def _levels(self):
        """Of the digits of a code; (): it is no such thing."""
        return self.levels if isinstance(self.vocabulary, int) else self.vocabulary

    def _fields(self):
        return dict(self.block) | dict(dropout=self.dropout, dtype=self.dtype)

    def _block(self):
        return Block(**self._fields(), parent=None)

    def _condition(self, condition, null):
        """(the start [B D], the text [B T D] or None, its mask [B T] or None); null bool [B]: whose is dropped."""
        batch, start, memory, mask = null.shape[0], 0.0, None, None
        if self.classes:
            label = labels(condition, self.classes, batch, null)
            vectors = self.class_embed(jnp.minimum(label, self.class_embed.num_embeddings - 1))  # [B D]
            start = vectors if self.class_token else jnp.where((label < self.classes)[:, None], vectors, 0)
        if not self.class_token:
            start = jnp.broadcast_to(start + self.start, (batch, self.width))
        if self.text:
            memory, mask = jnp.broadcast_to(self.null_text, (batch, 1, self.width)), jnp.ones((batch, 1), bool)
            if condition is not None:
                if "text" not in condition:
                    raise ValueError(f'This AR reads text; the condition lacks "text", it has {sorted(condition)}.')
                text = self.text_mlp(condition["text"])  # [B T D]
                memory = jnp.where(null[:, None, None], memory, text)
                mask = null[:, None] | condition.get("text_mask", jnp.ones(text.shape[:2], bool))
            memory = memory.astype(self.dtype)
        return start, memory, mask

    def _embed(self, indices, at):
        """Codes int [B n] or [B n G] that stand from place `at` on -> [B n D]."""
        return self._place(self._vectors(indices), at)

    def _vectors(self, indices):
        return self.digits.embed(indices) if self._levels() else self.token_embed(indices)

    def _draw(self, features, choose, layers=None):
        return self.digits.draw(features, choose, layers)

    def _place(self, x, at):
        """x [B n D] with the vectors of its places, from `at` on."""
        if self.position in ("rotary", "rotary_2d"):
            return x
        table = self.pos_embed if self.position == "learned" else jnp.asarray(sincos_1d(self.length, self.width))
        return x + jax.lax.dynamic_slice_in_dim(table, at, x.shape[1])

    def _rotary(self, n):
        """Tables of the first n places, or None."""
        head_dim = self._block().head_dim
        if self.position == "rotary":
            return rotary.rotary_1d(n, head_dim)
        if self.position == "rotary_2d":
            side = math.isqrt(self.length)
            if side * side != self.length:
                raise ValueError(f'AR.position "rotary_2d" needs a square number of tokens, not {self.length}.')
            return tuple(jnp.pad(t, ((1, 0), (0, 0)))[:n] for t in rotary.rotary_2d(side, side, head_dim))
        return None

    def _head(self, x):
        if self.head_depth:  # these layers go on where those ended, and have the last norm
            return x
        x = self.norm(x)
        return x if self._levels() else self.head(x).astype(jnp.float32)


class TextMLP(nn.Module):
    """Features of a text, of any width E, as wide as the model: W_2 GELU(W_1 x), E wide inside (FlexTok's)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = jax.nn.gelu(Linear(x.shape[-1], bias=False, dtype=self.dtype, name="fc1")(x))
        return Linear(self.width, bias=False, dtype=self.dtype, name="fc2")(x)
