"""Foreign state dicts -> our parameter trees, by a table of rules that reads like numpy assignments.

A rule is `(regex, target, pattern)`:
- `regex` must match the whole foreign key; the first rule that matches wins.
- `target` is a path in our tree, with the regex's groups and, where many foreign arrays share one leaf, the place of
  this one: r"\1/blocks/attn/qkv/kernel[\2,:,0]". A target of None sets the key aside; `pattern` then says why.
- `pattern` is an einops rearrangement. Every axis on its right takes its length from our leaf, so an array that does
  not fit is an error and never a lucky reshape.

Rules only permute entries. So gradients, and any other tree shaped like the parameters, convert by the same table.
"""

import itertools
import re
import warnings
from typing import Any, NamedTuple

import einops
import numpy as np

# The arrays of torch's layers, for `rules_of`: (suffix of the key, leaf of ours, pattern). Linear kernels are [out in]
# there, [in out] here, those of convolutions [out in h w] and [h w in out]; t: query, key, value; h heads, d head_dim.
AFFINE = ((r"\.weight", "/scale", "d -> d"), (r"\.bias", "/bias", "d -> d"))
LINEAR = ((r"\.weight", "/kernel", "o i -> i o"), (r"\.bias", "/bias", "o -> o"))
OUT = ((r"\.weight", "/kernel", "o (h d) -> h d o"), (r"\.bias", "/bias", "o -> o"))
CONV = ((r"\.weight", "/kernel", "o i h w -> h w i o"), (r"\.bias", "/bias", "o -> o"))


def rules_of(layers, key="", path="", place="") -> tuple[tuple[str, str, str], ...]:
    """A rule for each array of each layer (key, path, arrays as above), the two behind `key` and `path`."""
    return tuple(
        (key + name + suffix, path + ours + leaf + place, pattern)
        for name, ours, arrays in layers
        for suffix, leaf, pattern in arrays
    )


def bert_rules(key="") -> tuple[tuple[str, str, str], ...]:
    """The layers of BERT (arXiv 1810.04805), which stand behind `key`, for our "blocks" with post_norm."""
    layer = key + r"encoder\.layer\.(\d+)\."
    apart = tuple(
        (rf"{layer}attention\.self\.{name}\.{kind}", rf"blocks/attn/qkv/{leaf}[\1,{axes}{i}]", pattern)
        for i, name in enumerate(("query", "key", "value"))
        for kind, leaf, axes, pattern in (
            ("weight", "kernel", ":,:,", "(h d) i -> i h d"),
            ("bias", "bias", ":,", "(h d) -> h d"),
        )
    )
    layers = (
        (r"attention\.output\.dense", "attn/out", OUT),
        (r"attention\.output\.LayerNorm", "norm1", AFFINE),
        (r"intermediate\.dense", "mlp/fc1", LINEAR),
        (r"output\.dense", "mlp/fc2", LINEAR),
        (r"output\.LayerNorm", "norm2", AFFINE),
    )
    return (*apart, *rules_of(layers, layer, "blocks/", r"[\1]"))


def with_one_type(state_dict, key="") -> dict:
    """A BERT's state dict with the type of all tokens, the first of two, added to the vectors of their places."""
    types, places = (f"{key}embeddings.{name}_embeddings.weight" for name in ("token_type", "position"))
    state_dict = dict(state_dict)
    if types in state_dict:
        state_dict[places] = state_dict[places] + state_dict.pop(types)[0]
    return state_dict


class Piece(NamedTuple):
    """Where one foreign array goes: `leaf[index] = value`, with `leaf` at `path` of our tree."""

    path: str
    index: tuple[int | slice, ...]
    value: np.ndarray


class Report(NamedTuple):
    """Every key that did not simply convert; `str()` of it lists them all."""

    unused: list[str]  # foreign keys that no rule knows
    missing: list[str]  # our leaves, or parts of them, that no foreign key fills
    mismatched: list[str]  # one sentence a key: does not fit, lies outside our leaf, or differs from a fixed table
    set_aside: dict[str, list[str]]  # reason -> foreign keys left out on purpose

    def __str__(self) -> str:
        groups = {
            "missing in the foreign state dict": self.missing,
            "mismatched": self.mismatched,
            "unknown foreign keys": self.unused,
        }
        groups |= {f"set aside, {reason}": keys for reason, keys in self.set_aside.items()}
        lines = []
        for title, entries in groups.items():
            if entries:
                lines += [f"{title} ({len(entries)}):", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: dict[str, Any]) -> dict:
    """{"a/b/c": leaf} -> nested dicts."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def matching(state_dict, regex) -> list[tuple[re.Match, tuple[int, ...]]]:
    """(match, shape of the array) of each key that the regex matches whole: what says the sizes of a model."""
    return [(m, array.shape) for key, array in state_dict.items() if (m := re.fullmatch(regex, key))]


def unwrapped(tree: dict) -> dict:
    """The state dict that a file holds under "model", "state_dict" or "module", or the tree itself."""
    for key in ("model", "state_dict", "module"):
        tree = tree[key] if isinstance(tree.get(key), dict) else tree
    return tree


def match(state_dict, rules, like, constants=None, atol=1e-5) -> tuple[dict[str, Piece], Report]:
    """Apply the table without copying: {foreign key: Piece of views}, and what did not fit.

    Args:
        state_dict: {key: array}.
        rules: the table, see the head of this file.
        like: our tree; its leaves need only `shape` and `dtype` (`jax.eval_shape` of an init will do).
        constants: {path: array} that we compute and do not store. A key whose rule leads there must equal it.
        atol: largest difference allowed from a constant. The default leaves room for a table made in float32.
    """
    leaves, constants = flatten(like), constants or {}
    pieces, report, filled = {}, Report([], [], [], {}), {}
    for key, array in state_dict.items():
        found = next(((m, rule) for rule in rules if (m := re.fullmatch(rule[0], key))), None)
        if found is None:
            report.unused.append(key)
            continue
        m, (_, target, pattern) = found
        if target is None:
            report.set_aside.setdefault(pattern, []).append(key)
            continue
        path, place = _locate(m.expand(target))
        # A key that does not fit counts as filling its place: it is reported as mismatched, not as missing as well.
        earlier = filled.setdefault(path, {}).setdefault(place, key)
        try:
            if earlier != key:
                raise ValueError(f"{path}{_written(place)} is already filled by {earlier}")
            if path in constants:
                _check_constant(_fit(array, pattern, path, place, constants[path]), constants[path], path, atol)
            elif path in leaves:
                pieces[key] = Piece(path, _index(place), _fit(array, pattern, path, place, leaves[path]))
            else:
                raise ValueError(f"our tree has no {path}")
        except ValueError as error:
            report.mismatched.append(f"{key}: {error}")
    for path, leaf in leaves.items():
        report.missing.extend(_holes(path, leaf.shape, filled.get(path, {})))
    return pieces, report


def convert(state_dict, rules, like, constants=None, put=None) -> tuple[dict, Report]:
    """Foreign state dict -> (tree of numpy arrays with the shapes and dtypes of `like`, report).

    Args:
        state_dict, rules, like, constants: as of `match`.
        put: (path, array) -> what stands in the tree for it. Called with one leaf after the other, so that a large
            tree is never whole in the host's memory.

    Unknown foreign keys give one warning that names them.

    Raises:
        ValueError: a leaf of ours stays unfilled or a foreign array does not fit; the message lists every one.
    """
    pieces, report = match(state_dict, rules, like, constants)
    if report.missing or report.mismatched:
        raise ValueError(f"The state dict does not fit this model; check the sizes in its config.\n{report}")
    if report.unused:
        message = f"{len(report.unused)} foreign keys are unknown and were not used: {', '.join(report.unused)}"
        warnings.warn(message, stacklevel=2)
    of_leaf, flat = {}, {}
    for piece in pieces.values():
        of_leaf.setdefault(piece.path, []).append(piece)
    for path, leaf in flatten(like).items():
        array = np.empty(leaf.shape, leaf.dtype)
        for _, index, value in of_leaf[path]:
            array[index] = value
        flat[path] = array if put is None else put(path, array)
    return unflatten(flat), report


def _locate(target):
    """Splits "a/b[1,:,0]" into "a/b" and (1, ":", 0); the place is () for a whole leaf."""
    path, _, place = target.partition("[")
    return path, tuple(i if i == ":" else int(i) for i in place.rstrip("]").split(",") if i)


def _written(place):
    return f"[{','.join(map(str, place))}]" if place else ""


def _index(place):
    return tuple(slice(None) if i == ":" else i for i in place)


def _fit(array, pattern, path, place, leaf):
    """A view of the array in the shape of `leaf[place]`."""
    if any(i != ":" and i >= n for i, n in zip(place, leaf.shape, strict=False)):
        raise ValueError(f"{path}{_written(place)} lies outside {path}, whose shape is {tuple(leaf.shape)}")
    shape = tuple(n for n, i in itertools.zip_longest(leaf.shape, place, fillvalue=":") if i == ":")
    axes = pattern.partition("->")[2].split()
    try:
        return einops.rearrange(array, pattern, **dict(zip(axes, shape, strict=True)))
    except (einops.EinopsError, ValueError):
        needs = f"{path}{_written(place)} needs {shape} by '{pattern}'"
        raise ValueError(f"{needs}, and the array has shape {tuple(array.shape)}") from None


def _check_constant(value, constant, path, atol):
    error = np.max(np.abs(value - constant))
    if not error <= atol:
        raise ValueError(f"{path} is computed here and differs from this table by {error:.1e}, more than {atol:.0e}")


def _holes(path, shape, filled):
    """What of one leaf is unfilled, written as the rules write it. All places of a leaf fix the same axes."""
    if not filled:
        return [path]
    place = next(iter(filled))
    every = itertools.product(*((":",) if i == ":" else range(n) for i, n in zip(place, shape, strict=False)))
    return [path + _written(hole) for hole in every if hole not in filled]


if __name__ == "__main__":
    from jaxtok.convert import main  # the command stands on top of the house, this file near its ground

    main()
