"""Decoding on a cache: every token is computed once, and what later tokens want of it is kept.

A cache is a list with a dict for each layer: "k" [Bh d S] and "v" [Bh S d] of the S places that there will be, and,
where there is text, "memory" with the same of its T places (nn.decoder_block.for_attending says why so). Weights are a
list with a tree for each layer too: a slice of a stacked array is copied in every step, an array of its own is not.
"""

import jax
import jax.numpy as jnp

from jaxtok.nn.attention import head_count
from jaxtok.nn.decoder_block import Block, CrossAttention, Side


def layers(params, dtype):
    """Stacked parameters [L ...] of nn.decoder_block.stack -> a list of L trees, kernels cast once to `dtype`."""
    depth = jax.tree.leaves(params)[0].shape[0]
    return [cast(jax.tree.map(lambda p, i=i: p[i], params), dtype) for i in range(depth)]


def cast(params, dtype):
    """A tree with its kernels in `dtype`: what a linear layer would cast in every step."""
    is_kernel = lambda path: path[-1].key == "kernel"
    return jax.tree_util.tree_map_with_path(lambda path, p: p.astype(dtype) if is_kernel(path) else p, params)


def empty(block: Block, params, batch, width, places, memory=None, memory_mask=None):
    """A cache for `places` tokens of `batch` sequences under the list of layers `params`.

    memory: [B T D], of which each layer's cross-attention gets its keys and values here, once; memory_mask: bool [B T].
    """
    heads = head_count(width, block.head_dim)
    keys = jnp.zeros((batch * heads, block.head_dim, places), block.dtype)
    cache = [{"k": keys, "v": keys.swapaxes(1, 2)} for _ in params]
    if memory is not None:
        cross = CrossAttention(width, block.head_dim, block.bias, block.dtype, parent=None)
        for layer, p in zip(cache, params, strict=True):
            layer["memory"] = cross.apply({"params": p["cross"]}, memory, memory_mask, method="remember")
    return cache


def advance(block: Block, params, x, cache, side: Side):
    """x [B n D], the n tokens from place side.at on -> (what the last layer makes of them, the cache with them)."""
    after = []
    for p, layer in zip(params, cache, strict=True):
        x, layer = block.apply({"params": p}, x, side, False, layer)
        after.append(layer)
    return x, after


def unroll(step, embed, choose, prefix, cache, tokens):
    """Feeds a prefix, then token after token as it is chosen: one compiled step, however many.

    Args:
      step: (x [B D], place [], cache) -> (logits [B K], cache).
      embed: (codes, place []) -> x [B D], where the code chosen at place - 1 stands.
      choose: (logits [B K], i []) -> codes int32 [b] or [b G], the i-th token; b may be B, or B / 2 for guided pairs.
      prefix: [B P D], what stands before the first token; its last vector predicts it.
      cache: of P - 1 + tokens places.
      tokens: how many, static.

    Returns (codes int32 [b tokens] or [b tokens G], logits [B tokens K], dead code where they are not used).
    """
    start = prefix.shape[1] - 1

    def turn(carry, place):
        x, cache = carry
        logits, cache = step(x, place, cache)
        codes = choose(logits, place - start)
        x = embed(codes, place + 1)
        if start:
            following = jax.lax.dynamic_index_in_dim(prefix, jnp.minimum(place + 1, start), 1, keepdims=False)
            x = jnp.where(place < start, following, x)
        return (x.astype(prefix.dtype), cache), (codes, logits)

    _, (codes, logits) = jax.lax.scan(turn, (prefix[:, 0], cache), jnp.arange(start + tokens))
    return codes[start:].swapaxes(0, 1), logits[start:].swapaxes(0, 1)
