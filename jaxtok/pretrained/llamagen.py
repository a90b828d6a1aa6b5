"""LlamaGen's class-conditional GPTs (arXiv 2406.06525, MIT licence) -> `params` of our `generate.ar.AR`.

Ours is AR(vocabulary=16384, length=256 or 576, width, depth, classes=1000, class_token=True, position="rotary_2d",
block=dict(norm="rms", hidden=...)), hidden being 2/3 of 4 width, rounded up to a multiple of 256; head_dim is
width / heads. Sizes are nowhere in the table.
"""

from jaxtok.pretrained.convert import Report, convert, unwrapped

_LAYER = r"layers\.(\d+)\."

# Linear kernels are [out in] there, [in out] here; t: query, key, value; h heads, d head_dim.
RULES = (
    (
        r"cls_embedding\.embedding_table\.weight",
        "class_embed/embedding",
        "c d -> c d",
    ),  # the last row is the null class
    (r"tok_embeddings\.weight", "token_embed/embedding", "k d -> k d"),
    (_LAYER + r"attention\.wqkv\.weight", r"blocks/attn/qkv/kernel[\1]", "(t h d) i -> i h t d"),
    (_LAYER + r"attention\.wo\.weight", r"blocks/attn/out/kernel[\1]", "o (h d) -> h d o"),
    (_LAYER + r"feed_forward\.w1\.weight", r"blocks/mlp/gate/kernel[\1]", "o i -> i o"),
    (_LAYER + r"feed_forward\.w3\.weight", r"blocks/mlp/value/kernel[\1]", "o i -> i o"),
    (_LAYER + r"feed_forward\.w2\.weight", r"blocks/mlp/out/kernel[\1]", "o i -> i o"),
    (_LAYER + r"attention_norm\.weight", r"blocks/norm1/scale[\1]", "d -> d"),
    (_LAYER + r"ffn_norm\.weight", r"blocks/norm2/scale[\1]", "d -> d"),
    (r"norm\.weight", "norm/scale", "d -> d"),
    (r"output\.weight", "head/kernel", "o i -> i o"),
)


def from_state_dict(state_dict, like) -> tuple[dict, Report]:
    """A state dict {key: array} -> (params, report); or a dict that holds one under "model", "module" or "state_dict".

    `like`: our params or their `jax.eval_shape`. Raises ValueError as `convert` does.
    """
    return convert(unwrapped(state_dict), RULES, like)
