"""Models by name: what `jaxtok.load` finds, reads and puts on the devices.

A source is one of
    a workdir        config.json with a task, and checkpoints/: what jaxtok.train and jaxtok.pretrained.convert write
    a folder         config.json and model.safetensors (or its index), as they are published
    a file           NAME.safetensors, .pth, .pt, .ckpt or .bin; the config is in it, or config.json beside it
    a repository     OWNER/NAME on the hub; huggingface_hub (the extra "hub") fetches its files and caches them
"""

import importlib.util
import json
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxtok import build, pretrained, sharding
from jaxtok.bound import BoundGenerator, BoundTokenizer, picture_shape
from jaxtok.checkpoint import stored_weights
from jaxtok.pretrained import pickles, safetensors
from jaxtok.pretrained.convert import Report, flatten, unwrapped
from jaxtok.tasks import merge
from jaxtok.tokenizer import Tokenizer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
EVERYTHING = ((".*", "fsdp"),)


def load(source, kind="flextok") -> BoundTokenizer | BoundGenerator:
    """See `jaxtok.load`."""
    path = find(source)
    mesh = jax.sharding.get_mesh()
    mesh = None if mesh.empty else mesh
    if mesh and not set(sharding.AXES) <= set(mesh.axis_names):
        raise ValueError(f"The mesh has the axes {mesh.axis_names}: make it with jaxtok.sharding.make_mesh.")
    if (path / "checkpoints").is_dir():
        model, variables = restore(path, mesh)
        return (BoundTokenizer if isinstance(model, Tokenizer) else BoundGenerator)(model, variables, mesh)
    converted = convert(path, kind, mesh)
    if converted.model is None:
        raise ValueError(f"{source} is a {next(iter(converted.config))}, and jaxtok.load gives whole tokenizers.")
    print(converted.licence, file=sys.stderr)
    return BoundTokenizer(converted.model, converted.variables, mesh)


class Converted(NamedTuple):
    """A published checkpoint as a model of ours, or as a part: a codec or a tower."""

    config: dict  # under "task", "codec" or "tower", a spec for `build`
    model: Any  # None for a part
    variables: dict
    report: Report
    keys: int  # how many there were
    licence: str


def convert(path, kind="flextok", mesh=None, host=False) -> Converted:
    """Reads a published checkpoint; leaf after leaf, so that it never lies in memory twice.

    Args:
      path: the folder or file, or for a kind that has a `read` of its own, what that takes.
      kind: whose it is, a module of `jaxtok.pretrained`: "flextok", a whole tokenizer; "vae", a codec; "vit", a tower.
      mesh: where the variables go; None: the default device.
      host: leave them in the host's memory, as numpy arrays.
    """
    table = table_of(kind)
    state_dict, published = table.read(path) if hasattr(table, "read") else read(path := Path(path))
    if hasattr(table, "load"):  # of a part for a config's `init_from`, or of a tokenizer that says its sizes itself
        config, params, report = table.load(state_dict, published, part_shapes)
        model = build.build(config["task"]["model"]) if "task" in config else None
        if not host:
            params = jax.device_put(params, _layout({"params": params}, EVERYTHING, mesh)["params"])
        return Converted(config, model, {"params": params}, report, len(state_dict), table.LICENCE)
    if not published:
        raise FileNotFoundError(f"{path} has no config in its metadata: place the published config.json beside it.")
    codec = table.codec_of(published)
    spec = table.config_from(published, codec_config(path, codec) if codec else None)
    model = build.build(spec)
    like = parameter_shapes(model)
    layout = flatten(_layout({"params": like}, EVERYTHING, mesh)["params"])
    put = None if host else lambda path, array: jax.device_put(array, layout[path])
    rows, columns = model.decoder.shape[0] // model.decoder.patch, model.decoder.shape[1] // model.decoder.patch
    params, report = table.from_state_dict(state_dict, like, (rows, columns), put)
    return Converted(dict(task=table.task(spec)), model, {"params": params}, report, len(state_dict), table.LICENCE)


def table_of(kind):
    """The module of `jaxtok.pretrained` that reads checkpoints of a kind."""
    found = re.fullmatch(r"\w+", kind) and importlib.util.find_spec(f"jaxtok.pretrained.{kind}")
    table = importlib.import_module(found.name) if found else None
    reads = lambda module: hasattr(module, "config_from") or hasattr(module, "load")
    if not reads(table):
        modules = pkgutil.iter_modules(pretrained.__path__, "jaxtok.pretrained.")
        tables = [m.name for m in modules if reads(importlib.import_module(m.name))]
        known = ", ".join(f'"{name.rpartition(".")[2]}"' for name in tables)
        raise ValueError(f"There is no jaxtok.pretrained.{kind} that reads checkpoints; {known} do.")
    return table


def find(source) -> Path:
    """The folder or file of a source, fetched if it is the id of a repository.

    FileNotFoundError for what is neither, and for a folder of workdirs, as those of a recipe of several stages.
    """
    path = epath.Path(source).expanduser()  # of a bucket too, where runs may lie
    if path.exists():
        if (path / "checkpoints").is_dir():
            return path
        if runs := sorted(found.parent.name for found in path.glob("*/checkpoints")):
            raise FileNotFoundError(f"{path} is a folder of workdirs: name one of them, {', '.join(runs)}.")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source} is no folder or file here, and no id of a repository, which has the form OWNER/NAME."
        )
    return fetch(str(source), ("config.json", "model*.safetensors*"))


def workdir(source) -> Path:
    """The workdir of a run, or of converted weights. FileNotFoundError for what else `find` finds."""
    path = find(source)
    if not (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{path} is no workdir of a run: python -m jaxtok.pretrained.convert makes one of published weights."
        )
    return path


def fetch(repository, patterns) -> Path:
    """The folder that holds the files of a repository, from huggingface_hub's cache or from the hub.

    FileNotFoundError, whatever the reason, says which files to place where.
    """
    by_hand = (
        f"or place its files ({', '.join(patterns)}) in a folder, by any means, and give the path of that instead of "
        f"{repository}"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f'{repository} is on the hub, and huggingface_hub is not installed: pip install "jaxtok[hub]", {by_hand}.'
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # it has many, of its own and of those below it
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise FileNotFoundError(
            f"{repository} is neither in the cache ({cache}) nor to be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): try again with a "
            f"connection, {by_hand}."
        ) from error


def codec_config(path, repository) -> dict:
    """config.json of the codec of a checkpoint: from vae/ beside it, or from the codec's own repository."""
    folder = (path if path.is_dir() else path.parent) / "vae"
    folder = folder if folder.is_dir() else fetch(repository, ("config.json",))
    return json.loads((folder / "config.json").read_text())


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    """A published folder or file -> (state dict of views, config as published, {} if there is none)."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds no {' or '.join(WEIGHTS)}, and no checkpoints/ of a run.")
        path = found[0]
    if path.suffix in PICKLES:
        tree, metadata = unwrapped(pickles.read(path)), {}
        state_dict = {key: value for key, value in tree.items() if isinstance(value, np.ndarray)}
    else:
        state_dict, metadata = safetensors.read(path)
    config = folder / "config.json"
    if config.exists():
        return state_dict, json.loads(config.read_text())
    return state_dict, {key: value for key, value in metadata.items() if key != "format"}


def part_shapes(spec, size=64) -> dict:
    """The parameters of a codec, tower or tokenizer as shapes, for pictures of `size` pixels a side."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    return jax.eval_shape(build.build(spec).init, jax.random.key(0), image)["params"]


def parameter_shapes(model) -> dict:
    """The parameters of a tokenizer as shapes."""
    image = jnp.zeros((1, *picture_shape(model)), jnp.uint8)
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    return jax.eval_shape(lambda: model.init(keys, image, train=True))["params"]


def restore(workdir, mesh):
    """A run's Tokenizer and its variables, or its GeneratorTask and their trees: EMA parameters, and what is frozen.

    They go onto the mesh by the run's own rules; None: onto the default device.
    """
    config = json.loads((workdir / "config.json").read_text())
    if "task" not in config:
        raise ValueError(f"{workdir} holds a {next(k for k in config if k != 'source')}, not a whole tokenizer.")
    rules = config.get("sharding", EVERYTHING)
    trees = {}
    for checkpoints, which, shapes in stored_weights(workdir):
        shapes.pop("objective", None)  # of the losses, teachers among them
        if not shapes:
            continue
        layout = _layout({"params": shapes}, rules, mesh)["params"]
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
        trees[which] = checkpoints.restore_params(which=which, abstract=abstract, whole=False)
    params = merge(trees.get("ema", {}), trees.get("frozen", {}))  # one may train nothing
    if "tokenizer" in params:  # of a generator, and its variables are whole
        return build.build(config["task"]), params
    return build.build(config["task"]["model"]), {"params": params, **trees.get("mutable", {})}


def _layout(tree, rules, mesh):
    """A sharding for each array: those rules that concern it, or the default device."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: device, tree)
    paths = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    rules = [(regex, tactic) for regex, tactic in rules if any(re.search(regex, path) for path in paths)]
    return sharding.shardings(tree, mesh, rules)
