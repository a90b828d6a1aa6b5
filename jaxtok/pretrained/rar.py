"""RAR's generators (arXiv 2411.00776) -> `params` of our `generate.rar.RAR`.

The weights declare Apache-2.0 on the hub; the readme says research purposes. Ours is RAR(vocabulary=1024, length=256,
width, depth, classes=1000, block=dict(head_dim=width / heads, hidden=...)).
"""

from jaxtok.pretrained.convert import Report, convert

_BLOCK = r"blocks\.(\d+)\."
_AFFINE = ((r"\.weight", "/scale", "d -> d"), (r"\.bias", "/bias", "d -> d"))
_LINEAR = ((r"\.weight", "/kernel", "o i -> i o"), (r"\.bias", "/bias", "o -> o"))
_QKV = ((r"\.weight", "/kernel", "(t h d) i -> i h t d"), (r"\.bias", "/bias", "(t h d) -> h t d"))
_OUT = ((r"\.weight", "/kernel", "o (h d) -> h d o"), (r"\.bias", "/bias", "o -> o"))
# m: shift, scale, gate of attention and of the feed-forward layer; in the head scale, shift
_ADALN = ((r"\.weight", "/kernel", "(m o) i -> i m o"), (r"\.bias", "/bias", "(m o) -> m o"))

_LAYERS = (
    (_BLOCK + r"(norm[12])", r"blocks/\2", _AFFINE),
    (_BLOCK + r"attn\.qkv", "blocks/attn/qkv", _QKV),
    (_BLOCK + r"attn\.([qk]_norm)", r"blocks/attn/\2", _AFFINE),
    (_BLOCK + r"attn\.proj", "blocks/attn/out", _OUT),
    (_BLOCK + r"mlp\.(fc[12])", r"blocks/mlp/\2", _LINEAR),
    (_BLOCK + r"adaLN_modulation\.1", "blocks/adaln", _ADALN),
    (r"adaln_before_head\.adaLN_modulation\.1", "head_adaln", _ADALN),
    (r"lm_head", "head", _LINEAR),
)
RULES = (
    (r"embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"cls_token", "cls_token", "1 1 d -> d"),
    (r"pos_embed", "pos_embed", "1 n d -> n d"),
    (r"target_aware_pos_embed", "target_embed", "1 n d -> n d"),
    (r"timesteps_embeddings", "number_embed", "1 n d -> n d"),
    *(
        (key + suffix, path + leaf + (r"[\1]" if path.startswith("blocks") else ""), pattern)
        for key, path, layer in _LAYERS
        for suffix, leaf, pattern in layer
    ),
)
TABLES = {"pos_embed": "pos_embed", "target_aware_pos_embed": "target_embed", "timesteps_embeddings": "number_embed"}


def used_rows(state_dict, like) -> dict:
    """The state dict with the rows of its tables that some place reads: they have about 1024 (or 100) to spare.

    The table of targets begins with two rows for [cls] and the class, which are never a target.
    """
    tables = {}
    for key, path in TABLES.items():
        if key in state_dict:
            first = 2 if path == "target_embed" else 0
            tables[key] = state_dict[key][:, first : first + like[path].shape[0]]
    return dict(state_dict) | tables


def from_state_dict(state_dict, like) -> tuple[dict, Report]:
    """A state dict {key: array} -> (params, report). `like`: our params or their `jax.eval_shape`.

    Raises ValueError as `convert` does.
    """
    return convert(used_rows(state_dict, like), RULES, like)
