"""Folder and TFDS: the conventions, what a missing data set says, and that a bad file names itself."""

import io
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtok.data.images import BadRecord
from jaxtok.data.sources import TFDS, Folder

ROOT = Path(__file__).parents[2]


def picture(path, colour=(1, 2, 3), size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_flat_folder(tmp_path):
    for name in ("b_c.png", "a.PNG", "c-2.webp"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    picture(tmp_path / ".hidden.png")
    source = Folder(tmp_path)
    assert source.files == ["a.PNG", "b_c.png", "c-2.webp"]
    assert source.class_names == ("all",)
    assert [source[i]["caption"] for i in range(3)] == ["a", "b c", "c 2"]
    example = source[1]
    assert example["image"].shape == (4, 5, 3) and example["image"].dtype == np.uint8
    assert example["label"] == 0 and example["label"].dtype == np.int32
    assert tuple(example["image"][0, 0]) == (1, 2, 3)


def test_class_folders(tmp_path):
    picture(tmp_path / "tabby_cat" / "1.png")
    picture(tmp_path / "dog" / "deep" / "1.jpg")
    picture(tmp_path / "dog" / "2.png")
    (tmp_path / "no_pictures").mkdir()
    source = Folder(str(tmp_path))
    assert source.class_names == ("dog", "tabby_cat")
    assert source.files == ["dog/2.png", "dog/deep/1.jpg", "tabby_cat/1.png"]
    assert [(source[i]["caption"], int(source[i]["label"])) for i in range(3)] == [
        ("dog", 0), ("dog", 0), ("tabby cat", 1),
    ]  # fmt: skip
    again = pickle.loads(pickle.dumps(source))
    assert again.files == source.files and again[2]["label"] == 1


def test_pictures_beside_class_folders_are_not_dropped_in_silence(tmp_path):
    picture(tmp_path / "dog" / "1.png")
    picture(tmp_path / "stray.png")
    with pytest.warns(UserWarning, match="beside the class folders are ignored, stray.png"):
        assert len(Folder(tmp_path)) == 1


def test_split_by_hash_is_disjoint_complete_and_stable(tmp_path):
    for k in range(60):
        picture(tmp_path / "cat" / f"{k}.png")
    train, test, whole = Folder(tmp_path, "train"), Folder(tmp_path, "test"), Folder(tmp_path)
    assert sorted(train.files + test.files) == sorted(whole.files)
    assert not set(train.files) & set(test.files)
    assert 1 <= len(test) <= 14
    assert len(Folder(tmp_path, "test", test_fraction=0.5)) > len(test)
    for k in range(60, 90):
        picture(tmp_path / "cat" / f"{k}.png")
    (tmp_path / "cat" / "0.png").unlink()
    assert set(test.files) - {"cat/0.png"} <= set(Folder(tmp_path, "test").files)
    assert set(train.files) - {"cat/0.png"} <= set(Folder(tmp_path, "train").files)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders_are_the_splits(tmp_path, held_out):
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "train" / "dog" / "1.png")
    picture(tmp_path / held_out / "dog" / "2.png")
    train, test = Folder(tmp_path, "train"), Folder(tmp_path, "test")
    assert train.files == ["cat/1.png", "dog/1.png"] and test.files == ["dog/2.png"]
    assert test.class_names == train.class_names == ("cat", "dog")
    assert test[0]["label"] == 1  # numbered by the training classes
    with pytest.raises(ValueError, match="choose split='train' or split='test'"):
        Folder(tmp_path)
    picture(tmp_path / held_out / "cow" / "3.png")
    with pytest.raises(ValueError, match="classes that .*train has not: cow"):
        Folder(tmp_path, "test")


def test_what_a_missing_folder_says(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*/nowhere"):
        Folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match=r"No picture in .*\.jpg"):
        Folder(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no split 'validation'"):
        Folder(tmp_path, "validation")
    with pytest.raises(ValueError, match="No picture .* fell into split='test' at test_fraction=0.0"):
        Folder(tmp_path, "test", test_fraction=0.0)


def test_a_bad_file_names_itself(tmp_path):
    (tmp_path / "broken.png").write_text("I am no picture")
    with pytest.raises(BadRecord, match="broken.png: no picture of a known format"):
        Folder(tmp_path)[0]


def prepared(folder, format="array_record"):
    """A data set as TFDS prepares it, written without tensorflow: six PNGs of two classes, the last one broken."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_generated_pb2

    place = folder / "tiny" / "1.0.0"
    place.mkdir(parents=True)
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "big_dog"]),
        }
    ).save_config(place)
    writer = ArrayRecordWriter(str(place / f"tiny-train.{format}-00000-of-00001"), "group_size:1")
    for k in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (3 + k, 2), (10 * k, 0, 0)).save(buffer, "PNG")
        example = tf_example_generated_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(buffer.getvalue() if k < 5 else b"broken")
        example.features.feature["label"].int64_list.value.append(k % 2)
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train", "shardLengths": ["6"], "numBytes": "999",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }  # fmt: skip
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": format, "splits": [split]}
    (place / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_reads_without_tensorflow(tmp_path):
    """In a process where importing tensorflow is an error."""
    prepared(tmp_path)
    trap = tmp_path / "trap" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise AssertionError('tensorflow was imported')")
    code = f"""
        import pickle, sys
        sys.path.insert(0, {str(ROOT)!r})
        from jaxtok.data.sources import TFDS, BadRecord
        from jaxtok.data.pipeline import train_batches
        from jaxtok.data.transforms import resize_crop
        source = pickle.loads(pickle.dumps(TFDS("tiny", "train", {str(tmp_path)!r})))
        assert len(source) == 6 and source.class_names == ("cat", "big_dog")
        example = source[3]
        assert example["image"].shape == (2, 6, 3) and example["image"][0, 0, 0] == 30
        assert example["label"] == 1 and example["label"].dtype == "int32" and example["caption"] == "big dog"
        assert source[4]["caption"] == "cat"
        assert len(TFDS("tiny", "train[:50%]", {str(tmp_path)!r})) == 3
        try:
            source[5]
        except BadRecord as error:
            assert "TFDS tiny train record 5" in str(error)
        else:
            raise AssertionError("a broken record was read")
        with train_batches(source, [resize_crop(4)], batch_size=6, max_bad=0.2) as batches:
            assert sorted(next(batches)["index"]) == [0, 0, 1, 2, 3, 4]
        assert "tensorflow" not in sys.modules
        print("read")
    """
    path = {"PYTHONPATH": str(tmp_path / "trap")}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=path)
    assert run.returncode == 0 and run.stdout.strip() == "read", run.stderr


def test_what_a_missing_tfds_data_set_says(tmp_path):
    command = f"python -m jaxtok.data.prepare --name=mnist --data_dir={tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/mnist.*{command}"):
        TFDS("mnist", "train", tmp_path)  # TFDS knows it, but it was not prepared
    with pytest.raises(FileNotFoundError, match=f"No TFDS data set 'unheard_of' in {tmp_path}.*jaxtok.data.prepare"):
        TFDS("unheard_of", "train", tmp_path)
    with pytest.raises(FileNotFoundError, match="tfrecord, which has no random access.*jaxtok.data.prepare"):
        TFDS("tiny", "train", prepared(tmp_path, "tfrecord"))


def test_an_unknown_tfds_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="'test'.*train"):
        TFDS("tiny", "test", prepared(tmp_path))


def test_preparing_says_what_it_needs():
    code = "import sys; sys.modules['tensorflow'] = None; from jaxtok.data.prepare import prepare; prepare('mnist')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and 'pip install "jaxtok[tfds-prepare]"' in run.stderr
