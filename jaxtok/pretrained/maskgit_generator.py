"""TiTok's masked generators (arXiv 2406.07550, Apache-2.0 declared on the hub) -> `params` of `generate.masked.Masked`.

There are two bodies. VIT (L-32 and B-64): Masked(vocabulary=4096, width=768, depth=24, classes=1000,
block=dict(head_dim=48, post_norm=True, eps=1e-12)). UVIT (S-128): Masked(vocabulary=4096, width=1024, depth=20,
classes=1000, skips=True, block=dict(bias=("out", "mlp"))), which has one layer more in the middle.
"""

from jaxtok.pretrained.convert import AFFINE, LINEAR, OUT, Report, bert_rules, convert, rules_of, with_one_type

_QKV = ((r"\.weight", "/kernel", "(t h d) i -> i h t d"),)
VIT = (
    (r"model\.embeddings\.word_embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"model\.embeddings\.position_embeddings\.weight", "pos_embed", "n d -> n d"),
    *bert_rules(r"model\."),
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


def from_state_dict(state_dict, like) -> tuple[dict, Report]:
    """A state dict {key: array} of either body -> (params, report). ValueError as `convert` raises it.

    `like`: our params or their `jax.eval_shape`; those with "mid_block" want UVIT.
    """
    return convert(with_one_type(state_dict, "model."), UVIT if "mid_block" in like else VIT, like)
