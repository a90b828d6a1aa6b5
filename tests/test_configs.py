"""EVERY config: its :tiny builds, trains, saves, restores, encodes and decodes; the others build."""

import functools
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import NAMES
from jaxtok import hub, init_from, plan, sharding, stages, train
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from jaxtok.data import pipeline
from jaxtok.step import numeric, transforms
from jaxtok.tasks import merge
from tests import runs

train_on_two = functools.partial(runs.alone, devices=2)  # which is a mesh: tests/test_train.py has others


def load(name):
    return importlib.import_module(f"configs.{name}")


def first(workdir, folder):
    """The path, in `folder`, of what the tiny config begins with that a workdir, runs/NAME_tiny, is named after."""
    path = folder / Path(workdir).name
    runs.untrained(load(path.name.removesuffix("_tiny")).get_config("tiny"), path)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_goes_the_whole_way(name, tmp_path):
    config = load(name).get_config("tiny")
    if "tokenizer" in config.task:
        config.task.tokenizer = first(config.task.tokenizer, tmp_path)
    config.init_from = tuple(dict(source, path=first(source["path"], tmp_path)) for source in config.init_from)
    tmp_path /= "run"
    metrics = train_on_two(config, tmp_path)
    assert metrics and all(np.isfinite(v) for v in metrics.values())
    losses = runs.logged(tmp_path)
    if "ema" in Checkpoints(tmp_path).shapes():  # something trains
        assert losses[config.total_steps] < losses[min(losses)]
    assert train_on_two(config, tmp_path) == pytest.approx(metrics)  # finished: restored, evaluated, nothing trained
    if "tokenizer" in config.task:
        return

    model, variables = hub.restore(tmp_path, None)
    source, change = build(config.data.eval.source), transforms(config.data.eval)
    examples = [pipeline.augment(source[i], change, (i,)) for i in range(2)]
    batch = numeric({key: np.stack([e[key] for e in examples]) for key in examples[0] if key != "caption"})
    context = build(config.task).context(batch)
    encode, decode = (jax.jit(functools.partial(model.apply, method=method)) for method in ("encode", "decode"))
    codes = encode(variables, batch["image"], **context)
    decoded = decode(variables, codes, jax.random.key(0), **context)
    assert decoded.shape == batch["image"].shape and np.isfinite(decoded).all()


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


def generators():
    """(name, variant) of all generators over codes but the tiny ones, which train."""
    for name in NAMES:
        for variant in load(name).VARIANTS:
            task = load(name).get_config(variant).task
            if "tiny" not in variant and task.name == "tasks.GeneratorTask" and "vocabulary" in task.model:
                yield name, variant


@pytest.mark.parametrize("name, variant", [*generators()])
def test_every_parameter_of_a_generator_finds_its_sharding_rule(name, variant):
    """Of as many dimensions; and no rule finds nothing. Published sizes do not train here."""
    config = load(name).get_config(variant)
    model = build(config.task.model)
    condition = {"label": jnp.zeros(2, int), "text": jnp.zeros((2, 3, 8)), "text_mask": jnp.ones((2, 3), bool)}
    codes = jnp.zeros((2, model.length, *np.shape(model.vocabulary)), int)
    init = functools.partial(model.init, {"params": jax.random.key(0), "train": jax.random.key(0)}, method="loss")
    params = jax.eval_shape(functools.partial(init, train=True), codes, condition)["params"]
    sharding.shardings({"params": {"generator": params}}, sharding.make_mesh(data=1, fsdp=-1), config.sharding)


def test_a_config_loads_without_jax():
    code = f"import sys; from configs import {', '.join(NAMES)}; assert not {{'jax', 'jaxtok'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True, env={"PYTHONPATH": str(Path(runs.ROOT))})


def source(workdir):
    """(name, variant) of the config that a workdir of another one's is named after; None for a converted checkpoint."""
    stem = Path(workdir).name
    name = max((n for n in NAMES if stem == n or stem.startswith(f"{n}_")), key=len, default=None)
    return name and (name, stem[len(name) + 1 :])


def begins():
    """(name, variant) of all published sizes that begin with the weights of a run of a config."""
    for name in NAMES:
        for variant in load(name).VARIANTS:
            sources = load(name).get_config(variant).get("init_from", ())
            if not variant.startswith("tiny") and any(source(s["path"]) for s in sources):
                yield name, variant


class Shapes:
    """Checkpoints of a run that never was."""

    def restore_params(self, which, abstract, whole):
        return abstract


@functools.cache
def state(name, variant):
    """The trees of a fresh run, as shapes."""
    config = load(name).get_config(variant)
    task = build(config.task)
    return jax.eval_shape(task.init, jax.random.key(0), plan.batch_shapes(config, task))


@pytest.mark.parametrize("name, variant", [*begins()])
def test_what_a_variant_begins_with_fits_it(name, variant, monkeypatch):
    """The run that its `init_from` names, by names and shapes alone: published sizes do not train here."""
    trees = state(name, variant)
    ours = functools.reduce(merge, trees.values())
    for weights in load(name).get_config(variant).init_from:
        if found := source(weights["path"]):
            there = state(*found)
            stored = [(Shapes(), which, tree) for which, tree in there.items() if tree]
            monkeypatch.setattr(init_from, "stored_weights", lambda path, stored=stored: stored)
            assert init_from.graft(ours, **weights)[1]
