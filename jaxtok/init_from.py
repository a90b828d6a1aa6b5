"""Where a new run's weights come from, beside chance: other runs, and converted checkpoints."""

import functools
import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxtok import build, sharding
from jaxtok.checkpoint import stored_weights
from jaxtok.tasks import merge


def init_from(state, sources):
    """A fresh state with the weights of `sources`, ({"path": a workdir, "rules": see graft}, ...), in turn.

    Raises ValueError if a frozen parameter comes from nowhere: nothing may stay random that does not train.
    """
    trees, filled = {name: state[name] for name in ("params", "frozen", "mutable")}, set()
    for i, source in enumerate(sources):
        where, ours = f"config.init_from[{i}]", functools.reduce(merge, trees.values())
        merged, paths = build.call(graft, ours, options=source, where=where)
        trees = {name: like(tree, merged) for name, tree in trees.items()}
        filled |= set(paths)
    frozen = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state["frozen"])]
    lacking = [path for path in frozen if path not in filled]
    if lacking:
        raise ValueError(
            f"{len(lacking)} frozen parameters have no weights ({lacking[0]} ...): they never train, so init_from must "
            'bring them: init_from=(dict(path="runs/..."),), a run or what `python -m jaxtok.pretrained.convert` wrote.'
        )
    return state | trees | ({"ema": jax.tree.map(jnp.copy, trees["params"])} if filled else {})


def like(tree, merged):
    """The part of `merged` that has the paths of `tree`."""
    return {k: like(v, merged[k]) if isinstance(v, dict) else merged[k] for k, v in tree.items()}


def graft(tree: dict, path: str, rules: tuple = ((r".*", r"\g<0>"),)) -> tuple[dict, list[str]]:
    """Puts the weights of another run, or of a converted checkpoint, into a tree of ours.

    Args:
      tree: nested dicts of arrays; what is taken over has their shapes, dtypes and layout.
      path: the workdir of the other run, of which `checkpoint.stored_weights` says what is taken.
      rules: (regex of the whole path there, path here or None): the first that matches a path says where it goes,
        None leaves it out. Default: every path to itself.

    Returns the new tree and the paths that were filled.

    FileNotFoundError if there is no checkpoint. ValueError lists all paths there that no rule matches, that lead
    nowhere or twice to one place, or whose shape differs, and the rules that match nothing.
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    wanted, faults, used, filled = [], [], set(), {}
    for checkpoints, which, shapes in stored_weights(path):
        targets = {}
        wanted.append((checkpoints, which, targets))
        for name, array in traverse_util.flatten_dict(shapes, sep="/").items():
            found = next(((m, rule) for rule in rules if (m := re.fullmatch(rule[0], name))), None)
            if found is None:
                faults.append(f"{name}: no rule says where it goes")
                continue
            m, rule = found
            used.add(rule[0])
            if rule[1] is None:
                continue
            target = m.expand(rule[1])
            if target not in flat:
                faults.append(f"{name} -> {target}: there is no such parameter here")
            elif target in filled:
                faults.append(f"{name} -> {target}: already filled by {filled[target]}")
            elif array.shape != flat[target].shape:
                faults.append(f"{name} -> {target}: {tuple(array.shape)} there, {tuple(flat[target].shape)} here")
            else:
                filled[target], targets[name] = name, target
    faults += [f"rule {rule[0]!r} matches nothing there" for rule in rules if rule[0] not in used]
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(f"init_from {path} does not fit this model; check its config and the rules:\n  {listed}")
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for checkpoints, which, targets in wanted:
        if targets:
            abstract = {name: struct(flat[target]) for name, target in targets.items()}
            abstract = traverse_util.unflatten_dict(abstract, sep="/")
            loaded = checkpoints.restore_params(which=which, abstract=abstract, whole=False)
            loaded = traverse_util.flatten_dict(loaded, sep="/")
            flat |= {target: loaded[name] for name, target in targets.items()}
    return traverse_util.unflatten_dict(flat, sep="/"), sorted(filled)
