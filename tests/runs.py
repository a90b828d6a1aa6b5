"""Tiny runs for tests: a config of seconds, and what a finished run says."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils.epath import backend, gpath

from configs import flextok
from jaxtok import checkpoint, plan, sharding, train
from jaxtok.build import build

ROOT = Path(__file__).parent.parent


def tiny(**changes):
    """The tiny FlexTok, one log a step; `changes` are dotted keys ("schedule__peak_lr=1.0")."""
    config = flextok.get_config("tiny")
    config.log_every = 1
    return changed(config, **changes)


def changed(config, **changes):
    """The config, with dotted keys set."""
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for name in path:
            node = node[name]
        node[last] = value
    return config


def alone(config, workdir, devices=1, **options):
    """The metrics of a run on few devices: eight fake ones on two cores only cost time where there is much to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:devices]))
        return train.train(config, workdir, **options)


def untrained(config, workdir):
    """Makes `workdir` that of a run that has only begun: random weights in a checkpoint."""
    task = build(config.task)
    batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), plan.batch_shapes(config, task))
    trees = jax.jit(task.init)(jax.random.key(0), batch)
    checkpoint.claim_workdir(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(1, {"ema": trees["params"], "mutable": trees["mutable"]})
    checkpoints.close()


def logged(workdir, name="loss"):
    """step -> the value of a metric in metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@contextlib.contextmanager
def bucket(root):
    """What epath does in "gs://..." happens in the folder `root`, where files, as in an object store, do not grow."""
    local = lambda text: str(text).replace("gs://", f"{root}/", 1)

    class Store:
        def __getattr__(self, name):
            def call(*args, **options):
                assert name != "open" or "a" not in args[1], f"{args[0]} cannot grow"
                return getattr(backend.os_backend, name)(*map(local, args), **options)

            return call

    store = property(lambda path: Store() if str(path).startswith("gs://") else backend.os_backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpath._GPath, "_backend", store)
        yield


def start(workdir, *flags, devices=1):
    """python -m jaxtok.train on the tiny config, as a user starts it."""
    command = [sys.executable, "-m", "jaxtok.train", "--config=configs/flextok.py:tiny", f"--workdir={workdir}"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def init_sharded(init, mesh, rules, *args):
    """init(*args) computed straight into its layout, as the loop does it: (state, its shardings)."""
    layout = sharding.shardings(jax.eval_shape(init, *args), mesh, rules)
    return jax.jit(init, out_shardings=layout)(*args), layout
