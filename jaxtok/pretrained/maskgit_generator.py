"""TiTok's masked generators (arXiv 2406.07550, Apache-2.0 declared on the hub) -> `params` of `generate.masked.Masked`.

There are two bodies. VIT (L-32 and B-64): Masked(vocabulary=4096, width=768, depth=24, classes=1000,
block=dict(head_dim=48, post_norm=True, eps=1e-12)). UVIT (S-128): Masked(vocabulary=4096, width=1024, depth=20,
classes=1000, skips=True, block=dict(bias=("out", "mlp"))), which has one layer more in the middle.
"""

from jaxtok.pretrained.convert import AFFINE, LINEAR, OUT, Report, convert, rules_of

_QKV = ((r"\.weight", "/kernel", "(t h d) i -> i h t d"),)
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
    *rules_of(
        (
            (r"attention\.output\.dense", "attn/out", OUT),
            (r"attention\.output\.LayerNorm", "norm1", AFFINE),
            (r"intermediate\.dense", "mlp/fc1", LINEAR),
            (r"output\.dense", "mlp/fc2", LINEAR),
            (r"output\.LayerNorm", "norm2", AFFINE),
        ),
        _BERT,
        "blocks/",
        r"[\1]",
    ),
    *rules_of(((r"embeddings\.LayerNorm", "norm", AFFINE), (r"lm_head", "head", LINEAR)), r"model\."),
)

_BLOCK = (
    (r"norm1", "norm1", AFFINE),
    (r"attn\.qkv", "attn/qkv", _QKV),
    (r"attn\.proj", "attn/out", OUT),
    (r"norm2", "norm2", AFFINE),
    (r"mlp\.fc1", "mlp/fc1", LINEAR),
    (r"mlp\.fc2", "mlp/fc2", LINEAR),
)
UVIT = (
    (r"embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"pos_embed", "pos_embed", "1 n d -> n d"),
    *rules_of(_BLOCK, r"(in|out)_blocks\.(\d+)\.", r"\1_blocks/block/", r"[\2]"),
    *rules_of(((r"skip_linear", "skip", LINEAR),), r"out_blocks\.(\d+)\.", r"out_blocks/", r"[\1]"),
    *rules_of(_BLOCK, r"mid_block\.", "mid_block/"),
    *rules_of(((r"norm", "norm", AFFINE), (r"lm_head", "head", LINEAR))),
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
