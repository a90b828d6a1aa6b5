"""ArrayRecord: what is written is what is read, pictures and codes alike."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxtok.data.images import BadRecord
from jaxtok.data.pipeline import train_batches
from jaxtok.data.records import ArrayRecord, decode_example, encode_example, write_array_record
from jaxtok.data.shapes import Shapes


def test_round_trip_over_several_files(tmp_path):
    shapes = Shapes(size=16, n=7)
    first = write_array_record(tmp_path / "s-0.array_record", (shapes[i] for i in range(4)), shapes.class_names)
    second = write_array_record(tmp_path / "s-1.array_record", (shapes[i] for i in range(4, 7)), shapes.class_names)
    assert (first, second) == (4, 3)
    for paths in (tmp_path, str(tmp_path / "s-*"), [tmp_path / "s-1.array_record", tmp_path / "s-0.array_record"]):
        source = pickle.loads(pickle.dumps(ArrayRecord(paths)))
        assert len(source) == 7 and source.class_names == shapes.class_names
        for i in range(7):
            assert source[i].keys() == shapes[i].keys()
            for key, value in shapes[i].items():
                np.testing.assert_array_equal(source[i][key], value)
            assert source[i]["label"].dtype == np.int32 and source[i]["patch_labels"].dtype == np.int32
    assert source.describe(4).endswith("s-1.array_record record 1")
    with pytest.raises(IndexError):
        source[7]
    with train_batches(source, batch_size=7) as batches:
        assert sorted(next(batches)["index"]) == list(range(7))


@pytest.mark.parametrize("dtype", ["uint16", ">i4", "float32", "bool"])
def test_codes_and_numbers(dtype):
    given = {
        "codes": np.arange(12).reshape(3, 4).astype(dtype),
        "caption": "ein Hündchen",
        "score": 0.25,
        "length": np.int64(9),
    }
    got = decode_example(encode_example(given), "it")
    np.testing.assert_array_equal(got["codes"], given["codes"])
    assert got["codes"].dtype == np.dtype(dtype).newbyteorder("=") and got["codes"].shape == (3, 4)
    assert (got["caption"], got["score"], got["length"]) == ("ein Hündchen", 0.25, 9)
    with pytest.raises(TypeError, match="caption: list cannot be written"):
        encode_example({"caption": ["a"]})


def test_encoded_pictures_are_kept_and_bad_ones_name_themselves(tmp_path):
    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8))
    noise.save(buffer, "JPEG")
    path = tmp_path / "two.array_record"
    write_array_record(path, [{"image": buffer.getvalue()}, {"image": b"no picture"}])
    source = ArrayRecord(path)
    np.testing.assert_array_equal(source[0]["image"], np.asarray(Image.open(buffer).convert("RGB")))
    with pytest.raises(BadRecord, match="two.array_record record 2: no picture of a known format"):
        source[1]
    with pytest.raises(BadRecord, match="it: "):
        decode_example(encode_example({"codes": np.arange(9)})[:-5], "it")


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    def examples():
        yield {"label": 1}
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_array_record(tmp_path / "x.array_record", examples())
    with pytest.raises(FileNotFoundError):
        ArrayRecord(tmp_path)


def test_what_is_missing_or_foreign_says_so(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    with pytest.raises(FileNotFoundError, match="No ArrayRecord file at .*nowhere.*write_array_record"):
        ArrayRecord(tmp_path / "nowhere")
    (tmp_path / "text.array_record").write_text("I am no ArrayRecord")
    with pytest.raises(ValueError, match="text.array_record is no file that .*write_array_record wrote"):
        ArrayRecord(tmp_path)
    (tmp_path / "text.array_record").unlink()
    writer = ArrayRecordWriter(str(tmp_path / "foreign.array_record"), "group_size:1")
    writer.write(b"serialised by somebody else")
    writer.close()
    with pytest.raises(ValueError, match="foreign.array_record is no file .*data.sources.TFDS if TFDS made it"):
        ArrayRecord(tmp_path)
    (tmp_path / "foreign.array_record").unlink()
    write_array_record(tmp_path / "a.array_record", [{"label": 0}], ("cat",))
    write_array_record(tmp_path / "b.array_record", [{"label": 0}], ("dog",))
    with pytest.raises(ValueError, match="a.array_record and .*b.array_record differ in class names"):
        ArrayRecord(tmp_path)
