"""Reads .safetensors files with numpy alone: a memory map and views of it, nothing is copied and nothing is run.

A file is: eight bytes, the length of the header (little-endian); the header, JSON: {key: {"dtype", "shape",
"data_offsets": [begin, end]}} and under "__metadata__" strings by name; the arrays, one after the other without holes,
in row-major order, little-endian. Offsets count from the end of the header.
"""

import json
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

INDEX = ".index.json"  # of a checkpoint of several files: {"weight_map": {key: file}}
HEADER = 100_000_000  # bytes, the largest header that the format allows
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file, or the index of several -> ({key: array}, metadata).

    Args:
      path: NAME.safetensors, or NAME.safetensors.index.json, whose files lie beside it.

    The arrays are read-only views of memory maps: their bytes are read when they are used. Every byte of a file is
    accounted for before the first array is given out.

    ValueError, one sentence: the file is truncated or longer than it says, its header is no header, an array's shape
    does not fit its bytes, two arrays overlap, or a type is none of `DTYPES`.
    """
    path = Path(path)
    try:
        return _read_index(path) if path.name.endswith(INDEX) else _read_file(path)
    except _Bad as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}; download or convert it again.") from None


class _Bad(Exception):
    """What is wrong with a file."""


def _read_index(path):
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = {file: {key for key in places if places[key] == file} for file in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Bad('an index is JSON with a "weight_map" of keys to file names') from None
    arrays, metadata = {}, {}
    for file, keys in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise _Bad(f"it names the file {file!r}, which is not a plain name beside it")
        found, more = read(path.with_name(file))
        if found.keys() != keys:
            raise _Bad(f"{file} holds other keys than it says, {', '.join(sorted(found.keys() ^ keys)[:3])} among them")
        arrays, metadata = arrays | found, metadata | more
    return {key: arrays[key] for key in places}, metadata


def _read_file(path):
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _Bad(f"it ends within its header, after {size} bytes")
        if length > HEADER:
            raise _Bad(f"its header claims {length} bytes, more than the format allows")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise _Bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("its __metadata__ is not a JSON object of strings")

    entries = sorted(((key, *_entry(key, entry)) for key, entry in header.items()), key=lambda entry: entry[3:])
    end = 0
    for key, _, _, begin, stop in entries:
        if begin != end:
            raise _Bad(f"the bytes of {key} {'overlap those of another array' if begin < end else 'follow a hole'}")
        end = stop
    if end != size - 8 - length:
        raise _Bad(f"its arrays take {end} bytes, and it holds {size - 8 - length}")

    data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if end else np.zeros(0, np.uint8)
    views = {key: np.ndarray(shape, dtype, data, begin) for key, dtype, shape, begin, _ in entries}
    return {key: views[key] for key in header}, metadata


def _entry(key, entry):
    """One entry of the header, checked: (dtype, shape, begin, end)."""
    try:
        name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = (*shape, begin, end)
        if not all(type(n) is int and 0 <= n <= sys.maxsize for n in counts):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise _Bad(f"the header's entry of {key} is not a dtype, a shape and two offsets") from None
    if name not in DTYPES:
        raise _Bad(f"{key} has the dtype {name}, and only {', '.join(DTYPES)} are known here")
    dtype = np.dtype(DTYPES[name])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _Bad(f"{key} has the shape {list(shape)} of {name}, which does not fill its {end - begin} bytes")
    return dtype, shape, begin, end


def _unique(pairs):
    """A JSON object; the same key twice would hide an array."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found
