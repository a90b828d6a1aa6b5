"""Rectified flow over continuous latents: the class-conditional transformer of SiT (arXiv 2401.08740)."""

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
from jaxtok.nn.patch import patchify, unpatchify
from jaxtok.nn.position import TimeEmbedding, sincos_2d
from jaxtok.nn.transformer import modulate

BLOCK = dict(mlp="gelu", norm="plain", eps=1e-6, bias=("qkv", "out", "mlp"))
SOLVERS = ("euler", "heun")


class Flow(nn.Module):
    """Noise -> latents [B h w C]: a transformer over patches, modulated by time and class, gives the velocity.

    The contract is that of generate/__init__.py with latents in the place of codes: `loss` takes them and `sample`
    gives them, always whole, so it has no `tokens`; Scores are of samples [B].

    Attributes:
      shape: (h, w, C) of the latents.
      width, depth: of the transformer.
      classes: how many; 0: the null class stands for nothing.
      patch: side of a patch.
      scale: latents are multiplied by it, so that what noise is mixed with has a variance near 1.
      block: fields of nn.decoder_block.Block that differ from BLOCK.
      time: law of the training time, uniform [B] -> [B] (nn.flow), 1 being noise.
      null_rate: share of training samples whose class is dropped.
      dtype: of the computation. remat, unroll: see nn.decoder_block.stack.
    """

    shape: tuple[int, int, int]
    width: int
    depth: int
    classes: int = 0
    patch: int = 2
    scale: float = 1.0
    block: Mapping[str, Any] = FrozenDict()
    time: Callable = flow.shifted_time
    null_rate: float = 0.1
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x_t, t, condition=None, *, null=None, train=False):
        """The velocity, noise - latents, at x_t [B h w C] and time t [B]; null bool [B]: whose class is dropped."""
        grid = self.shape[0] // self.patch, self.shape[1] // self.patch
        x = Linear(self.width, dtype=self.dtype, name="patch_embed")(patchify(x_t, self.patch))  # [B P D]
        x = (x + sincos_2d(*grid, self.width).reshape(1, -1, self.width)).astype(self.dtype)
        classes = nn.Embed(
            self.classes + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="class_embed"
        )
        vector = TimeEmbedding(self.width, dtype=self.dtype, name="time")(t)
        vector = vector + classes(labels(condition, self.classes, x_t.shape[0], null))
        vector = vector[:, None].astype(self.dtype)  # [B 1 D]
        fields = BLOCK | dict(self.block) | dict(dtype=self.dtype)
        blocks = stack(self.depth, remat=self.remat, unroll=self.unroll, name="blocks", **fields)
        x, _ = blocks(x, Side(condition=vector), train)
        modulation = Linear((2, self.width), init="zeros", dtype=self.dtype, name="head_adaln")(jax.nn.silu(vector))
        x = modulate(layer_norm(x, fields["eps"]), modulation[..., 0, :], modulation[..., 1, :])
        y = Linear(self.patch**2 * self.shape[2], init="zeros", name="head")(x.astype(jnp.float32))
        return unpatchify(y, grid, self.patch)

    def loss(self, latents, condition=None, *, train=False, step=0):
        """Scores [B] of latents [B h w C] at one random time each: mean squared error of the velocity."""
        check_given(condition, self.classes)
        time_key, noise_key, drop_key = jax.random.split(self.make_rng("train"), 3)
        latents = latents.astype(jnp.float32) * self.scale
        batch, noise = len(latents), jax.random.normal(noise_key, latents.shape)
        t = self.time(jax.random.uniform(time_key, (batch,)))
        null = jax.random.bernoulli(drop_key, self.null_rate, (batch,)) if train else None
        velocity = self(flow.interpolate(latents, noise, t), t, condition, null=null, train=train)
        return Scores(jnp.square(velocity - (noise - latents)).mean((1, 2, 3)), jnp.ones(batch))

    def sample(self, rng, condition=None, *, steps=25, guidance=1.0, solver="euler", batch=1):
        """Solves the flow from noise to latents.

        Args:
          rng: key of the noise.
          condition: see generate/__init__.py; None: the null class, for `batch` samples.
          steps: of the solver.
          guidance: scale, or a schedule over the steps (generate/sampling.py; `interval` is the guidance interval).
          solver: "euler", or "heun" for two velocities a step.

        Returns float32 [B h w C], divided by `scale` again.
        """
        if solver not in SOLVERS:
            raise ValueError(f'Flow.sample has the solvers {SOLVERS}, not "{solver}".')
        check_steps(self, steps)
        predict, batch = passes(self, condition, batch, guidance)
        velocity = lambda x, t, scale: predict(scale, x, t)
        scales = jnp.stack([jnp.asarray(sampling.scale_at(guidance, i, steps), jnp.float32) for i in range(steps)])
        noise = jax.random.normal(rng, (batch, *self.shape))
        if solver == "heun":
            x = flow.heun(velocity, noise, flow.times(steps), scales)
        else:
            carried = lambda x, t, carry, scale: (velocity(x, t, scale), carry)
            x, _ = flow.euler(carried, noise, flow.times(steps), None, scales)
        return x / self.scale
