"""python -m jaxtok.evaluate on tiny runs: what it writes, that it is true, and that devices do not change it."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import flextok
from jaxtok import evaluate as command
from jaxtok import tasks
from jaxtok.eval import frechet
from jaxtok.eval.reconstruction import psnr
from jaxtok.hub import load
from jaxtok.pretrained.extractors import Extractor
from jaxtok.sharding import make_mesh
from tests import runs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run whose held-out pictures end in the middle of a batch."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    runs.alone(runs.tiny(), path)
    return path


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    patch_weights(monkeypatch)


def patch_weights(patch):
    """Weights that a machine may have or not change nothing here: a small extractor, and twice L1 for LPIPS."""
    patch.setattr(command, "extractor", fake_extractor)
    patch.setattr(command.perceptual, "lpips_params", lambda net: jnp.float32(2))
    apply = lambda variables, a, b: variables["params"] * jnp.abs(a - b).mean((1, 2, 3))
    patch.setattr(command.perceptual, "LPIPS", lambda net: types.SimpleNamespace(apply=apply))


def fake_extractor(name, path=None):
    """Means of 4 x 4 blocks through a fixed map: six numbers a picture."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(48, 6)), jnp.float32)

    def features(weights, x):
        blocks = x.reshape(len(x), 4, x.shape[1] // 4, 4, x.shape[2] // 4, 3).mean((2, 4))
        return blocks.reshape(len(x), -1) @ weights

    return Extractor("FD-fake", jax.tree_util.Partial(jax.jit(features), weights), 6, "f" * 64)


@pytest.fixture(scope="module")
def evaluated(workdir, tmp_path_factory):
    """(metrics, folder) of one evaluation on all eight devices."""
    out = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch_weights(patch)
        return command.evaluate(workdir, out, all_samplers=True, lpips="vgg"), out


def held_out():
    source = command.build.build(flextok.get_config("tiny").data.eval.source)
    return np.stack([source[i]["image"] for i in range(len(source))])


def test_the_numbers_are_those_of_training_and_of_a_loaded_tokenizer(workdir, evaluated):
    metrics, _ = evaluated
    trained = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["pictures"] == 12 and metrics["bad"] == 0 and metrics["step"] == 6 and metrics["run"] == "tiny"
    for sampler in ("one step", "2 steps, guided"):
        for k, found in metrics["reconstruction"][sampler].items():
            for score in ("psnr", "ssim"):
                assert found[score] == pytest.approx(trained[f"eval/{score}/{sampler}@{k}"], rel=1e-4)
            assert found["bytes"] == pytest.approx(int(k) * np.log2(64_000) / 8)
    assert list(metrics["reconstruction"]["one step"]) == ["1", "4", "8"]
    codes = load(workdir).encode(held_out())
    book = metrics["codebook"]
    assert book["used"] == pytest.approx(len(np.unique(codes)) / 64_000)
    assert book["distinct_first"] == pytest.approx(len(np.unique(codes[:, 0])) / 12)
    assert len(book["positions"]) == 8 and book["shown_position"] == pytest.approx(np.log2(12))


def test_the_frechet_distance_is_that_of_the_pictures(workdir, evaluated):
    metrics, _ = evaluated
    tokenizer, images = load(workdir), held_out()
    features = fake_extractor("").features
    of = lambda x: np.asarray(features(np.asarray(x, np.float32) / 255))
    whole = lambda x: frechet.update(frechet.empty(6), of(x))
    about = metrics["frechet"]
    first = frechet.first_half(np.arange(len(images)))
    assert about["floor"] == pytest.approx(frechet.distance(whole(images[first]), whole(images[~first])), rel=1e-3)
    assert (about["extractor"], about["sha256"], about["pictures"]) == ("FD-fake", "f" * 64, 12)
    # One step of a flow from noise depends on the noise; distances of the same weights are near, of others not.
    found = metrics["reconstruction"]["one step"]["8"]["frechet"]
    rebuilt = tokenizer.decode(tokenizer.encode(images), steps=1)
    assert found == pytest.approx(frechet.distance(whole(images), whole(rebuilt)), rel=0.3)
    assert found > 2 * frechet.distance(whole(images), whole(images)) + 1e-3


def test_one_device_gives_the_numbers_of_eight(workdir, evaluated, tmp_path):
    metrics, _ = evaluated
    alone = command.evaluate(
        workdir, tmp_path, mesh=make_mesh(devices=jax.devices()[:1]), all_samplers=True, lpips="vgg"
    )
    assert sorted(leaves(alone)) == sorted(leaves(metrics))
    for name, value in leaves(alone).items():
        if isinstance(value, float):
            assert leaves(metrics)[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


def leaves(tree, prefix=""):
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, part in items for k, v in leaves(part, f"{prefix}/{name}").items()}
    return {prefix: tree}


def test_what_is_written(evaluated):
    metrics, out = evaluated
    stored = json.loads((out / "metrics.json").read_text())
    assert stored == json.loads(command.report.to_json(metrics))
    text = (out / "report.html").read_text()
    for picture in ("reconstructions.png", "worst.png", "best.png"):
        assert Image.open(out / picture).size[0] > 300
    assert text.count("data:image/png;base64,") == len(list(out.glob("*.png"))) >= 3
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", text)
    for word in ("FD-fake", "f" * 64, "tiny at step 6", "12 held-out pictures", "two halves of the originals"):
        assert word in text
    assert "LPIPS vgg" in text
    assert not list(out.glob("*.tmp"))


def test_the_worst_and_best_are_kept_and_nothing_else(evaluated, workdir):
    """Of two batches: what `collect` keeps agrees with a sort of all rows."""
    task = command.build.build(json.loads((workdir / "config.json").read_text())["task"])
    _, variables = command.hub.restore(workdir, None)
    images = held_out()
    lpips = command.distance_of("vgg", (16, 16, 3), [])
    task = dataclasses.replace(task, samplers=task.samplers[:1])
    look = jax.jit(functools.partial(command.streaming.look, task), static_argnums=2)
    outs = []
    for start in (0, 8):
        part = np.pad(images[start : start + 8], ((0, max(0, start + 8 - 12)), (0, 0), (0, 0), (0, 0)))
        index = np.arange(start, start + 8)
        batch = {"image": part, "mask": index < 12, "index": np.where(index < 12, index, -1).astype(np.int32)}
        wanted = command.streaming.wanted(12)
        outs.append(jax.device_get(look(variables, lpips, None, wanted, batch)))
    rows, kept, moments = command.streaming.collect(outs, command.streaming.labels(task))
    assert moments == {} and rows["index"].tolist() == list(range(12))
    order = np.argsort(rows["psnr/one step@8"])
    assert [index for _, index, _ in kept["worst"]] == order[:4].tolist()
    assert [index for _, index, _ in kept["best"]] == order[::-1][:4].tolist()
    assert [index for _, index, _ in kept["shown"]] == command.streaming.wanted(12).tolist()
    for _, index, pictures in kept["worst"] + kept["shown"]:
        np.testing.assert_array_equal(pictures[0], images[index])
        # the first sampler's columns follow the original; its last is the one that counts
        assert psnr(pictures[None, 0], pictures[None, 3])[0] == pytest.approx(rows["psnr/one step@8"][index], abs=0.1)
        apart = np.abs(pictures[0] / 255 - pictures[3] / 255).mean()
        assert 2 * apart == pytest.approx(rows["lpips/one step@8"][index], rel=1e-3)


def test_limit_tokens_options_and_another_config(workdir, tmp_path, monkeypatch):
    def missing(*args):
        raise FileNotFoundError('pip install "jaxtok[eval]"')

    monkeypatch.setattr(command, "extractor", missing)
    monkeypatch.setattr(command.perceptual, "lpips_params", missing)
    (tmp_path / "metrics.json").write_text("of an earlier evaluation")
    other = flextok.get_config("tiny")
    other.data.eval.source.n = 10
    options = dict(limit=5, batch=8, tokens=(2,), sampler={"steps": 3}, lpips="vgg")
    metrics = command.evaluate(workdir, tmp_path, other, **options)
    assert metrics["pictures"] == 5 == json.loads((tmp_path / "metrics.json").read_text())["pictures"]
    assert list(metrics["reconstruction"]) == ["steps=3", tasks.MEAN_COLOUR, tasks.SWAPPED]
    assert list(metrics["reconstruction"]["steps=3"]) == ["2"] and list(metrics["probe"]) == [2]
    assert set(metrics["reconstruction"]["steps=3"]["2"]) == {"psnr", "ssim", "bytes"}
    for what in ("LPIPS", "Fréchet distance"):
        assert f'No {what}: pip install "jaxtok[eval]"' in metrics["notes"]


def test_a_limit_is_spread_over_the_source():
    source = command.streaming.Spread(range(100), 5)
    assert [source[i] for i in range(5)] == [0, 25, 50, 74, 99]
    assert len(command.streaming.Spread(range(3), 5)) == 3


def test_metrics_json_is_not_there_before_the_end(workdir, tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text("of an earlier evaluation")
    monkeypatch.setattr(command, "of_tokenizer", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.evaluate(workdir, tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_what_cannot_be_evaluated(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no workdir of a run"):
        command.evaluate(tmp_path)
    with pytest.raises(TypeError, match='no key "step".* Did you mean "steps"'):
        command.evaluate(workdir, tmp_path, sampler={"step": 3})
    with pytest.raises(ValueError, match=r"must lie in 1 ... 8"):
        command.evaluate(workdir, tmp_path, tokens=(9,))
    with pytest.raises(ValueError, match="cannot be split"):
        command.evaluate(workdir, tmp_path, batch=9)
    other = flextok.get_config("tiny")
    other.data.eval.source.size = 32
    with pytest.raises(ValueError, match=r"made for pictures \[16, 16, 3\]; data.eval gives \[32, 32, 3\]"):
        command.evaluate(workdir, tmp_path, config=other)
