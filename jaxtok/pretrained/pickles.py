"""Reads what torch.save wrote (.pth, .pt, .ckpt, .bin) and runs nothing of it.

Such a file is a pickle, a program for a small machine that can call any function. Here that machine is not started:
the opcodes are read one by one, those that a state dict needs make plain dicts, lists and numbers, and a few names of
torch mean "a view of these bytes". Every other name or opcode is refused, and with it the file.

Two layouts of torch: a zip archive (torch 1.6 and newer), whose arrays stay views of memory maps, and before that a
chain of pickles followed by the raw arrays, which are read into memory. Or, with other names, a pickle of numpy arrays.
"""

import contextlib
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "torch.BoolStorage": np.bool_,
    "torch.ByteStorage": np.uint8,
    "torch.CharStorage": np.int8,
    "torch.ShortStorage": np.int16,
    "torch.IntStorage": np.int32,
    "torch.LongStorage": np.int64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
}
TORCH = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *STORAGES,
}
NUMPY = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}
NUMBERS = "b1 u1 i1 i2 i4 i8 f2 f4 f8".split()  # no others: an object's bytes would be an address
MAGIC = 0x1950A86A20F9469CFC6C  # what the first pickle of the older layout holds
LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
).split()
BYTES = "BINBYTES SHORT_BINBYTES BINBYTES8".split()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Name(NamedTuple):
    """A global that the pickle mentions, as its name alone."""

    name: str


class Storage(NamedTuple):
    """What tensors are views of."""

    bytes: np.ndarray
    dtype: np.dtype


def read(path) -> Any:
    """A file of torch.save -> nested dicts, lists and tuples, with numpy arrays for its tensors.

    The arrays keep their strides, and share memory where the tensors did. Attributes of dicts are dropped.

    ValueError, one sentence: the file is neither layout, is damaged, or names what a state dict does not need.
    """
    path = Path(path)
    with _in_words(path, "torch.save", "load it with torch and save its tensors alone (a state dict)"):
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with path.open("rb") as file:
            return _read_chain(file, path.stat().st_size)


def read_numpy(path) -> Any:
    """A file of pickle.dump -> its nested dicts, lists and tuples, of numbers, strings and numpy arrays.

    Arrays may be bool, integers or floats, little-endian. ValueError, one sentence: as of `read`.
    """
    path = Path(path)
    with _in_words(path, "pickle.dump", "load it with pickle and save its arrays alone"), path.open("rb") as file:
        return _run(file, names=NUMPY)


@contextlib.contextmanager
def _in_words(path, writer, way_out):
    try:
        yield
    except _Refused as error:
        raise ValueError(
            f"{path} {error}, and nothing of it was run: where you trust the file, {way_out}, best as .safetensors."
        ) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a file of {writer} ({error!r}): download it again.") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is a damaged archive ({error}): download it again.") from None


class _Refused(Exception):
    """What a file holds beyond plain tensors."""


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        names = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(names) != 1:
            raise _Refused(f"is a zip archive with {len(names)} data.pkl, where torch.save writes one")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise _Refused("was written on a big-endian machine")
        found = {}

        def storage(key, size):
            info = members[f"{folder}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise _Refused("is a compressed archive, which torch.save does not write")
            if info.file_size < size:
                raise ValueError(f"an array of {size} bytes has {info.file_size}")
            if key not in found:
                found[key] = _map(path, info)
            return found[key]

        with archive.open(names[0]) as file:
            return _run(file, storage)


def _map(path, info):
    """The bytes of a member that is stored as it is."""
    if not info.file_size:
        return np.zeros(0, np.uint8)
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # the two lengths behind which a member's bytes begin
        lengths = file.read(4)
    start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=info.file_size)


def _read_chain(file, size):
    if file.peek(1)[:1] != b"\x80" or _run(file) != MAGIC:
        raise _Refused("is neither a zip archive nor a chain of pickles that torch.save wrote")
    _run(file)  # the version of the layout
    if not _run(file)["little_endian"]:
        raise _Refused("was written on a big-endian machine")
    found = {}  # key -> its bytes, which come after the tensors that view them

    def storage(key, needed):
        if key not in found:
            if sum(map(len, found.values())) + needed > size:
                raise ValueError(f"there are no {needed} bytes for an array")
            found[key] = np.empty(needed, np.uint8)
        if len(found[key]) != needed:
            raise ValueError("an array has two lengths")
        return found[key]

    tree = _run(file, storage)
    for key in _run(file):
        file.read(8)  # how many numbers follow
        if file.readinto(found[key]) != len(found[key]):
            raise EOFError("the file ends within an array")
    return tree


def _run(file, storage=None, names=TORCH):
    """What one pickle makes.

    storage: (key, size) -> uint8 [size], the bytes that tensors are views of. names: those that it may mention.
    """
    stack, marks, memo = [], [], {}

    def pop(n):
        if not 0 <= n <= len(stack):
            raise IndexError("the stack is empty")
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return items

    def since_mark():
        return pop(len(stack) - marks.pop())

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in BYTES and names is NUMPY:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                items = pop(1) if name == "APPEND" else since_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = pop(2) if name == "SETITEM" else since_mark()
                _fill(_expect(stack[-1], dict), items[::2], items[1::2])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(names, *argument.split(" ")))
            case "STACK_GLOBAL":
                stack.append(_name(names, *pop(2)))
            case "BINPERSID":
                stack.append(_storage(storage, *pop(1)))
            case "REDUCE":
                stack.append(_make(*pop(2)))
            case "BUILD":
                (state,) = pop(1)
                _build(stack[-1], state)
            case "STOP":
                (tree,) = stack
                return tree
            case name:
                raise _Refused(f"uses the pickle opcode {name}{f' ({argument})' if argument else ''}")
    raise EOFError("the pickle has no end")


def _name(names, module, name):
    full = f"{_expect(module, str)}.{_expect(name, str)}"
    if full not in names:
        raise _Refused(f"names {full}, which a state dict does not need")
    return Name(full)


def _storage(storage, pid):
    """A persistent id: ("storage", type, key, device, count), and in the older layout None or a view's place."""
    match _expect(pid, tuple):
        case (str("storage"), type_, key, _, count) | (str("storage"), type_, key, _, count, None) if storage:
            dtype = np.dtype(STORAGES[_expect(type_, Name).name])
            return Storage(storage(_expect(key, str), _natural(count) * dtype.itemsize), dtype)
    raise _Refused("keeps something other than tensors outside the pickle")


def _make(function, arguments):
    """What a call of the pickle means."""
    match _expect(function, Name).name, _expect(arguments, tuple):
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (pairs,):  # as Python 2 wrote it
            pairs = [_expect(pair, list) for pair in _expect(pairs, list)]
            return _fill({}, [key for key, _ in pairs], [value for _, value in pairs])
        case "torch.Size", (shape,):
            return _expect(shape, tuple)
        case "torch._utils._rebuild_parameter", (array, *_):
            return _expect(array, np.ndarray)
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, *_):
            bytes_, dtype = _expect(storage, Storage)
            shape, strides = (tuple(map(_natural, _expect(sizes, tuple))) for sizes in (shape, strides))
            strides = tuple(n * dtype.itemsize for n in strides)
            return np.ndarray(shape, dtype, bytes_, _natural(offset) * dtype.itemsize, strides)  # checks the bounds
        case "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct", (Name("numpy.ndarray"), *_):
            return np.zeros(0, np.int8)  # a new one for each call: its state comes by a BUILD
        case "numpy.dtype", (str(code), *_) if code in NUMBERS:
            return np.dtype(code)
        case name, _:
            raise _Refused(f"calls {name} with other arguments than its writer")


def _build(value, state):
    """Gives a value its state: an array its content, a type of numbers its order of bytes; a dict's is dropped."""
    match value, state:
        case (dict(), _) | (np.dtype(), (_, "<" | "|", *_)):
            pass
        case np.ndarray(), (_, shape, np.dtype() as dtype, bool(fortran), bytes(content)):
            shape = tuple(map(_natural, _expect(shape, tuple)))
            if np.ndarray(shape, dtype, content).nbytes != len(content):  # __setstate__ trusts its arguments
                raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
            value.__setstate__((1, shape, dtype, fortran, content))
        case _:
            raise _Refused(f"gives a {type(value).__name__} another state than its writer")


def _fill(tree, keys, values):
    """Keys are strings or numbers, as a state dict's are: others may be made to hash for ever."""
    tree.update(zip([_expect(key, str, int) for key in keys], values, strict=True))
    return tree


def _expect(value, *kinds):
    """`value`, if it is of just these types. Messages name types alone: a value may be made to print for ever."""
    if type(value) not in kinds:
        raise _Refused(f"has a {type(value).__name__} where torch.save writes a {kinds[0].__name__}")
    return value


def _natural(n):
    if _expect(n, int) < 0:
        raise ValueError(f"{n} where a size is needed")
    return n
