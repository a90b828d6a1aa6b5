"""The encoder of T5 1.1 and Flan-T5 (arXiv 1910.10683, 2002.05202, 2210.11416) as a text tower, and its weights.

The files are those of google/t5-v1_1-* and google/flan-t5-* on the hub: the whole model, whose decoder is left out, or
its encoder alone. T5 1.0, whose layers have no gate, is another model. `data.transforms.caption_words` makes ids with
the tokenizer.json of such a repository.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.decoder_block import stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.mlp import FeedForward
from jaxtok.nn.norm import Norm
from jaxtok.pretrained.convert import Report, convert, matching

LICENCE = "The weights of T5 1.1 and Flan-T5 are under the Apache License 2.0."

EPS = 1e-6  # of every norm


class T5Encoder(nn.Module):
    """Ids int32 [B T], 0 where there is no more text -> (features float32 [B T D], mask bool [B T]).

    The call is that of `encoders.text.TextTransformer`. Places are told by their distances alone, so a text may have
    any length. The sizes are XL's where nothing is said.

    Attributes:
      width, depth: of the transformer.
      heads, head_dim: of attention; together they need not be as wide as the model.
      hidden: width inside the feed-forward layers.
      vocabulary: how many ids there are.
      buckets, farthest: how many kinds of distance there are, and from where on all are of one.
      dtype: of the computation; norms and the softmax are float32. Not float16, which the features of T5 exceed.
    """

    width: int = 2048
    depth: int = 24
    heads: int = 32
    head_dim: int = 64
    hidden: int = 5120
    vocabulary: int = 32_128
    buckets: int = 32
    farthest: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text):
        n = text.shape[1]
        normal = nn.initializers.normal(1.0)
        mask = (text > 0) | (jnp.arange(n) == 0)  # [B T]
        x = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="embed")(text).astype(self.dtype)
        table = self.param("relative", nn.initializers.normal(self.width**-0.5), (self.buckets, self.heads))
        bias = table[buckets_of(n, self.buckets, self.farthest)].transpose(2, 0, 1)[None]  # [1 h T T]
        fields = dict(heads=self.heads, head_dim=self.head_dim, hidden=self.hidden, dtype=self.dtype)
        blocks = stack(self.depth, target=Block, name="blocks", **fields)
        x, _ = blocks(x, Side(bias.astype(self.dtype), mask[:, None, None]), False)
        return Norm("rms", EPS, name="norm")(x.astype(jnp.float32)), mask


class Side(NamedTuple):
    """What every layer sees beside the tokens."""

    bias: Any  # [1 h T T], added to the logits
    mask: Any  # bool [B 1 1 T], what may be attended to


class Block(nn.Module):
    """Attention, whose logits are not scaled, then a gated feed-forward layer; for `stack`. No biases."""

    heads: int
    head_dim: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x, side, train=False):
        norm = lambda name: Norm("rms", EPS, name=name)
        x = x + SelfAttention(self.heads, self.head_dim, self.dtype, name="attn")(norm("norm1")(x), side)
        return x + FeedForward("geglu", self.hidden, dtype=self.dtype, name="mlp")(norm("norm2")(x)), None


class SelfAttention(nn.Module):
    """x [B T D], side -> [B T D]."""

    heads: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x, side):
        qkv = Linear((self.heads, 3, self.head_dim), stacked=3, bias=False, dtype=self.dtype, name="qkv")(x)
        q, k, v = (qkv[..., i, :] for i in range(3))  # [B T h d]
        y = jax.nn.dot_product_attention(q, k, v, side.bias, side.mask, scale=1.0)
        return Linear(x.shape[-1], inputs=2, bias=False, dtype=self.dtype, name="out")(y)


def buckets_of(n, buckets, farthest):
    """The kind of distance from each of n places to each, int [n n]: rows are queries, columns are keys.

    A half of the kinds is for keys behind the query. Of each half, the first half are single distances, and the others
    grow by a common factor up to `farthest`, the last of them without end.
    """
    distance = np.arange(n) - np.arange(n)[:, None]
    half, exact, far = buckets // 2, buckets // 4, np.abs(distance)
    steps = np.log(np.maximum(far, 1).astype(np.float32) / exact) / np.float32(np.log(farthest / exact))
    grown = np.minimum(exact + (steps * (half - exact)).astype(int), half - 1)
    return half * (distance > 0) + np.where(far < exact, far, grown)


# ---- published weights ----

_LAYER = r"encoder\.block\.(\d+)\.layer\."
_ATTENTION = _LAYER + r"0\.SelfAttention\."
_MLP = _LAYER + r"1\.DenseReluDense\."
_TABLE = r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
RULES = (
    (r"shared\.weight", "embed/embedding", "k d -> k d"),
    (_TABLE, "relative", "k h -> k h"),
    *((_ATTENTION + rf"{name}\.weight", rf"blocks/attn/qkv/kernel[\1,:,:,{i}]", "(h d) i -> i h d")
      for i, name in enumerate("qkv")),
    (_ATTENTION + r"o\.weight", r"blocks/attn/out/kernel[\1]", "o (h d) -> h d o"),
    (_LAYER + r"0\.layer_norm\.weight", r"blocks/norm1/scale[\1]", "d -> d"),
    (_LAYER + r"1\.layer_norm\.weight", r"blocks/norm2/scale[\1]", "d -> d"),
    *((_MLP + rf"{name}\.weight", rf"blocks/mlp/{ours}/kernel[\1]", "o i -> i o")
      for name, ours in (("wi_0", "gate"), ("wi_1", "value"), ("wo", "out"))),
    (r"encoder\.final_layer_norm\.weight", "norm/scale", "d -> d"),
    (r"encoder\.embed_tokens\.weight", None, "shared.weight once more"),
    (r"(?:decoder\..*|lm_head\.weight)", None, "T5's decoder"),
)  # fmt: skip


def load(state_dict, published=None, shapes=None) -> tuple[dict, dict, Report]:
    """A published state dict {key: array} -> ({"text_tower": spec of the T5Encoder}, its params, report).

    The sizes are those of the arrays; `published`, the config.json, may say from where on distances are one. Raises
    ValueError as `convert` does, and for a T5 of another kind.
    """
    state_dict, published = dict(state_dict), published or {}
    if "shared.weight" not in state_dict and "encoder.embed_tokens.weight" in state_dict:
        state_dict["shared.weight"] = state_dict.pop("encoder.embed_tokens.weight")
    for key, ours in (("feed_forward_proj", "gated-gelu"), ("layer_norm_epsilon", EPS)):
        if published.get(key, ours) != ours:
            raise ValueError(
                f"This T5's config.json says {key} = {published[key]!r}; T5Encoder computes {ours!r} alone."
            )
    fields = sizes(state_dict) | dict(farthest=published.get("relative_attention_max_distance", 128))
    like = jax.eval_shape(T5Encoder(**fields).init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    params, report = convert(state_dict, RULES, like)
    return {"text_tower": dict(name="pretrained.t5.T5Encoder", **fields)}, params, report


def sizes(state_dict) -> dict:
    """The fields of the T5Encoder that these arrays are of. ValueError where they are no T5's with gates."""
    find = functools.partial(matching, state_dict)
    words, tables, queries, gates = map(find, (RULES[0][0], _TABLE, _ATTENTION + r"q\.weight", _MLP + r"wi_0\.weight"))
    if not (words and tables and queries and gates):
        raise ValueError("These are no weights of T5 1.1 or Flan-T5: see the head of jaxtok/pretrained/t5.py.")
    if len(tables) > 1:
        raise ValueError("Every layer here has distances of its own, as UMT5's; those of T5 are the first layer's.")
    (vocabulary, width), (buckets, heads), (inside, _), (hidden, _) = (x[0][1] for x in (words, tables, queries, gates))
    return dict(
        width=width,
        depth=1 + max(int(m[1]) for m, _ in queries),
        heads=heads,
        head_dim=inside // heads,
        hidden=hidden,
        vocabulary=vocabulary,
        buckets=buckets,
    )
