import errno
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtok.checkpoint import Checkpoints, claim_workdir
from jaxtok.sharding import make_mesh, path_name, put_batch, shardings
from tests.runs import init_sharded

RULES = [("kernel$", (None, "fsdp", "tensor")), (".*", "fsdp")]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def init_state(step=0, width=8):
    """A train state whose every array tells the step."""
    key = jax.random.fold_in(jax.random.key(7), step)
    params = {
        "encoder": {
            "kernel": jax.random.normal(key, (2, 16, width)),
            "bias": jnp.full((5,), step, jnp.float32),
            "cast": jnp.arange(6, dtype=jnp.bfloat16) / 7 + step,
        },
        "decoder": {"scale": jnp.array([0.0, -0.0, jnp.nan, jnp.inf]) + step},
    }
    _, opt_state = OPTIMIZER.update(jax.tree.map(jnp.ones_like, params), OPTIMIZER.init(params), params)
    return {
        "step": jnp.int32(step),
        "params": params,
        "ema": jax.tree.map(lambda x: x / 2, params),
        "opt_state": opt_state,
        "mutable": {},
        "key": key,
    }


def sharded(step=0, sizes=(2, 4, 1), **kwargs):
    state = init_state(step, **kwargs)
    return jax.device_put(state, shardings(state, make_mesh(*sizes), RULES))


def abstract(sizes=None, **kwargs):
    tree = jax.eval_shape(lambda: init_state(**kwargs))
    if sizes is None:
        return tree
    layout = shardings(tree, make_mesh(*sizes), RULES)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)


def assert_same(got, want):
    """Bit for bit, NaNs and the sign of zero included, in trees of the same classes."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path_name(path)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path_name(path)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of a fresh workdir, closed at the end."""
    checkpoints = Checkpoints(tmp_path)
    yield checkpoints
    checkpoints.close()


def test_round_trip(run, tmp_path):
    assert run.latest() is None
    assert run.save(3, sharded(3)) and run.save(5, sharded(5))
    run.wait()
    assert run.latest() == 5
    assert_same(run.restore(abstract((2, 4, 1))), init_state(5))
    old = run.restore(abstract((2, 4, 1)), step=3)
    assert_same(old, init_state(3))
    assert isinstance(old["opt_state"][1][0], optax.ScaleByAdamState)
    assert float(jax.random.uniform(old["key"])) == float(jax.random.uniform(init_state(3)["key"]))
    # and a process that comes later finds the same
    assert_same(Checkpoints(tmp_path).restore(abstract()), init_state(5))


def test_keys_of_another_kind(run):
    state = {"keys": jax.random.split(jax.random.key(3, impl="rbg"), 4), "key": jax.random.key(4, impl="threefry2x32")}
    run.save(1, state)
    got = run.restore(jax.eval_shape(lambda: state))
    assert_same(got, state)
    assert jax.random.key_impl(got["keys"]) == "rbg"


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), None], ids=str)
def test_restores_onto_another_mesh(run, sizes):
    run.save(2, sharded(2, (2, 4, 1)))
    target = abstract(sizes)
    got = run.restore(target)
    assert_same(got, init_state(2))
    kernel = got["params"]["encoder"]["kernel"]
    if sizes is None:
        assert kernel.devices() == {jax.devices()[0]}
    else:
        for x, t in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True):
            assert x.sharding.is_equivalent_to(t.sharding, x.ndim)
        _, fsdp, tensor = sizes
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16 // fsdp, 8 // tensor)}


def test_the_state_may_be_donated_at_once(run):
    """Arrays of which two devices write a slice each are copied; a CPU lends smaller ones, and then donates nothing."""
    state = sharded(1, width=2**16)
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    run.save(1, state)
    jax.block_until_ready(step(state["params"]))
    assert state["params"]["encoder"]["kernel"].is_deleted()
    assert_same(run.restore(abstract(width=2**16)), init_state(1, width=2**16))


def test_a_step_is_saved_once(run):
    assert run.save(4, init_state(4)) is True
    assert run.save(4, init_state(9)) is False
    assert_same(run.restore(abstract()), init_state(4))


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9])],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, kept):
    checkpoints = Checkpoints(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in range(1, 10):
        if step == 6:  # the policy holds across restarts
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep_last=keep_last, keep_every=keep_every)
        checkpoints.save(step, {"x": jnp.arange(3) + step})
    checkpoints.close()
    assert checkpoints.steps() == kept
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept
    for step in kept:
        got = checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.int32)}, step)
        np.testing.assert_array_equal(got["x"], np.arange(3) + step)


@pytest.mark.parametrize("options", [dict(keep_last=0), dict(keep_every=0)])
def test_a_policy_that_keeps_nothing(tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, **options)


def test_a_failed_save_is_heard_of_at_the_next_call(run, tmp_path):
    run.save(1, init_state(1))
    run.wait()
    big = {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}
    for call in (run.latest, run.wait, lambda: run.save(3, init_state(3)), run.close):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # the disk, as it were, is full
        try:
            assert run.save(2, big)  # it starts, and fails in the background
            with pytest.raises(RuntimeError, match=r"Saving checkpoint 2 in .*; the last complete checkpoint is 1\."):
                call()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert run.steps() == [1]
    run.save(2, init_state(2))
    assert run.latest() == 2
    assert_same(run.restore(abstract()), init_state(2))
    run.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_disk_that_timed_out_is_a_failed_save_and_none_under_way(run):
    """OSError(ETIMEDOUT) is a TimeoutError, as is what says that a save takes its time."""
    run.save(1, init_state(1))
    run.wait()
    saving = lambda error: types.SimpleNamespace(result=lambda timeout=None: (_ for _ in ()).throw(error))
    run._saving = 2, saving(TimeoutError())
    run.check()
    run._saving = 2, saving(OSError(errno.ETIMEDOUT, "Connection timed out"))
    with pytest.raises(RuntimeError, match=r"Saving checkpoint 2 .*timed out.*; the last complete checkpoint is 1\."):
        run.check()


def test_a_save_that_cannot_start(run):
    with pytest.raises(RuntimeError, match=r"Saving checkpoint 1 in .* failed \(.*\); there is no complete checkpoint"):
        run.save(1, {"x": jnp.zeros((0, 3))})


def test_missing_checkpoints(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No complete checkpoint in {tmp_path}/checkpoints: it holds none"):
        run.restore(abstract())
    with pytest.raises(FileNotFoundError, match="No complete checkpoint in"):
        run.restore_params()
    assert list(tmp_path.iterdir()) == []  # a reader leaves no trace
    for step in (1, 2):
        run.save(step, init_state(step))
    message = rf"No complete checkpoint of step 7 in {tmp_path}/checkpoints: the steps there are 1, 2\."
    with pytest.raises(FileNotFoundError, match=message):
        run.restore(abstract(), step=7)


def test_what_a_killed_save_left(run, tmp_path):
    run.save(1, init_state(1))
    run.close()
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    reader = Checkpoints(tmp_path)
    assert reader.latest() == 1
    assert_same(reader.restore(abstract()), init_state(1))
    assert left.exists()  # it might be another process's save under way
    assert run.save(2, init_state(2))
    run.wait()
    assert not left.exists()
    assert reader.latest() == 2


def test_a_kill_while_an_old_step_is_dropped(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    rmtree = type(run.folder).rmtree

    def half(path, **kwargs):
        if path.name.startswith("1."):
            (path / "_CHECKPOINT_METADATA").unlink()
            raise Killed
        rmtree(path, **kwargs)

    run.keep_last = 1
    run.save(1, init_state(1))
    run.save(2, init_state(2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(run.folder), "rmtree", half)
        run.wait()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    later = Checkpoints(tmp_path, keep_last=1)
    assert later.steps() == [2]
    later.save(3, init_state(3))
    later.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_state_of_another_shape(run):
    run.save(1, init_state(1))
    with pytest.raises(ValueError) as error:
        run.restore(abstract(width=12))
    message = str(error.value)
    assert "Checkpoint 1 in" in message and "does not fit" in message
    assert "params/encoder/kernel: float32 (2, 16, 8) there, float32 (2, 16, 12) here" in message
    assert "opt_state/1/0/mu/encoder/kernel: float32 (2, 16, 8) there" in message
    assert "bias" not in message and len(message.splitlines()) == 5  # params, ema, mu, nu

    wrong = abstract()
    wrong["params"]["encoder"]["cast"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    wrong["params"]["encoder"]["new"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    del wrong["params"]["decoder"], wrong["key"]
    with pytest.raises(ValueError) as error:
        run.restore(wrong)
    message = str(error.value)
    assert "params/encoder/cast: bfloat16 (6,) there, float32 (6,) here" in message
    assert "params/encoder/new: nothing there, float32 (2,) here" in message
    assert "params/decoder/scale: float32 (4,) there, nothing here" in message
    assert "key: uint32 (2,) there, nothing here" in message


def test_long_lists_of_differences_are_cut(run):
    run.save(1, {f"w{i}": jnp.zeros(2) for i in range(20)})
    with pytest.raises(ValueError, match="and 12 more") as error:
        run.restore({f"w{i}": jax.ShapeDtypeStruct((3,), jnp.float32) for i in range(20)})
    assert len(str(error.value).splitlines()) == 10


def test_parameters_alone(run):
    for step in (1, 2):
        run.save(step, sharded(step))
    ema = run.restore_params()
    assert_same(ema, init_state(2)["ema"])
    assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(ema))
    assert_same(run.restore_params(step=1, which="params"), init_state(1)["params"])

    sharding = NamedSharding(make_mesh(2, 4), P())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract()["ema"])
    ema = run.restore_params(abstract=target)
    assert_same(ema, init_state(2)["ema"])
    assert {x.sharding for x in jax.tree.leaves(ema)} == {sharding}

    with pytest.raises(ValueError, match=r"ema/encoder/kernel: float32 \(2, 16, 8\) there, float32 \(2, 16, 4\) here"):
        run.restore_params(abstract=abstract(width=4)["ema"])


def test_parameters_that_are_not_there(run):
    state = init_state(1)
    del state["ema"]
    run.save(1, state)
    with pytest.raises(ValueError, match='holds no "ema", only key, opt_state, params, step'):
        run.restore_params()
    assert_same(run.restore_params(which="params"), state["params"])


def test_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("runs/a")
    checkpoints.save(1, {"x": jnp.ones(3)})
    checkpoints.close()
    assert (tmp_path / "runs" / "a" / "checkpoints" / "1").is_dir()
    assert Checkpoints("runs/a").latest() == 1


# kill -9 -------------------------------------------------------------------------------------------------------------


def big_state(step):
    """Large enough that a kill falls within the writing."""
    key = jax.random.key(step)
    return {"step": jnp.int32(step), "x": jax.random.normal(key, (8, 1 << 17)), "key": key}


def save_forever(workdir):
    """What the killed process does: goes on from the latest step, and says so when its first save is begun."""
    checkpoints = Checkpoints(workdir, keep_last=1)
    first = (checkpoints.latest() or 0) + 1
    for step in itertools.count(first):
        checkpoints.save(step, big_state(step))
        if step == first:
            print(os.getpid(), step, flush=True)
        if step % 2:  # a while with nothing under way
            checkpoints.wait()
            time.sleep(0.1)


# Imports once and forks a process for each line it reads. Nothing of jax has started yet, so there are no threads.
NURSERY = """
import os, sys
import orbax.checkpoint.experimental.v1
from tests.test_checkpoint import save_forever
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        save_forever(line.strip())
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def test_kill_during_saves(tmp_path):
    folder = tmp_path / "checkpoints"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "OPENBLAS_NUM_THREADS": "1"}
    moments = random.Random(0)
    target = jax.eval_shape(lambda: big_state(0))
    latest = within = 0
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as nursery:
        for _ in range(16):
            print(tmp_path, file=nursery.stdin, flush=True)
            pid, _, step = nursery.stdout.readline().partition(" ")
            time.sleep(moments.uniform(0.0, 0.4))
            os.kill(int(pid), signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"
            assert int(step) == latest + 1  # it went on where the one before was killed
            within += bool(list(folder.glob("*tmp*")))
            checkpoints = Checkpoints(tmp_path)
            assert (checkpoints.latest() or 0) >= latest
            for latest in checkpoints.steps():
                assert_same(checkpoints.restore(target, latest), big_state(latest))
        nursery.stdin.close()
    assert within, "no kill fell within a save"
    assert latest, "no save was ever complete"
    # and the run goes on
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(latest + 1, big_state(latest + 1))
    checkpoints.close()
    assert [p.name for p in folder.iterdir()] == [str(latest + 1)]


# several processes ---------------------------------------------------------------------------------------------------


def one_of_two(index, port, workdir):
    """What each of two processes with two devices does."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    claim_workdir(workdir, config())
    mesh = make_mesh(fsdp=2)
    batch = put_batch({"x": np.arange(4) + 4 * index}, mesh)["x"]
    assert batch.shape == (8,) and int(batch.sum()) == 28
    state, _ = init_sharded(init_state, mesh, RULES, 1)
    time.sleep(index)  # the later process must not take another turn because it finds a folder
    checkpoints = Checkpoints(workdir, keep_last=1)
    assert checkpoints.latest() is None
    for step in (1, 2):
        assert checkpoints.save(step, state)
    assert not checkpoints.save(2, state)
    assert checkpoints.steps() == [2]
    got = checkpoints.restore(abstract((2, 2, 1)))
    jax.tree.map(lambda a, b: assert_same(*[[s.data for s in x.addressable_shards] for x in (a, b)]), got, state)
    checkpoints.restore(abstract((1, 4, 1)))
    checkpoints.close()
    print("fine")


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"from tests.test_checkpoint import *; one_of_two({i}, {port}, {str(tmp_path)!r})"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert out.endswith("fine\n"), err
    finally:
        for process in processes:
            process.kill()
            process.wait()


# whose workdir -------------------------------------------------------------------------------------------------------


def config(**changes):
    c = ConfigDict(
        dict(
            seed=0,
            encoder=dict(name="encoders.latent1d.Latent1D", depth=4),
            quantizer=dict(levels=(8, 8, 8)),
            losses=[dict(name="flow", weight=1.0), dict(name="repa", weight=0.5)],
            data=dict(name="emoji", workers=0),
            mesh=dict(data=-1, fsdp=1),
            eval_every=100,
            log_every=10,
        )
    )
    c.update_from_flattened_dict(changes)
    return c


def test_workdir_of_the_same_config(tmp_path):
    workdir = tmp_path / "runs" / "a"
    claim_workdir(workdir, config())
    written = (workdir / "config.json").read_text()
    assert json.loads(written)["encoder"] == {"name": "encoders.latent1d.Latent1D", "depth": 4}
    assert list(json.loads(written)) == sorted(json.loads(written))
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    claim_workdir(str(workdir), config())
    assert (workdir / "config.json").read_text() == written


def test_workdir_of_another_config(tmp_path):
    claim_workdir(tmp_path, config())
    written = (tmp_path / "config.json").read_text()
    other = config(**{"encoder.depth": 6, "quantizer.levels": (8, 8), "mesh.fsdp": 8})
    other.losses[1]["weight"] = 0.25
    other.optimizer = ConfigDict(dict(lr=1e-3))
    del other["seed"]
    with pytest.raises(ValueError) as error:
        claim_workdir(tmp_path, other)
    assert str(error.value).splitlines() == [
        f"{tmp_path} holds a run of another config, which differs (old -> new) in",
        "  encoder.depth: 4 -> 6",
        "  losses.1.weight: 0.5 -> 0.25",
        "  optimizer.lr: absent -> 0.001",
        "  quantizer.levels: [8, 8, 8] -> [8, 8]",
        "  seed: 0 -> absent",
        "Take another workdir, or these values back.",
    ]
    assert (tmp_path / "config.json").read_text() == written


def test_what_may_change_between_restarts(tmp_path):
    claim_workdir(tmp_path, config())
    claim_workdir(tmp_path, config(**{"mesh.fsdp": 8, "data.workers": 4, "eval_every": 50, "log_every": 1}))
    assert json.loads((tmp_path / "config.json").read_text())["mesh"] == {"data": -1, "fsdp": 8}
    with pytest.raises(ValueError, match="log_every: 1 -> 10"):
        claim_workdir(tmp_path, config(), free=("mesh", "data", "eval"))
    claim_workdir(tmp_path, config(seed=1), free=("seed", "mesh", "data", "eval", "log"))
    with pytest.raises(ValueError, match='data.name: "emoji" -> "folder"'):
        claim_workdir(tmp_path, config(**{"data.name": "folder", "seed": 1}))


def test_weights_to_begin_with_may_have_moved_since(tmp_path):
    claim_workdir(tmp_path, config(init_from=[dict(path="runs/a"), dict(path="b", rules=[["x", None]])]))
    claim_workdir(tmp_path, config(init_from=[dict(path="/abs/runs/a"), dict(path="b", rules=[["x", None]])]))
    with pytest.raises(ValueError, match=r"init_from.1.rules.0"):
        claim_workdir(tmp_path, config(init_from=[dict(path="/abs/runs/a"), dict(path="b", rules=[["y", None]])]))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    claim_workdir(tmp_path, config())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    claim_workdir(tmp_path, config())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        claim_workdir(tmp_path, config(seed=1))


def test_checkpoints_without_a_config(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no config.json that says whose"):
        claim_workdir(tmp_path, config())
