"""Tiny runs for tests: a config of seconds, and what a finished run says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from configs import flextok
from jaxtok import sharding

ROOT = Path(__file__).parent.parent


def tiny(**changes):
    """The tiny FlexTok, one log a step; `changes` are dotted keys ("schedule__peak_lr=1.0")."""
    config = flextok.get_config("tiny")
    config.log_every = 1
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for name in path:
            node = node[name]
        node[last] = value
    return config


def logged(workdir, name="loss"):
    """step -> the value of a metric in metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


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
