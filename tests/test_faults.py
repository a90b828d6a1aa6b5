"""What a run does when something breaks; docs/sharding_and_scale.md has the table. Kills are in test_train.py."""

import json
import resource
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import checkpoint, train
from jaxtok.checkpoint import Checkpoints, Misfit
from jaxtok.metrics import Window
from tests import runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps: its workdir, and its losses."""
    path = tmp_path_factory.mktemp("whole")
    train.train(runs.tiny(checkpoint__every=2), path)
    return path, runs.logged(path)


def saved(workdir, steps, size=1 << 16):
    """Checkpoints of arrays that are the step, over and over."""
    checkpoints = Checkpoints(workdir)
    for step in steps:
        checkpoints.save(step, {"x": jnp.full(size, float(step)), "y": jnp.arange(8)})
    checkpoints.close()
    return checkpoints


ABSTRACT = {"x": jax.ShapeDtypeStruct((1 << 16,), jnp.float32), "y": jax.ShapeDtypeStruct((8,), jnp.int32)}


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name == "d":  # arrays
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


def lost(folder):
    for file in sorted(folder.rglob("*"), reverse=True):
        if file.is_file() and file.parent != folder:
            file.unlink()


@pytest.mark.parametrize("damage", [truncate, garbage, lost])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    saved(tmp_path, (1, 2))
    damage(tmp_path / "checkpoints/2")
    state, step, said = Checkpoints(tmp_path).restore_newest(ABSTRACT)
    assert step == 1 and (state["x"] == 1).all()
    assert len(said) == 1 and "Checkpoint 2" in said[0] and "2.damaged" in said[0]
    again = Checkpoints(tmp_path)
    assert again.steps() == [1] and again.save(2, {"x": jnp.full(1 << 16, 2.0), "y": jnp.arange(8)})
    again.close()
    assert Checkpoints(tmp_path).restore_newest(ABSTRACT)[1:] == (2, [])


def test_when_none_can_be_read_the_run_does_not_begin_anew_and_nothing_is_renamed(tmp_path, monkeypatch):
    """Neither at this start nor at the next; a fault of the reader, such as too little memory, damages nothing."""
    saved(tmp_path, (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_load", lambda *args: (_ for _ in ()).throw(MemoryError("RESOURCE_EXHAUSTED")))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"No checkpoint .* can be read: 2 \(MemoryError.*; 1 \(MemoryError"):
                Checkpoints(tmp_path).restore_newest(ABSTRACT)
    assert Checkpoints(tmp_path).restore_newest(ABSTRACT)[1:] == (2, [])
    for step in "12":
        garbage(tmp_path / "checkpoints" / step)
    with pytest.raises(RuntimeError, match="They are left as they are"):
        Checkpoints(tmp_path).restore_newest(ABSTRACT)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_what_only_another_process_cannot_read_is_said_so(tmp_path, monkeypatch):
    saved(tmp_path, (1, 2))
    answers = iter([False, True])
    others = dict(process_allgather=lambda x: np.array([x, next(answers)]), sync_global_devices=lambda name: None)
    monkeypatch.setattr(checkpoint, "multihost_utils", types.SimpleNamespace(**others))
    _, step, said = Checkpoints(tmp_path).restore_newest(ABSTRACT)
    assert step == 1 and "2 in" in said[0] and "(on another process)" in said[0]


def test_a_checkpoint_of_another_state_is_not_damaged(tmp_path):
    checkpoints = saved(tmp_path, (1, 2))
    with pytest.raises(Misfit, match="does not fit"):
        checkpoints.restore_newest(ABSTRACT | {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert checkpoints.steps() == [1, 2]


def test_a_run_says_so_and_ends_as_if_nothing_had_been(whole, tmp_path, capsys):
    train.train(runs.tiny(checkpoint__every=2, total_steps=6), tmp_path)
    for step in ("4", "6"):
        garbage(tmp_path / "checkpoints" / step)
    capsys.readouterr()
    train.train(runs.tiny(checkpoint__every=2), tmp_path)
    out = capsys.readouterr().out
    assert "Checkpoint 6" in out and "Checkpoint 4" in out and "Resuming at step 2" in out
    assert runs.logged(tmp_path) == whole[1]


def test_a_save_that_fails_is_heard_of_without_another_save(tmp_path):
    checkpoints = saved(tmp_path, (1,))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # the disk, as it were, is full
    try:
        checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))})
        with pytest.raises(RuntimeError, match=r"Saving checkpoint 2 in .*; the last complete checkpoint is 1\."):
            for _ in range(600):  # steps of a run
                checkpoints.check()
                time.sleep(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.check()
    assert checkpoints.steps() == [1]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    pending = [{"loss/flow": np.float32(1), "grad_norm": np.float32(np.nan if i == 3 else 1)} for i in range(5)]
    with pytest.raises(FloatingPointError, match=r"Step 9: grad_norm is nan\. There is no checkpoint yet"):
        train.fetch(pending, 10, Checkpoints(tmp_path))
    wanted = rf'good checkpoint is step 4: .*another workdir, with init_from=\(dict\(path="{tmp_path}"\),\)'
    with pytest.raises(FloatingPointError, match=wanted):  # this workdir would refuse another rate
        train.fetch(pending, 10, saved(tmp_path, (4,)))


def test_a_wait_for_data_is_reported_while_it_lasts(capsys):
    window = Window(patience=0.05)
    with window.waiting(7, "Folder"):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert said.count("Step 7 has waited") >= 2 and "from Folder" in said
    with window.waiting(8, "Folder"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and window.waited >= 0.2


def test_a_log_has_the_times_of_steps_and_the_peak_of_memory(whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["step"] == 4 and "loss" in line)
    assert line["step_s_p95"] >= line["step_s_median"] > 0 and 0 <= line["data_wait_share"] <= 1
    assert 0.1 < line["memory_peak_gb"] < 24


def test_a_trace_is_written_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="6 are left"):
        train.train(runs.tiny(), tmp_path / "short", profile=True)
    train.train(runs.tiny(total_steps=13), tmp_path / "run", profile=True)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
