"""A rectified-flow transformer that rebuilds a picture from any prefix of its tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import flow
from jaxtok.nn.attention import Attend
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.patch import patchify, unpatchify
from jaxtok.nn.position import TimeEmbedding, sincos_2d
from jaxtok.nn.transformer import Transformer, modulate
from jaxtok.structs import Decoded

GUIDANCE = {"apg": flow.apg, "cfg": flow.cfg}
PATCHES, TOKENS = 0, 1  # the two sets that adaLN modulates apart


class FlowDecoder(nn.Module):
    """FlexTok's decoder (arXiv 2502.13967): noisy patches and code tokens through one adaLN-zero transformer.

    A token that is not kept becomes one learned mask vector, overwriting its position too, and is still attended;
    without a condition all tokens become one learned null vector. Codes may have fewer than R tokens: the others are
    tokens that are not kept.

    Attributes:
      width, depth, head_dim: of the transformer.
      registers: R, how many tokens come in.
      shape: (h, w, C) of what is decoded: pixels, or the codec's latents.
      patch: side of a patch.
      grid: patches of the pictures that the positions were made for, (rows, columns); another grid is laid over the
        same square. None: positions count patches.
      prediction: what the head gives, "velocity" or "x0"; a head narrower than a patch's values cannot span a
        velocity, which holds the noise: small models want "x0".
      time: law of the training time, uniform [B] -> [B] (nn.flow).
      null_rate: share of training samples that see the null condition, for guidance.
      tap: the block after which `Decoded.features` shows the patches to a teacher (REPA), or None.
      max_timestep: of the time embedding.
      dtype: of the computation. remat, unroll: see nn.transformer.Transformer.
      shortcuts: which of the exact savings to make (docs/performance.md): "collapse" (one token counts for all that
        are equal), "last" (the last block computes what is read), "once" (what depends on the time alone is computed
        for all steps at once, and both guidance passes are one sequence).
    """

    width: int
    depth: int
    registers: int
    shape: tuple[int, int, int]
    patch: int = 2
    head_dim: int = 64
    grid: tuple[int, int] | None = None
    prediction: str = "velocity"
    time: Callable = flow.mode_time
    null_rate: float = 0.1
    tap: int | None = None
    max_timestep: float = 1000.0
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    shortcuts: tuple[str, ...] = ("collapse", "last", "once")

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.code_embed = Linear(self.width, dtype=self.dtype, name="code_embed")
        self.register_pos_embed = self.param("register_pos_embed", normal, (self.registers, self.width))
        self.mask_token = self.param("mask_token", normal, (self.width,))
        self.null_token = self.param("null_token", normal, (self.width,))
        self.patch_embed = Linear(self.width, dtype=self.dtype, name="patch_embed")
        self.time_embed = TimeEmbedding(self.width, self.max_timestep, dtype=self.dtype, name="time")
        self.blocks = Transformer(
            self.depth, self.head_dim, 2, dtype=self.dtype, remat=self.remat, unroll=self.unroll, name="blocks"
        )
        self.head_adaln = Linear((2, self.width), init="zeros", dtype=self.dtype, name="head_adaln")
        self.head = Linear(self.patch * self.patch * self.shape[2], init="zeros", name="head")

    def __call__(self, codes, *, target, context=None, train=False, time=None, noise=None):
        """Decodes at one random time. target [B h w C] is the clean picture x0; time [B] and noise like target are
        drawn from the rng stream "train" unless given. Returns Decoded in the space of `prediction`."""
        self._check()
        keys = jax.random.split(self.make_rng("train"), 3) if train or time is None or noise is None else None
        time = self.time(jax.random.uniform(keys[0], target.shape[:1])) if time is None else time
        noise = jax.random.normal(keys[1], target.shape) if noise is None else noise
        null = jax.random.bernoulli(keys[2], self.null_rate, target.shape[:1]) if train and self.null_rate else None
        prediction, features = self._at(flow.interpolate(target, noise, time), time, codes, null, self.tap, train)
        return Decoded(prediction, noise - target if self.prediction == "velocity" else target, features)

    def predict(self, x_t, t, codes, null=None):
        """The head's output at x_t [B h w C] and time t [B], float32; null bool [B]: whose condition is dropped."""
        return self._at(x_t, t, codes, null)[0]

    def velocity(self, x_t, t, codes, null=None):
        """The velocity at x_t [B h w C], time t [B]: float32 [B h w C]."""
        self._check()
        return self._as_velocity(self.predict(x_t, t, codes, null), x_t, t)

    def sample(self, codes, rng=None, *, steps=25, guidance=1.0, guide="apg", noise=None, size=None):
        """Solves the flow from noise to the picture with Euler steps.

        Args:
          codes: Codes of at most R tokens; only z and keep are read.
          rng: key of the noise, or None when noise is given.
          steps: Euler steps; one step gives the model's estimate of x0 straight from noise.
          guidance: scale; exactly 1 costs one pass a step instead of two.
          guide: "apg" (FlexTok's) or "cfg".
          noise: [B h w C], x at t = 1.
          size: (h, w) of what is decoded, if not that of `shape`.

        Returns float32 [B h w C].
        """
        self._check()
        if steps < 1:
            raise ValueError(f"FlowDecoder.sample needs at least 1 step, got {steps}.")
        if guide not in GUIDANCE:
            raise ValueError(f'guide is one of {sorted(GUIDANCE)}, not "{guide}".')
        guided = guidance != 1.0
        batch, times = codes.z.shape[0], flow.times(steps)
        if noise is None:
            noise = jax.random.normal(rng, (batch, *(size or self.shape[:2]), self.shape[2]))
        conditions = [self._tokens(codes)]
        if guided:
            conditions.append(self._null_tokens(batch))
        once = self._once(times) if "once" in self.shortcuts else None
        passes = [[condition] for condition in conditions] if once is None else [conditions]
        module, variables = self.unbind()  # a bound module must not be called inside a scan

        def velocity(x, t, buffer, once):
            t = jnp.full((batch,), t)
            v = [v for some in passes for v in module.apply(variables, x, t, some, once, method="_under")]
            return GUIDANCE[guide](*v, guidance, buffer) if guided else (*v, buffer)

        x, _ = flow.euler(velocity, noise, times, jnp.zeros_like(noise) if guided else None, once)
        return x

    # ---- pieces ----

    def _at(self, x_t, t, codes, null=None, tap=None, train=False):
        """(the head's output, features) at one time a sample."""
        tokens, counts = self._tokens(codes)
        if null is not None:
            tokens = jnp.where(null[:, None, None], self.null_token, tokens)
        return self._run(x_t, [(tokens, counts)], self.time_embed(t), tap=tap, train=train)

    def _under(self, x, t, conditions, once):
        """The velocity [B h w C] under each condition at time t [B], in one pass; `once`: of that time, or None."""
        y, _ = self._run(x, conditions, self.time_embed(t) if once is None else None, once)
        return [self._as_velocity(y, x, t) for y in jnp.split(y, len(conditions))]

    def _tokens(self, codes):
        """What the transformer reads of codes: (tokens [B K D], how many each stands for, [K] or None).

        All R of them, or, collapsed, those that codes have and one for all that they lack: those carry the same
        vector and no position, so no layer tells them apart.
        """
        k, missing = codes.z.shape[1], self.registers - codes.z.shape[1]
        if missing < 0:
            raise ValueError(f"FlowDecoder reads at most {self.registers} tokens, got {k}.")
        tokens = self.code_embed(codes.z) + self.register_pos_embed[:k]
        tokens = jnp.where(codes.keep[..., None], tokens, self.mask_token)
        if not missing:
            return tokens, None
        rest, counts = self._repeat(self.mask_token, missing, tokens.shape[0])
        return jnp.concatenate([tokens, rest], 1), np.concatenate([np.ones(k), counts])

    def _null_tokens(self, batch):
        """What the transformer reads where there is no condition."""
        return self._repeat(self.null_token, self.registers, batch)

    def _repeat(self, vector, n, batch):
        """n equal tokens, or one that counts for them: (tokens, counts [K])."""
        counts = np.array([n]) if "collapse" in self.shortcuts else np.ones(n)
        return jnp.broadcast_to(vector, (batch, len(counts), self.width)), counts

    def _once(self, times):
        """What depends on the time alone: trees of arrays [steps, ...] for the blocks and for the head."""
        condition = self.time_embed(times)  # [S D]
        blocks = jnp.moveaxis(self.blocks.modulations(condition), 1, 0)[:, :, None]  # [S L 1 2 6 D]
        return blocks, self.head_adaln(jax.nn.silu(condition))[:, None]  # [S 1 2 D]

    def _run(self, x, conditions, condition=None, once=None, tap=None, train=False):
        """The trunk and its head under n conditions: (float32 [n B h w C], features).

        The n sequences [patches, tokens] are packed in one, of which each sees itself alone.
        """
        height, width, batch = x.shape[1] // self.patch, x.shape[2] // self.patch, x.shape[0]
        patches = self.patch_embed(patchify(x, self.patch))  # [B P D]
        patches = patches + sincos_2d(height, width, self.width, self.grid).reshape(1, -1, self.width)
        p, start = patches.shape[1], 0
        sequence, segments, attends, last = [], [], [], []
        for tokens, counts in conditions:
            k = tokens.shape[1]
            counts = None if counts is None or (counts == 1).all() else np.concatenate([np.ones(p), counts])
            itself = slice(start, start + p + k)
            sequence += [patches, tokens]
            segments += [(PATCHES, p), (TOKENS, k)]
            attends.append(Attend(itself, itself, counts=counts))
            last.append(Attend(slice(start, start + p), itself, counts=counts))
            start += p + k
        sequence = jnp.concatenate(sequence, 1).astype(self.dtype)  # [B N D]
        self.sow("intermediates", "sequence", sequence)
        blocks, head = once if once is not None else (None, self.head_adaln(jax.nn.silu(condition)))
        y = self.blocks(
            sequence,
            attends,
            last if "last" in self.shortcuts else None,
            segments=segments,
            condition=condition,
            modulations=blocks,
            tap=tap,
            train=train,
        )
        y, features = (y, {}) if tap is None else (y[0], {"patches": y[1][:, :p]})
        if "last" not in self.shortcuts:
            y = jnp.concatenate([y[:, a.queries] for a in last], 1)
        y = modulate(layer_norm(y), head[:, :1], head[:, 1:]).astype(jnp.float32)  # [B n P D]
        y = self.head(y).reshape(batch, len(conditions), p, -1)
        return unpatchify(y.swapaxes(0, 1).reshape(-1, p, y.shape[-1]), (height, width), self.patch), features

    def _as_velocity(self, y, x_t, t):
        return y if self.prediction == "velocity" else flow.velocity_from_x0(x_t, y, t)

    def _check(self):
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f'FlowDecoder.prediction is "velocity" or "x0", not "{self.prediction}".')
