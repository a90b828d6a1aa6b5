"""The reader against files written here from the description of the format, whole and broken."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxtok.pretrained.safetensors import DTYPES, read
from tests.pretrained.published import write_safetensors as write

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a.weight": np.array([1, -2], np.int64)}


def write_raw(path, header, data):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_arrays_come_back_as_views_in_the_order_of_the_file(tmp_path):
    arrays, metadata = read(write(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"}))
    assert metadata == {"format": "pt"} and list(arrays) == list(ARRAYS)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[key], array)
        assert arrays[key].dtype == array.dtype and not arrays[key].flags.writeable
        assert isinstance(base(arrays[key]), np.memmap)  # no byte was read yet


def base(array):
    while not isinstance(array, np.memmap) and array.base is not None:
        array = array.base
    return array


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_keeps_its_bits(tmp_path, name):
    dtype = np.dtype(DTYPES[name])
    bits = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, 5 * dtype.itemsize, np.uint8)
    # three bytes first, so that what follows is not aligned
    arrays = {"odd": np.arange(3, dtype=np.uint8), "x": bits.view(dtype), "0-d": bits.view(dtype)[0].reshape(())}
    arrays["empty"] = np.zeros((0, 4), dtype)
    found, _ = read(write(tmp_path / "x.safetensors", arrays))
    assert found["x"].dtype == dtype and found["0-d"].shape == () and found["empty"].shape == (0, 4)
    np.testing.assert_array_equal(np.frombuffer(found["x"].tobytes(), np.uint8), bits)


def test_bfloat16_is_a_number(tmp_path):
    found, _ = read(write(tmp_path / "x.safetensors", {"x": np.array([1.5, -3.0], ml_dtypes.bfloat16)}))
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1.5, -3.0])


def test_a_file_without_arrays(tmp_path):
    assert read(write(tmp_path / "x.safetensors", {})) == ({}, {})


def test_a_padded_header(tmp_path):
    header = json.dumps({"x": entry("U8", [2], 0, 2)}) + "   "
    np.testing.assert_array_equal(read(write_raw(tmp_path / "x.safetensors", header, b"\5\6"))[0]["x"], [5, 6])


def test_every_truncation_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", ARRAYS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is not a whole .* download or convert it again"):
            read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="its arrays take 40 bytes, and it holds 41"):
        read(path)


@pytest.mark.parametrize(
    "header, says",
    [
        ({"x": entry("F32", [2], 0, 8), "y": entry("U8", [4], 4, 8)}, "y overlap"),
        ({"x": entry("U8", [2], 0, 2), "y": entry("U8", [4], 4, 8)}, "y follow a hole"),
        ({"x": entry("U8", [2], 0, 2)}, "its arrays take 2 bytes, and it holds 8"),
        ({"x": entry("U8", [16], 0, 16)}, "its arrays take 16 bytes, and it holds 8"),
        ({"x": entry("F32", [3], 0, 8)}, r"shape \[3\] of F32, which does not fill its 8 bytes"),
        ({"x": entry("F32", [2**40, 2**40], 0, 8)}, "does not fill"),
        ({"x": entry("U8", [-8], 0, 8)}, "entry of x"),
        ({"x": entry("U8", [8.0], 0, 8)}, "entry of x"),
        ({"x": entry("U8", [True, 8], 0, 8)}, "entry of x"),
        ({"x": entry("U8", [8, 2**80], 0, 8)}, "entry of x"),
        ({"x": entry("U8", [8], 8, 0)}, "does not fill"),
        ({"x": {"dtype": "U8", "shape": [8]}}, "entry of x"),
        ({"x": [1, 2]}, "entry of x"),
        ({"x": entry("F8_E4M3", [8], 0, 8)}, "dtype F8_E4M3, and only BOOL"),
        ({"__metadata__": {"step": 3}}, "__metadata__"),
        ('{"x": 1', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "not a JSON object"),
        ('{"x": 1, "x": 2}', "a key stands there twice"),
    ],
)
def test_a_broken_header_is_refused(tmp_path, header, says):
    with pytest.raises(ValueError, match=says):
        read(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(ValueError, match="claims 200000000 bytes"):
        read(path)


# ---- several files ----


@pytest.fixture
def sharded(tmp_path):
    places = {"b": "m-1.safetensors", "a.weight": "m-2.safetensors"}
    for key, file in places.items():
        write(tmp_path / file, {key: ARRAYS[key]}, {"format": "pt"})

    def index(changes=None):
        path = tmp_path / "m.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": places | (changes or {})}))
        return path

    return index


def test_an_index_gathers_its_files(sharded):
    arrays, metadata = read(sharded())
    assert list(arrays) == list(ARRAYS) and metadata == {"format": "pt"}
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[key], array)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"c": "m-1.safetensors"}, "m-1.safetensors holds other keys than it says, c"),
        ({"b": "../m-1.safetensors"}, "not a plain name"),
        ({"b": 3}, "weight_map"),
    ],
)
def test_a_wrong_index_is_refused(sharded, changes, says):
    with pytest.raises(ValueError, match=says):
        read(sharded(changes))


def test_a_missing_shard_is_named(sharded, tmp_path):
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="m-2.safetensors"):
        read(sharded())
