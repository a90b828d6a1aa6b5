"""The linear layer of every transformer here."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


class Linear(nn.Module):
    """y = x W + b, where the features on either side may be a shape: heads stay an axis of the kernel.

    The kernel is [*inputs, *features]; sharding rules and converters then speak of heads and gates, not of offsets. The
    product is one of matrices, all batch axes and all features merged: XLA's CPU backend runs the backward pass of
    any other form at half the speed. A split axis must therefore be the first of `features`, or merging gathers it.

    Attributes:
      features: int or tuple, the shape of the output's last axes.
      inputs: how many last axes of x are contracted.
      stacked: how many independent matrices the features hold: each gets its own fan-out at initialisation.
      bias: whether b [*features] is added.
      init: "xavier" (uniform, gain 1) or "zeros".
      dtype: of the computation; parameters are float32.
    """

    features: int | tuple[int, ...]
    inputs: int = 1
    stacked: int = 1
    bias: bool = True
    init: str = "xavier"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, part=()):
        """[... *inputs] -> [... *features], or only the features at index `part` of the kernel's feature axes."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        batch, inputs = x.shape[: x.ndim - self.inputs], x.shape[x.ndim - self.inputs :]
        rows = math.prod(inputs)
        fan_out = math.prod(features) // self.stacked
        init = _xavier(rows, fan_out) if self.init == "xavier" else nn.initializers.zeros
        kernel = self.param("kernel", init, inputs + features)[(slice(None),) * self.inputs + part].astype(self.dtype)
        y = split_batch(x).astype(self.dtype).reshape(-1, rows) @ kernel.reshape(rows, -1)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, features)[part].astype(self.dtype).reshape(-1)
        return split_batch(y.reshape(batch + kernel.shape[self.inputs :]))


def split_batch(x):
    """x [B ...], held to the mesh's split of batches where it is traced on one (`sharding.on_mesh`); values stay.

    The compiler knows how the batch and every kernel are split, and must choose between them for what lies in between.
    Left alone it chooses the kernels' split over fsdp, and every device computes the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp"} <= mesh.shape.keys() or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    rest = [P.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"), *rest))


def _xavier(fan_in, fan_out):
    bound = math.sqrt(6 / (fan_in + fan_out))
    return lambda key, shape, dtype=jnp.float32: nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound
