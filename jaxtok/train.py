"""The one training loop: python -m jaxtok.train --config=configs/flextok.py --workdir=runs/flextok

Read train() top to bottom: mesh, data, state, restore, steps, evaluation, end. run() is for recipes of several stages.
"""

import contextlib
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils

from jaxtok import build, command, distributed, sharding, stages
from jaxtok.checkpoint import Checkpoints, claim_workdir
from jaxtok.data import pipeline
from jaxtok.eval import pictures
from jaxtok.init_from import init_from
from jaxtok.metrics import Logger, Window, copy_files
from jaxtok.step import batch_shapes, count_flops, numbered, numeric, program, transforms

KEYS = (
    "seed total_steps batch_size accumulate ema log_every eval_every tensorboard checkpoint mesh sharding schedule "
    "optimizer data task init_from"
).split()
SHOWN = 8  # rows of the picture


def run(config, workdir, profile=False):
    """`train`, for each stage of a config in turn; those that have ended are passed over. Returns the last metrics."""
    metrics, stop, runs = {}, [], stages.runs(config, workdir, KEYS)
    for number, (folder, stage) in enumerate(runs, 1):
        if number < len(runs) and stages.finished(folder, stage):
            claim_workdir(folder, stage)  # a key that changed since would else be ignored
            continue
        metrics = train(stage, folder, profile, stop)
        if np.any(multihost_utils.process_allgather(np.array(bool(stop)))):  # be it in the very last step
            if number < len(runs) and jax.process_index() == 0:
                print(f"A signal stopped the recipe in {folder.name}; the same command goes on from there.", flush=True)
            break
    return metrics


def train(config, workdir, profile=False, stop=None):
    """Trains `config` in `workdir`, resuming where an earlier run of it stopped. Returns the final metrics.

    Args:
      workdir: made if missing; of a bucket too ("gs://BUCKET/run").
      profile: writes a trace of three steps, the eleventh and two more, to workdir/profile (TensorBoard and Perfetto).
      stop: a list to which signals put their names while it trains (`distributed.until_signal`), for whoever called it.
    """
    build.check_keys(config, KEYS, "The config")
    build.check_keys(config.data, ("train", "eval", "workers", "max_bad"), "config.data")
    for split, keys in (("train", ("source", "transforms")), ("eval", ("source", "transforms", "batch_size"))):
        build.check_keys(config.data[split], keys, f"config.data.{split}")
    build.check_keys(config.checkpoint, ("every", "keep_last", "keep_every"), "config.checkpoint")
    if min(config.log_every, config.checkpoint.every) < 1:
        raise ValueError(
            f"log_every={config.log_every} and checkpoint.every={config.checkpoint.every} must be at least 1."
        )
    workdir, total = epath.Path(workdir).expanduser(), config.total_steps

    # Mesh.
    mesh = build.call(sharding.make_mesh, options=config.mesh, where="config.mesh")
    sharding.check_batch_size(config.data.eval.batch_size, mesh)

    # Data: whatever is missing fails here, before the first step.
    source, held_out = build.build(config.data.train.source), build.build(config.data.eval.source)
    change, look_change = transforms(config.data.train), transforms(config.data.eval)
    max_bad = config.data.get("max_bad", 0.01)
    shapes = batch_shapes(source, change, config.batch_size, max_bad)
    eval_shapes = batch_shapes(held_out, look_change, config.data.eval.batch_size, max_bad)
    for name, dtype in (("mask", bool), ("index", jnp.int32)):
        eval_shapes[name] = jax.ShapeDtypeStruct((config.data.eval.batch_size,), dtype)
    shared = dict(process_index=jax.process_index(), process_count=jax.process_count(), max_bad=max_bad)
    eval_batches = functools.partial(
        pipeline.eval_batches, held_out, look_change, batch_size=config.data.eval.batch_size, **shared
    )

    # State: its layout over the mesh comes first, so that nothing is ever whole on one device.
    task = build.build(config.task)
    task.check(source)
    task.check(held_out)
    init, abstract, step_fn = program(config, task, mesh, shapes)
    key = jax.random.key(config.seed)
    evaluate = jax.jit(sharding.on_mesh(mesh, functools.partial(first_pictures, task.evaluate)))
    jax.eval_shape(evaluate, abstract["ema"], abstract["mutable"], abstract["frozen"], eval_shapes, key)

    # Restore: what a checkpoint holds, or everything fresh, with what `init_from` brings.
    checkpoints = Checkpoints(workdir, config.checkpoint.keep_last, config.checkpoint.keep_every or None)
    frozen = Checkpoints(workdir / "frozen", keep_last=1)  # apart, and written once
    start, damaged = 0, []
    if checkpoints.latest():
        claim_workdir(workdir, config)
        state, start, damaged = checkpoints.restore_newest(saved(abstract))
        state |= {"frozen": {}}
        if abstract["frozen"]:
            state |= frozen.restore({"frozen": abstract["frozen"]})
    else:
        claim_workdir(workdir, config, free=(".*",))  # a run that saved nothing may begin anew, otherwise
        state = init_from(init(key), build.build(config.init_from) + task.sources())
        if jax.process_index() == 0:
            frozen.folder.rmtree(missing_ok=True)  # of that run
        if state["frozen"]:
            frozen.save(0, {"frozen": state["frozen"]})
            frozen.close()

    if profile and total < start + 13:
        raise ValueError(f"--profile traces the eleventh step and two more, and {total - start} are left.")
    traced = range(start + 10, start + 13) if profile else range(-1, -1)
    data = pipeline.train_batches(  # it reads while the step is compiled
        source,
        change,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        workers=config.data.get("workers", 0),
        **shared,
    )

    # The step, compiled once.
    log = Logger(workdir, total, start, tensorboard=config.tensorboard)
    for sentence in damaged:
        log.print(sentence)
    parameters = sum(x.size for x in jax.tree.leaves(abstract["params"]))
    log.print(
        f"{workdir.name}: {parameters / 1e6:.2f} M parameters, {len(source)} pictures to train on, {len(held_out)} "
        f"held out, {jax.device_count()} {jax.devices()[0].device_kind} device(s). "
        + (f"Resuming at step {start}. " if start else "")
        + "Compiling ..."
    )
    for name, term in getattr(task, "losses", {}).items():
        if not term.get("weight", 1.0):
            log.print(f"loss/{name} is off: its weight is 0.")
    if start < total:
        step = step_fn.trace(abstract, shapes)
        step_flops = count_flops(config, shapes, step.jaxpr)
        step_fn = step.lower().compile()
    evaluate = functools.partial(run_evaluation, task, evaluate, eval_batches, mesh, workdir, log)

    metrics, pending, window = {}, [], Window()
    stop = [] if stop is None else stop
    agreed = distributed.agreement()
    with data, contextlib.closing(log), contextlib.closing(checkpoints), distributed.until_signal(stop):
        for step in range(start, total):
            if step == traced.start:
                trace = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(trace.name)
            with window.waiting(step + 1, type(source).__name__):
                batch = sharding.put_batch(numeric(next(data)), mesh)
            state, logs = step_fn(state, batch)  # returns at once: the next batch is read and moved while it runs
            pending.append(logs)
            window.step()
            checkpoints.check()
            done = step + 1
            if done == traced.stop:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                copy_files(trace.name, workdir / "profile")
                log.print(f"A trace of steps {traced.start + 1} to {done}: {workdir / 'profile'}")
            stopping = agreed(bool(stop))  # asked once, for it may change at any moment
            save = stopping or done == total or done % config.checkpoint.every == 0
            look = config.eval_every and done % config.eval_every == 0 and done < total and not stopping
            if save or look or done % config.log_every == 0:
                means = fetch(pending, done, checkpoints)
                means["data_bad"] = len(data.bad)  # of the rows of process 0
                log.log(done, means | window.close(len(pending) * config.batch_size, step_flops * len(pending)))
                pending = []
            if save:
                checkpoints.save(done, saved(state))
            if look:
                metrics, _ = evaluate(done, state)
                window = Window()
            if stopping and done < total:
                checkpoints.wait()
                by = stop[0] if stop else "a signal to another process"
                log.print(f"Stopped by {by} after step {done} and saved it; the same command goes on from there.")
                return metrics
        metrics, table = evaluate(total, state)
        checkpoints.wait()
        log.table(f"Held-out {task.shows} of {workdir.name} at step {total}", table)
        log.print(f"Pictures: {workdir / task.shows}.png")
    return metrics


# ---- pieces ----


def saved(state):
    """What of a state a checkpoint holds."""
    return {k: v for k, v in state.items() if k != "frozen"}


def first_pictures(evaluate, *args):
    """A task's evaluation of a batch, with as many pictures as are shown at most."""
    out = evaluate(*args)
    return out | {"pictures": [images[:SHOWN] for images in out["pictures"]]}


def run_evaluation(task, evaluate, batches, mesh, workdir, log, done, state):
    """One pass over the held-out data with the EMA weights: (metrics, table), logged; and workdir/<task.shows>.png."""
    rows, shown, every = [], [], 1
    with batches() as data:
        for number, batch in enumerate(data):
            batch = sharding.put_batch(numbered(batch), mesh)
            out = evaluate(state["ema"], state["mutable"], state["frozen"], batch, jax.random.key(0))
            out, mask = multihost_utils.process_allgather((out, batch["mask"]), tiled=True)
            rows.append(jax.tree.map(lambda x, mask=mask: np.asarray(x)[mask], out["rows"]))
            if jax.process_index() == 0 and number % every == 0:
                shown.append([np.asarray(images)[mask[:SHOWN]] for images in out["pictures"]])
            if len(shown) == 2 * SHOWN:  # from every second batch of those, and from now on
                shown, every = shown[::2], 2 * every
    if jax.process_index() == 0:
        columns = map(np.concatenate, zip(*shown, strict=True))
        columns = {t: c[:: max(1, len(c) // SHOWN)][:SHOWN] for t, c in zip(task.titles(), columns, strict=True)}
        with (workdir / f"{task.shows}.png").open("wb") as file:
            pictures.grid(columns, file)
    metrics, table = task.summarize({name: np.concatenate([r[name] for r in rows]) for name in rows[0]})
    log.log(done, {f"eval/{name}": value for name, value in metrics.items()})
    return metrics, table


def fetch(pending, done, checkpoints):
    """Means of the logs of the last steps. FloatingPointError at the first loss or gradient that is not finite."""
    pending = jax.device_get(pending)
    for i, logs in enumerate(pending):
        for name, value in sorted(logs.items(), key=lambda item: item[0] == "grad_norm"):  # the losses first
            if (name.startswith("loss/") or name == "grad_norm") and not np.isfinite(value):
                step, good = done - len(pending) + i + 1, checkpoints.latest()
                mend = "lower schedule.peak_lr or set optimizer.clip, and"
                raise FloatingPointError(
                    f"Step {step}: {name} is {value}. "
                    + (
                        f"The last good checkpoint is step {good}: {mend} go on from its weights in another workdir, "
                        f'with init_from=(dict(path="{checkpoints.folder.parent}"),).'
                        if good
                        else f"There is no checkpoint yet: {mend} run again."
                    )
                )
    return {name: float(np.mean([logs[name] for logs in pending])) for name in pending[0]}


@command.one_line("python -m jaxtok.train")
def main(argv):
    if len(argv) > 1:
        raise app.UsageError(
            f"Unknown arguments {argv[1:]}: options are --config=FILE, --workdir=DIR, --config.KEY=VALUE."
        )
    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    with command.together():
        run(FLAGS.config, FLAGS.workdir, FLAGS.profile)


if __name__ == "__main__":
    command.use_huge_pages()
    FLAGS = flags.FLAGS
    command.define_config("A file or a name that python -m jaxtok.configs lists, :VARIANT.")
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go.")
    flags.DEFINE_bool("profile", False, "Write a trace of three steps to WORKDIR/profile.")
    command.define_processes()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
