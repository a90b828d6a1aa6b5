"""The reader against files in torch.save's two layouts, written here without torch, and against pickles that bite."""

import contextlib
import os
import pickle
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxtok.pretrained.pickles import MAGIC, STORAGES, read

TYPES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}


class Global:
    """A name of torch, which is not installed here."""

    def __init__(self, name):
        self.name = name


class Call:
    """A call that unpickling would make: function(*arguments), then a state for its result."""

    def __init__(self, function, *arguments, state=None):
        self.parts, self.state = (Global(function), arguments), state


class Storage:
    def __init__(self, array):
        self.array = array


class Writer(pickle._Pickler):
    """Pickles as torch does: protocol 2, arrays outside by a persistent id."""

    def __init__(self, file, view=()):
        super().__init__(file, 2)
        self.storages, self.view = [], view

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(f"c{obj.name.rpartition('.')[0]}\n{obj.name.rpartition('.')[2]}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.parts[0])
            self.save(obj.parts[1])
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        key = str(self.storages.index(obj))
        return ("storage", Global(TYPES[obj.array.dtype]), key, "cpu", obj.array.size, *self.view)


def tensor(storage, shape, strides=None, offset=0):
    strides = tuple(np.cumprod([1, *shape[:0:-1]])[::-1].tolist())[: len(shape)] if strides is None else strides
    return Call("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, ordered({}))


def ordered(items, state=None):
    return Call("collections.OrderedDict", state=state) if not items else (Call("collections.OrderedDict"), items)


def save_zip(path, tree, folder="archive/", compression=zipfile.ZIP_STORED, byteorder="little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        with archive.open(f"{folder}data.pkl", "w") as file:
            writer = Writer(file)
            writer.dump(tree)
        archive.writestr(f"{folder}byteorder", byteorder)
        for i, storage in enumerate(writer.storages):
            archive.writestr(f"{folder}data/{i}", storage.array.tobytes())
        archive.writestr(f"{folder}version", "3\n")
    return path


def save_chain(path, tree):
    with path.open("wb") as file:
        for part in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}):
            pickle.dump(part, file, 2)
        writer = Writer(file, view=(None,))
        writer.dump(tree)
        pickle.dump([str(i) for i in range(len(writer.storages))], file, 2)
        for storage in writer.storages:
            file.write(storage.array.size.to_bytes(8, "little") + storage.array.tobytes())
    return path


SAVE = pytest.mark.parametrize("save", [save_zip, save_chain])


@SAVE
def test_a_state_dict_comes_back(tmp_path, save):
    numbers = np.random.default_rng(0).normal(size=24).astype(np.float32)
    shared, steps = Storage(numbers), Storage(np.array([7], np.int64))
    half = Storage(np.array([1.5, -3.0, 0.25], ml_dtypes.bfloat16))
    tree = {
        "model": {
            "whole": tensor(shared, (2, 3, 4)),
            "turned": tensor(shared, (4, 3), (1, 4), 12),  # a transposed half of the same numbers
            "parameter": Call("torch._utils._rebuild_parameter", tensor(half, (3,)), True, ordered({})),
            "scalar": tensor(steps, ()),
            "none": tensor(half, (0, 5)),
        },
        "optimizer": {"state": {0: {"step": 3.0}}, "groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "foreach": None}]},
        "epoch": 2**40,
        "size": Call("torch.Size", (2, 3)),
        "versions": Call("collections.OrderedDict", state={"_metadata": {"": {"version": 1}}}),
    }
    found = read(save(tmp_path / "x.pth", tree))
    model = found["model"]
    np.testing.assert_array_equal(model["whole"], numbers.reshape(2, 3, 4))
    np.testing.assert_array_equal(model["turned"], numbers[12:].reshape(3, 4).T)
    assert np.shares_memory(model["whole"], model["turned"])
    assert model["parameter"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(model["parameter"].astype(np.float32), [1.5, -3.0, 0.25])
    assert model["scalar"] == 7 and model["scalar"].shape == () and model["none"].shape == (0, 5)
    assert found["optimizer"] == tree["optimizer"]
    assert (found["epoch"], found["size"], found["versions"]) == (2**40, (2, 3), {})


@SAVE
@pytest.mark.parametrize("dtype", STORAGES.values())
def test_every_type_keeps_its_bits(tmp_path, save, dtype):
    bits = np.random.default_rng(0).integers(0, 2, 8 * np.dtype(dtype).itemsize, np.uint8)
    found = read(save(tmp_path / "x.pt", tensor(Storage(bits.view(dtype)), (8,))))
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.frombuffer(found.tobytes(), np.uint8), bits)


def test_arrays_of_an_archive_are_not_read_before_they_are_used(tmp_path):
    path = save_zip(tmp_path / "x.pth", tensor(Storage(np.arange(5.0)), (5,)))
    array = read(path)
    while not isinstance(array, np.memmap):
        assert not array.flags.writeable
        array = array.base


@SAVE
def test_what_the_first_versions_wrote_is_read(tmp_path, save):
    numbers = Storage(np.arange(6, dtype=np.float32))
    weight = Call("torch._utils._rebuild_tensor", numbers, 0, (2, 3), (3, 1))
    tree = Call("collections.OrderedDict", [["lin.weight", weight], ["n", 3]])  # of Python 2
    found = read(save(tmp_path / "x.pth", tree))
    assert list(found) == ["lin.weight", "n"]
    np.testing.assert_array_equal(found["lin.weight"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_newer_protocols_are_read(tmp_path, protocol):
    tree = {"names": ["a", "b"] * 2, "n": (1, 2.5, None, True, -1)}
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(tree, protocol))
    assert read(tmp_path / "x.pth") == tree


# ---- what is refused, and does not run ----


class Reduce:
    """Unpickling it calls the function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


# What Python's own unpickler would run; "touch M" makes the marker file.
ATTACKS = {
    "reduce": lambda m: pickle.dumps(Reduce(os.system, f"touch {m}"), 2),
    "nested in a dict": lambda m: pickle.dumps({"model": {"a": [1, {"b": Reduce(os.system, f"touch {m}")}]}}, 2),
    "protocol 0": lambda m: pickle.dumps(Reduce(os.system, f"touch {m}"), 0),
    "stack global": lambda m: pickle.dumps(Reduce(os.system, f"touch {m}"), 4),
    "eval": lambda m: pickle.dumps(Reduce(eval, f"open({str(m)!r}, 'w')"), 2),
    "inst": lambda m: b"(" + text(f"touch {m}") + b"ios\nsystem\n.",
    "obj": lambda m: b"(csubprocess\ngetoutput\n" + text(f"touch {m}") + b"o.",
    "newobj": lambda m: b"\x80\x04ccodecs\nCodecInfo\ncos\nsystem\n" + text(f"touch {m}") + b"\x85R\x85\x81.",
    "state": lambda m: b"ccollections\nOrderedDict\n)R}" + text("a") + b"cos\nsystem\n" + text(f"touch {m}")
    + b"\x85Rsb.",
    "getattr chain": lambda m: b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + text("os") + b"\x85R" + text("system")
    + b"tR" + text(f"touch {m}") + b"\x85R.",
    "dotted name": lambda m: b"\x80\x04" + text("pickle") + text("sys.modules.get") + b"\x93" + text("os") + b"\x85R0"
    + b"cos\nsystem\n" + text(f"touch {m}") + b"\x85R.",
}  # fmt: skip
# What does nothing here, and is no state dict.
STRANGE = {
    "extension": b"\x82\x01.",
    "newobj_ex": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "newobj of an allowed name": b"\x80\x04ccollections\nOrderedDict\n)\x81.",
    "below an allowed name": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
    "another persistent id": text("module") + b"\x85Q.",
    "numpy": pickle.dumps(np.arange(3), 2),
    "a function of torch": b"ctorch\nload\n" + text("x") + b"\x85R.",
    "a dict is called": b"}" + text("x") + b"\x85R.",
    "another argument": b"ccollections\nOrderedDict\n" + text("x") + b"\x85R.",
    "a name gets a state": b"ctorch\nSize\n}b.",
    "a tuple as a key": b"})Ns.",
    "bytes": pickle.dumps(b"x" * 5, 4),
    "a set": pickle.dumps({1, 2}, 4),
}


def put(path, code, layout):
    if layout == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
    else:
        head = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head if layout == "chain" else []) + code)
    return path


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacks_are_real(tmp_path, name):
    with contextlib.suppress(Exception):
        pickle.loads(ATTACKS[name](tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("layout", ["zip", "chain", "bare"])
@pytest.mark.parametrize("name", [*ATTACKS, *STRANGE])
def test_what_is_no_state_dict_is_refused_and_not_run(tmp_path, name, layout):
    marker = tmp_path / "marker"
    code = ATTACKS[name](marker) if name in ATTACKS else STRANGE[name]
    with pytest.raises(ValueError, match=r"x\.pth .*nothing of it was run: .* best as \.safetensors"):
        read(put(tmp_path / "x.pth", code, layout))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("reduce", "names posix.system,"),
        ("getattr chain", "names builtins.getattr,"),
        ("inst", r"opcode INST \(os system\)"),
        ("below an allowed name", "names collections.OrderedDict.fromkeys,"),
        ("numpy", r"names numpy\._core"),
        ("newobj_ex", "opcode NEWOBJ_EX"),
        ("a tuple as a key", "has a tuple where torch.save writes a str"),
    ],
)
def test_the_refusal_names_what_it_found(tmp_path, name, says):
    code = ATTACKS[name]("x") if name in ATTACKS else STRANGE[name]
    with pytest.raises(ValueError, match=says):
        read(put(tmp_path / "x.pth", code, "zip"))


def test_a_tuple_that_doubles_itself_ends_at_once(tmp_path):
    """Sixty levels of (x, x) are small in memory and endless to print, to hash or to compare."""
    code = b")" + b"q\0h\0\x86" * 60
    for end in (b"}h\0Ns.", code + b"Q.", b"\x93.", b"R.", b"."):
        with contextlib.suppress(ValueError):
            read(put(tmp_path / "x.pth", code + end, "zip"))


# ---- what is damaged ----


@SAVE
def test_every_truncation_is_refused(tmp_path, save):
    path = save(tmp_path / "x.pth", {"a": tensor(Storage(np.arange(6.0)), (2, 3))})
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.pth"):
            read(path)


@SAVE
@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((2, 4), (4, 1), 0),
        ((2, 3), (3, 1), 1),
        ((2, 3), (-3, 1), 0),
        ((2,), (2**62,), 0),
        ((2**70,), (0,), 0),
        ((7,), (1, 1), 0),
    ],
)
def test_a_tensor_outside_its_bytes_is_refused(tmp_path, save, shape, strides, offset):
    path = save(tmp_path / "x.pth", tensor(Storage(np.arange(6.0)), shape, strides, offset))
    with pytest.raises(ValueError, match="cannot be read as a file of torch.save"):
        read(path)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"byteorder": "big"}, "big-endian"),
    ],
)
def test_other_archives_are_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        read(save_zip(tmp_path / "x.pth", tensor(Storage(np.arange(99.0)), (99,)), **options))


def test_a_storage_that_claims_more_than_the_file_has_takes_no_memory(tmp_path):
    path = save_chain(tmp_path / "x.pth", tensor(Storage(np.broadcast_to(np.float32(0), 2**20)), (1,)))
    path.write_bytes(path.read_bytes().replace((2**20).to_bytes(4, "little"), (2**30).to_bytes(4, "little")))
    with pytest.raises(ValueError, match=f"there are no {2**32} bytes"):
        read(path)


def test_a_tar_of_the_first_versions_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        archive.add(__file__, "storages")
    with pytest.raises(ValueError, match="neither a zip archive nor a chain of pickles"):
        read(tmp_path / "x.pth")
