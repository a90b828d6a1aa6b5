"""The loop: the same numbers on every mesh and after every kind of stop, and errors that help."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import signal
import time
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok import checkpoint, sharding, train
from jaxtok.checkpoint import Checkpoints
from jaxtok.data import pipeline
from jaxtok.data.images import BadRecord
from jaxtok.step import batch_shapes, numeric, train_step
from jaxtok.tasks import TokenizerTask
from tests import runs

STEPS = 20


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Losses of 20 steps on one device."""
    workdir = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        only = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", only)
        train.train(runs.tiny(total_steps=STEPS), workdir)
    return runs.logged(workdir)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_gives_the_losses_of_one_device(mesh, one_device, tmp_path, monkeypatch):
    states = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: (states.append(state), save(self, step, state)))
    config = runs.tiny(total_steps=STEPS, mesh=dict(zip(sharding.AXES, mesh, strict=True)))
    train.train(config, tmp_path)
    losses = runs.logged(tmp_path)
    assert losses.keys() == one_device.keys() and len(losses) == STEPS
    np.testing.assert_allclose(list(losses.values()), list(one_device.values()), atol=1e-4, rtol=0)
    assert losses[STEPS] < 0.5 * losses[1]  # it learns, so equal is not equally stuck

    # Every parameter, moment and EMA copy lies where its rule says, after the last step as after the first.
    laid_out = sharding.shardings(states[-1], sharding.make_mesh(*mesh), config.sharding)
    for (path, array), wanted in zip(
        jax.tree_util.tree_leaves_with_path(states[-1]), jax.tree.leaves(laid_out), strict=True
    ):
        assert array.sharding.is_equivalent_to(wanted, array.ndim), sharding.path_name(path)
    qkv = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(states[-1]) if "qkv" in str(p)}
    assert len(qkv) == 8  # encoder and decoder: parameters, EMA, two moments
    for name, x in qkv.items():
        assert x.addressable_shards[0].data.size * mesh[1] * mesh[2] == x.size, name


def test_accumulated_gradients_are_those_of_the_whole_batch():
    @dataclasses.dataclass(frozen=True)
    class Line:
        """A task without chance: least squares."""

        def loss(self, params, mutable, frozen, batch, key, step):
            loss = jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()
            return loss, (mutable, {"loss/l2": loss})

    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(16, 3)).astype(np.float32), "y": rng.normal(size=(16,)).astype(np.float32)}
    params = {"w": jnp.ones(3)}
    tx = optax.adam(0.1)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "ema": params, "opt_state": tx.init(params)}
    state |= {"mutable": {}, "frozen": {}, "key": jax.random.key(0)}
    results = [train_step(Line(), tx, lambda s: 0.1, 0.9, n, state, batch) for n in (1, 4)]
    (whole, logs), (parts, part_logs) = results
    np.testing.assert_allclose(whole["params"]["w"], parts["params"]["w"], atol=1e-6)
    np.testing.assert_allclose(logs["grad_norm"], part_logs["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(logs["loss"], part_logs["loss"], rtol=1e-6)
    assert float(logs["grad_norm"]) > 0.1


# ---- what a batch looks like, and what is shown of many ----


def test_one_example_says_the_shapes_of_a_batch():
    """The first that can be read; the others are left for the steps."""
    read = []

    class Source:
        def __len__(self):
            return 8

        def __getitem__(self, i):
            read.append(i)
            if i == 0:
                raise BadRecord("0 is bad")
            return {"image": np.zeros((9, 7, 3), np.uint8), "label": 3, "caption": "x"}

    half = lambda example, rng: example | {"image": example["image"][:4, :4], "text": np.zeros(5, np.int32)}
    shapes = batch_shapes(Source(), (half,), 4, 0.5)
    assert read == [0, 1]
    with pipeline.train_batches(Source(), (half,), batch_size=4, max_bad=0.5) as batches:
        batch = numeric(next(batches))
    assert shapes == {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()} and len(shapes) == 3
    with pytest.raises(ValueError, match="1 of 8 records of Source are bad"):
        batch_shapes(Source(), (half,), 4, 0.01)
    with pytest.raises(ValueError, match="list is empty"):
        batch_shapes([], (half,), 4, 0.01)


def test_few_pictures_of_many_batches_are_kept(tmp_path, monkeypatch):
    """Eight, from all of the data, of valid rows; what lies in memory meanwhile does not grow with the batches."""
    side, count, drawn = 128, 100, []

    def evaluate(*args):
        images = jnp.full((16, side, side, 3), args[3]["number"][0], jnp.uint8)
        return {"rows": {"number": args[3]["number"]}, "pictures": [images, images]}

    def batches():
        good = np.arange(16) % 2 == 0
        rows = lambda i: {"number": np.full(16, i, np.int32), "mask": good, "index": np.arange(16)}
        return contextlib.nullcontext(map(rows, range(count)))

    task = types.SimpleNamespace(titles=lambda: ("a", "b"), shows="pictures", summarize=lambda rows: (rows, []))
    log = types.SimpleNamespace(log=lambda done, metrics: None)
    monkeypatch.setattr(train.pictures, "grid", lambda columns, file: drawn.append(columns))
    few = jax.jit(functools.partial(train.first_pictures, evaluate))
    state = dict.fromkeys(("ema", "mutable", "frozen"))
    tracemalloc.start()
    rows, _ = train.run_evaluation(task, few, batches, sharding.make_mesh(8), tmp_path, log, 1, state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(rows["number"], np.repeat(np.arange(count), 8))
    numbers = drawn[0]["b"][:, 0, 0, 0]
    assert drawn[0]["a"].shape == (8, side, side, 3) and np.ptp(numbers) >= 80 and len(set(numbers)) == 8, numbers
    assert peak < 30 * 8 * side**2 * 3 * 2, peak  # of thirty batches; the other half are copies on their way


# ---- stops ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Sixty steps of the command as a user gives it, and its flags."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    flags = ["--config.total_steps=60", "--config.log_every=1", "--config.checkpoint.every=2"]
    process = runs.start(workdir, *flags)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return workdir, flags, out


def test_a_run_leaves_what_it_promises(uninterrupted):
    workdir, _, out = uninterrupted
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "reconstructions.png",
    ]
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 60
    assert "PSNR, one step" in out and "mean colour" in out and "reconstructions.png" in out
    assert Checkpoints(workdir).steps() == [56, 58, 60]  # keep_last = 3
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-2])
    for name in (
        "loss loss/flow grad_norm update_norm param_norm lr images_per_s model_flops_per_s data_wait_share "
        "codes/perplexity codes/used"
    ).split():
        assert np.isfinite(last[name]), name


def same_run(workdir, other):
    """Every loss and every array of the last checkpoint is equal, bit for bit."""
    a, b = runs.logged(workdir), runs.logged(other)
    assert a == b and list(a) == list(range(1, 61))
    states = []
    for run in (workdir, other):
        checkpoints = Checkpoints(run)
        states.append([checkpoints.restore_params(60, which) for which in ("params", "ema", "opt_state")])
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(number, uninterrupted, tmp_path):
    whole, flags, _ = uninterrupted
    process = runs.start(tmp_path, *flags)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(number)
            break
    out = process.stdout.read()
    assert process.wait(60) == 0, out
    assert f"Stopped by {number.name}" in out
    stopped = Checkpoints(tmp_path).latest()
    assert 5 <= stopped < 60
    process = runs.start(tmp_path, *flags)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"Resuming at step {stopped}" in out, out
    same_run(tmp_path, whole)


def test_kill_9_at_ten_random_moments_changes_nothing(uninterrupted, tmp_path):
    """Saves come every second step and take longer than the steps, so that many a kill falls into one."""
    whole, flags, _ = uninterrupted
    rng, seen, inside = random.Random(0), [], 0
    for _ in range(10):
        process = runs.start(tmp_path, *flags)
        wait = rng.randint(1, 8)
        for line in process.stdout:
            wait -= line.startswith("step ")
            if not wait:
                break
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        inside += any("tmp" in p.name for p in (tmp_path / "checkpoints").glob("*"))
        seen.append(Checkpoints(tmp_path).latest() or 0)
    assert len(set(seen)) > 2 and seen[-1] < 60, seen  # the kills fell at different places
    assert inside, "no kill fell into a save"
    assert seen == sorted(seen)
    process = runs.start(tmp_path, *flags)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    same_run(tmp_path, whole)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    config = runs.tiny(total_steps=8, checkpoint__every=4)
    train.train(config, tmp_path / "whole")
    train.train(config, tmp_path / "stopped", stop=Countdown(5))
    assert Checkpoints(tmp_path / "stopped").latest() == 5
    config.mesh = dict(data=2, fsdp=2, tensor=2)
    train.train(config, tmp_path / "stopped")
    a, b = runs.logged(tmp_path / "whole"), runs.logged(tmp_path / "stopped")
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-4)


class Countdown(list):
    """Says stop when asked the n-th time."""

    def __init__(self, n):
        super().__init__(["a test"])
        self.left = n

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


def test_a_log_comes_before_each_evaluation_and_the_last_one_is_made_up_for(tmp_path, monkeypatch):
    """Rates are of the steps since the last log, and an evaluation is none. A signal in the last one is not lost."""
    summarize, looks, stop = TokenizerTask.summarize, [], []

    def killed(self, rows):
        looks.append(rows)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt
        return summarize(self, rows)

    monkeypatch.setattr(TokenizerTask, "summarize", killed)
    config = runs.tiny(total_steps=5, log_every=3, eval_every=2)
    with pytest.raises(KeyboardInterrupt):
        runs.alone(config, tmp_path, stop=stop)
    assert stop == ["SIGTERM"]
    assert list(runs.logged(tmp_path)) == [2, 3, 4, 5] and list(runs.logged(tmp_path, "eval/codes/used")) == [2, 4]
    assert runs.alone(config, tmp_path)["codes/used"] == runs.logged(tmp_path, "eval/codes/used")[5]


def test_a_run_in_a_bucket_leaves_nothing_here_and_goes_on(tmp_path, monkeypatch, capsys):
    """Orbax, which speaks to buckets by libraries of its own, is led to the folder that stands for this one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = lambda workdir: checkpoint.Checkpoints(str(workdir).replace("gs://", f"{tmp_path}/"))
    monkeypatch.setattr(train, "Checkpoints", lambda workdir, *args, **options: folder(workdir))
    with runs.bucket(tmp_path):
        runs.alone(runs.tiny(total_steps=2), "gs://bucket/run")
        runs.alone(runs.tiny(total_steps=2), "gs://bucket/run")
    assert "run: " in (said := capsys.readouterr().out) and "Resuming at step 2" in said
    workdir = tmp_path / "bucket/run"
    assert {"checkpoints", "config.json", "metrics.jsonl", "reconstructions.png"} == {p.name for p in workdir.iterdir()}
    assert list(runs.logged(workdir)) == [1, 2] and list((tmp_path / "here").iterdir()) == []


# ---- errors ----


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"Step \d+: loss/flow is (nan|inf)\..*(checkpoint is step 2|no checkpoint)"
    ):
        train.train(runs.tiny(total_steps=12, checkpoint__every=2, schedule__peak_lr=1e30), tmp_path)
    for step in Checkpoints(tmp_path).steps():  # what was saved is good
        for x in jax.tree.leaves(Checkpoints(tmp_path).restore_params(step, "params")):
            assert np.isfinite(x).all()


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(bach_size=3), TypeError, 'no key "bach_size". Did you mean "batch_size"'),
        (dict(task__model__encoder__widht=3), TypeError, 'no key "widht". Did you mean "width"'),
        (dict(task__model__quantizer__name="quantizers.fqs.FSQ"), ValueError, 'Did you mean "quantizers.fsq.FSQ"'),
        (dict(schedule__peak=3), TypeError, 'no key "peak". Did you mean "peak_lr"'),
        (dict(optimizer__bb2=3), TypeError, 'no key "bb2". Did you mean "b2"'),
        (dict(mesh__dat=3), TypeError, 'no key "dat". Did you mean "data"'),
        (dict(batch_size=12), ValueError, "A batch of 12 cannot be split over data=8"),
        (dict(data__eval__batch_size=12), ValueError, "A batch of 12 cannot be split over data=8"),
        (dict(accumulate=3), ValueError, "batch_size 16 must be divisible by accumulate 3"),
        (dict(accumulate=0), ValueError, "accumulate 0, which is at least 1"),
        (dict(log_every=0), ValueError, "log_every=0 and checkpoint.every="),
        (dict(checkpoint__every=0), ValueError, "checkpoint.every=0 must be at least 1"),
        (dict(batch_size=128), ValueError, "Shapes has 64 examples, fewer than one batch of 128"),
        (dict(accumulate=4), ValueError, "A batch of 4 cannot be split over data=8"),
        (dict(data__worker=3), TypeError, 'no key "worker". Did you mean "workers"'),
        (dict(checkpoint__evry=3), TypeError, 'no key "evry". Did you mean "every"'),
        (dict(data__train__transfroms=()), TypeError, 'no key "transfroms". Did you mean "transforms"'),
        (dict(data__eval__batchsize=8), TypeError, 'no key "batchsize". Did you mean "batch_size"'),
        (dict(task__losses__flow__wieght=0.1), TypeError, 'losses.flow has no key "wieght". Did you mean "weight"'),
        (dict(mesh__fsdp=3), ValueError, "does not fit 8 devices"),
        (dict(task__model__encoder__patch=5), ValueError, "16 x 16 does not divide into patches of 5"),
        (dict(task__model__quantizer__levels=(8, 1)), ValueError, "integers of at least 2"),
        (dict(task__model__quantizer__levels=(8, 8)), ValueError, "encoder's `channels`"),
        (dict(task__model__encoder__head_dim=24), ValueError, "width 64 is not divisible by head_dim 24"),
        (dict(task__model__decoder__prediction="noise"), ValueError, '"velocity" or "x0", not "noise"'),
        (dict(task__model__nested_dropout__law="pow3"), ValueError, "'pow2'"),
        (dict(task__token_counts=(1, 9)), ValueError, "token_counts"),
        (dict(data__train__source__name="data.sources.Folder"), TypeError, "data.sources.Folder"),
        (dict(optimizer__lr_factors=(("^encodr/", 0.1),)), ValueError, "no parameter matches '^encodr/'"),
        (dict(sharding=(("encodr", "fsdp"), (".*", "fsdp"))), ValueError, "encodr"),
        (dict(schedule__warmup=100), ValueError, "shorten the warm-up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config_fails_before_the_first_step_and_says_why(changes, error, words, tmp_path):
    with pytest.raises(error, match=re.escape(words)):
        train.train(runs.tiny(**changes), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_missing_data_set_fails_before_the_first_step(tmp_path):
    config = runs.tiny()
    config.data.train.source = dict(name="data.sources.Folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused(tmp_path):
    train.train(runs.tiny(total_steps=2), tmp_path)
    with pytest.raises(ValueError, match=r"schedule.peak_lr: 0.0025 -> 0.5"):
        train.train(runs.tiny(total_steps=2, schedule__peak_lr=0.5), tmp_path)


def test_the_command_line_says_what_it_wants():
    process = runs.start("unused", "--config.bach_size=4")
    out, _ = process.communicate(timeout=60)
    assert process.returncode and "batch_size" in out
    process = runs.start("unused", "more")
    out, _ = process.communicate(timeout=60)
    assert process.returncode and "--config=FILE, --workdir=DIR" in out
