"""A pre-norm transformer: the block as a function, and a stack of them."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.attention import Attention, take
from jaxtok.nn.linear import Linear
from jaxtok.nn.mlp import FeedForward
from jaxtok.nn.norm import layer_norm

# What the backward pass may keep instead of computing again.
REMAT = {
    "none": None,  # everything
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_policy(remat):
    """The policy of that name for jax.checkpoint, None for "none". ValueError lists the names."""
    if remat not in REMAT:
        raise ValueError(f'remat is one of {", ".join(map(repr, REMAT))}; got "{remat}".')
    return REMAT[remat]


def block(x, attends, modulation, attention, mlp):
    """One block: attention, then MLP, each on normalised tokens and added to them.

    Args:
      x: [B N D].
      attends: see nn.attention.Attend; tokens that are no query are not computed further.
      modulation: None, or the six vectors of adaLN-zero (DiT, arXiv 2212.09748) for each token, each [B N D] or
        [1 N D]: gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp (FlexTok's order).
      attention, mlp: (x, attends) -> [B M D] and x -> x.

    Returns [B M D], the M queries.
    """
    queries = [a.queries for a in attends]
    if modulation is None:
        x = take(x, queries) + attention(layer_norm(x), attends)
        return x + mlp(layer_norm(x))
    gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation
    x = take(x, queries) + take(gate_a, queries) * attention(modulate(layer_norm(x), shift_a, scale_a), attends)
    return x + take(gate_m, queries) * mlp(modulate(layer_norm(x), take(shift_m, queries), take(scale_m, queries)))


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def spread(vectors, segments):
    """The vector of each token: [B S D], and of each stretch of the sequence (set, length) -> [B N D]."""
    batch, _, width = vectors.shape
    return jnp.concatenate([jnp.broadcast_to(vectors[:, s, None], (batch, n, width)) for s, n in segments], 1)


class Transformer(nn.Module):
    """`depth` blocks whose parameters carry a leading layer axis: one compiled body, however deep.

    Attributes:
      depth, head_dim: heads are width / head_dim.
      sets: how many sets of tokens adaLN-zero modulates apart (FlexTok: patches, registers); 0: no modulation.
      dtype: of the computation.
      remat: what the backward pass computes again: "none", "full" or "dots".
      unroll: how many layers stand in one turn of the loop; more compiles slower and can run faster.
    """

    depth: int
    head_dim: int = 64
    sets: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x, attends, last=None, *, segments=(), condition=None, modulations=None, tap=None, train=False):
        """x [B N D] -> [B M D].

        Args:
          attends: who attends to whom in every block; all tokens are queries, in order.
          last: the same for the last block, whose M queries are what comes out. None: as in the others.
          segments: ((set, length), ...), which set of vectors modulates which stretch of the sequence.
          condition: [B D], from which every block computes its modulation.
          modulations: instead of `condition`, what `self.modulations` made of it.
          tap: the index of a block whose output is wanted too.
          train: whether gradients are to be taken: the same result, another way to a layer's parameters.

        Returns x, or (x, the tapped output [B N D]).
        """
        policy = remat_policy(self.remat)
        width = x.shape[-1]
        attention = Attention(self.head_dim, dtype=self.dtype, parent=None)
        mlp = FeedForward(dtype=self.dtype, parent=None)
        params = {"attn": self._layers("attn", attention, x, attends), "mlp": self._layers("mlp", mlp, x)}
        if self.sets:
            adaln = self._adaln(width)
            params["adaln"] = self._layers("adaln", adaln, jnp.zeros((1, width)))

        def body(x, layer, attends):
            params, modulation = layer
            if condition is not None:
                modulation = adaln.apply({"params": params["adaln"]}, jax.nn.silu(condition))
            if modulation is not None:  # [B S 6 D]
                modulation = [spread(modulation[:, :, i], segments) for i in range(6)]
            return block(
                x,
                attends,
                modulation,
                partial(attention.apply, {"params": params["attn"]}),
                partial(mlp.apply, {"params": params["mlp"]}),
            )

        if policy is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False, static_argnums=2)
        layers, outputs = (params, modulations), []
        seen = self.is_mutable_collection("intermediates")

        def run(x, start, stop):
            # A part of the stack is a copy of it. Without gradients an index into the whole does instead; with them its
            # gradient would be one, of the whole, in every layer.
            pick = lambda i: jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), layers)
            some = jax.tree.map(lambda p: p[start:stop], layers) if train else jnp.arange(start, stop)
            step = lambda x, i: (x := body(x, i if train else pick(i), attends), x if seen else None)
            x, out = jax.lax.scan(step, x, some, unroll=max(1, min(self.unroll, stop - start)))
            outputs.append(out)
            return x

        tapped, start, stop = None, 0, self.depth - (last is not None)
        if tap is not None:
            x = tapped = run(x, 0, tap + 1)
            start = tap + 1
        x = run(x, start, stop)
        if last is not None:
            x = body(x, jax.tree.map(lambda p: p[-1], layers), last)
        elif seen:
            self.sow("intermediates", "out", jnp.concatenate(outputs))  # [L B N D]
        return x if tap is None else (x, tapped)

    def modulations(self, condition):
        """What `condition` [T D] means to every block, computed once for many uses: [L T S 6 D]."""
        adaln, params = self._adaln(condition.shape[-1]), self.variables["params"]["adaln"]
        return jax.lax.map(lambda params: adaln.apply({"params": params}, jax.nn.silu(condition)), params)

    def _adaln(self, width):
        return Linear((self.sets, 6, width), init="zeros", dtype=self.dtype, parent=None)

    def _layers(self, name, module, *args):
        """The parameters of `depth` copies of a module, [L ...], each initialised apart."""
        init = lambda key: nn.Module.init(module, key, *args)["params"]  # Linear has a field `init`
        return self.param(name, lambda key: jax.vmap(init)(jax.random.split(key, self.depth)))
