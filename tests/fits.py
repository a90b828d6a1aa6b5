"""Trainings of seconds, for properties: a config's task and the loop's own step, on pictures held in memory.

One compiled program from the first step to the last, on one device, with LLVM's first optimisations, which tests go
without elsewhere (tests/conftest.py): over hundreds of steps they pay.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxtok import optim
from jaxtok.build import build
from jaxtok.data.shapes import Shapes
from jaxtok.eval.reconstruction import psnr
from jaxtok.step import init_state, train_step
from jaxtok.tasks import merge

jit_once = functools.cache(jax.jit)


@functools.cache
def emoji(split, size=16):
    """All pictures of a split, uint8 [n size size 3], and their classes."""
    return pictures(build(dict(name="data.sources.Emoji", size=size, split=split)))


@functools.cache
def shapes(split, n, size=16):
    """The first n drawn pictures of a split, uint8 [n size size 3], and the classes of their largest shapes."""
    return pictures(Shapes(size, n, split=split))


def pictures(source):
    """All of a source."""
    examples = [source[i] for i in range(len(source))]
    return {key: np.stack([example[key] for example in examples]) for key in ("image", "label")}


@functools.cache
def trainer(spec):
    """Of a config as JSON: (task, the whole training compiled: (data, key, given) -> (variables, logs))."""
    config = ConfigDict(json.loads(spec))
    task = build(config.task)
    rate = optim.schedule(config.total_steps, **config.schedule)
    tx = optim.adamw(rate, **build(config.optimizer))
    step = functools.partial(train_step, task, tx, rate, config.ema, 1)

    def run(data, key, given):
        take = lambda key: jax.random.randint(key, (config.batch_size,), 0, len(data["image"]))
        batch = lambda key: jax.tree.map(lambda x: x[take(key)], data)
        state = init_state(task, tx, jax.eval_shape(batch, key), key)
        for name, tree in given.items():
            where = "frozen" if name in state["frozen"] else "params"
            state |= {where: state[where] | {name: tree}}
        state["ema"] = state["params"]
        keys = jax.random.split(jax.random.fold_in(key, 1), config.total_steps)
        state, logs = jax.lax.scan(lambda state, key: step(state, batch(key)), state, keys)
        return {"params": merge(state["ema"], state["frozen"]), **state["mutable"]}, logs

    return task, jax.jit(run, compiler_options={"xla_backend_optimization_level": "1"})


def fit(config, data, seed=0, given=None):
    """Trains a config on `data` {"image", ...}: (task, averaged variables, logs of every step).

    given: parameters that replace those of that name, {"encoder": ...}, as `init_from` would bring them.
    """
    task, run = trainer(config.to_json(sort_keys=True))
    return task, *run(jax.tree.map(jnp.asarray, data), jax.random.key(seed), given or {})


def method(task, name, **options):
    """A method of a task's model, compiled once."""
    apply = jit_once(task.model.apply, static_argnames=("method", *options))
    return functools.partial(apply, method=name, **options)


def encode(task, variables, images):
    """Codes of pictures uint8 [B H W 3]."""
    return method(task, "encode")(variables, images)


def decode(task, variables, codes, **options):
    """Pictures float32 [B H W 3] of codes."""
    return method(task, "decode", **options)(variables, codes)


def quality(task, variables, images, change=lambda codes: codes, **options):
    """The mean PSNR of pictures rebuilt from their codes, which `change` may change."""
    codes = change(encode(task, variables, images))
    return float(psnr(images, decode(task, variables, codes, **options)).mean())


def evaluate(task, variables, images):
    """What the loop says of held-out pictures, uint8 [B H W 3]: {"psnr/one pass@8": ...}."""
    params, mutable = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    rows = jit_once(task.evaluate)(params, mutable, {}, {"image": images}, jax.random.key(0))["rows"]
    return task.summarize(jax.tree.map(np.asarray, rows))[0]
