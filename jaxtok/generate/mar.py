"""Masked autoregression (MAR, arXiv 2406.11838): tokens in a random order, each drawn digit by digit at its place."""

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
from jaxtok.generate.heads import Channels, take_apart
from jaxtok.generate.masked import counts
from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm

BLOCK = dict(mlp="gelu", eps=1e-6, bias=("qkv", "out", "mlp"))
MASKED = -1  # every digit of a token that is not known


class MAR(nn.Module):
    """An encoder of the known tokens, a decoder over all places, and a head that draws a place's token digit by digit.

    The contract is that of generate/__init__.py, with tokens [B N G] of G digits: TokenBridge's channels (arXiv
    2503.16430). The class stands before the known tokens, `buffer` times over. In training the encoder has room for as
    many tokens as can be known, 1 - `least` of them; while sampling for all.

    Attributes:
      vocabulary: of the G digits.
      length: N tokens.
      width: of both transformers; depth: of each.
      classes: how many; 0: the null class stands for nothing.
      head: fields of generate.heads.Channels, the law of a token at a place.
      buffer: how often the class stands there.
      block: fields of nn.decoder_block.Block that differ from BLOCK.
      least: the smallest share of masked tokens in training; the shares are normal around 1 with deviation 0.25, cut
        at `least` and 1, each sample's its own.
      null_rate: share of training samples whose class is dropped.
      dropout: rate on what each layer of both transformers adds, in training.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    vocabulary: tuple[int, ...]
    length: int
    width: int
    depth: int
    classes: int = 0
    head: Mapping[str, Any] = FrozenDict()
    buffer: int = 64
    block: Mapping[str, Any] = FrozenDict()
    least: float = 0.7
    null_rate: float = 0.1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def setup(self):
        normal = nn.initializers.normal(0.02)
        layers = BLOCK | dict(self.block) | dict(dtype=self.dtype, remat=self.remat, unroll=self.unroll)
        norm = lambda: Norm("layer", layers["eps"])
        self.class_embed = nn.Embed(self.classes + 1, self.width, embedding_init=normal)
        self.encoder_pos = self.param("encoder_pos", normal, (self.buffer + self.length, self.width))
        self.norm_in = norm()
        self.encoder_blocks = stack(self.depth, dropout=self.dropout, **layers)
        self.encoder_norm = norm()
        self.between = Linear(self.width, dtype=self.dtype)
        self.mask_token = self.param("mask_token", normal, (self.width,))
        self.decoder_pos = self.param("decoder_pos", normal, (self.buffer + self.length, self.width))
        self.decoder_blocks = stack(self.depth, dropout=self.dropout, **layers)
        self.decoder_norm = norm()
        self.feature_pos = self.param("feature_pos", normal, (self.length, self.width))
        head = dict(self.head)
        block = BLOCK | dict(qk_norm=True, dtype=self.dtype) | dict(head.pop("block", {}))
        self.digits = Channels(self.vocabulary, self.width, True, block=block, remat=self.remat, **head)

    def __call__(self, codes, condition=None, *, null=None, train=False, known=None):
        """Features [B N D] of all places, for codes int [B N G] of which some are MASKED.

        null: bool [B], whose class is dropped. known: at most so many tokens are not masked; None: all may be.
        """
        batch, n = codes.shape[:2]
        masked = codes[..., 0] == MASKED  # [B N]
        first = jnp.argsort(masked, -1, stable=True)[:, :known]  # [B V], the known ones, and masked ones after them
        there = ~jnp.take_along_axis(masked, first, 1)
        x = self.digits.embed(jnp.maximum(jnp.take_along_axis(codes, first[..., None], 1), 0))  # [B V D]
        label = self.class_embed(labels(condition, self.classes, batch, null))[:, None]  # [B 1 D]
        tables = self.encoder_pos[: self.buffer], self.encoder_pos[self.buffer :]
        x = jnp.concatenate([label + tables[0], x + tables[1][first]], 1)
        seen = jnp.pad(there, ((0, 0), (self.buffer, 0)), constant_values=True)  # [B buffer+V]
        side = Side(mask=jnp.broadcast_to(seen[:, None], (batch, x.shape[1], x.shape[1])))
        x, _ = self.encoder_blocks(self.norm_in(x).astype(self.dtype), side, train)
        x = self.between(self.encoder_norm(x))
        hidden = self.mask_token.astype(self.dtype)
        places = put(
            jnp.broadcast_to(hidden, (batch, n, self.width)),
            first,
            jnp.where(there[..., None], x[:, self.buffer :], hidden),
        )
        x = jnp.concatenate([x[:, : self.buffer], places], 1) + self.decoder_pos
        x, _ = self.decoder_blocks(x.astype(self.dtype), Side(), train)
        return self.decoder_norm(x)[:, self.buffer :] + self.feature_pos.astype(self.dtype)

    def loss(self, codes, condition=None, *, train=False, step=0):
        """Scores [B N] of codes int32 [B N G] under a random mask; those that are not masked have no weight."""
        check_given(condition, self.classes)
        much, where, drop = jax.random.split(self.make_rng("train"), 3)
        batch, n = codes.shape[:2]
        share = 1 + 0.25 * jax.random.truncated_normal(much, (self.least - 1) / 0.25, 0.0, (batch, 1))
        masked = jnp.argsort(jax.random.uniform(where, (batch, n)), -1) < jnp.ceil(n * share)
        null = jax.random.bernoulli(drop, self.null_rate, (batch,)) if train else None
        shown, known = jnp.where(masked[..., None], MASKED, codes), n - math.floor(n * self.least)
        x = self(shown, condition, null=null, train=train, known=known)
        return self.digits.score(x, codes)._replace(weight=masked.astype(jnp.float32))

    def sample(self, rng, condition=None, *, tokens=None, steps=64, guidance=1.0, temperature=1.0, batch=1):
        """All tokens in a random order, in `steps` passes over the places (or twice as many, guided).

        Args:
          rng: key.
          condition: see generate/__init__.py; None: the null class, for `batch` samples.
          tokens: None or N: all of them.
          steps: after step s, N cos(pi/2 (s + 1) / steps) tokens are still to come.
          guidance: scale, of the features, or a schedule over the N tokens (generate/sampling.py).
          temperature: of each digit's law.

        Returns int32 [B N G].
        """
        check_steps(self, steps, tokens)
        n, left = self.length, counts(self.length, steps, cosine)
        before = np.concatenate([[n], left[:-1]])
        most = max(before - left)  # tokens a step
        predict, batch = passes(self, condition, batch, guidance)
        module, variables = self.unbind()
        head, layers = take_apart(variables["params"]["digits"], self.dtype)
        params = {"params": variables["params"] | {"digits": head}}
        order = jnp.argsort(jax.random.uniform(jax.random.fold_in(rng, steps), (batch, n)), -1)

        def turn(codes, now):
            step, before, after = now
            x = predict(sampling.scale_at(guidance, n - after, n), codes)  # [B N D]
            start = jnp.minimum(after, n - most)  # those of this step stand in the order from `after` to `before`
            here = jax.lax.dynamic_slice_in_dim(order, start, most, 1)  # [B m]
            key = jax.random.fold_in(rng, step)
            choose = lambda logits, g: sampling.draw(jax.random.fold_in(key, g), logits, temperature)
            x = jnp.take_along_axis(x, here[..., None], 1)
            drawn = module.apply(params, x, choose, layers, method="draw")  # [B m G]
            number = start + jnp.arange(most)[:, None]
            are = (after <= number) & (number < before)
            return put(codes, here, jnp.where(are, drawn, jnp.take_along_axis(codes, here[..., None], 1))), None

        codes = jnp.full((batch, n, len(self.vocabulary)), MASKED, jnp.int32)
        return jax.lax.scan(turn, codes, (jnp.arange(steps), before, left))[0]

    def draw(self, features, choose, layers=None):
        """Tokens int [... G] at features [... D]; choose, layers: see generate.heads.Digits."""
        return self.digits.draw(features, choose, layers)


def put(x, places, values):
    """x [B N D] with values [B m D] at places int [B m], each sample's its own."""
    return jax.vmap(lambda x, places, values: x.at[places].set(values))(x, places, values)


def cosine(done):
    """The share of masked tokens once a share of the steps is done: cos(pi/2 done)."""
    return math.cos(math.pi / 2 * done)
