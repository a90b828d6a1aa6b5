"""EVERY config: its :tiny builds, trains, saves, restores, encodes and decodes; the others build."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtok import stages, train
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from tests import runs

NAMES = sorted(p.stem for p in (runs.ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))


def load(name):
    return importlib.import_module(f"configs.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_tiny_goes_the_whole_way(name, tmp_path):
    config = load(name).get_config("tiny")
    if "tokenizer" in config.task:
        train.train(runs.tiny(), tmp_path / "tokenizer")
        config.task.tokenizer, tmp_path = str(tmp_path / "tokenizer"), tmp_path / "generator"
    metrics = train.train(config, tmp_path)
    assert metrics and all(np.isfinite(v) for v in metrics.values())
    losses = runs.logged(tmp_path)
    assert losses[config.total_steps] < losses[min(losses)]
    assert train.train(config, tmp_path) == pytest.approx(metrics)  # finished: restored, evaluated, nothing trained
    if "tokenizer" in config.task:
        return

    task = build(config.task)
    checkpoints = Checkpoints(tmp_path)
    variables = {"params": checkpoints.restore_params(which="ema")}
    if jax.eval_shape(task.init, jax.random.key(0), {"image": np.zeros((2, 16, 16, 3), np.uint8)})["mutable"]:
        variables |= checkpoints.restore_params(which="mutable")
    images = np.stack([build(config.data.eval.source)[i]["image"] for i in range(2)])
    codes = task.model.apply(variables, images, method="encode")
    decoded = task.model.apply(variables, codes, jax.random.key(0), method="decode")
    assert decoded.shape == images.shape and np.isfinite(decoded).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_builds_and_an_unknown_one_lists_them(name):
    module = load(name)
    assert "python -m jaxtok.train" in module.__doc__ and "arXiv" in module.__doc__
    with pytest.raises(ValueError, match='no variant "tinny"; there are .*"?tiny'):
        module.get_config("tinny")
    for variant in module.VARIANTS:
        config = module.get_config(variant)
        for _, run in stages.runs(config, "runs/it", train.KEYS):
            assert set(run) <= set(train.KEYS) and run.total_steps > 0
            build(run.task)


def test_a_config_loads_without_jax():
    code = f"import sys; from configs import {', '.join(NAMES)}; assert not {{'jax', 'jaxtok'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True, env={"PYTHONPATH": str(Path(runs.ROOT))})
