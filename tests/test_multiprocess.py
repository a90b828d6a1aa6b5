"""One run as several processes: what a pod does, on one machine. tests/test_launch.py starts them by the command."""

import contextlib
import functools
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtok import distributed, sharding
from jaxtok.checkpoint import Checkpoints
from jaxtok.data import pipeline
from jaxtok.train import train
from tests.runs import ROOT, logged, tiny

STEPS, DEVICES, BATCH, EXAMPLES = 12, 4, 16, 64
# Of losses against one process: 9.4e-8 at the worst from 2 processes and then 1, 1.8e-7 from 2 and then 4; seed 0 only.
TOLERANCE = 1e-5


def config():
    """Every array that can be is split over all four devices, and so over all processes."""
    c = tiny(total_steps=STEPS, mesh__fsdp=DEVICES, checkpoint__every=4)
    c.task.samplers = c.task.samplers[:1]
    return c


class Traced:
    """Batches of which every one that the loop takes is written down; `before(step)` is called first."""

    def __init__(self, batches, path, step, before):
        self.batches, self.path, self.step, self.before = batches, path, step, before

    def __next__(self):
        self.step += 1
        self.before(self.step)
        batch = next(self.batches)
        with open(self.path, "a") as file:
            file.write(json.dumps([self.step, batch["index"].tolist()]) + "\n")
        return batch

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.batches.close()


@contextlib.contextmanager
def traced(path, before=lambda step: None):
    """Within, the loop's batches are written down in `path`, a line a step: [step, indices in the source]."""
    plain = pipeline.train_batches

    def train_batches(*args, start_step=None, **kwargs):
        if start_step is None:  # the first look, for shapes
            return plain(*args, **kwargs)
        return Traced(plain(*args, start_step=start_step, **kwargs), path, start_step, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train_batches", train_batches)
        yield


def member(port, count, index, folder, hold=None, full=None):
    """What each of `count` processes does, in folder/run, by a clock that is an hour ahead of the process before.

    hold: {process: the step before which it waits for the file folder/go.PROCESS}. full: the process whose disk is full
    from the first checkpoint on.
    """
    folder = Path(folder)

    def before(step):
        if step == (hold or {}).get(index):
            (folder / f"held.{index}").touch()
            while not (folder / f"go.{index}").exists():
                time.sleep(0.02)
        if index == full and step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))

    clock = time.time
    time.time = lambda: clock() + 3600 * index
    socket.gethostname = platform.node = lambda: f"machine{index}"
    distributed.join(f"localhost:{port}", count, index)
    with distributed.end_together(), traced(folder / f"rows.{count}.{index}", before):
        train(config(), folder / "run")


@contextlib.contextmanager
def run(count, folder, **options):
    """`count` processes with the devices shared among them."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    code = "import sys; from tests.test_multiprocess import member; a, k = eval(sys.argv[1]); member(*a, **k)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, repr(((port, count, i, str(folder)), options))],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES // count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(done, processes, seconds=400):
    end = time.monotonic() + seconds
    while not done():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def ends(processes):
    """What all of them said, when all have ended as they should."""
    said = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def alone(folder):
    """One process with as many devices, from where folder/run stands to the end."""
    with pytest.MonkeyPatch.context() as patch, traced(folder / "rows.1.0"):
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:DEVICES]))
        train(config(), folder / "run")


def rows(folder, count):
    """step -> the indices that `count` processes took for it, process by process."""
    taken = [dict(json.loads(x) for x in (folder / f"rows.{count}.{i}").read_text().splitlines()) for i in range(count)]
    for each in taken:
        assert all(len(indices) == BATCH // count for indices in each.values())
    return {step: sum((each.get(step, []) for each in taken), []) for step in sorted(set().union(*taken))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    alone(folder)
    return folder


def same(folder, whole):
    """The run in `folder` has the losses, the evaluation and the files of `whole`."""
    for name in ("loss", "eval/psnr/one step@8"):
        got, want = logged(folder / "run", name), logged(whole / "run", name)
        assert got.keys() == want.keys()
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=TOLERANCE, err_msg=name)
    assert {p.name for p in (folder / "run").iterdir()} == {p.name for p in (whole / "run").iterdir()}


def test_sigterm_to_both_of_two_at_different_steps_then_one_process_goes_on(whole, tmp_path):
    with run(2, tmp_path, hold={0: 6, 1: 5}) as processes:
        for i in (1, 0):
            wait_until((tmp_path / f"held.{i}").exists, processes)
            processes[i].terminate()
            time.sleep(0.2)  # it wakes up to take the signal
            (tmp_path / f"go.{i}").touch()
        said = ends(processes)
    assert "Stopped by SIGTERM after step 6 and saved it" in said[0]
    assert "step " not in said[1]  # process 0 speaks alone
    assert Checkpoints(tmp_path / "run").steps() == [4, 6]

    taken, want = rows(tmp_path, 2), rows(whole, 1)
    assert sorted(sum((want[step] for step in range(1, 5)), [])) == list(range(EXAMPLES))  # an epoch
    assert taken == {step: want[step] for step in range(1, 7)}  # each its half, and together all

    alone(tmp_path)
    assert rows(tmp_path, 1) == {step: want[step] for step in range(7, 13)}
    same(tmp_path, whole)


def test_kill_9_of_one_of_two_ends_the_other_then_four_go_on(whole, tmp_path):
    with run(2, tmp_path, hold={1: 7}) as (first, second):
        wait_until(
            lambda: (tmp_path / "held.1").exists() and (tmp_path / "run/checkpoints/4").exists(), [first, second]
        )
        second.kill()
        said = first.communicate(timeout=4 * distributed.HEARTBEAT)[0]
        assert first.returncode not in (0, -signal.SIGKILL)
        assert re.search("another task died|Process 0 of 2 stops", said), said
    assert Checkpoints(tmp_path / "run").steps() == [4]

    with run(4, tmp_path) as processes:
        assert "Resuming at step 4" in ends(processes)[0]
    want = rows(whole, 1)
    assert rows(tmp_path, 4) == {step: want[step] for step in range(5, 13)}
    same(tmp_path, whole)


def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
    with run(2, tmp_path, full=1) as processes:
        said = [process.communicate(timeout=4 * distributed.HEARTBEAT)[0] for process in processes]
    assert all(process.returncode for process in processes), said
    assert "Saving checkpoint 4" in said[1] and "File too large" in said[1], said[1]
    assert Checkpoints(tmp_path / "run").steps() == []


def test_an_error_in_one_process_ends_it_at_once(monkeypatch, capfd):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with distributed.end_together():
        raise ValueError("a file is missing")
    assert left == [1]
    said = capfd.readouterr().err
    assert "ValueError: a file is missing" in said and "Process 0 of 2 stops" in said
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 1)
    with pytest.raises(ValueError, match="missing"), distributed.end_together():
        raise ValueError("a file is missing")


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize is called with."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize(
    "environ, joins",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7"}, False),  # inside an allocation, but not by srun
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_a_cluster_is_known_by_its_environment(environ, joins, initialized, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    distributed.join()
    assert initialized == [(None, None, None)] * joins


def test_what_join_passes_on(initialized):
    distributed.join("host:1234", 4, 0)
    distributed.join("auto")
    assert initialized == [("host:1234", 4, 0), (None, None, None)]


@pytest.mark.parametrize(
    "args, message",
    [
        (("host:1", 2, None), "needs --processes=N and"),
        (("host:1", None, 0), "needs --processes=N and"),
        (("host:1", 2, 2), "--process=2 must lie in 0 ... 1"),
        ((None, 2, 1), "need --coordinator"),
    ],
)
def test_arguments_that_do_not_fit(args, message, initialized):
    with pytest.raises(ValueError, match=message):
        distributed.join(*args)
    assert not initialized
