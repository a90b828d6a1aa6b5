"""RAR's generators (arXiv 2411.00776) -> `params` of our `generate.rar.RAR`.

The weights declare Apache-2.0 on the hub; the readme says research purposes. Ours is RAR(vocabulary=1024, length=256,
width, depth, classes=1000, block=dict(head_dim=width / heads, hidden=...)).
"""

from jaxtok.pretrained.convert import AFFINE, LINEAR, OUT, Report, convert, rules_of

_QKV = ((r"\.weight", "/kernel", "(t h d) i -> i h t d"), (r"\.bias", "/bias", "(t h d) -> h t d"))
# m: shift, scale, gate of attention and of the feed-forward layer; in the head scale, shift
_ADALN = ((r"\.weight", "/kernel", "(m o) i -> i m o"), (r"\.bias", "/bias", "(m o) -> m o"))

_LAYERS = (
    (r"(norm[12])", r"\2", AFFINE),
    (r"attn\.qkv", "attn/qkv", _QKV),
    (r"attn\.([qk]_norm)", r"attn/\2", AFFINE),
    (r"attn\.proj", "attn/out", OUT),
    (r"mlp\.(fc[12])", r"mlp/\2", LINEAR),
    (r"adaLN_modulation\.1", "adaln", _ADALN),
)
RULES = (
    (r"embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"cls_token", "cls_token", "1 1 d -> d"),
    (r"pos_embed", "pos_embed", "1 n d -> n d"),
    (r"target_aware_pos_embed", "target_embed", "1 n d -> n d"),
    (r"timesteps_embeddings", "number_embed", "1 n d -> n d"),
    *rules_of(_LAYERS, r"blocks\.(\d+)\.", "blocks/", r"[\1]"),
    *rules_of(((r"adaln_before_head\.adaLN_modulation\.1", "head_adaln", _ADALN), (r"lm_head", "head", LINEAR))),
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
