"""Recipes of several stages: what each run is, and that a stop in the middle of any costs nothing."""

import os
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxtok
from jaxtok import stages, train
from jaxtok.checkpoint import Checkpoints
from jaxtok.metrics import Logger
from tests import runs


def recipe():
    """A tokenizer, then its decoder alone."""
    config = runs.tiny(total_steps=3, checkpoint__every=1)
    second = config.task.to_dict() | {"frozen": ("encoder",)}
    config.stages = (
        dict(name="all"),
        dict(name="decoder", total_steps=4, task=second, init_from=(dict(path="all"),)),
    )
    return config


def params(workdir):
    return Checkpoints(workdir).restore_params(which="params")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a recipe that nothing stopped."""
    workdir = tmp_path_factory.mktemp("recipe")
    assert train.run(recipe(), workdir)
    return workdir


def test_a_stage_begins_where_the_other_ended_and_moves_only_what_it_trains(whole):
    first = Checkpoints(whole / "all").restore_params(which="ema")
    frozen = Checkpoints(whole / "decoder" / "frozen").restore_params(which="frozen")
    assert same(frozen["encoder"], first["encoder"])
    after = params(whole / "decoder")
    assert "encoder" not in after and not same(after["decoder"], first["decoder"])
    assert list(runs.logged(whole / "decoder")) == [1, 2, 3, 4]


def test_a_recipe_is_no_tokenizer_its_stages_are(whole):
    with pytest.raises(FileNotFoundError, match="folder of workdirs: name one of them, all, decoder"):
        jaxtok.load(whole)
    assert jaxtok.load(whole / "decoder").tokens == 8


@pytest.mark.parametrize("stage, step", [("all", 1), ("decoder", 2)])
def test_a_stop_in_the_middle_of_any_stage_changes_nothing(whole, tmp_path, monkeypatch, stage, step):
    log = Logger.log

    def stop(self, done, values):
        log(self, done, values)
        if f"/{stage}/" in str(self.path) and done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "log", stop)
        train.run(recipe(), tmp_path)
    assert (tmp_path / "decoder").exists() == (stage == "decoder")
    assert Checkpoints(tmp_path / stage).latest() < {"all": 3, "decoder": 4}[stage]
    before = (tmp_path / "all" / "metrics.jsonl").read_text()
    metrics = train.run(recipe(), tmp_path)
    assert metrics and same(params(tmp_path / "decoder"), params(whole / "decoder"))
    if stage == "decoder":  # a stage that has ended is not run again
        assert (tmp_path / "all" / "metrics.jsonl").read_text() == before


def test_a_signal_at_the_end_of_a_stage_begins_no_other(tmp_path, monkeypatch, capsys):
    """It may come in the last step, or in the evaluation after it: the stage is whole then."""
    done = []

    def stage(config, workdir, profile, stop):
        done.append(workdir.name)
        stop.append("SIGTERM")

    monkeypatch.setattr(train, "train", stage)
    train.run(recipe(), tmp_path)
    assert done == ["all"] and "stopped the recipe in all" in capsys.readouterr().out


def test_a_stage_that_has_ended_keeps_its_config(whole):
    changed = recipe()
    changed.stages = (dict(name="all", ema=0.5), changed.stages[1])
    with pytest.raises(ValueError, match=r"ema: [\d.]+ -> 0.5"):
        train.run(changed, whole)


def test_what_a_stage_is():
    config = ConfigDict(dict(total_steps=5, batch_size=8, init_from=(dict(path="else"),)))
    [(workdir, alone)] = stages.runs(config, "w", ("total_steps",))
    assert str(workdir) == "w" and alone == config
    config.stages = (dict(name="a"), dict(name="b", total_steps=7, init_from=(dict(path="a"), dict(path="x/a"))))
    (one, first), (two, second) = stages.runs(config, "w", ("total_steps", "init_from"))
    assert (str(one), str(two)) == ("w/a", "w/b") and (first.total_steps, second.total_steps) == (5, 7)
    assert first.init_from[0]["path"] == "else" and [s["path"] for s in second.init_from] == ["w/a", "x/a"]
    assert second.batch_size == 8
    [_, (two, second)] = stages.runs(config, "gs://bucket/w", ("total_steps", "init_from"))
    assert (str(two), second.init_from[0]["path"]) == ("gs://bucket/w/b", "gs://bucket/w/a")


@pytest.mark.parametrize(
    "stage, said",
    [
        (dict(name="a", total_step=1), 'no key "total_step".*Did you mean "total_steps"'),
        (dict(total_steps=1), r"stages\[1\].name is ''"),
        (dict(name="first"), "another one for each"),
        (dict(name="../x"), "names a folder"),
    ],
)
def test_a_stage_that_is_wrong(stage, said):
    config = ConfigDict(dict(total_steps=5, stages=(dict(name="first"), stage)))
    with pytest.raises((TypeError, ValueError), match=said):
        stages.runs(config, "w", ("total_steps",))
