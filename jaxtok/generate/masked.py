"""Masked models over codes (MaskGIT, arXiv 2202.04200): many tokens a step, the surest first."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from jaxtok.generate import sampling
from jaxtok.generate.condition import check_given, check_steps, labels, passes
from jaxtok.generate.objective import score
from jaxtok.nn.decoder_block import Block, Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm

BLOCK = dict(mlp="gelu", bias=("qkv", "out", "mlp"))


# ---- the law of training masks ----


def masked_count(u, n):
    """How many of n tokens are masked for uniform u: n acos(u) / (pi/2), rounded, at least 1. int32 like u."""
    return jnp.maximum(jnp.round(n * jnp.arccos(u) / (jnp.pi / 2)), 1).astype(jnp.int32)


# ---- the sampler ----


def arccosine(done):
    """The share of masked tokens once a share of the steps is done: acos(done) / (pi/2)."""
    return math.acos(done) / (math.pi / 2)


def counts(n, steps, law=arccosine):
    """How many of n tokens are still masked after each step: int [steps].

    After step s, floor(n law((s + 1) / steps)), but fewer than before, at least 1; 0 at the end.
    """
    left, after = n, []
    for step in range(steps):
        left = max(1, min(left - 1, math.floor(n * law((step + 1) / steps))))
        after.append(left)
    return np.array([*after[:-1], 0])


def annealed(logits, left):
    """Logits at the softmax temperature 0.5 + 0.8 left, `left` being the share of steps still to come."""
    return logits / (0.5 + 0.8 * left)


def reveal(indices, masked, logits, uniforms, temperature, count):
    """One step: every masked token gets a code, the `count` least sure of these are masked again.

    Args:
      indices: int [B N]; masked: bool [B N].
      logits: [B N K] for all tokens.
      uniforms: (float [B N K], float [B N]), uniform draws for codes and for confidences.
      temperature: of the Gumbel noise on both.
      count: int [], how many are masked afterwards.

    A confidence is the chosen code's logit, and not its log-probability, as in TiTok's code. Returns (indices, masked).
    """
    noisy = logits + temperature * sampling.gumbel(uniforms[0])
    chosen = noisy.argmax(-1).astype(indices.dtype)
    indices = jnp.where(masked, chosen, indices)
    confidence = jnp.take_along_axis(logits, indices[..., None], -1)[..., 0]
    confidence = confidence + temperature * sampling.gumbel(uniforms[1])
    confidence = jnp.where(masked, confidence, jnp.inf)
    rank = jnp.argsort(jnp.argsort(confidence, -1), -1)
    return indices, rank < count


class Masked(nn.Module):
    """A bidirectional transformer over [class, tokens], some of them masked, that gives logits for every token.

    The contract is that of generate/__init__.py. With `skips`, the second half of the layers reads the outputs of the
    first (U-ViT, arXiv 2209.12152): depth / 2 layers, one in the middle, depth / 2 layers.

    Attributes:
      vocabulary: K codes; id K is the mask, K + 1 + c are the classes, K + 1 + `classes` is the null class.
      length: N tokens.
      width, depth: of the transformer.
      classes: how many; 0: the null class stands for nothing.
      block: fields of nn.decoder_block.Block that differ from BLOCK; with post_norm the embedding is normalised,
        without it the last layer's output.
      skips: see above.
      smoothing: of the labels.
      visible_weight: of tokens that are not masked, in the loss.
      null_rate: share of training samples whose class is dropped.
      dropout: rate on what each layer adds, in training.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    vocabulary: int
    length: int
    width: int
    depth: int
    classes: int = 0
    block: Mapping[str, Any] = FrozenDict()
    skips: bool = False
    smoothing: float = 0.1
    visible_weight: float = 0.1
    null_rate: float = 0.1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.embed = nn.Embed(self.vocabulary + self.classes + 2, self.width, embedding_init=normal)
        self.pos_embed = self.param("pos_embed", normal, (1 + self.length, self.width))
        fields = BLOCK | dict(self.block) | dict(dropout=self.dropout, dtype=self.dtype)
        layers = dict(remat=self.remat, unroll=self.unroll)
        if not self.skips:
            self.blocks = stack(self.depth, **layers, **fields)
        elif self.depth % 2:
            raise ValueError(f"Masked with skips needs an even depth, got {self.depth}.")
        else:
            self.in_blocks = stack(self.depth // 2, target=Shown, fields=fields, **layers)
            self.mid_block = Block(**fields)
            self.out_blocks = stack(self.depth // 2, target=Skipping, over=(0,), fields=fields, **layers)
        self.norm = Norm("layer", Block(**fields, parent=None).eps)
        self.drop = nn.Dropout(self.dropout, rng_collection="train")
        self.head = Linear(self.vocabulary, dtype=self.dtype)

    def __call__(self, indices, condition=None, *, null=None, train=False):
        """Logits [B N K] of tokens int [B N], where K means masked; null bool [B]: whose class is dropped."""
        label = labels(condition, self.classes, indices.shape[0], null)
        x = self.embed(jnp.concatenate([self.vocabulary + 1 + label[:, None], indices], 1)) + self.pos_embed
        post_norm = self.block.get("post_norm", False)
        x = self.drop(self.norm(x) if post_norm else x, deterministic=not train).astype(self.dtype)  # [B 1+N D]
        side = Side()
        if self.skips:
            x, shown = self.in_blocks(x, side, train)
            x, _ = self.mid_block(x, side, train)
            x, _ = self.out_blocks(x, side, train, shown[::-1])
        else:
            x, _ = self.blocks(x, side, train)
        x = x if post_norm else self.norm(x)
        return self.head(x[:, 1:]).astype(jnp.float32)

    def loss(self, indices, condition=None, *, train=False, step=0):
        """Scores [B N] of codes int32 [B N] under a random mask; `correct` counts masked tokens by their weight too."""
        check_given(condition, self.classes)
        much, where, drop = jax.random.split(self.make_rng("train"), 3)
        batch, n = indices.shape
        count = masked_count(jax.random.uniform(much, (batch, 1)), n)
        masked = jnp.argsort(jax.random.uniform(where, (batch, n)), -1) < count
        null = jax.random.bernoulli(drop, self.null_rate, (batch,)) if train else None
        logits = self(jnp.where(masked, self.vocabulary, indices), condition, null=null, train=train)
        weight = jnp.where(masked, 1.0, self.visible_weight)
        return score(logits, indices, weight, self.smoothing if train else 0.0)

    def sample(
        self, rng, condition=None, *, tokens=None, steps=8, guidance=1.0, temperature=4.5, anneal=False, batch=1
    ):
        """All tokens from masks in `steps` passes (or twice as many, guided).

        Args:
          rng: key.
          condition: see generate/__init__.py; None: the null class, for `batch` samples.
          tokens: None or N: all of them.
          guidance: scale, or a schedule over the steps (generate/sampling.py).
          temperature: of the Gumbel noise at the first step; it falls linearly to 0.
          anneal: whether logits are `annealed`.

        Returns int32 [B N].
        """
        check_steps(self, steps, tokens)
        predict, batch = passes(self, condition, batch, guidance)

        def turn(state, now):
            step, count = now
            indices, masked = state
            shown = jnp.where(masked, self.vocabulary, indices)
            logits = predict(sampling.scale_at(guidance, step, steps), shown)
            left = 1 - (step + 1) / steps
            keys = jax.random.split(jax.random.fold_in(rng, step))
            uniforms = [jax.random.uniform(k, s) for k, s in zip(keys, (logits.shape, masked.shape), strict=True)]
            logits = annealed(logits, left) if anneal else logits
            return reveal(indices, masked, logits, uniforms, temperature * left, count), None

        state = jnp.zeros((batch, self.length), jnp.int32), jnp.ones((batch, self.length), bool)
        (indices, _), _ = jax.lax.scan(turn, state, (jnp.arange(steps), counts(self.length, steps)))
        return indices


class Shown(nn.Module):
    """A block of the first half: gives its output for the second half too."""

    fields: Mapping[str, Any]

    @nn.compact
    def __call__(self, x, side, train=False):
        x, _ = Block(**self.fields, name="block")(x, side, train)
        return x, x


class Skipping(nn.Module):
    """A block of the second half: reads x and what the first half showed, [B N D] each."""

    fields: Mapping[str, Any]

    @nn.compact
    def __call__(self, x, side, train=False, shown=None):
        x = Linear(x.shape[-1], dtype=x.dtype, name="skip")(jnp.concatenate([x, shown], -1))
        return Block(**self.fields, name="block")(x, side, train)
