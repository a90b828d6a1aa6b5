"""What a compiled program moves, read from XLA's text of it (`compiled.as_text()`), loops times their lengths.

The compiler's own `cost_analysis` counts the body of a loop once, and knows nothing of collectives.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16}  # the other types end in theirs
# Instructions that name bytes and move none.
STILL = "parameter constant tuple get-tuple-element bitcast iota after-all partition-id opt-barrier".split()


class Array(NamedTuple):
    size: int  # bytes
    hbm: bool  # else it lies on the chip


class Instruction(NamedTuple):
    name: str
    op: str
    result: list
    operands: list
    line: str


class Moved(NamedTuple):
    """Bytes of one device.

    Attributes:
      collectives: kind -> bytes it sends to others; all-gathers and all-reduces as rings at their best do.
      hoistable: those of them that every turn of a loop sends again although nothing they read changes in it.
      hbm: bytes that instructions read and write in HBM, each operand and result once.
      unknown: how many loops of unknown length were counted once.
    """

    collectives: dict
    hoistable: float
    hbm: int
    unknown: int


def moved(text: str) -> Moved:
    """Counts the whole program."""
    computations, entry = parse(text)
    seen, hbm, unknown = {}, 0, 0

    def walk(name, times, still=()):
        """still: names of what is the same in every turn of the loop that this is the body of."""
        nonlocal hbm, unknown
        instructions = computations[name]
        arrays = {i.name: i.result for i in instructions}
        for i in instructions:
            same = bool(still) and still.issuperset(i.operands)
            inner = computations[called(i.line, "calls")] if i.op == "fusion" else instructions
            for j in inner if i.op == "fusion" else [i]:
                if (kind := kind_of(j, inner)) in KINDS:
                    # An asynchronous one lies in several fusions, some in loops of their own, each with all its bytes.
                    # Those that are no fusions may share a channel, and are several.
                    size = sent(j, kind, {k.name: k.result for k in inner})
                    key = i.name if i is j else (attribute(j.line, "channel_id"), kind, size)
                    seen[key] = min(seen.get(key, (math.inf,)), (times, kind, size, same))
            if i.op == "while":
                length, body = trips(i, instructions, computations), called(i.line, "body")
                unknown += length is None
                walk(body, times * (1 if length is None else length), unchanged(computations[body]))
            elif i.op == "conditional":
                for branch in re.findall(r"%([\w.-]+)", re.search(r"(?:branch|true)_comp.*", i.line)[0].split("}")[0]):
                    walk(branch, times)
            elif i.op == "call":
                walk(called(i.line, "to_apply"), times)
            elif i.op not in STILL and not i.op.endswith("-done"):
                hbm += times * traffic(i, arrays, computations)

    walk(entry, 1)
    sums = dict.fromkeys(KINDS, 0) | {"hoistable": 0}
    for times, kind, size, same in seen.values():
        sums[kind] += times * size
        sums["hoistable"] += times * size * same
    return Moved({k: round(sums[k]) for k in KINDS if sums[k]}, round(sums["hoistable"]), hbm, unknown)


def kind_of(i, instructions):
    """The kind of a collective. A TPU's reduce-scatter is written as an all-reduce of which only slices are read."""
    kind = i.op.removesuffix("-start")
    if kind != "all-reduce":
        return kind
    of_it = {i.name, *(j.name for j in instructions if j.op == "get-tuple-element" and j.operands == [i.name])}
    readers = {j.op for j in instructions if j.name not in of_it and of_it.intersection(j.operands)}
    return "reduce-scatter" if readers == {"dynamic-slice"} else kind


def sent(i: Instruction, kind: str, arrays: dict) -> float:
    """Bytes that each of the n devices of a collective sends."""
    size, n = sum(a.size for operand in i.operands for a in arrays[operand]), group_size(i.line)
    share = (n - 1) / n
    return {
        "all-gather": (n - 1) * size,
        "all-reduce": 2 * share * size,
        "reduce-scatter": share * size,
        "all-to-all": share * size,
        "collective-permute": size,
    }[kind]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, by name, and the name of the one that is the program."""
    computations, entry, instructions = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            instructions = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)", line):
            name, result, op, operands = found.groups()
            instructions.append(Instruction(name, op, sizes(result), re.findall(r"%([\w.-]+)", operands), line))
    return computations, entry


def sizes(text):
    """The arrays of a type: f32[8,128]{1,0:T(8,128)S(1)} is on the chip, as is every memory space but 0."""
    found = []
    for dtype, shape, layout in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?", text):
        bits = BITS.get(dtype) or int((re.match(r"[a-z]+(\d+)", dtype) or [0, 0])[1])
        found.append(Array(math.prod(int(n) for n in shape.split(",") if n) * bits // 8, "S(" not in layout))
    return found


def called(line, attribute):
    return re.search(rf"\b{attribute}=%?([\w.-]+)", line)[1]


def attribute(line, name):
    found = re.search(rf"\b{name}=(\d+)", line)
    return found and found[1]


def trips(loop, instructions, computations):
    """How often a loop runs: what the compiler noted, or by its counter: from a constant, by a constant, below a third.

    None where that cannot be read.
    """
    if noted := re.search(r'known_trip_count\D*?"n":"(\d+)"', loop.line):
        return int(noted[1])
    body, condition = (computations[called(loop.line, part)] for part in ("body", "condition"))
    compare = root(condition)
    begin = next((i for i in instructions if [i.name] == loop.operands and i.op == "tuple"), None)
    if compare.op != "compare" or "direction=LT" not in compare.line or not begin:
        return None
    counter, bound = (find(name, condition) for name in compare.operands)
    place = attribute(counter.line, "index")
    if counter.op != "get-tuple-element" or number(bound) is None:
        return None
    step = find(root(body).operands[int(place)], body)
    if step.op != "add":
        return None
    added = [find(name, body) for name in step.operands]
    by = next((number(i) for i in added if number(i) is not None), None)
    counted = any(i.op == "get-tuple-element" and attribute(i.line, "index") == place for i in added)
    start = number(find(begin.operands[int(place)], instructions))
    return -(-(number(bound) - start) // by) if counted and by and start is not None else None


def root(instructions):
    """The instruction whose result is that of its computation."""
    return next(i for i in instructions if i.line.lstrip().startswith("ROOT "))


def find(name, instructions):
    """The instruction that makes an array, through copies of it."""
    i = next(i for i in instructions if i.name == name)
    return find(i.operands[0], instructions) if i.op in ("copy", "bitcast") else i


def number(i):
    """The value of a whole constant."""
    found = i.op == "constant" and re.search(r" constant\((-?\d+)\)", i.line)
    return int(found[1]) if found else None


def unchanged(body):
    """Names of what is the same in every turn of a loop: what of its tuple it passes on, and what is made of that."""
    passed = {name: str(k) for k, name in enumerate(find(x, body).name for x in root(body).operands)}
    names = set()
    for i in body:
        element = i.op == "get-tuple-element" and passed.get(i.name) == attribute(i.line, "index")
        if element or i.op == "constant" or (i.operands and names.issuperset(i.operands)):
            names.add(i.name)
    return names


def group_size(line):
    """Over how many devices a collective goes. ValueError for a notation that is not known."""
    if found := re.search(
        r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line
    ):  # a mesh with axes, and those it goes over
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[axis]) for axis, part in used)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # [groups, size]
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):  # lists
        return len(found[1].split(","))
    if "source_target_pairs=" in line:
        return 2  # a permutation, for which it does not matter
    raise ValueError(f"hlo: over which devices does this go? {line.strip()[:300]}")


def traffic(i, arrays, computations):
    """Bytes of HBM that an instruction reads and writes."""
    if i.op == "slice-start":  # (operand), slice, semaphore
        return i.result[1].size * (i.result[0].hbm + i.result[1].hbm)
    if i.op.endswith("-start"):  # a copy: its result names source and destination
        return sum(a.size for a in i.result if a.hbm)
    if i.op == "custom-call" and not i.operands:  # sets memory aside
        return 0
    reads = [sum(a.size for a in arrays.get(name, ()) if a.hbm) for name in i.operands]
    writes = [a.size * a.hbm for a in i.result]
    body, inner, parameters = [i], arrays, dict(enumerate(i.operands))
    if i.op == "fusion":
        body = computations[called(i.line, "calls")]
        inner = {j.name: j.result for j in body}
        parameters = {int(re.search(r"parameter\((\d+)\)", j.line)[1]): j.name for j in body if j.op == "parameter"}
        if any(kind_of(j, body) in KINDS for j in body):  # what a piece of a collective passes on, it does not move
            for result, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}", i.line):
                reads[int(operand)] = writes[int(result or 0)] = 0
    for k, name in parameters.items():
        users = [j for j in body if name in j.operands]
        if users and all(j.op in ("dynamic-slice", "gather") and j.operands[0] == name for j in users):
            reads[k] = min(reads[k], sum(inner[j.name][0].size for j in users))
        elif users and all(j.op == "dynamic-update-slice" and j.operands[0] == name for j in users):  # in place
            rest = max(reads[k] - sum(inner[j.operands[1]][0].size for j in users), 0)
            reads[k], writes = 0, [max(sum(writes) - rest, 0)]
    return sum(reads) + sum(writes)
