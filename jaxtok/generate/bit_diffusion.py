"""Diffusion over bits (Instella-T2I, arXiv 2506.21022): noise flips them, a transformer says which to flip back.

At time t each bit is its own with probability 1 - t, and a coin's otherwise: x_t ~ Bernoulli((1 - t) x_0 + t / 2). So
at t = 1 nothing is left of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxtok.generate import sampling
from jaxtok.generate.condition import check_given, check_steps, labels, passes
from jaxtok.generate.objective import Scores
from jaxtok.nn import flow
from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.position import TimeEmbedding
from jaxtok.nn.transformer import modulate

BLOCK = dict(mlp="gelu", norm="plain", eps=1e-6, bias=("qkv", "out", "mlp"))


def logistic_normal(u):
    """Uniform u [B] -> t [B], the logistic function of a standard normal: most times lie half way."""
    return jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))


def add_noise(key, bits, t):
    """Bits [B ...] of 0 and 1 at time t [B]: float32 like bits, of 0 and 1."""
    keep = 1 - flow.expand(t, bits)
    return jax.random.bernoulli(key, keep * bits + (1 - keep) / 2).astype(jnp.float32)


def posterior(x_t, p, t, s):
    """The probability that a bit is 1 at time s < t, float32 [...].

    Args:
      x_t: the bit at t, 0 or 1 [...].
      p: the probability that it is 1 at time 0 [...]; both values of x_0 have their share.
      t, s: [].

    By Bayes from q(x_s | x_0), and q(x_t | x_s), which keeps a bit with probability (1 - t) / (1 - s).
    """
    keep = (1 - t) / (1 - s)
    likely = keep * x_t + (1 - keep) / 2, keep * (1 - x_t) + (1 - keep) / 2  # of x_t, if x_s is 1, and if it is 0

    def given(x_0):
        one = (1 - s) * x_0 + s / 2
        return one * likely[0] / (one * likely[0] + (1 - one) * likely[1])

    return p * given(1.0) + (1 - p) * given(0.0)


class BitDiffusion(nn.Module):
    """Noise -> bits int [B N m]: a bidirectional transformer over tokens, modulated by time and class.

    The contract is that of generate/__init__.py; `sample` gives all tokens, and Scores are of samples [B], the mean
    cross-entropy of a bit in nats at one random time.

    Attributes:
      vocabulary: (2,) * m, one size a bit (quantizers.binary with bits=(1,) * m).
      length: N tokens.
      width, depth: of the transformer.
      classes: how many; 0: the null class stands for nothing.
      block: fields of nn.decoder_block.Block that differ from BLOCK.
      time: law of the training time, uniform [B] -> [B], 1 being noise.
      null_rate: share of training samples whose class is dropped.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    vocabulary: tuple[int, ...]
    length: int
    width: int
    depth: int
    classes: int = 0
    block: Mapping[str, Any] = FrozenDict()
    time: Callable = logistic_normal
    null_rate: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x_t, t, condition=None, *, null=None, train=False):
        """Log odds float32 [B N m] of the bits of x_0, at bits x_t [B N m] and time t [B]; null bool [B]: as of AR."""
        if set(self.vocabulary) != {2}:
            raise ValueError(f"BitDiffusion is over bits, so its vocabulary is (2,) * m, and not {self.vocabulary}.")
        normal = nn.initializers.normal(0.02)
        x = Linear(self.width, dtype=self.dtype, name="embed")(2 * x_t.astype(jnp.float32) - 1)
        x = (x + self.param("pos_embed", normal, (self.length, self.width))).astype(self.dtype)  # [B N D]
        classes = nn.Embed(self.classes + 1, self.width, embedding_init=normal, name="class_embed")
        vector = TimeEmbedding(self.width, dtype=self.dtype, name="time")(t)
        vector = vector + classes(labels(condition, self.classes, x_t.shape[0], null))
        vector = vector[:, None].astype(self.dtype)  # [B 1 D]
        fields = BLOCK | dict(self.block) | dict(dtype=self.dtype)
        blocks = stack(self.depth, remat=self.remat, unroll=self.unroll, name="blocks", **fields)
        x, _ = blocks(x, Side(condition=vector), train)
        modulation = Linear((2, self.width), init="zeros", dtype=self.dtype, name="head_adaln")(jax.nn.silu(vector))
        x = modulate(layer_norm(x, fields["eps"]), modulation[..., 0, :], modulation[..., 1, :])
        flipped = Linear(len(self.vocabulary), init="zeros", name="head")(x.astype(jnp.float32))
        return (1 - 2 * x_t) * flipped

    def loss(self, indices, condition=None, *, train=False, step=0):
        """Scores [B] of bits int [B N m] at one random time each."""
        check_given(condition, self.classes)
        time_key, noise_key, drop_key = jax.random.split(self.make_rng("train"), 3)
        batch, bits = len(indices), indices.astype(jnp.float32)
        t = self.time(jax.random.uniform(time_key, (batch,)))
        null = jax.random.bernoulli(drop_key, self.null_rate, (batch,)) if train else None
        odds = self(add_noise(noise_key, bits, t), t, condition, null=null, train=train)
        return Scores(cross_entropy(odds, bits).mean((1, 2)), jnp.ones(batch))

    def sample(self, rng, condition=None, *, steps=20, guidance=1.0, batch=1):
        """Draws coins, then in each step all bits from their posterior; the last step takes the likelier value.

        Args:
          rng: key.
          condition: see generate/__init__.py; None: the null class, for `batch` samples.
          steps: evenly spaced times from 1.
          guidance: scale of the log odds, or a schedule over the steps (generate/sampling.py).

        Returns int32 [B N m].
        """
        check_steps(self, steps)
        predict, batch = passes(self, condition, batch, guidance)

        def turn(x, now):
            i, t = now
            odds = predict(sampling.scale_at(guidance, i, steps), x, t)
            p = posterior(x, jax.nn.sigmoid(odds), t, t - 1 / steps)
            last = i == steps - 1
            drawn = jax.random.bernoulli(jax.random.fold_in(rng, i), p)
            return jnp.where(last, odds > 0, drawn).astype(jnp.float32), None

        noise = jax.random.bernoulli(jax.random.fold_in(rng, steps), shape=(batch, self.length, len(self.vocabulary)))
        x, _ = jax.lax.scan(turn, noise.astype(jnp.float32), (jnp.arange(steps), flow.times(steps)))
        return x.astype(jnp.int32)


def cross_entropy(odds, bits):
    """Nats [...] of bits, 0 or 1, at log odds."""
    return jax.nn.softplus(odds) - bits * odds
