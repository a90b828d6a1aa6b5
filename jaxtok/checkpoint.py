"""The state of a run on disk, and whose workdir it is. The only file that imports Orbax.

    workdir/config.json            the resolved config; `claim_workdir` refuses a workdir of another one
    workdir/checkpoints/<step>/    a folder per step, which appears when it is complete and not before
    workdir/frozen/checkpoints/0/  what never changes (a pretrained codec, teachers), written once

A state is any tree of arrays. On disk it is nested dicts by path ("params/encoder/...", "opt_state/0/mu/..."), so the
classes of optax may change their modules without making a checkpoint unreadable; restoring takes the tree's structure
from the caller. Orbax is imported where it is used: it takes a while.
"""

import hashlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from jaxtok.sharding import path_name

# What may change when a run goes on: where and how often, never what is computed. Weights that it began with are in its
# checkpoints by then, wherever they came from.
FREE = ("mesh", "sharding", "log_every", "checkpoint", "eval", r"data\.workers", "tensorboard", r"init_from\.\d+\.path")


class Misfit(ValueError):
    """A checkpoint that is whole, of another state."""


class Checkpoints:
    """The checkpoints of one run. With several processes, all of them call each method, in the same order.

    Reading (`steps`, `latest`, `restore`, `restore_params`) changes nothing on disk, so one may read a run that is
    training. The first `save` removes what killed saves left behind.

    A save that fails in the background raises RuntimeError at the next call of any method; of several processes perhaps
    in one alone, which must then end: the others wait for its part.

    Args:
      workdir: the run's folder; its checkpoints are in workdir/checkpoints.
      keep_last: so many of the newest steps are kept, at least 1.
      keep_every: steps divisible by this are kept for good; None: no others.
    """

    def __init__(self, workdir: str, keep_last: int = 3, keep_every: int | None = None):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"checkpoint: keep_last={keep_last} must be at least 1, keep_every={keep_every} too, or None."
            )
        self.folder = _absolute(workdir) / "checkpoints"
        self.keep_last, self.keep_every = keep_last, keep_every
        self._cleaned = False
        self._saving = None  # (step, the save under way)

    def save(self, step: int, state: Any) -> bool:
        """Copies the state to the host and writes it in the background.

        The caller may donate or change the state as soon as this returns. Steps that need not be kept go when a later
        call finds this one complete. False, with nothing written, if the step is there already: a run reaches a step
        in one state only.
        """
        step = int(step)
        if step in self.steps():
            return False
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        # Else a save that fails early leaves a thread that waits five minutes for its folder and holds up the exit.
        context.async_options.create_directories_asynchronously = False
        # Devices that hold the same array share the writing of it, each a slice: a program to compile for each shape
        # and slice, which pays for large arrays only.
        context.array_options.saving.min_slice_bytes_for_replica_parallel = 2**20
        try:
            if not self._cleaned and jax.process_index() == 0:
                self._clean()
            self._cleaned = True
            with context:  # overwrite: what stands there is no complete checkpoint
                self._saving = step, ocp.save_async(self.folder / str(step), _to_disk(state), overwrite=True)
        except Exception as error:
            raise self._failure(step, error) from error
        return True

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            raise self._failure(step, error) from error
        if jax.process_index() == 0:
            self._drop_old()

    def check(self) -> None:
        """Raises what `wait` would if the save under way has failed by now. It returns at once: call it every step."""
        try:
            if self._saving is not None:
                self._saving[1].result(timeout=0)
        except TimeoutError as error:
            if not error.args:  # it is under way; a disk or a network that timed out says something
                return
        except Exception:  # of which `wait` says more
            pass
        self.wait()

    close = wait  # call it before the process ends, also after an error

    def steps(self) -> list[int]:
        """The complete checkpoints, ascending."""
        self.wait()
        if jax.process_count() == 1:
            return self._list()
        # What process 0 sees: where folders and network disks are seen to change at different times, processes that
        # looked for themselves could take different turns, and then wait for each other for ever.
        steps = self._list() if jax.process_index() == 0 else []
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        return multihost_utils.broadcast_one_to_all(np.resize(np.array([*steps, 0], np.int32), count)).tolist()

    def latest(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def shapes(self, step: int | None = None) -> dict:
        """What a step (default: the latest) holds: nested dicts of ShapeDtypeStruct; no array is read."""
        flat = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in self._stored(self._find(step)).items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """The state of a step (default: the latest), bit for bit, on any mesh.

        Args:
          abstract_state: a tree of ShapeDtypeStruct with shardings (without: on the first device), all of the state.
          step: one of `steps()`.

        FileNotFoundError if there is no such checkpoint; ValueError names the first paths whose shape or dtype differ.
        """
        return self._load(self._find(step), abstract_state)

    def restore_newest(self, abstract_state: Any) -> tuple[Any, int, list[str]]:
        """(`restore` of the newest step that can be read, that step, a sentence for each newer one that cannot).

        What cannot be read is set aside as STEP.damaged, or its step could not be saved again: once an older one has
        been read, for a fault of the reader (memory, the disk) spoils all of them alike. RuntimeError, with nothing
        renamed, if none can be read: a run must not begin anew in silence. ValueError as of `restore`.
        """
        reasons = {}
        for step in reversed(self.steps()):
            state, error = None, None
            try:
                state = self._load(step, abstract_state)
            except Misfit:
                raise
            except Exception as reason:  # Orbax and what it stands on have many
                error = reason
            if np.all(multihost_utils.process_allgather(np.array(error is None))):  # all take the same step
                return state, step, self._set_aside(reasons)
            reasons[step] = "on another process" if error is None else repr(error)[:200]
        raise RuntimeError(
            f"No checkpoint in {self.folder} can be read: "
            + "; ".join(f"{step} ({reason})" for step, reason in reasons.items())
            + ". They are left as they are. If memory or a disk is the reason, mend that and run again; "
            "to begin anew, take another workdir."
        )

    def restore_params(
        self, step: int | None = None, which: str = "ema", abstract: Any = None, whole: bool = True
    ) -> Any:
        """Only the parameters of a step: for evaluation, with no optimizer and no rules.

        Args:
          step: one of `steps()`; default: the latest.
          which: "ema", "params", or another top key of the state ("mutable").
          abstract: a tree of ShapeDtypeStruct, with shardings or not, that the parameters must fit. Default: nested
            dicts as on disk, on the first device.
          whole: whether `abstract` must name every parameter there; else the others are not read.

        FileNotFoundError if there is no such checkpoint, ValueError if it has no `which` or does not fit.
        """
        step = self._find(step)
        stored = self._stored(step)
        if abstract is None:
            abstract = self.shapes(step).get(which)
        if not any(name.startswith(f"{which}/") for name in stored):
            tops = sorted({name.split("/")[0] for name in stored})
            raise ValueError(f'Checkpoint {step} in {self.folder} holds no "{which}", only {", ".join(tops)}.')
        return self._load(step, {which: abstract}, part=which, whole=whole)[which]

    def _set_aside(self, reasons):
        """Renames damaged steps; a sentence for each of {step: reason}."""
        if jax.process_index() == 0:
            for step in reasons:
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        multihost_utils.sync_global_devices("what is damaged is set aside")
        return [
            f"Checkpoint {step} in {self.folder} is damaged ({reason}); it is set aside as {step}.damaged."
            for step, reason in reasons.items()
        ]

    def _list(self):
        """`steps`, as this process sees them."""
        import orbax.checkpoint.experimental.v1 as ocp

        if not self.folder.exists():
            return []
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.folder))

    def _clean(self):
        """Removes what killed saves left. Each folder there that is no complete checkpoint has such a name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            path.rmtree()

    def _drop_old(self):
        for step in self._list()[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                # Orbax would delete file by file, and stumble over the rest if it is killed meanwhile. A rename is
                # atomic, and under this name the next run removes what is left.
                dying = (self.folder / str(step)).rename(self.folder / f"{step}.orbax-checkpoint-tmp")
                dying.rmtree()

    def _failure(self, step, error):
        """The error of a failed save, which left something behind."""
        self._cleaned = False
        last = max(self._list(), default=None)  # as seen by this process: the others may not have failed
        good = "there is no complete checkpoint yet" if last is None else f"the last complete checkpoint is {last}"
        return RuntimeError(f"Saving checkpoint {step} in {self.folder} failed ({error}); {good}.")

    def _find(self, step):
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step not in steps:
            wanted = "No complete checkpoint" if step is None else f"No complete checkpoint of step {step}"
            there = f"the steps there are {', '.join(map(str, steps))}" if steps else "it holds none; check the workdir"
            raise FileNotFoundError(f"{wanted} in {self.folder}: {there}.")
        return step

    def _stored(self, step):
        """Path -> what is known of the array on disk."""
        import orbax.checkpoint.experimental.v1 as ocp

        return traverse_util.flatten_dict(ocp.metadata(self.folder / str(step)).metadata, sep="/")

    def _load(self, step, abstract, part=None, whole=True):
        import orbax.checkpoint.experimental.v1 as ocp

        stored = {k: x for k, x in self._stored(step).items() if part is None or k.startswith(f"{part}/")}
        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
        wanted = {path_name(path): leaf for path, leaf in leaves}
        on_disk = {name: _abstract_on_disk(leaf) for name, leaf in wanted.items()}
        differ = [
            f"{name}: {_describe(stored.get(name))} there, {_describe(on_disk.get(name))} here"
            for name in [*on_disk, *(sorted(stored.keys() - on_disk.keys()) if whole else ())]
            if _describe(stored.get(name)) != _describe(on_disk.get(name))
        ]
        if differ:
            listed = "\n  ".join(differ[:8] + ([f"and {len(differ) - 8} more"] if len(differ) > 8 else []))
            raise Misfit(f"Checkpoint {step} in {self.folder} does not fit the state of this config:\n  {listed}")
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            loaded = ocp.load(self.folder / str(step), traverse_util.unflatten_dict(on_disk, sep="/"))
        loaded = traverse_util.flatten_dict(loaded, sep="/")
        return structure.unflatten([_from_disk(loaded[name], leaf.dtype) for name, leaf in wanted.items()])


def stored_weights(workdir: str) -> list[tuple[Checkpoints, str, dict]]:
    """What a workdir holds of a model: its newest "ema" and "mutable", and "frozen", those that are there.

    Each as (its Checkpoints, that key, nested dicts of ShapeDtypeStruct). FileNotFoundError if there is no checkpoint.
    """
    run, frozen = Checkpoints(workdir), Checkpoints(_absolute(workdir) / "frozen")
    shapes = run.shapes()
    found = [(run, which, shapes[which]) for which in ("ema", "mutable") if which in shapes]
    return found + ([(frozen, "frozen", frozen.shapes()["frozen"])] if frozen.steps() else [])


def fingerprint(workdir: str) -> str:
    """Tells a model from another without reading its weights: sha256, in hex, over small things of a workdir.

    It is taken over `task.model` of config.json and, of the newest checkpoint and of workdir/frozen, over the names and
    sizes of all files and the bytes of Orbax's manifests. Orbax names files of arrays at random, and the manifests name
    those files. So it changes when the model does, with every step that is saved, and when equal weights are saved once
    more; it stays when the folder is copied or moved, and when older steps are deleted. Not detected: bytes of arrays
    that are changed in place, at the same size. Any process may call it alone.

    FileNotFoundError if there is no config.json or no checkpoint.
    """
    workdir = _absolute(workdir)
    model = json.loads((workdir / "config.json").read_text()).get("task", {}).get("model")
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode())
    run, frozen = Checkpoints(workdir), Checkpoints(workdir / "frozen")
    if not run._list():
        raise FileNotFoundError(f"No complete checkpoint in {run.folder}: check the workdir, or let its run save one.")
    for folder in [
        checkpoints.folder / str(step) for checkpoints in (run, frozen) for step in checkpoints._list()[-1:]
    ]:
        for file in sorted(_files(folder)):
            digest.update(f"\n{file.relative_to(folder).as_posix()} {file.stat().length}".encode())
            if file.name.startswith("manifest."):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def claim_workdir(workdir: str, config: ConfigDict, free: tuple[str, ...] = FREE) -> None:
    """Makes workdir this config's: writes the config to an empty one, accepts one that holds it, refuses the rest.

    Args:
      workdir: made if missing; by process 0, which alone writes.
      config: written to workdir/config.json, resolved and sorted.
      free: regexes; keys ("schedule.peak_lr") that one matches from their start may differ, and the file then
        takes the new values.

    ValueError lists the keys that differ, as old -> new.
    """
    workdir = _absolute(workdir)
    path = workdir / "config.json"
    text = config.to_json(sort_keys=True, indent=2) + "\n"
    if path.exists():
        old, new = _flatten(json.loads(path.read_text())), _flatten(json.loads(text))
        differ = [
            f"{key}: {_value(old, key)} -> {_value(new, key)}"
            for key in sorted(old.keys() | new.keys())
            if _value(old, key) != _value(new, key) and not any(re.match(regex, key) for regex in free)
        ]
        if differ:
            listed = "\n  ".join(differ)
            raise ValueError(
                f"{workdir} holds a run of another config, which differs (old -> new) in\n  {listed}\n"
                "Take another workdir, or these values back."
            )
    elif (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} holds checkpoints but no config.json that says whose: take another workdir.")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        half = workdir / "config.json.tmp"  # a killed process leaves the old file or the new one, never half of it
        half.write_text(text)
        half.replace(path)


def _absolute(workdir):
    path = epath.Path(workdir).expanduser()
    return path if path.is_absolute() else path.absolute()  # absolute() spoils the URL of a bucket


def _files(folder):
    """All files below a folder but hidden ones, which file managers leave."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif not path.name.startswith("."):
            yield path


def _is_key(dtype):
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _to_disk(state):
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    flat = {name: jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf for name, leaf in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def _abstract_on_disk(leaf):
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf.dtype):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _from_disk(array, dtype):
    if not _is_key(dtype):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), dtype)))


def _describe(array):
    return "nothing" if array is None else f"{jnp.dtype(array.dtype).name} {tuple(array.shape)}"


def _flatten(config, prefix=""):
    """Nested dicts, and lists of them, by dotted key; lists of plain values stay values."""
    if isinstance(config, list) and any(isinstance(item, dict | list) for item in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    items = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items()]
    return {key: value for item in items for key, value in item.items()}


def _value(flat, key):
    return json.dumps(flat[key]) if key in flat else "absent"
