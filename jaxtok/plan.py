"""Whether a run fits on a pod, and what binds it: python -m jaxtok.plan --config=flextok:d18_d28 --topology=v5e:16x16

The real training step, compiled for a TPU pod on a machine without one; the extra "plan" brings the compiler.
It needs no data, no weights and no accelerator: the step of `jaxtok.train` is compiled from shapes. Those of a batch
are what config.data.train makes of one example of its source, or of a grey picture of 512 px where that is not at hand.

Every figure is of the compiler (memory), read from the program it made (bytes; jaxtok/hlo.py), counted from the traced
step (FLOPs; jaxtok/nn/flops.py) or published by the maker of the chip (jaxtok/chips.py). The three times are what each
resource would need alone, at its published peak: the largest is a bound from below, and no prediction.

Several topologies (--topology=v5e:2x4,v5e:16x16 --per_chip=8) show weak scaling. cpu:8 compiles for the host. Of a
recipe of several stages, each.
"""

import itertools
import json
import math
import os
import re
import sys

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxtok import build, command, hlo, sharding, stages, step, train
from jaxtok.chips import CHIPS
from jaxtok.metrics import format_table
from jaxtok.nn import flops

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REMAT = ("none", "dots", "full")  # each saves more memory and computes more again


def plan(config: ConfigDict, topology: str, *, quick: bool = False) -> dict:
    """What a step of `config` takes of each chip of `topology` ("v5p:8x8x4", "cpu:8" ...), as --json prints it.

    Where it fits, also how many pictures a chip would fill the memory; where it does not, what was tried to mend that
    and the first that does. quick: neither, which compiles once only.

    ValueError for a topology that is not known and a batch or mesh that does not fit it.
    """
    devices = topology_devices(topology)
    report = {"topology": topology, "chips": len(devices), "batch": config.batch_size}
    report |= compile_step(config, devices)
    if not report["fits"]:
        return report if quick else report | cheapest(config, devices)
    return report if quick or "memory" not in report else report | fill_memory(config, devices, report)


def topology_devices(topology):
    """The devices of a pod that is not there. ValueError says what a topology looks like."""
    if found := re.fullmatch(r"cpu:(\d+)", topology):
        devices, count = jax.devices("cpu"), int(found[1])
        if not 1 <= count <= len(devices):
            raise ValueError(f"{topology}: this process has 1 to {len(devices)} CPU devices.")
        return devices[:count]
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it holds no chip that another process might want
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:  # libtpu is missing, or does not know the name
        raise ValueError(
            f'Topology "{topology}": {str(error).splitlines()[0]} Names are v5e:16x16, v5p:8x8x4, v6e:2x4 and so on, '
            'or cpu:8; those of TPUs need libtpu: pip install "jaxtok[plan]".'
        ) from error
    if devices[0].device_kind not in CHIPS:
        names = ", ".join(chip.name for chip in CHIPS.values())
        raise ValueError(f"There are no figures for {devices[0].device_kind} in jaxtok/chips.py, only for {names}.")
    return devices


def batch_shapes(config, task):
    """The shapes of a global batch, as the module's docstring says."""
    spec = config.data.train.source
    try:
        source = build.build(spec)
    except (FileNotFoundError, ImportError):
        if hasattr(task, "tokenizer"):
            task.codec  # noqa: B018  says that the tokenizer is not there, if that is not there either
            raise  # no picture stands in for codes
        side = spec.get("size", 512)
        source = [{"image": np.full((side, side, 3), 128, np.uint8), "label": np.int32(0), "caption": ""}]
    else:
        task.check(source)
    return step.batch_shapes(
        source, step.transforms(config.data.train), config.batch_size, config.data.get("max_bad", 0.01)
    )


def compile_step(config, devices):
    """Compiles the step and returns what is known of it, per chip: whether it fits, bytes, FLOPs and times."""
    mesh = build.call(sharding.make_mesh, options=config.mesh.to_dict() | {"devices": devices}, where="config.mesh")
    task, chip = build.build(config.task), CHIPS.get(devices[0].device_kind)
    shapes = batch_shapes(config, task)
    _, state, program = step.program(config, task, mesh, shapes)
    program = program.trace(state, shapes)
    model = step.count_flops(config, shapes, program.jaxpr)
    executed = flops.count_program(program.jaxpr) / len(devices)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    report = {
        "mesh": dict(mesh.shape),
        "shapes": {name: f"{x.dtype} {list(x.shape)}" for name, x in shapes.items()},
        "parameters": sum(x.size for x in jax.tree.leaves(state["params"])),
        "bytes": {name: held(tree) for name, tree in state.items() if name not in ("step", "key")},
        "flops": {"step": model, "picture": model / config.batch_size, "executed": executed},
    }
    report["bytes"]["batch"] = sum(x.size * x.dtype.itemsize for x in shapes.values()) // split
    if chip:
        report |= {"memory": chip.memory, "seconds": {"compute": executed / chip.flops}}
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return report | {"fits": False, "needed": needed(str(error)), "said": str(error).splitlines()[0]}
    memory, moved = compiled.memory_analysis(), hlo.moved(compiled.as_text())
    arguments = memory.argument_size_in_bytes
    report["bytes"] |= {
        "padding of all these": max(arguments - sum(report["bytes"].values()), 0),
        "temporaries": memory.temp_size_in_bytes,  # activations, gradients, gathered parameters
        "results, program": memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes,
    }
    total = arguments + report["bytes"]["temporaries"] + report["bytes"]["results, program"]
    report |= {"needed": total, "fits": chip is None or total <= chip.memory, "moved": moved._asdict()}
    if chip:
        report["seconds"]["HBM"] = moved.hbm / chip.hbm
        report["seconds"]["interconnect"] = sum(moved.collectives.values()) / chip.links
        report["bound"] = max(report["seconds"], key=report["seconds"].get)
    return report


def held(tree):
    """Bytes of a part of the state on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def needed(error):
    """Bytes of HBM that a compiler's refusal names: "(34.54G) exceeds ...", or "Used 17.2G of 15.75G hbm"."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of", error)
    if not found:
        raise RuntimeError(f"The compiler gave up: {error}")
    number, unit = (x for x in found.groups() if x)
    return int(float(number) * UNITS[unit])


def fill_memory(config, devices, report):
    """Pictures a chip now, and how many would fill it: a straight line through this batch size and a larger one."""
    now, left = config.batch_size / config.accumulate / len(devices), report["memory"] - report["needed"]
    larger = config.copy_and_resolve_references()
    factor = max(2, left // (2 * report["bytes"]["temporaries"] + 1))  # about half full
    larger.batch_size *= factor
    slope = (compile_step(larger, devices)["needed"] - report["needed"]) / (now * (factor - 1))
    return {"per_chip": now, "per_chip_that_fills": None if slope <= 0 else int(now + left / slope)}


def cheapest(config, devices):
    """What was tried, {setting: bytes needed}, and the first that fits or None. Each keeps those before it."""
    tried = {}
    for name, changed in settings(config, len(devices)):
        try:
            report = compile_step(changed, devices)
        except ValueError:  # so many devices cannot share the batch, or an array
            continue
        tried[name] = report["needed"]
        if report["fits"]:
            return {"tried": tried, "cheapest": name}
    return {"tried": tried, "cheapest": None}


def settings(config, chips):
    """(name, config) of what saves memory, the cheapest first: the layout, then remat, then accumulation."""
    config = config.copy_and_resolve_references()
    fsdp = max(config.mesh.get("fsdp", 1), 1)
    for size in (n for n in range(fsdp + 1, chips + 1) if chips % n == 0 and n % fsdp == 0):
        config.mesh.update(data=-1, fsdp=size)
        yield f"mesh.fsdp={size}", config
    for policy in REMAT[1:]:
        if set_remat(config.task, policy):
            yield f"remat={policy}", config
    for parts in (2, 4, 8, 16):
        config.accumulate = parts
        yield f"accumulate={parts}", config


def set_remat(node, policy):
    """Gives every `remat` of a config the policy if that saves more than its own; whether there was one."""
    changed = False
    for key, value in node.items():
        if isinstance(value, ConfigDict):
            changed |= set_remat(value, policy)
        elif key == "remat" and REMAT.index(value) < REMAT.index(policy):
            node[key], changed = policy, True
    return changed


# ---- what is printed ----


def mib(n):
    return f"{n / 2**20:,.1f}"


def show(report):
    """The report as text."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    stage = f"{report['stage']}: " if "stage" in report else ""
    lines = [f"{stage}{report['topology']}, {report['chips']} chips, mesh {mesh}, batch {report['batch']}"]
    if "memory" in report:
        left = report["memory"] - report["needed"]
        verb, rest = ("It fits:", "left") if report["fits"] else ("It does NOT fit:", "lacking")
        lines.append(f"{verb} {mib(report['needed'])} of {mib(report['memory'])} MiB a chip, {mib(abs(left))} {rest}.")
    if not report["fits"]:
        lines.append(f"The compiler: {report['said']}")
        lines += [f"  with {name}: {mib(size)} MiB" for name, size in report.get("tried", {}).items()]
        if "cheapest" in report:
            lines.append(f"The cheapest that fits: {report['cheapest'] or 'none of these; take more chips.'}")
    if report.get("per_chip_that_fills"):
        lines.append(
            f"About {report['per_chip_that_fills']} pictures a chip would fill it ({report['per_chip']:g} now): a "
            "straight line through two batch sizes."
        )
    lines.append(f"Parameters: {report['parameters'] / 1e6:.1f} M that train. The batch: {report['shapes']}.")
    lines.append(
        "Model FLOPs: {step:.4g} a step, {picture:.4g} a picture; a chip computes {executed:.4g} a step, "
        "rematerialisation included.".format(**report["flops"])
    )
    lines.append(format_table("", [{"a chip holds": k, "MiB": mib(v)} for k, v in report["bytes"].items()]))
    if "moved" in report:
        moved = report["moved"]
        rows = moved["collectives"] | ({"HBM, reads and writes": moved["hbm"]} if "memory" in report else {})
        lines.append(format_table("", [{"a chip moves, a step": k, "MiB": mib(v)} for k, v in rows.items()]))
        if moved["hoistable"]:
            lines.append(
                f"Sent again by every turn of a loop, though it stays the same: {mib(moved['hoistable'])} MiB."
            )
        if moved["unknown"]:
            lines.append(f"At least: {moved['unknown']} loops of unknown length are counted once.")
    if "bound" in report:
        rows = [{"at published peaks": k, "ms a step": f"{1e3 * v:.2f}"} for k, v in report["seconds"].items()]
        lines.append(format_table("", rows) + f"\n{report['bound']} binds.")
    return "\n".join(lines)


def scaling(reports):
    """The table of several topologies: what a chip moves and holds on each."""
    sent = [report.get("moved", {}).get("collectives", {}) for report in reports]
    kinds = [kind for kind in hlo.KINDS if any(kind in kinds for kinds in sent)]
    rows = [
        ({"stage": r["stage"]} if "stage" in r else {})
        | {"topology": r["topology"], "chips": r["chips"], "pictures a chip": f"{r['batch'] / r['chips']:g}"}
        | {f"{kind}, MiB": mib(moved.get(kind, 0)) for kind in kinds}
        | {"needs, MiB": mib(r["needed"]), "binds": r.get("bound", "")}
        for r, moved in zip(reports, sent, strict=True)
    ]
    return format_table("\nA chip and step", rows)


def parse_mesh(text):
    """ "data:16,fsdp:all" -> {"data": 16, "fsdp": -1}."""
    try:
        pairs = (item.split(":") for item in text.split(","))
        return {axis: -1 if size == "all" else int(size) for axis, size in pairs}
    except ValueError as error:
        raise ValueError(
            f'--mesh={text}: write axes and sizes as "data:16,fsdp:16", or "all" for what is left.'
        ) from error


@command.one_line("python -m jaxtok.plan")
def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}.")
    jax.config.update("jax_platforms", "cpu")
    topologies = FLAGS.topology.split(",")
    if cpus := [int(name[4:]) for name in topologies if re.fullmatch(r"cpu:\d+", name)]:
        jax.config.update("jax_num_cpu_devices", max(cpus))
    logging.set_verbosity(logging.ERROR)
    reports = []
    recipe = stages.runs(FLAGS.config, "", train.KEYS)
    for topology, (stage, config) in itertools.product(topologies, recipe):
        config = config.copy_and_resolve_references()
        if FLAGS.mesh:
            config.mesh = parse_mesh(FLAGS.mesh)
        if FLAGS.per_chip:
            config.batch_size = FLAGS.per_chip * len(topology_devices(topology)) * config.accumulate
        reports.append(({"stage": stage.name} if stage.name else {}) | plan(config, topology, quick=FLAGS.quick))
        if not FLAGS.json:
            print(show(reports[-1]), flush=True)
    if FLAGS.json:
        print(json.dumps(reports, indent=2))
    elif len(reports) > 1:
        print(scaling(reports))
    sys.exit(not all(report["fits"] for report in reports))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command.define_config("A file or a name that python -m jaxtok.configs lists, :VARIANT.")
    flags.DEFINE_string("topology", None, "v5e:16x16, v5p:8x8x4, v6e:2x4 ..., cpu:8; several with commas.")
    flags.DEFINE_string("mesh", None, "Sizes of the mesh's axes instead of config.mesh, data:16,fsdp:16 or fsdp:all.")
    flags.DEFINE_integer("per_chip", 0, "Pictures a chip and gradient step, instead of config.batch_size.")
    flags.DEFINE_bool("quick", False, "Compile once: neither what fills the memory nor what would make it fit.")
    flags.DEFINE_bool("json", False, "Print a list of JSON objects, one a topology.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
