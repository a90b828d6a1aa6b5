"""A rectified-flow transformer that rebuilds a picture from any prefix of its tokens."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import flow
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm
from jaxtok.nn.patch import patchify, unpatchify
from jaxtok.nn.position import TimeEmbedding, sincos_2d
from jaxtok.nn.transformer import modulate, stack
from jaxtok.structs import Decoded

GUIDANCE = {"apg": flow.apg, "cfg": flow.cfg}


class FlowDecoder(nn.Module):
    """FlexTok's decoder (arXiv 2502.13967): noisy patches and code tokens through one adaLN-zero transformer.

    A token that is not kept becomes one learned mask vector, overwriting its position too, and is still attended;
    without a condition all tokens become one learned null vector.

    Attributes:
      width, depth, head_dim: of the transformer.
      registers: R, how many tokens come in.
      shape: (h, w, C) of what is decoded: pixels, or the codec's latents.
      patch: side of a patch.
      prediction: what the head gives, "velocity" or "x0"; a head narrower than a patch's values cannot span a
        velocity, which holds the noise: small models want "x0".
      time: law of the training time, uniform [B] -> [B] (nn.flow).
      null_rate: share of training samples that see the null condition, for guidance.
      max_timestep: of the time embedding.
      dtype: of the computation. remat, unroll: see nn.transformer.stack.
    """

    width: int
    depth: int
    registers: int
    shape: tuple[int, int, int]
    patch: int = 2
    head_dim: int = 64
    prediction: str = "velocity"
    time: Callable = flow.mode_time
    null_rate: float = 0.1
    max_timestep: float = 1000.0
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def predict(self, x_t, t, codes, null=None):
        """The head's output at x_t [B h w C] and time t [B], float32; null bool [B]: whose condition is dropped."""
        height, width, channels = x_t.shape[1:]
        grid = height // self.patch, width // self.patch
        tokens = Linear(self.width, dtype=self.dtype, name="code_embed")(codes.z)  # [B R D]
        normal = nn.initializers.normal(0.02)
        tokens = tokens + self.param("register_pos_embed", normal, (self.registers, self.width))
        mask_token = self.param("mask_token", normal, (self.width,))
        tokens = jnp.where(codes.keep[..., None], tokens, mask_token)
        null_token = self.param("null_token", normal, (self.width,))
        if null is not None:
            tokens = jnp.where(null[:, None, None], null_token, tokens)
        patches = Linear(self.width, dtype=self.dtype, name="patch_embed")(patchify(x_t, self.patch))  # [B P D]
        patches = patches + sincos_2d(*grid, self.width).reshape(1, -1, self.width)
        x = jnp.concatenate([patches, tokens], 1).astype(self.dtype)  # [B P+R D]
        self.sow("intermediates", "sequence", x)
        condition = TimeEmbedding(self.width, self.max_timestep, dtype=self.dtype, name="time")(t)  # [B D]
        blocks = stack(
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
            name="blocks",
            head_dim=self.head_dim,
            segments=(patches.shape[1], tokens.shape[1]),
            dtype=self.dtype,
        )
        x, _ = blocks(x, None, condition)
        head = Linear((2, self.width), init="zeros", dtype=self.dtype, name="head_adaln")
        shift, scale = jnp.split(head(jax.nn.silu(condition)), 2, 1)  # each [B 1 D]
        x = modulate(layer_norm(x[:, : patches.shape[1]]), shift, scale).astype(jnp.float32)
        x = Linear(self.patch * self.patch * channels, init="zeros", name="head")(x)
        return unpatchify(x, grid, self.patch)  # [B h w C]

    def velocity(self, x_t, t, codes, null=None):
        """The velocity at x_t [B h w C], time t [B]: float32 [B h w C]."""
        self._check()
        y = self.predict(x_t, t, codes, null)
        return y if self.prediction == "velocity" else flow.velocity_from_x0(x_t, y, t)

    def __call__(self, codes, *, target, context=None, train=False, time=None, noise=None):
        """Decodes at one random time. target [B h w C] is the clean picture x0; time [B] and noise like target are
        drawn from the rng stream "train" unless given. Returns Decoded in the space of `prediction`."""
        self._check()
        keys = jax.random.split(self.make_rng("train"), 3) if time is None or noise is None or train else (None,) * 3
        time = self.time(jax.random.uniform(keys[0], target.shape[:1])) if time is None else time
        noise = jax.random.normal(keys[1], target.shape) if noise is None else noise
        null = jax.random.bernoulli(keys[2], self.null_rate, target.shape[:1]) if train and self.null_rate else None
        prediction = self.predict(flow.interpolate(target, noise, time), time, codes, null)
        return Decoded(prediction, noise - target if self.prediction == "velocity" else target)

    def sample(self, codes, rng=None, *, steps=25, guidance=1.0, guide="apg", noise=None):
        """Solves the flow from noise to the picture with Euler steps.

        Args:
          codes: Codes; only z and keep are read.
          rng: key of the noise, or None when noise is given.
          steps: Euler steps; one step gives the model's estimate of x0 straight from noise.
          guidance: scale; exactly 1 costs one pass a step instead of two.
          guide: "apg" (FlexTok's) or "cfg".
          noise: [B h w C], x at t = 1.

        Returns float32 [B h w C].
        """
        self._check()
        if steps < 1:
            raise ValueError(f"FlowDecoder.sample needs at least 1 step, got {steps}.")
        if guide not in GUIDANCE:
            raise ValueError(f'guide is one of {sorted(GUIDANCE)}, not "{guide}".')
        batch = codes.z.shape[0]
        if noise is None:
            noise = jax.random.normal(rng, (batch, *self.shape))
        module, variables = self.unbind()  # a bound module must not be called inside a scan

        def velocity(x, t, buffer):
            t = jnp.full((batch,), t)
            v = module.apply(variables, x, t, codes, method="velocity")
            if guidance == 1.0:
                return v, buffer
            null = jnp.ones((batch,), bool)
            v_uncond = module.apply(variables, x, t, codes, null, method="velocity")
            return GUIDANCE[guide](v, v_uncond, guidance, buffer)

        x, _ = flow.euler(velocity, noise, steps, None if guidance == 1.0 else jnp.zeros_like(noise))
        return x

    def _check(self):
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f'FlowDecoder.prediction is "velocity" or "x0", not "{self.prediction}".')
