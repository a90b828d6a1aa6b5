"""T5's encoder and CLIP's text model: their features, and that weights go where they belong or say why not."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import textok
from jaxtok import convert as command
from jaxtok.build import build
from jaxtok.data.transforms import caption_words
from jaxtok.init_from import graft
from jaxtok.pretrained import clip_text, t5
from jaxtok.pretrained.convert import match
from tests.goldens import text_arrays
from tests.goldens.compare import MISS, compare_all
from tests.pretrained import published
from tests.runs import ROOT

NAMES = tuple(text_arrays.FILES)


@functools.cache
def golden(name):
    with np.load(ROOT / f"tests/goldens/text/{name}.npz") as archive:
        return dict(archive)


def weights(name):
    return {key.removeprefix("param/"): a for key, a in golden(name).items() if key.startswith("param/")}


@functools.cache
def tower(name):
    """(ids -> features and mask, params)."""
    spec, params, _ = text_arrays.loaded(name, golden(name))
    return jax.jit(build(spec["text_tower"]).apply), params


def read(name, ids, params=None):
    apply, own = tower(name)
    with jax.default_matmul_precision("highest"):
        return apply({"params": own if params is None else params}, np.asarray(ids, np.int32))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_transformers(name):
    with jax.default_matmul_precision("highest"):
        ours, inputs, tolerances = text_arrays.FILES[name](golden(name))
    check = lambda arrays: [
        row for row in compare_all(name, ours, arrays, inputs, {}, tolerances) if row.verdict == MISS
    ]
    assert check(golden(name)) == [] and ours["features"].dtype == np.float32
    wrong = golden(name)["features"].copy()
    wrong[0, -1, -1] += 3e-5
    assert len(check(golden(name) | {"features": wrong})) == 1


@pytest.mark.parametrize("name", ["t5", "clip_text"])
def test_every_weight_is_read(name):
    """Each foreign array that has a place, drawn anew, changes the features; its neighbours do not make up for it."""
    ids, rng = golden(name)["ids"], np.random.default_rng(0)
    right, table, (_, own) = read(name, ids)[0], text_arrays.TABLES[name], tower(name)
    pieces, _ = match(weights(name), table.RULES, own)
    assert len(pieces) == {"t5": 21, "clip_text": 36}[name]
    for key in pieces:
        if key.endswith("k_proj.bias"):
            continue  # it adds the same to all logits of a query
        drawn = weights(name) | {key: rng.normal(size=weights(name)[key].shape).astype(np.float32)}
        assert jnp.abs(read(name, ids, table.load(drawn, {"num_attention_heads": 3})[1])[0] - right).max() > 1e-3, key


@pytest.mark.parametrize("name", ["t5", "clip_text"])
def test_padding_is_read_by_nobody(name):
    ids = golden(name)["ids"]
    length = {"t5": 9, "clip_text": 6}[name]
    features, mask = read(name, ids)
    assert mask.sum(1).tolist() == [ids.shape[1], length] and mask[1, :length].all()
    for more in (0, 1, 3):
        np.testing.assert_allclose(
            read(name, ids[1:, : length + more])[0][:, :length], features[1:, :length], atol=1e-5
        )
    other = ids.copy()
    other[1, length - 1] = 5
    assert jnp.abs(read(name, other)[0][1, length - 1] - features[1, length - 1]).max() > 1e-3
    nothing = read(name, 0 * ids)
    assert nothing[1].sum(1).tolist() == [1, 1] and np.isfinite(nothing[0]).all()


def test_a_token_of_t5_sees_those_behind_it_and_one_of_clip_does_not():
    for name, sees in (("t5", True), ("clip_text", False)):
        ids = golden(name)["ids"]
        other = ids.copy()
        other[0, -1] = 4
        assert (jnp.abs(read(name, other)[0][0, :-1] - read(name, ids)[0][0, :-1]).max() > 1e-3) == sees


def test_clip_may_count_its_padding():
    spec, params, _ = text_arrays.loaded("clip_text", golden("clip_text"))
    ids = golden("clip_text")["ids"]
    features, mask = build(spec["text_tower"] | dict(padding=True)).apply({"params": params}, ids)
    assert mask.all() and mask.shape == ids.shape
    np.testing.assert_allclose(features, read("clip_text", ids)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip_text"])
def test_in_bfloat16_features_are_nearly_those(name):
    spec, params, _ = text_arrays.loaded(name, golden(name))
    ids = golden(name)["ids"]
    features, mask = build(spec["text_tower"] | dict(dtype="bfloat16")).apply({"params": params}, ids)
    assert features.dtype == jnp.float32
    assert 0 < np.abs(features - read(name, ids)[0])[np.array(mask)].mean() < 0.05


def test_distances_fall_into_buckets():
    """Single ones up to 7, then up to 128 by a common factor; keys behind the query have a half of their own."""
    row = t5.buckets_of(300, 32, 128)[150]
    assert row[150 - np.array([0, 1, 7, 8, 11, 12, 16, 32, 64, 127, 128, 150])].tolist() == [
        *(0, 1, 7, 8, 8, 9, 10, 12, 14, 15, 15, 15)
    ]
    np.testing.assert_array_equal(row[151:], 16 + row[149:0:-1])
    assert t5.buckets_of(3, 32, 128).tolist() == [[0, 17, 18], [1, 0, 17], [2, 1, 0]]


# ---- what files may hold ----


def test_what_is_left_out_is_named():
    report = text_arrays.loaded("t5", golden("t5"))[2]
    assert report.unused == [] and len(report.set_aside["T5's decoder"]) == 18
    assert report.set_aside["shared.weight once more"] == ["encoder.embed_tokens.weight"]
    whole = weights("clip_text") | {
        "logit_scale": np.zeros(()),
        "text_projection.weight": np.zeros((8, 24)),
        "visual_projection.weight": np.zeros((8, 4)),
        "vision_model.encoder.layers.0.mlp.fc1.weight": np.zeros((4, 4)),
        "text_model.embeddings.position_ids": np.arange(13)[None],
    }
    published = {"text_config": {"num_attention_heads": 3}}
    spec, params, report = clip_text.load(whole, published)
    assert report.unused == [] and sum(map(len, report.set_aside.values())) == 5
    jax.tree.map(np.testing.assert_array_equal, params, tower("clip_text")[1])
    assert spec["text_tower"]["mlp"] == "quick_gelu"
    bare = {key.removeprefix("text_model."): array for key, array in weights("clip_text").items()}
    jax.tree.map(np.testing.assert_array_equal, clip_text.load(bare, published)[1], params)


def test_an_encoder_alone_is_enough():
    alone = {key: array for key, array in weights("t5").items() if key.startswith("encoder.")}
    jax.tree.map(np.testing.assert_array_equal, t5.load(alone)[1], tower("t5")[1])


@pytest.mark.parametrize(
    ("name", "key", "path"),
    [
        ("t5", "encoder.block.1.layer.0.SelfAttention.k.weight", r"blocks/attn/qkv/kernel[1,:,:,1]"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "blocks/mlp/value/kernel[0]"),
        ("t5", "encoder.final_layer_norm.weight", "norm/scale"),
        ("clip_text", "text_model.encoder.layers.1.self_attn.q_proj.bias", "blocks/attn/qkv/bias[1,:,0]"),
        ("clip_text", "text_model.final_layer_norm.bias", "norm/bias"),
    ],
)
def test_a_key_that_lacks_or_does_not_fit_is_named(name, key, path):
    load = functools.partial(text_arrays.TABLES[name].load, published={"num_attention_heads": 3})
    lost = {k: array for k, array in weights(name).items() if k != key}
    with pytest.raises(ValueError) as error:
        load(lost)
    assert "missing in the foreign state dict (1)" in str(error.value) and path in str(error.value)
    with pytest.raises(ValueError) as error:
        load(weights(name) | {key: weights(name)[key][:-1]})
    assert f"{key}: {path} needs" in str(error.value)


def test_other_models_are_refused_by_name():
    for table, what in ((t5, "no weights of T5 1.1"), (clip_text, "no weights of CLIP's text model")):
        with pytest.raises(ValueError, match=what):
            table.load({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu'"):
        t5.load(weights("t5"), {"feed_forward_proj": "relu"})
    per_layer = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(ValueError, match="as UMT5's"):
        t5.load(weights("t5") | {per_layer: np.zeros((32, 3))})
    with pytest.raises(ValueError, match="hidden_act 'silu'"):
        clip_text.load(weights("clip_text"), {"hidden_act": "silu"})
    with pytest.raises(ValueError, match="places for 13 tokens, got 14"):
        read("clip_text", np.ones((1, 14)))


# ---- in a run ----


@pytest.mark.parametrize("name", ["t5", "clip_text"])
def test_a_converted_workdir_fills_the_tower_of_a_config(name, tmp_path, capsys):
    published.write_safetensors(tmp_path / "model.safetensors", weights(name))
    (tmp_path / "config.json").write_text(str(golden(name)["config"]))
    command.main([str(tmp_path), f"--kind={name}", f"--out={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert {"t5": "21 of 40 keys", "clip_text": "36 of 36 keys"}[name] in said and "The weights of" in said
    spec = json.loads((tmp_path / "run" / "config.json").read_text())["text_tower"]
    assert spec["name"] == textok.TOWERS[name][0]["name"]
    empty = jax.tree.map(jnp.zeros_like, tower(name)[1])
    found, filled = graft({"text_tower": empty}, str(tmp_path / "run"), textok.TOWER_RULES)
    jax.tree.map(np.testing.assert_array_equal, found["text_tower"], tower(name)[1])
    assert len(filled) == len(jax.tree.leaves(empty))


def test_a_tokenizer_json_of_either_makes_ids(tmp_path):
    """T5's ends a text with a token of its own, CLIP's also begins it with one; a long text keeps both."""
    tokenizers = pytest.importorskip("tokenizers", reason='pip install "jaxtok[text]" brings tokenizers')
    words = ["<pad>", "</s>", "<s>", "<unk>", "a", "red", "cat"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = {}
    for name, template in (("t5", "$A </s>"), ("clip", "<s> $A </s>")):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("</s>", 1), ("<s>", 2)]
        )
        tokenizer.enable_padding(pad_id=6, length=9)  # which the file may ask for, and a run does not want
        tokenizer.save(str(tmp_path / f"{name}.json"))
        make = caption_words(tmp_path / f"{name}.json", 5)
        made[name] = [make({"caption": caption}, None)["text"].tolist() for caption in ("a cat", "", "a " * 9)]
    assert made["t5"] == [[4, 6, 1, 0, 0], [1, 0, 0, 0, 0], [4, 4, 4, 4, 1]]
    assert made["clip"] == [[2, 4, 6, 1, 0], [2, 1, 0, 0, 0], [2, 4, 4, 4, 1]]
    with pytest.raises(
        FileNotFoundError, match="there is no .*other.json. It is the tokenizer.json that stands beside"
    ):
        caption_words(tmp_path / "other.json", 5)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is no tokenizer.json"):
        caption_words(tmp_path / "other.json", 5)
