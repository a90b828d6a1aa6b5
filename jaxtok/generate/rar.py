"""Randomised autoregression (RAR, arXiv 2411.00776): in training, tokens in random orders that grow regular."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxtok.generate import cache, sampling
from jaxtok.generate.condition import batch_size, is_guided, labels
from jaxtok.generate.objective import score
from jaxtok.nn import masks
from jaxtok.nn.decoder_block import Block, Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.transformer import modulate

BLOCK = dict(mlp="gelu", eps=1e-6, qk_norm=True, bias=("qkv", "out", "mlp"))
PREFIX = 2  # [cls] and the class stand before the tokens


def random_ratio(step, start, end):
    """Share of samples in a random order: 1 until step `start`, then linearly to 0 at step `end`."""
    return jnp.clip(1 - (step - start) / max(end - start, 1), 0.0, 1.0)


class RAR(nn.Module):
    """A causal transformer: [cls, class, t_0 ... t_{N-2}] in any order -> logits of [t_0 ... t_{N-1}] in that order.

    The contract is that of generate/__init__.py. Each token is told where it stands and where the next one will, and is
    modulated (adaLN-zero) by the class and by its number in the sequence.

    Attributes:
      vocabulary: K codes; ids K + 1 + c are the classes, K + 1 + `classes` is the null class (K is not used here).
      length: N tokens.
      width, depth: of the transformer.
      classes: how many.
      block: fields of nn.decoder_block.Block that differ from BLOCK.
      anneal: (start, end), the steps between which random orders end.
      null_rate: share of training samples whose class is dropped.
      dropout: rate on what each layer adds, in training.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    vocabulary: int
    length: int
    width: int
    depth: int
    classes: int
    block: Mapping[str, Any] = FrozenDict()
    anneal: tuple[int, int] = (125_000, 187_500)
    null_rate: float = 0.1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.embed = nn.Embed(self.vocabulary + self.classes + 2, self.width, embedding_init=normal)
        self.cls_token = self.param("cls_token", normal, (self.width,))
        self.pos_embed = self.param("pos_embed", normal, (PREFIX + self.length, self.width))
        self.target_embed = self.param("target_embed", normal, (self.length, self.width))
        self.number_embed = self.param("number_embed", normal, (PREFIX + self.length, self.width))
        self.blocks = stack(self.depth, remat=self.remat, unroll=self.unroll, **self._fields())
        self.head_adaln = Linear((2, self.width), init="zeros", dtype=self.dtype)
        self.head = Linear(self.vocabulary, dtype=self.dtype)

    def __call__(self, indices, condition=None, *, order=None, null=None, train=False):
        """Logits [B N K] of codes [B N], in the order in which they are read.

        order: int [B N], of each sample a permutation of the places; None: as they are. null: bool [B], whose class is
        dropped.
        """
        order = self._raster(len(indices)) if order is None else order
        return self.predict(jnp.take_along_axis(indices, order, 1)[:, :-1], order, condition, null=null, train=train)

    def predict(self, tokens, order, condition=None, *, null=None, train=False):
        """Logits [B n+1 K] of the first n tokens int [B n], already in order, and of the next; order int [B N]."""
        batch, n = tokens.shape
        class_vector = self._class(condition, batch, null)  # [B D]
        prefix = jnp.stack([jnp.broadcast_to(self.cls_token, class_vector.shape), class_vector], 1)
        places = jnp.concatenate([jnp.broadcast_to(jnp.arange(PREFIX), (batch, PREFIX)), PREFIX + order[:, :n]], 1)
        targets = self.target_embed[order[:, : n + 1]]  # of [class, t_0 ... t_{n-1}]; cls and the last of all have none
        targets = jnp.pad(targets, ((0, 0), (1, n + 1 - targets.shape[1]), (0, 0)))
        x = jnp.concatenate([prefix, self.embed(tokens)], 1) + self.pos_embed[places] + targets  # [B 2+n D]
        side = Side(mask=masks.prefix_causal(0, n + PREFIX), condition=self._side(class_vector, 0, n + PREFIX))
        x, _ = self.blocks(x.astype(self.dtype), side, train)
        return self._head(x[:, 1:], side.condition[:, 1:])

    def loss(self, indices, condition=None, *, train=False, step=0):
        """Scores [B N] of codes int32 [B N], in the order in which they were read: as they are, unless `train`."""
        if condition is None:
            raise ValueError('RAR has classes: its loss needs a condition with the "label" of each sample.')
        batch, order, null = len(indices), self._raster(len(indices)), None
        if train:
            who, how, drop = jax.random.split(self.make_rng("train"), 3)
            shuffled = jnp.argsort(jax.random.uniform(how, indices.shape), -1)
            random = jax.random.bernoulli(who, random_ratio(step, *self.anneal), (batch, 1))
            order = jnp.where(random, shuffled, order)
            null = jax.random.bernoulli(drop, self.null_rate, (batch,))
        logits = self(indices, condition, order=order, null=null, train=train)
        return score(logits, jnp.take_along_axis(indices, order, 1))

    def sample(self, rng, condition=None, **options):
        """Codes int32 [B tokens]; options as `rollout`."""
        return self.rollout(rng, condition, **options)[0]

    def rollout(self, rng, condition=None, *, tokens=None, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, batch=1):
        """Draws tokens in raster order on a cache; arguments and result as AR.rollout."""
        k = self.length if tokens is None else tokens
        if not 1 <= k <= self.length:
            raise ValueError(f"RAR samples 1 to {self.length} tokens, not {k}.")
        guided = is_guided(guidance, condition)
        batch = batch_size(condition, batch)
        class_vector = self._class(condition, batch)
        if guided:
            class_vector = sampling.pair(class_vector, self._class(None, batch))
        cls = jnp.broadcast_to(self.cls_token, class_vector.shape) + self.pos_embed[0]
        prefix = jnp.stack([cls, class_vector + self.pos_embed[1] + self.target_embed[0]], 1).astype(self.dtype)
        block = self._block()
        module, variables = self.unbind()  # a bound module must not be called inside a scan
        params = dict(variables["params"])
        layers = cache.layers(params.pop("blocks"), self.dtype)
        params = cache.cast(params, self.dtype)
        apply = lambda method, *args: module.apply({"params": params}, *args, method=method)

        def step(x, place, kept):
            condition = apply("_side", class_vector, place, 1)
            x, kept = cache.advance(block, layers, x[:, None], kept, Side(condition=condition, at=place))
            logits = apply("_head", x, condition)[:, 0]
            if guided:
                logits = sampling.guide_pairs(logits, guidance, place - PREFIX + 1, self.length)
            return logits, kept

        def embed(codes, place):
            x = apply("_token", codes, place)
            return sampling.pair(x, x) if guided else x

        def choose(logits, i):
            return sampling.draw(jax.random.fold_in(rng, i), logits, temperature, top_k, top_p)

        kept = cache.empty(block, layers, prefix.shape[0], self.width, PREFIX - 1 + k)
        return cache.unroll(step, embed, choose, prefix, kept, k)

    # ---- pieces ----

    def _fields(self):
        return BLOCK | dict(self.block) | dict(dropout=self.dropout, dtype=self.dtype)

    def _block(self):
        return Block(**self._fields(), parent=None)

    def _raster(self, batch):
        return jnp.broadcast_to(jnp.arange(self.length), (batch, self.length))

    def _class(self, condition, batch, null=None):
        """The vector of each sample's class, or of the null class: [B D]."""
        return self.embed(self.vocabulary + 1 + labels(condition, self.classes, batch, null))

    def _token(self, codes, place):
        """Codes int [B] that stand at `place` in raster order -> [B D]."""
        i = place - PREFIX  # the last place has no target, and nothing reads it
        return self.embed(codes) + self.pos_embed[place] + self.target_embed[jnp.minimum(i + 1, self.length - 1)]

    def _side(self, class_vector, place, n):
        """The condition of n places from `place` on: [B n D]."""
        numbers = jax.lax.dynamic_slice_in_dim(self.number_embed, place, n)
        return (class_vector[:, None] + numbers).astype(self.dtype)

    def _head(self, x, condition):
        scale, shift = jnp.split(self.head_adaln(jax.nn.silu(condition)), 2, -2)  # each [B n 1 D]
        x = modulate(layer_norm(x, 1e-6), shift[..., 0, :], scale[..., 0, :])
        return self.head(x).astype(jnp.float32)
