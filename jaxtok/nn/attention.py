"""Multi-head self-attention, who attends to whom, and what computes it on which platform."""

import functools
import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import layer_norm


class Attend(NamedTuple):
    """Some tokens of a sequence read some others; a tuple of these is who attends to whom, all of it static.

    What no `Attend` relates is never computed: a block mask written so costs nothing where it is empty, several
    sequences may be packed into one, and a last block computes only the tokens that are read.

    Attributes:
      queries, keys: slices of the sequence with both ends given.
      mask: bool [queries keys], True = may attend, or None.
      counts: float [keys]: a key that stands for so many equal ones, or None. Its logit grows by log(count), which is
        exactly what the softmax over all of them would give.
    """

    queries: slice
    keys: slice
    mask: np.ndarray | None = None
    counts: np.ndarray | None = None


def everything(n, mask=None):
    """All n tokens read all, under a mask [n n]."""
    return (Attend(slice(0, n), slice(0, n), mask),)


def take(x, slices):
    """The tokens of some slices of x [B N D], in order; x itself where they are all of it."""
    if [(s.start, s.stop) for s in slices] == [(0, x.shape[1])]:
        return x
    return jnp.concatenate([x[:, s] for s in slices], 1)


def head_count(width, head_dim):
    """ValueError unless head_dim divides width."""
    if width % head_dim:
        raise ValueError(f"Attention: width {width} is not divisible by head_dim {head_dim}.")
    return width // head_dim


def attention(q, k, v, *, mask=None, counts=None, scale=None):
    """Softmax attention of q [B Q h d] to k and v [B K h d]: [B Q h d].

    Args:
      mask: bool [Q K], or [B Q K] or [B 1 K], or None.
      counts: float [K], see Attend, or None.
      scale: of the logits; None: d^-0.5.

    In bfloat16 and float16, and where the program is traced on a mesh (`sharding.on_mesh`), whose devices then say what
    it is for, kernels that never write the logits to memory compute it: Pallas' splash attention on a TPU, cuDNN on a
    GPU. What they do not take, XLA computes, and a warning says so once. On a CPU, XLA does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kernel = KERNELS.get(device and device.platform) if q.dtype.itemsize == 2 else None
    if kernel is not None:
        try:
            return kernel(q, k, v, mask, counts, scale)
        except (NotImplementedError, RuntimeError, ValueError) as error:  # cuDNN raises all three
            warnings.warn(
                f"Attention of {q.shape[1]} to {k.shape[1]} tokens is left to XLA, which keeps all logits in memory, "
                f"not to the kernel of {device.device_kind}: {error}",
                stacklevel=2,
            )
    return dense(q, k, v, mask, counts, scale)


def dense(q, k, v, mask, counts, scale, implementation="xla"):
    """One product, the softmax and another product; or "cudnn", which wants masks and counts of full size."""
    full = q.shape[1], k.shape[1]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], *full)).reshape(-1, 1, *full)  # [1 1 Q K], or [B 1 Q K]
    bias = None if counts is None else jnp.broadcast_to(jnp.log(jnp.asarray(counts, q.dtype)), (1, 1, *full))
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation=implementation)


def splash(q, k, v, mask, counts, scale, interpret=False):
    """Pallas' kernel for TPUs, each device on its own examples and heads; it leaves out what a mask leaves empty.

    It works in blocks, and lengths are padded to whole ones. NotImplementedError where that adds more than an eighth,
    for counts, and for masks that are no numpy arrays [Q K].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, mesh = (q.shape[1], k.shape[1]), jax.sharding.get_abstract_mesh()
    if counts is not None or not (mask is None or (isinstance(mask, np.ndarray) and mask.shape == shape)):
        raise NotImplementedError("it takes no counts, and no masks but constant ones for the whole batch.")
    sizes = [next((block for block in (512, 256, 128) if -n % block <= n / 8), None) for n in shape]
    if None in sizes:
        raise NotImplementedError("its blocks of 128 would be padding for more than an eighth.")
    if jax.config.jax_default_matmul_precision not in (None, "default", "bfloat16"):
        raise NotImplementedError("it takes no jax_default_matmul_precision.")
    data, fsdp, tensor = (mesh.shape.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    if q.shape[0] % (data * fsdp) or q.shape[2] % tensor:
        raise NotImplementedError(f"{q.shape[0]} examples and {q.shape[2]} heads cannot be split over the mesh.")
    block_q, block_k = sizes
    blocks = kernels.BlockSizes(
        block_q=block_q, block_kv=block_k, block_kv_compute=block_k,
        block_q_dkv=block_q, block_kv_dkv=block_k, block_kv_dkv_compute=block_k,
        block_q_dq=block_q, block_kv_dq=block_k,
    )  # fmt: skip
    more = [-n % block for n, block in zip(shape, sizes, strict=True)]
    if any(more):
        mask = np.pad(np.ones(shape, bool) if mask is None else mask, [(0, n) for n in more])
        mask[shape[0] :] = True  # queries that nobody reads; none at all would be 0 / 0
        pad = lambda x, n: jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))
        q, k, v = pad(q, more[0]), pad(k, more[1]), pad(v, more[1])
    head = masks.FullMask(shape) if mask is None else masks.NumpyMask(mask)

    def local(q, k, v):
        heads = masks.MultiHeadMask([head] * q.shape[2])
        kernel = kernels.make_splash_mha(
            mask=heads, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)).swapaxes(1, 2)  # of [B h N d]

    q = (q * (q.shape[-1] ** -0.5 if scale is None else scale)).astype(q.dtype)
    if not mesh.empty:
        split = P(("data", "fsdp"), None, "tensor")
        local = jax.shard_map(local, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    return local(q, k, v)[:, : shape[0]]


KERNELS = {"tpu": splash, "gpu": functools.partial(dense, implementation="cudnn")}  # by platform


class Attention(nn.Module):
    """Multi-head self-attention without biases, queries and keys layer-normalised per head.

    Call: (x [B N D], attends) -> [B M D], for the M tokens that are queries.

    Attributes:
      head_dim: width of a head; the number of heads is D / head_dim.
      scale: of the logits; the default 8 / head_dim is muP's, and head_dim^-0.5 at the usual 64.
      dtype: of the computation; the softmax is float32.
    """

    head_dim: int = 64
    scale: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, attends):
        width, heads = x.shape[-1], head_count(x.shape[-1], self.head_dim)
        project = Linear((heads, 3, self.head_dim), stacked=3, bias=False, dtype=self.dtype, name="qkv")
        queries = [a.queries for a in attends]
        if sum(s.stop - s.start for s in queries) == x.shape[1]:
            qkv = project(x)
            q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]  # [B N h d]
            q = take(q, queries)
        else:
            kv = project(x, part=np.s_[:, 1:])
            q, k, v = project(take(x, queries), part=np.s_[:, 0]), kv[..., 0, :], kv[..., 1, :]
        q, k = layer_norm(q), layer_norm(k)
        scale, start, read = 8.0 / self.head_dim if self.scale is None else self.scale, 0, []
        for a in attends:
            stop = start + a.queries.stop - a.queries.start
            some = q[:, start:stop], k[:, a.keys], v[:, a.keys]
            read.append(attention(*some, mask=a.mask, counts=a.counts, scale=scale))  # [B Q h d]
            start = stop
        x = read[0] if len(read) == 1 else jnp.concatenate(read, 1)  # [B M h d]
        return Linear(width, inputs=2, bias=False, dtype=self.dtype, name="out")(x)
