"""FlexTok's autoregressive models, FlexAR (arXiv 2502.13967) -> `params` of our `generate.ar.AR`.

The names are those of modules in the public code: EPFL-VILAB/search-over-tokens (folder flextok_ar, Apache-2.0), on
apple/ml-l3m. Which of its modules a checkpoint has, its config.yaml says; no such file and no checkpoint had been seen
when this was written, so where the code has two ways to write the same, the table knows both.

Ours is AR(vocabulary=64000, length=256, width, depth, block=dict(hidden=rows of mlp.fc1)), with classes=1000 or
text=True. Positions are in a checkpoint even where they are computed, so `position` is "learned".

A checkpoint has neither the tokenizer nor FLAN-T5-XL, whose features [B T 2048] a model with text reads. The null text
is the empty one as T5 reads it, which is one token: its features are an argument here.
"""

import re

import jax
import numpy as np

from jaxtok.pretrained.convert import AFFINE, LINEAR, OUT, Report, convert, rules_of

_BLOCK = r"models\.ar_image_model\.trunk\.blocks\.(\d+)\."
_FC = LINEAR[:1]  # t: query, key, value; h heads, d head_dim
_WEIGHT = r"\.weight"
_ONE = "(h d) i -> i h d"

# With text a block is norm_1, self_attn, norm_2, cross_attn, norm_3, mlp; without, norm_1, attn, norm_2, mlp.
_CLASS = ((r"norm_2", "norm2", AFFINE),)
_TEXT = (
    (r"norm_2", "norm_cross", AFFINE),
    (r"norm_3", "norm2", AFFINE),
    (r"cross_attn\.Wq", "cross/q", ((_WEIGHT, "/kernel", _ONE),)),
    (r"cross_attn\.proj", "cross/out", OUT[:1]),
)
_LAYERS = (
    (r"norm_1", "norm1", AFFINE),
    (r"(?:self_)?attn\.qkv", "attn/qkv", ((_WEIGHT, "/kernel", "(t h d) i -> i h t d"),)),
    (r"(?:self_)?attn\.proj", "attn/out", OUT[:1]),
    (r"mlp\.fc1", "mlp/gate", _FC),
    (r"mlp\.fc3", "mlp/value", _FC),
    (r"mlp\.fc2", "mlp/out", _FC),
)
_ENDS = (
    (r"models\.ar_image_model\.preprocessor\.embedding\.weight", "token_embed/embedding", "k d -> k d"),
    (r"models\.ar_image_model\.preprocessor\.sos_token_embed", "start", "1 1 d -> d"),
    (r"models\.ar_image_model\.preprocessor\.positional_embedding", "pos_embed", "n d -> n d"),
    (r"models\.ar_image_model\.preprocessor\.cls_embedding\.weight", "class_embed/embedding", "c d -> c d"),
    *rules_of(((r"trunk\.post_trunk_norm", "norm", AFFINE),), r"models\.ar_image_model\."),
    (r"models\.ar_image_model\.head\.linear\.weight", "head/kernel", "o i -> i o"),
    *rules_of(((r"(fc[12])", r"text_mlp/\1", _FC),), r"models\.text_encoder\.mlp\."),
    (r"null_text", "null_text", "d -> d"),
    (r"models\.image_tokenizer\..*", None, "the tokenizer has a checkpoint of its own"),
    (r"models\.text_encoder\.t5_embedder\..*", None, "FLAN-T5-XL has a checkpoint of its own"),
)


def rules(text) -> tuple:
    """The table of a model that reads text, or classes."""
    apart = tuple(
        (f"{_BLOCK}{key}{_WEIGHT}", rf"blocks/{path}/kernel[\1,:,:,{i}]", _ONE)
        for path, keys in (
            ("attn/qkv", (r"(?:self_)?attn\.q_proj", r"(?:self_)?attn\.k_proj", r"(?:self_)?attn\.v_proj")),
            ("cross/kv", (r"cross_attn\.Wk", r"cross_attn\.Wv")),
        )
        for i, key in enumerate(keys)
    )
    return (*_ENDS, *rules_of((*_LAYERS, *(_TEXT if text else _CLASS)), _BLOCK, "blocks/", r"[\1]"), *apart)


def completed(state_dict, empty_text=None) -> dict:
    """The state dict with what is not in it: biases of norms, zero where there are none, and the null text."""
    state_dict = dict(state_dict)
    for key in [key for key in state_dict if re.search(r"norm(_\d)?\.weight$", key)]:
        state_dict.setdefault(key.removesuffix("weight") + "bias", np.zeros_like(state_dict[key]))
    if empty_text is not None:
        fc1, fc2 = (state_dict[f"models.text_encoder.mlp.fc{i}.weight"] for i in (1, 2))
        state_dict["null_text"] = fc2 @ np.asarray(jax.nn.gelu(fc1 @ empty_text))
    return state_dict


def from_state_dict(state_dict, like, empty_text=None) -> tuple[dict, Report]:
    """A state dict {key: array} -> (params, report).

    `like`: our params or their `jax.eval_shape`. `empty_text`: float [2048], FLAN-T5-XL's features of "", for a model
    with text. ValueError without it there, and as `convert` raises it.
    """
    text = "null_text" in like
    if text and empty_text is None:
        raise ValueError(
            "FlexAR with text: give empty_text, FLAN-T5-XL's features of the empty text, for its own has none."
        )
    return convert(completed(state_dict, empty_text), rules(text), like)
