"""Who holds what: one mesh of three axes, and regex rules that lay the whole train state out on it.

`data` splits the batch only. `fsdp` splits the batch and, layer by layer, the state (ZeRO-3, arXiv 1910.02054; the
compiler gathers a layer where it is used). `tensor` splits what a rule says (arXiv 1909.08053). The compiler finds
every collective; the mathematics, and so the losses, are those of one device.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

WHOLE = 2**20  # elements

Rules = Sequence[tuple[str, str | Sequence[str | None]]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data", "fsdp" and "tensor" over `devices` (default: all, of all processes).

    At most one size may be -1: what the others leave. ValueError where the product is not the number of devices, where
    `data` is no multiple of the TPU slices that the devices belong to, or the sizes do not go with the TPUs' torus.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(
            f"mesh({said}): each size is a positive number, and at most one is -1 (what the others leave)."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % given or (not rest and given != len(devices)):
        raise ValueError(
            f"mesh({said}) does not fit {len(devices)} devices: the product of the sizes must be their number; "
            "leave one size -1 to fill it in."
        )
    if rest:
        sizes[rest[0]] = len(devices) // given
    # Auto, not the default Explicit: codebook gathers and concatenated registers do not type-check under Explicit.
    types = (AxisType.Auto,) * len(AXES)
    # A GPU has a slice_index too, but it counts machines, whose network carries the other axes well enough.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        return Mesh(_across_slices(slices, sizes, devices), AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh({said}) cannot be laid on the torus of these TPUs: each size must be a product of some of its sides "
            "(16, 16 and 256 of a 16x16)."
        ) from error


def _across_slices(slices, sizes, devices):
    """The devices of several TPU slices [data fsdp tensor]: only `data` crosses the slow network between them."""
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh: there are {slices} slices, and data={sizes['data']} is no multiple of that: each takes a share of "
            "the batch, for the network between them is too slow for more."
        )
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function` as it is, but jit traces it with the mesh at hand: `nn.linear` then keeps batches split over it."""

    @functools.wraps(getattr(function, "func", function))  # a partial has no name
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def path_name(path: Sequence[Any]) -> str:
    """A key path of jax.tree_util as rules and messages write it: "params/encoder/blocks/attn/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh, rules: Rules, *, min_size: int = 2**14) -> Any:
    """The layout of a train state: the same tree with a NamedSharding for every array.

    Args:
      tree: arrays or ShapeDtypeStructs: ALL of the state, or Adam's moments would stay whole on every device.
      mesh: of `make_mesh`.
      rules: (regex, tactic) pairs; the first whose regex is found in an array's path decides. Tactics:
        "replicate": whole on every device.
        "fsdp": the largest dimension that the fsdp axis divides is split; whole below min_size elements, and where it
          divides none of an array of at most WHOLE: a larger one is an error, and no silent copy on every device.
        (None, "fsdp", "tensor", ...): for each dimension the mesh axis that splits it, or None.
      min_size: arrays with fewer elements are not worth a collective to "fsdp".

    Scalars and PRNG keys are replicated and need no rule. ValueError names every array that no rule matches, every
    rule that matches no path, and a rule that does not fit its array; then also the size of the axis that would.
    """
    rules = [(regex, tactic if isinstance(tactic, str) else tuple(tactic)) for regex, tactic in rules]
    unused = {regex for regex, _ in rules}
    unmatched = []

    def layout(path, leaf):
        name = path_name(path)
        matching = [(regex, tactic) for regex, tactic in rules if re.search(regex, name)]
        unused.difference_update(regex for regex, _ in matching)
        if leaf.ndim == 0 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, P())
        if not matching:
            unmatched.append(f"{name} {leaf.shape}")
            return None
        return NamedSharding(mesh, _spec(*matching[0], name, leaf.shape, mesh, min_size))

    tree = jax.tree_util.tree_map_with_path(layout, tree)
    problems = []
    if unmatched:
        more = f" and {len(unmatched) - 10} more" if len(unmatched) > 10 else ""
        problems.append(
            f'no rule matches {", ".join(unmatched[:10])}{more}: add one, such as (".*", "fsdp") at the end'
        )
    if unused:
        listed = ", ".join(repr(regex) for regex, _ in rules if regex in unused)
        problems.append(f"nothing in the state matches the rules {listed}: mend the regex or remove the rule")
    if problems:
        raise ValueError("sharding: " + "; ".join(problems) + ".")
    return tree


def _spec(regex, tactic, name, shape, mesh, min_size):
    """The PartitionSpec of one array."""
    rule = f"sharding rule ({regex!r}, {tactic!r}) for {name} {shape}"
    if tactic == "replicate":
        return P()
    if tactic == "fsdp":
        size = mesh.shape["fsdp"]
        divisible = [i for i, n in enumerate(shape) if n % size == 0]
        if not divisible and math.prod(shape) > WHOLE:
            raise ValueError(f"{rule}: fsdp={size} divides none of its dimensions{_instead('fsdp', size, *shape)}")
        if size == 1 or math.prod(shape) < min_size or not divisible:
            return P()
        split = max(divisible, key=lambda i: shape[i])
        return P(*("fsdp" if i == split else None for i in range(len(shape))))
    if isinstance(tactic, str):
        raise ValueError(f'{rule}: a tactic is "fsdp", "replicate" or a tuple with an axis or None per dimension.')
    if len(tactic) != len(shape):
        raise ValueError(f"{rule}: the tuple has {len(tactic)} entries and the array {len(shape)} dimensions.")
    used = [axis for axis in tactic if axis is not None]
    if not set(used) <= set(mesh.shape) or len(set(used)) < len(used):
        raise ValueError(f"{rule}: an entry is None or one of the axes {', '.join(mesh.shape)}, each at most once.")
    for n, axis in zip(shape, tactic, strict=True):
        if axis is not None and n % mesh.shape[axis]:
            instead = _instead(axis, mesh.shape[axis], n)
            raise ValueError(f"{rule}: the dimension of {n} cannot be split over {axis}={mesh.shape[axis]}{instead}")
    return P(*tactic)


def _instead(axis, size, *dimensions):
    """The end of a sentence: which size of the axis would divide one of the dimensions."""
    best = max(math.gcd(n, size) for n in dimensions)
    return f"; mesh.{axis}={best} can, and mesh.data=-1 takes the devices that this leaves." if best > 1 else "."


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: examples over data and fsdp, the rest of the dimensions whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """ValueError if the batch size, of all processes together, does not divide over the mesh."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    parts = data * fsdp
    if batch_size < 1 or batch_size % parts:
        near = sorted({max(batch_size // parts, 1) * parts, (max(batch_size, 0) // parts + 1) * parts})
        raise ValueError(
            f"A batch of {batch_size} cannot be split over data={data} x fsdp={fsdp} of the mesh: "
            f"take a multiple of {parts} (such as {' or '.join(map(str, near))}), or another mesh."
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> the batch on all devices of all processes.

    Args:
      batch: numpy arrays [b ...], b = examples of this process, the same for all arrays and processes.
      mesh: of `make_mesh`.

    Returns arrays [B ...], B = b * processes. ValueError if the arrays differ in b or the mesh does not divide B.
    """
    lengths = {name: len(x) for name, x in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The arrays of a batch must hold equally many examples; these hold {lengths}.")
    total = next(iter(lengths.values())) * jax.process_count()
    check_batch_size(total, mesh)
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (total, *x.shape[1:])) for name, x in batch.items()
    }
