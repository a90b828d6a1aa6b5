"""Multi-head self-attention, and who attends to whom."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
            mask = None if a.mask is None else jnp.asarray(a.mask)[None, None]  # [1 1 Q K]
            bias = None if a.counts is None else jnp.log(jnp.asarray(a.counts, x.dtype))[None, None, None]  # [1 1 1 K]
            read.append(
                jax.nn.dot_product_attention(
                    q[:, start:stop], k[:, a.keys], v[:, a.keys], bias=bias, mask=mask, scale=scale
                )
            )  # [B Q h d]
            start = stop
        x = read[0] if len(read) == 1 else jnp.concatenate(read, 1)  # [B M h d]
        return Linear(width, inputs=2, bias=False, dtype=self.dtype, name="out")(x)
