"""One step of a run: the shapes that it is for, the state, the program that is compiled, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok import build, optim, sharding
from jaxtok.data import pipeline
from jaxtok.nn import flops


def program(config, task, mesh, shapes):
    """What a run compiles, from the shapes of its batch: (init: key -> state, the state as shapes and layout, step)."""
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise ValueError(
            f"batch_size {config.batch_size} must be divisible by accumulate {config.accumulate}, which is at least 1."
        )
    sharding.check_batch_size(config.batch_size // config.accumulate, mesh)
    rate = build.call(optim.schedule, config.total_steps, options=config.schedule, where="config.schedule")
    tx = build.call(optim.adamw, rate, options=config.optimizer, where="config.optimizer")
    init = functools.partial(init_state, task, tx, shapes)
    abstract = jax.eval_shape(jax.jit(init), jax.random.key(0))
    layout = sharding.shardings(abstract, mesh, config.sharding)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    step = jax.jit(
        sharding.on_mesh(mesh, functools.partial(train_step, task, tx, rate, config.ema, config.accumulate)),
        donate_argnums=0,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, None),
    )
    return jax.jit(init, out_shardings=layout), abstract, step


def init_state(task, tx, shapes, key):
    """The whole state of a run, from one key and the shapes of a batch."""
    init_key, run_key = jax.random.split(key)
    trees = task.init(init_key, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    params = trees["params"]
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "ema": params, "opt_state": tx.init(params)}
    return state | {"mutable": trees["mutable"], "frozen": trees["frozen"], "key": run_key}


def train_step(task, tx, rate, ema_decay, accumulate, state, batch):
    """One optimizer step: (state, batch) -> (state, logs). Logs are scalars that stay on the device."""
    params, key = state["params"], jax.random.fold_in(state["key"], state["step"])

    def gradients(mutable, batch, key):
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (mutable, logs)), grads = grad(params, mutable, state["frozen"], batch, key, state["step"])
        return mutable, ({"loss": loss, **logs}, grads)

    if accumulate == 1:
        mutable, (logs, grads) = gradients(state["mutable"], batch, key)
    else:  # every part spans all devices: the batch's first axis is [batch / accumulate, accumulate]
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, accumulate)

        def add(carry, part):  # a sum, for the gradients of all parts side by side would fill the memory
            mutable, new = gradients(carry[0], *part)
            return (mutable, jax.tree.map(jnp.add, carry[1], new)), None

        one = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = optax.tree.zeros_like(jax.eval_shape(gradients, state["mutable"], *one)[1])
        (mutable, sums), _ = jax.lax.scan(add, (state["mutable"], zeros), (parts, keys))
        logs, grads = jax.tree.map(lambda x: x / accumulate, sums)

    updates, opt_state = tx.update(grads, state["opt_state"], params)
    new = optax.apply_updates(params, updates)
    logs |= {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(new),
        "lr": rate(state["step"]),
    }
    ema = optim.ema_update(state["ema"], new, state["step"], ema_decay)
    new = {"step": state["step"] + 1, "params": new, "ema": ema, "opt_state": opt_state, "mutable": mutable}
    return state | new, logs


def count_flops(config, shapes, step=None):
    """Model FLOPs of one step (forward and backward of a batch), counted from the program without rematerialisation.

    step: the program of the whole step, if there is one: it is counted as it is where it computes nothing twice.
    """
    spec = config.task.to_dict()
    if step is not None and not rematerialises(spec):
        return flops.count_program(step)
    plain = build.build(without(spec, "remat"))
    trees = jax.eval_shape(plain.init, jax.random.key(0), shapes)
    grad = jax.grad(lambda params, *args: plain.loss(params, *args)[0])
    args = trees["params"], trees["mutable"], trees["frozen"], shapes, jax.random.key(0), 0
    return flops.count(grad, *args)


def rematerialises(spec):
    """Whether a part of a nested dict sets `remat`."""
    if isinstance(spec, (list, tuple)):
        return any(map(rematerialises, spec))
    return isinstance(spec, dict) and (spec.get("remat", "none") != "none" or any(map(rematerialises, spec.values())))


def without(spec, key):
    """A nested dict without `key`, wherever it stands."""
    if not isinstance(spec, dict):
        return spec
    return {k: without(v, key) for k, v in spec.items() if k != key}


def transforms(data):
    """The transforms of config.data.train or .eval: they are factories, so bad options fail here."""
    return tuple(make() for make in build.build(data.get("transforms", ())))


def numeric(batch):
    """What of a batch a device wants: captions, and where examples come from, stay behind."""
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray) and k != "index"}


def numbered(batch):
    """The same of a held-out batch, with `index`, int32: where examples come from, -1 for none."""
    return numeric(batch) | {"index": batch["index"].astype(np.int32)}


def batch_shapes(source, change, batch_size, max_bad):
    """The shapes of a global batch, from the first example that can be read."""
    batch = numeric(pipeline.one_batch(source, change, max_bad))
    return {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}
