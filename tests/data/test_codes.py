"""Codes on disk: what is written is what is read, and what is not whole is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from jaxtok.data import codes, pipeline
from jaxtok.data.images import BadRecord
from jaxtok.data.shapes import Shapes
from jaxtok.data.sources import Tokenized

NAMES = ("cat", "dog")


def write(folder, arrays, vocabulary, size=4, bad=()):
    """A split of these arrays [n ...] in shards of `size`; `bad` (position, reason) are in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = dict(format=codes.FORMAT, vocabulary=vocabulary, class_names=NAMES)
    name = "latents" if vocabulary is None else "codes"
    shards = -(-len(arrays) // size)
    (folder / "config.json").write_text(json.dumps(plan))
    for shard in range(shards):
        examples = (
            {name: arrays[i], "label": np.int32(i % 2), "caption": f"no. {i}"}
            for i in range(shard * size, min(shard * size + size, len(arrays)))
        )
        codes.write_shard(folder, plan, shard, examples, list(bad) if shard == 0 else [])
    codes.write_manifest(folder, plan, shards)
    return folder


@pytest.mark.parametrize(
    "vocabulary, shape, kind",
    [(256, (5,), "uint8"), (257, (5,), "uint16"), (2**16 + 1, (5,), "uint32"), ((4, 300), (5, 2), "uint16")],
)
def test_codes_come_back_as_int32_from_few_bytes(vocabulary, shape, kind, tmp_path):
    arrays = np.random.default_rng(0).integers(0, vocabulary, (10, *shape)).astype(np.int32)
    arrays[0, 0] = np.array(vocabulary) - 1
    source = pickle.loads(pickle.dumps(Tokenized(write(tmp_path, arrays, vocabulary))))
    assert len(source) == 10 and source.class_names == NAMES
    for i in range(10):
        example = source[i]
        assert example.keys() == {"codes", "label", "caption"}
        np.testing.assert_array_equal(example["codes"], arrays[i])
        assert example["codes"].dtype == np.int32 and source.records[i]["codes"].dtype == kind
        assert (example["label"], example["caption"]) == (i % 2, f"no. {i}")
    expected = [len(np.unique(column)) for column in arrays.reshape(-1, np.size(vocabulary)).T]
    assert source.manifest["counts"]["distinct"] == (expected if isinstance(vocabulary, tuple) else expected[0])
    assert source.describe(5).endswith("000001.array_record record 2")
    with pytest.raises(IndexError):
        source[10]
    source.verify()


def test_latents_come_back_as_they_are_and_make_batches(tmp_path):
    arrays = np.random.default_rng(0).normal(size=(10, 2, 3, 4)).astype(np.float32)
    source = Tokenized(str(write(tmp_path, arrays, None)))
    with pipeline.train_batches(source, batch_size=10) as batches:
        batch = next(batches)
    np.testing.assert_array_equal(batch["latents"], arrays[batch["index"]])
    assert batch["latents"].dtype == np.float32 and sorted(batch["index"]) == list(range(10))
    source[0]["latents"][:] = 0  # a copy: transforms may write to it
    np.testing.assert_array_equal(source[0]["latents"], arrays[0])


def test_a_shard_of_bad_records_alone_is_nothing(tmp_path):
    arrays, plan = np.arange(6).reshape(2, 3), dict(format=codes.FORMAT, vocabulary=6, class_names=NAMES)
    for shard, bad in ((0, [(0, "x"), (1, "y")]), (1, [])):
        examples = [{"codes": row, "label": 0, "caption": ""} for row in arrays if not bad]
        codes.write_shard(tmp_path, plan, shard, examples, bad)
    codes.write_manifest(tmp_path, plan, 2)
    source = Tokenized(tmp_path)
    assert source.manifest["counts"] == dict(examples=2, bad=2, distinct=6)
    np.testing.assert_array_equal([source[i]["codes"] for i in range(len(source))], arrays)
    codes.write_manifest(tmp_path, plan, 1)
    with pytest.raises(ValueError, match="holds no example"):
        Tokenized(tmp_path)


# ---- what is refused ----


@pytest.fixture
def split(tmp_path):
    return write(tmp_path / "train", np.arange(30).reshape(10, 3), 64)


def test_what_is_not_there(split):
    with pytest.raises(FileNotFoundError, match="nowhere holds no manifest.json of python -m jaxtok.tokenize"):
        Tokenized(split / "nowhere")
    with pytest.raises(FileNotFoundError, match="no manifest.json .*; but train inside it: give the path of one"):
        Tokenized(split.parent)
    (split / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="train has no manifest.json yet: its codes are not complete. Run"):
        Tokenized(split)


def test_a_missing_shard(split):
    (split / "000001.array_record").unlink()
    with pytest.raises(FileNotFoundError, match="train lacks 000001.array_record of 3 shards. Run the command"):
        Tokenized(split)
    assert codes.read_entry(split, 0) and codes.read_entry(split, 1) is None


def test_a_shard_of_another_size(split):
    file = split / "000002.array_record"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match=rf"000002.array_record \({size + 4} bytes, not {size}\) changed since"):
        Tokenized(split)
    assert codes.read_entry(split, 2) is None  # so the command writes it again


def test_another_number_of_examples(split):
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["shards"][2]["examples"] = 3
    (split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="000002.array_record holds 2 examples, and the manifest says 3"):
        Tokenized(split)
    (split / "manifest.json").write_text(json.dumps(manifest | {"format": "jaxtok codes 9"}))
    with pytest.raises(ValueError, match="has the format 'jaxtok codes 9', not 'jaxtok codes 1'"):
        Tokenized(split)


def test_a_damaged_byte(split):
    source = Tokenized(split)
    source.verify()
    file = split / "000001.array_record"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="000001.array_record of 3 shards are damaged"):
        Tokenized(split).verify()


def test_a_manifest_needs_all_shards(split):
    with pytest.raises(RuntimeError, match="lacks the shards 000003, 000004, which other processes write"):
        codes.write_manifest(split, dict(vocabulary=64), 5)


# ---- positions ----


class Half(Shapes):
    """Shapes of which every third cannot be read."""

    def __getitem__(self, i):
        if i % 3 == 1:
            raise BadRecord(f"record {i}: torn")
        return super().__getitem__(i)


def noise(example, rng):
    return example | {"image": rng.integers(0, 256, (4, 4, 3), np.uint8)}


def test_positions_run_through_all_passes():
    source = Half(size=16, n=7)
    view = codes.Positions(source, [noise], passes=2, size=4, max_bad=0.5)
    assert len(view) == view.total == 14 and list(view.shards) == [0, 1, 2, 3] and view.count(3) == 2
    for t in range(14):
        turn, index = divmod(t, 7)
        example = view[t]
        assert example.keys() >= {"image", "label", "caption", "bad"}
        if index % 3 == 1:
            assert example["bad"] == f"record {index}: torn" and not example["image"].any()
            continue
        expected = np.random.default_rng((index, turn)).integers(0, 256, (4, 4, 3), np.uint8)
        np.testing.assert_array_equal(example["image"], expected)
        assert example["bad"] == "" and example["caption"] == source[index]["caption"]
    first = np.random.default_rng((5,)).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(view[5]["image"], first)  # as evaluation draws it
    some = view.only([1, 3])
    assert [some.position(i) for i in range(len(some))] == [4, 5, 6, 7, 12, 13]
    assert some.describe(4) == "Half example 5"
    with pytest.raises(ValueError, match="Shapes is empty"):
        codes.Positions(Empty(), [], 1, 4, 0.5)


class Empty:
    def __len__(self):
        return 0


Empty.__name__ = "Shapes"


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2**31], list(range(0, 700, 3))])
def test_squeezed_numbers_come_back(numbers):
    np.testing.assert_array_equal(codes.expand(codes.squeeze(np.array(numbers, np.uint32))), numbers)
    assert len(codes.squeeze(np.arange(0, 64_000, dtype=np.uint16))) < 2000


def test_a_json_file_is_whole_or_old(tmp_path):
    file = Path(tmp_path) / "x.json"
    codes.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        codes.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
