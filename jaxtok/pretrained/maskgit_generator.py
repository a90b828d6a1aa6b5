"""TiTok's masked generators (arXiv 2406.07550, Apache-2.0 declared on the hub) -> `params` of `generate.masked.Masked`.

There are two bodies. VIT (L-32 and B-64): Masked(vocabulary=4096, width=768, depth=24, classes=1000,
block=dict(head_dim=48, post_norm=True, eps=1e-12)). UVIT (S-128): Masked(vocabulary=4096, width=1024, depth=20,
classes=1000, skips=True, block=dict(bias=("out", "mlp"))), which has one layer more in the middle.
"""

from jaxtok.pretrained.convert import Report, convert

# Linear kernels are [out in] there, [in out] here; t: query, key, value; h heads, d head_dim.
_AFFINE = ((r"\.weight", "/scale", "d -> d"), (r"\.bias", "/bias", "d -> d"))
_LINEAR = ((r"\.weight", "/kernel", "o i -> i o"), (r"\.bias", "/bias", "o -> o"))
_QKV = ((r"\.weight", "/kernel", "(t h d) i -> i h t d"),)
_OUT = ((r"\.weight", "/kernel", "o (h d) -> h d o"), (r"\.bias", "/bias", "o -> o"))


def _rules(key, path, place, layers):
    """A rule for each array of each layer: the layers' keys and paths follow `key` and `path`."""
    return tuple(
        (key + name + suffix, path + ours + leaf + place, pattern)
        for name, ours, layer in layers
        for suffix, leaf, pattern in layer
    )


_BERT = r"model\.encoder\.layer\.(\d+)\."
_TYPES = "model.embeddings.token_type_embeddings.weight"
VIT = (
    (r"model\.embeddings\.word_embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"model\.embeddings\.position_embeddings\.weight", "pos_embed", "n d -> n d"),
    (_BERT + r"attention\.self\.query\.weight", r"blocks/attn/qkv/kernel[\1,:,:,0]", "(h d) i -> i h d"),
    (_BERT + r"attention\.self\.key\.weight", r"blocks/attn/qkv/kernel[\1,:,:,1]", "(h d) i -> i h d"),
    (_BERT + r"attention\.self\.value\.weight", r"blocks/attn/qkv/kernel[\1,:,:,2]", "(h d) i -> i h d"),
    (_BERT + r"attention\.self\.query\.bias", r"blocks/attn/qkv/bias[\1,:,0]", "(h d) -> h d"),
    (_BERT + r"attention\.self\.key\.bias", r"blocks/attn/qkv/bias[\1,:,1]", "(h d) -> h d"),
    (_BERT + r"attention\.self\.value\.bias", r"blocks/attn/qkv/bias[\1,:,2]", "(h d) -> h d"),
    *_rules(
        _BERT,
        "blocks/",
        r"[\1]",
        (
            (r"attention\.output\.dense", "attn/out", _OUT),
            (r"attention\.output\.LayerNorm", "norm1", _AFFINE),
            (r"intermediate\.dense", "mlp/fc1", _LINEAR),
            (r"output\.dense", "mlp/fc2", _LINEAR),
            (r"output\.LayerNorm", "norm2", _AFFINE),
        ),
    ),
    *_rules(r"model\.", "", "", ((r"embeddings\.LayerNorm", "norm", _AFFINE), (r"lm_head", "head", _LINEAR))),
)

_BLOCK = (
    (r"norm1", "norm1", _AFFINE),
    (r"attn\.qkv", "attn/qkv", _QKV),
    (r"attn\.proj", "attn/out", _OUT),
    (r"norm2", "norm2", _AFFINE),
    (r"mlp\.fc1", "mlp/fc1", _LINEAR),
    (r"mlp\.fc2", "mlp/fc2", _LINEAR),
)
UVIT = (
    (r"embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"pos_embed", "pos_embed", "1 n d -> n d"),
    *_rules(r"(in|out)_blocks\.(\d+)\.", r"\1_blocks/block/", r"[\2]", _BLOCK),
    *_rules(r"out_blocks\.(\d+)\.", r"out_blocks/", r"[\1]", ((r"skip_linear", "skip", _LINEAR),)),
    *_rules(r"mid_block\.", "mid_block/", "", _BLOCK),
    *_rules("", "", "", ((r"norm", "norm", _AFFINE), (r"lm_head", "head", _LINEAR))),
)


def without_types(state_dict) -> dict:
    """The state dict of a VIT with the type of all tokens, the first of two, added to the vectors of their places."""
    state_dict = dict(state_dict)
    if _TYPES in state_dict:
        positions = "model.embeddings.position_embeddings.weight"
        state_dict[positions] = state_dict[positions] + state_dict.pop(_TYPES)[0]
    return state_dict


def from_state_dict(state_dict, like) -> tuple[dict, Report]:
    """A state dict {key: array} of either body -> (params, report). ValueError as `convert` raises it.

    `like`: our params or their `jax.eval_shape`; those with "mid_block" want UVIT.
    """
    return convert(without_types(state_dict), UVIT if "mid_block" in like else VIT, like)
