"""The transformer block of models over codes, and a stack of them: on whole sequences, or token by token on a cache."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxtok.nn.attention import attention, head_count
from jaxtok.nn.linear import Linear
from jaxtok.nn.mlp import FeedForward
from jaxtok.nn.norm import Norm
from jaxtok.nn.rotary import rotate
from jaxtok.nn.transformer import remat_policy


class Side(NamedTuple):
    """What every layer sees beside the tokens x [B N D]; None: there is none of it.

    Attributes:
      mask: bool [N N] or [B N N], who may attend to whom. Not with a cache: there, all that came before and x itself.
      rotary: tables (cos, sin) of the places of x, each [N d/2].
      condition: [B N D] or [B 1 D], from which adaLN-zero modulates.
      memory: [B T D], what cross-attention reads, and memory_mask: bool [B T], which of it. With a cache: in the cache.
      at: int [], the place of the first token of x. With a cache only.
    """

    mask: Any = None
    rotary: Any = None
    condition: Any = None
    memory: Any = None
    memory_mask: Any = None
    at: Any = None


class Block(nn.Module):
    """Self-attention, cross-attention if there is a memory, and a feed-forward layer, each added to its input.

    With a condition, adaLN-zero (DiT, arXiv 2212.09748): shift, scale and gate of attention, then of the feed-forward
    layer.

    Attributes:
      head_dim: width of a head; heads are D / head_dim, logits are divided by its root.
      hidden, mlp: `hidden` and `kind` of the feed-forward layer, see nn.mlp.FeedForward.
      norm, eps: see nn.norm.Norm.
      post_norm: the sums are normalised (BERT, arXiv 1810.04805), not what each part reads.
      qk_norm: queries and keys are normalised per head.
      bias: which linear layers have one, of "qkv", "out" (of attention) and "mlp".
      dropout: rate on what each part adds, in training.
      dtype: of the computation; norms and the softmax are float32.
    """

    head_dim: int = 64
    hidden: int | None = None
    mlp: str = "swiglu"
    norm: str = "layer"
    eps: float = 1e-5
    post_norm: bool = False
    qk_norm: bool = False
    bias: tuple[str, ...] = ()
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, side, train=False, cache=None):
        """x [B N D] -> (x [B N D], None or the cache, to which the tokens of x were added from place side.at on)."""
        if unknown := set(self.bias) - {"qkv", "out", "mlp"}:
            raise ValueError(f'Block.bias names "qkv", "out" and "mlp", not {sorted(unknown)}.')
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = 0, 0, 1, 0, 0, 1
        if side.condition is not None:
            adaln = Linear((6, x.shape[-1]), init="zeros", dtype=self.dtype, name="adaln")
            m = adaln(jax.nn.silu(side.condition))
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[..., i, :] for i in range(6))  # each [B N D]
        norm = lambda name: Norm(self.norm, self.eps, name=name)
        before = lambda name, x: x if self.post_norm else norm(name)(x)
        after = lambda name, x: norm(name)(x) if self.post_norm else x
        drop = nn.Dropout(self.dropout, deterministic=not train, rng_collection="train", name="dropout")

        attention = SelfAttention(
            self.head_dim, self.norm if self.qk_norm else None, self.eps, self.bias, self.dtype, name="attn"
        )
        y, cache = attention(before("norm1", x) * (1 + scale_a) + shift_a, side, cache)
        x = after("norm1", x + gate_a * drop(y))
        if side.memory is not None or (cache is not None and "memory" in cache):
            cross = CrossAttention(x.shape[-1], self.head_dim, self.bias, self.dtype, name="cross")
            memory = cross.remember(side.memory, side.memory_mask) if cache is None else cache["memory"]
            x = after("norm_cross", x + drop(cross(before("norm_cross", x), memory)))
        mlp = FeedForward(self.mlp, self.hidden, "mlp" in self.bias, self.dtype, name="mlp")
        y = mlp(before("norm2", x) * (1 + scale_m) + shift_m)
        return after("norm2", x + gate_m * drop(y)), cache


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, or to a cache {"k" [Bh d S], "v" [Bh S d]} that it is added to."""

    head_dim: int
    qk_norm: str | None
    eps: float
    bias: tuple[str, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x, side, cache=None):
        heads, bias = head_count(x.shape[-1], self.head_dim), "qkv" in self.bias
        qkv = Linear((heads, 3, self.head_dim), stacked=3, bias=bias, dtype=self.dtype, name="qkv")(x)
        q, k, v = (qkv[..., i, :] for i in range(3))  # [B N h d]
        if self.qk_norm is not None:
            q, k = (Norm(self.qk_norm, self.eps, name=name)(x) for name, x in (("q_norm", q), ("k_norm", k)))
        if side.rotary is not None:
            q, k = rotate(q, *side.rotary), rotate(k, *side.rotary)
        if cache is None:
            y = attention(q, k, v, mask=side.mask)  # [B N h d]
        else:
            write = jax.lax.dynamic_update_slice_in_dim
            (k, v), at = for_attending(k, v), side.at
            cache = cache | {"k": write(cache["k"], k, at, 2), "v": write(cache["v"], v, at, 1)}
            seen = jnp.arange(cache["v"].shape[1]) <= at + jnp.arange(x.shape[1])[:, None]
            y = attend(q, cache["k"], cache["v"], seen)
        return Linear(x.shape[-1], inputs=2, bias="out" in self.bias, dtype=self.dtype, name="out")(y), cache


class CrossAttention(nn.Module):
    """Multi-head attention of x [B N D] to the keys and values that `remember` makes of a memory."""

    width: int
    head_dim: int
    bias: tuple[str, ...]
    dtype: Any

    def setup(self):
        heads, bias = head_count(self.width, self.head_dim), "qkv" in self.bias
        self.q = Linear((heads, self.head_dim), bias=bias, dtype=self.dtype)
        self.kv = Linear((heads, 2, self.head_dim), stacked=2, bias=bias, dtype=self.dtype)
        self.out = Linear(self.width, inputs=2, bias="out" in self.bias, dtype=self.dtype)

    def __call__(self, x, memory):
        return self.out(attend(self.q(x), memory["k"], memory["v"], memory["mask"]))

    def remember(self, memory, mask):
        """memory [B T D], mask bool [B T] -> {"k" [Bh d T], "v" [Bh T d], "mask" [Bh 1 T]}."""
        kv = self.kv(memory)
        k, v = for_attending(kv[..., 0, :], kv[..., 1, :])
        return {"k": k, "v": v, "mask": jnp.repeat(mask, kv.shape[2], 0)[:, None]}


def for_attending(k, v):
    """[B S h d] each -> [Bh d S] and [Bh S d], as the products of attention read them.

    In any other order XLA's CPU backend transposes them whole; with B and h apart, a B of 1 makes it copy caches.
    """
    return rearrange(k, "b s h d -> (b h) d s"), rearrange(v, "b s h d -> (b h) s d")


def attend(q, k, v, mask):
    """Attention of q [B N h d] to k [Bh d S] and v [Bh S d], mask bool [... N S]: [B N h d]; the softmax is float32."""
    heads, scale = q.shape[2], q.shape[-1] ** -0.5
    logits = jnp.einsum("and,ads->ans", rearrange(q, "b n h d -> (b h) n d"), k).astype(jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)).astype(v.dtype)
    y = jnp.einsum("ans,asd->and", weights, v)
    return rearrange(y, "(b h) n d -> b n h d", h=heads)


def stack(depth, *, target=Block, remat="none", unroll=1, over=(), **fields):
    """`depth` blocks whose parameters carry a leading layer axis: one compiled body, however deep.

    Call: (x, side, train, *over) -> (x, what each layer gives beside x, stacked).

    Args:
      target: Block, or a module that is called like it.
      remat: "none", "full" or "dots": what the backward pass computes again.
      unroll: how many layers stand in one turn of the loop; more compiles slower and can run faster.
      over: 0 for each further argument of which layer i sees the i-th slice.
      fields: of the target.
    """
    policy = remat_policy(remat)
    if policy is not None:
        target = nn.remat(target, policy=policy, prevent_cse=False, static_argnums=(3,))  # self, x, side, train
    scanned = nn.scan(
        target,
        variable_axes={"params": 0},
        split_rngs={"params": True, "train": True},
        in_axes=(nn.broadcast, nn.broadcast, *over),
        length=depth,
        unroll=unroll,
    )
    return scanned(**fields)
