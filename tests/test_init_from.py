"""Starting from another run's weights, and parts that do not train."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from jaxtok import convert, train
from jaxtok.checkpoint import Checkpoints
from jaxtok.init_from import graft
from tests import runs

ENCODER_ONLY = ((r"encoder/.*|batch_stats/.*", r"\g<0>"), (r"decoder/.*", None))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished tiny run."""
    workdir = tmp_path_factory.mktemp("first")
    runs.alone(runs.tiny(), workdir)
    return workdir


def later(first, **changes):
    """A run with that run's encoder, frozen."""
    source = dict(path=str(first), rules=ENCODER_ONLY)
    return runs.tiny(init_from=(source,), task__frozen=("encoder",), **changes)


def flat(tree):
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def weights(workdir, which, step=None):
    return flat(Checkpoints(workdir).restore_params(step, which))


def test_a_frozen_part_stays_and_the_rest_trains(first, tmp_path):
    runs.alone(later(first), tmp_path)
    there = weights(first, "ema")
    stored = sorted(Checkpoints(tmp_path)._stored(6))
    assert any("decoder" in name for name in stored) and not any("encoder" in name for name in stored if "ema" in name)
    assert not any(name.startswith(("params/encoder", "opt_state/0/mu/encoder", "frozen")) for name in stored)
    frozen = weights(tmp_path / "frozen", "frozen")
    assert frozen.keys() == {name for name in there if name.startswith("encoder/")}
    for name, array in frozen.items():
        np.testing.assert_array_equal(array, there[name])
    assert any((array != there[name]).any() for name, array in weights(tmp_path, "params").items())


def test_a_start_that_saved_nothing_binds_nobody(first, tmp_path, monkeypatch):
    """Killed before its first step, with frozen weights written. The next start may take others, by another config."""
    other, there = Checkpoints(tmp_path / "other"), Checkpoints(first)
    moved = jax.tree.map(lambda x: x + 1, there.restore_params())
    other.save(1, {"ema": moved, "mutable": there.restore_params(which="mutable")})
    other.close()

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "Logger", killed)
    for source, rate in ((first, 0.1), (tmp_path / "other", 0.2)):
        with pytest.raises(KeyboardInterrupt):
            runs.alone(later(source, schedule__peak_lr=rate), tmp_path / "run")
    frozen, there = weights(tmp_path / "run/frozen", "frozen"), weights(tmp_path / "other", "ema")
    assert frozen and all((array == there[name]).all() for name, array in frozen.items())
    with pytest.raises(KeyboardInterrupt):
        runs.alone(runs.tiny(), tmp_path / "run")
    assert not Checkpoints(tmp_path / "run/frozen").steps()  # or who reads the run would take them for its own


def test_a_frozen_part_comes_back_with_the_run_even_if_its_source_is_gone(first, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    source = tmp_path / "source"
    source.symlink_to(first)
    runs.alone(later(source), whole)
    runs.alone(later(source, total_steps=3), parts)
    source.unlink()
    config = later(source, total_steps=3)
    (parts / "config.json").write_text(
        later(source).to_json(sort_keys=True, indent=2) + "\n"
    )  # the same run, six steps
    config.total_steps = 6
    runs.alone(config, parts)
    ours, theirs = runs.logged(parts), runs.logged(whole)
    assert {s: ours[s] for s in (4, 5, 6)} == {s: theirs[s] for s in (4, 5, 6)}


def test_fine_tuning_starts_where_the_other_run_ended(first, tmp_path):
    config = runs.tiny(init_from=(dict(path=str(first)),), total_steps=1, schedule__peak_lr=0.0, schedule__warmup=0)
    train.train(config, tmp_path)
    ours, theirs = weights(tmp_path, "params"), weights(first, "ema")
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
        np.testing.assert_array_equal(weights(tmp_path, "ema")[name], array)


def test_nothing_frozen_is_random(tmp_path):
    with pytest.raises(ValueError, match=r"frozen parameters have no weights \(encoder/.*init_from must bring them"):
        train.train(runs.tiny(task__frozen=("encoder",)), tmp_path)
    with pytest.raises(ValueError, match=r"no parameters in \['codec'\], only in \['decoder', 'encoder'\]"):
        train.train(runs.tiny(task__frozen=("codec",)), tmp_path)


def test_a_key_that_init_from_does_not_know_and_a_run_that_is_not_there(first, tmp_path):
    with pytest.raises(TypeError, match=r'config.init_from\[0\] has no key "pth". Did you mean "path"'):
        train.train(runs.tiny(init_from=(dict(pth=str(first)),)), tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.train(runs.tiny(init_from=(dict(path=str(tmp_path / "nowhere")),)), tmp_path / "b")


def test_graft_moves_by_rules_and_lists_every_fault(first):
    there = weights(first, "ema")
    kernel = jax.numpy.zeros(there["decoder/head/kernel"].shape)
    rules = ((r"decoder/(head)/kernel", r"other/\1"), (r".*", None))
    tree, filled = graft({"other": {"head": kernel}}, first, rules)
    assert filled == ["other/head"]
    np.testing.assert_array_equal(tree["other"]["head"], there["decoder/head/kernel"])
    tree = {"decoder": {"head": {"kernel": kernel.T, "bias": kernel}}, "lone": kernel}
    rules = (("decoder/head/(.*)", r"decoder/head/\1"), ("encoder/registers", "there/is/none"), ("nothing/.*", None))
    with pytest.raises(ValueError) as error:
        graft(tree, first, rules)
    message = str(error.value)
    for fault in (
        "decoder/head/kernel -> decoder/head/kernel: (64, 48) there, (48, 64) here",
        "encoder/registers -> there/is/none: there is no such parameter here",
        "encoder/patch_embed/kernel: no rule says where it goes",
        "rule 'nothing/.*' matches nothing there",
    ):
        assert fault in message


def test_published_weights_go_to_a_new_workdir_only(first, monkeypatch, capsys):
    """Into one with checkpoints nothing would be written, for the step is there."""
    monkeypatch.setattr(convert.hub, "convert", lambda *args, **options: pytest.fail("the work came first"))
    with pytest.raises(SystemExit):
        convert.main(["alex", "--kind=perceptual", f"--out={first}"])
    assert "has checkpoints already, of steps [3, 6]: give --out a new workdir" in capsys.readouterr().err
