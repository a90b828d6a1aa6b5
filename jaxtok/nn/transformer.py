"""The transformer block, and a stack of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.attention import Attention
from jaxtok.nn.linear import Linear
from jaxtok.nn.mlp import SwiGLU
from jaxtok.nn.norm import layer_norm

# What the backward pass may keep instead of computing again; "none" keeps everything.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """A pre-norm block: attention, then SwiGLU; with a condition, adaLN-zero (DiT, arXiv 2212.09748).

    `segments` are the lengths of the parts of the sequence that are modulated apart (FlexTok: patches, registers).
    Call: (x [B N D], mask bool [N N] or None, condition [B D] or None) -> (x, None), the form that nn.scan wants.
    """

    head_dim: int = 64
    segments: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, condition=None):
        attention = Attention(self.head_dim, dtype=self.dtype, name="attn")
        mlp = SwiGLU(dtype=self.dtype, name="mlp")
        if condition is None:
            x = x + attention(layer_norm(x), mask)
            x = x + mlp(layer_norm(x))
        else:
            shape = (len(self.segments), 6, x.shape[-1])
            m = Linear(shape, init="zeros", dtype=self.dtype, name="adaln")(jax.nn.silu(condition))
            gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = (
                spread(m[:, :, i], self.segments) for i in range(6)
            )  # each [B N D]
            x = x + gate_a * attention(modulate(layer_norm(x), shift_a, scale_a), mask)
            x = x + gate_m * mlp(modulate(layer_norm(x), shift_m, scale_m))
        self.sow("intermediates", "out", x)
        return x, None


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def spread(vectors, segments):
    """One vector a segment to one a token: [B S D], lengths of the S segments -> [B N D]."""
    batch, _, width = vectors.shape
    parts = [jnp.broadcast_to(vectors[:, i, None], (batch, n, width)) for i, n in enumerate(segments)]
    return jnp.concatenate(parts, 1)


def stack(depth, *, remat="none", unroll=1, name, **fields):
    """`depth` Blocks whose parameters carry a leading layer axis: one compiled body, however deep.

    remat: "none", "full" or "dots" (what the backward pass computes again). unroll: how many layers stand in one turn
    of the loop; more compiles slower and can run faster. The parameters are the same for every value of both.
    """
    if remat not in ("none", *REMAT):
        raise ValueError(f'remat is one of "none", {", ".join(map(repr, REMAT))}; got "{remat}".')
    block = Block if remat == "none" else nn.remat(Block, policy=REMAT[remat], prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        unroll=unroll,
    )
    return scanned(name=name, **fields)
