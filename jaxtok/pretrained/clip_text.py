"""CLIP's text transformer (arXiv 2103.00020) as a text tower, and its weights.

The files are those of openai/clip-vit-* on the hub, or of others in that form: the whole model, whose vision tower is
left out, or its text model alone. `data.transforms.caption_words` makes ids with the tokenizer.json among them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.norm import Norm
from jaxtok.pretrained.convert import AFFINE, LINEAR, OUT, Report, convert, matching, rules_of

LICENCE = "The weights of OpenAI's CLIP are under the MIT licence of its code; others of this form have their own."

EPS = 1e-5  # of every norm


class ClipText(nn.Module):
    """Ids int32 [B T], 0 where there is no more text -> (features float32 [B T D], mask bool [B T]).

    The call is that of `encoders.text.TextTransformer`. The features are those after the last norm; a token sees those
    before it alone. An id of 0 within a text is a word ("!"), those behind its last token are padding. The sizes are
    those of the ViT-L/14's where nothing is said.

    Attributes:
      width, depth, head_dim, hidden: of the transformer, and inside its feed-forward layers.
      mlp: "quick_gelu", which OpenAI's weights need, or "gelu".
      vocabulary: how many ids there are.
      length: the most tokens that there can be.
      padding: whether the mask counts the padding too. The decoder of TA-TiTok (arXiv 2501.07730) reads all 77 places.
      dtype: of the computation; norms and the softmax are float32.
    """

    width: int = 768
    depth: int = 12
    head_dim: int = 64
    hidden: int = 3072
    mlp: str = "quick_gelu"
    vocabulary: int = 49_408
    length: int = 77
    padding: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text):
        n = text.shape[1]
        if n > self.length:
            raise ValueError(f"ClipText has places for {self.length} tokens, got {n}.")
        normal = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="embed")(text)
        x = x + self.param("pos_embed", normal, (self.length, self.width))[:n]  # [B T D]
        fields = dict(head_dim=self.head_dim, hidden=self.hidden, mlp=self.mlp, eps=EPS, dtype=self.dtype)
        blocks = stack(self.depth, bias=("qkv", "out", "mlp"), name="blocks", **fields)
        x, _ = blocks(x.astype(self.dtype), Side(np.tri(n, dtype=bool)), False)
        more = jnp.cumsum(text[:, ::-1] > 0, 1)[:, ::-1] > 0  # bool [B T]: here or behind it is a token
        return Norm(eps=EPS, name="norm")(x.astype(jnp.float32)), more | (jnp.arange(n) == 0) | self.padding


# ---- published weights ----

_MODEL = r"(?:text_model\.)?"
_LAYER = _MODEL + r"encoder\.layers\.(\d+)\."
RULES = (
    (_MODEL + r"embeddings\.token_embedding\.weight", "embed/embedding", "k d -> k d"),
    (_MODEL + r"embeddings\.position_embedding\.weight", "pos_embed", "n d -> n d"),
    *(
        (_LAYER + rf"self_attn\.{name}_proj\.{kind}", rf"blocks/attn/qkv/{leaf}[\1,{axes}{i}]", pattern)
        for i, name in enumerate("qkv")
        for kind, leaf, axes, pattern in (
            ("weight", "kernel", ":,:,", "(h d) i -> i h d"),
            ("bias", "bias", ":,", "(h d) -> h d"),
        )
    ),
    *rules_of(
        (
            (r"self_attn\.out_proj", "attn/out", OUT),
            (r"layer_norm1", "norm1", AFFINE),
            (r"layer_norm2", "norm2", AFFINE),
            (r"mlp\.fc1", "mlp/fc1", LINEAR),
            (r"mlp\.fc2", "mlp/fc2", LINEAR),
        ),
        _LAYER,
        "blocks/",
        r"[\1]",
    ),
    *rules_of(((r"final_layer_norm", "norm", AFFINE),), _MODEL),
    (_MODEL + r"embeddings\.position_ids", None, "numbers of the places"),
    (r"vision_model\..*|visual_projection\..*", None, "CLIP's vision tower"),
    (r"text_projection\..*|logit_scale", None, "of CLIP's contrast, which no reader of words uses"),
)


def load(state_dict, published=None, shapes=None) -> tuple[dict, dict, Report]:
    """A published state dict {key: array} -> ({"text_tower": spec of the ClipText}, its params, report).

    The sizes are those of the arrays. `published`, the config.json of the text model or of the whole, says how many
    heads there are and which GELU; without it, heads are 64 wide and it is OpenAI's. Raises ValueError as `convert`
    does, and for what ClipText does not compute.
    """
    published = (published or {}).get("text_config", published) or {}
    fields = sizes(state_dict) | dict(mlp=published.get("hidden_act", "quick_gelu"))
    if fields["mlp"] not in ("quick_gelu", "gelu") or published.get("layer_norm_eps", EPS) != EPS:
        raise ValueError(
            f"ClipText computes quick_gelu or gelu, and norms with {EPS}; this CLIP's config.json says hidden_act "
            f"{fields['mlp']!r} and layer_norm_eps {published.get('layer_norm_eps', EPS)!r}."
        )
    if "num_attention_heads" in published:
        fields["head_dim"] = fields["width"] // published["num_attention_heads"]
    like = jax.eval_shape(ClipText(**fields).init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    params, report = convert(state_dict, RULES, like)
    return {"text_tower": dict(name="pretrained.clip_text.ClipText", **fields)}, params, report


def sizes(state_dict) -> dict:
    """The fields of the ClipText that these arrays are of, but for the heads. ValueError where they are no CLIP's."""
    find = functools.partial(matching, state_dict)
    words, places, inside = map(find, (RULES[0][0], RULES[1][0], _LAYER + r"mlp\.fc1\.weight"))
    if not (words and places and inside):
        raise ValueError("These are no weights of CLIP's text model: see the head of jaxtok/pretrained/clip_text.py.")
    (vocabulary, width), (length, _), (hidden, _) = (found[0][1] for found in (words, places, inside))
    depth = 1 + max(int(m[1]) for m, _ in inside)
    return dict(width=width, depth=depth, hidden=hidden, vocabulary=vocabulary, length=length)
