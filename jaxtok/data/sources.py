"""Where examples come from. A config names these as `data.sources.Folder` and so on; `jaxtok.data` has the contract.

A source that cannot be built says which paths it tried and what makes the data set; a record that cannot be read is a
`BadRecord`, which the pipeline skips, counts and names.
"""

import os
import warnings
from pathlib import Path

import numpy as np

from jaxtok.data.codes import Tokenized
from jaxtok.data.emoji import Emoji
from jaxtok.data.images import BadRecord, decode_image, stable_fraction
from jaxtok.data.records import ArrayRecord
from jaxtok.data.shapes import Shapes

__all__ = ["ArrayRecord", "BadRecord", "Emoji", "Folder", "Shapes", "TFDS", "Tokenized"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
TEST_FOLDERS = ("test", "val", "validation")


class Folder:
    """Pictures in a folder: flat, or one sub-folder a class. `image` uint8 [H W 3]; sizes may differ, so add a crop.

    `label` = number of the class in alphabetical order; `caption` = name of the class, or of the file if the folder is
    flat. Files are read in the order of their paths; those with other extensions, and hidden ones, are ignored.

    Args:
      path: the folder.
      split: None for all pictures, "train" or "test". If the folder holds `train/` beside `test/`, `val/` or
        `validation/`, these are the splits. Else a picture is in "test" if the hash of its path inside the folder, as a
        number in [0, 1), is below `test_fraction`: adding or removing other pictures moves none to the other side.
      test_fraction: share of the pictures held out when the folder itself has no splits.

    Raises:
      FileNotFoundError: there is no such folder, or no picture in it.
      ValueError: the split is unknown, or empty.
    """

    read_threads = 8

    def __init__(self, path, split=None, test_fraction=0.1):
        root = Path(path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root.absolute()}: put pictures there, or correct the path.")
        if split not in (None, "train", "test"):
            raise ValueError(f"Folder has no split {split!r}: choose 'train', 'test', or None for all pictures.")
        test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if test is not None and (root / "train").is_dir():
            if split is None:
                raise ValueError(f"{root} holds train/ and {test.name}/: choose split='train' or split='test'.")
            classes = class_folders(root / "train")
            self.root = root / "train" if split == "train" else test
            strangers = sorted(set(class_folders(self.root)) - set(classes))
            if strangers:
                raise ValueError(f"{self.root} has classes that {root / 'train'} has not: {', '.join(strangers)}.")
            chosen = None
        else:
            self.root, classes, chosen = root, class_folders(root), split

        files = [f for c in classes for f in pictures(self.root, c)] if classes else pictures(self.root)
        if not files:
            raise FileNotFoundError(f"No picture in {self.root.absolute()} (looked for {', '.join(EXTENSIONS)}).")
        if chosen is not None:
            files = [f for f in files if (stable_fraction(f) < test_fraction) == (chosen == "test")]
            if not files:
                raise ValueError(
                    f"No picture of {self.root.absolute()} fell into split={split!r} at test_fraction={test_fraction}: "
                    "add pictures or change test_fraction."
                )
        loose = next((e.name for e in os.scandir(self.root) if is_picture(e.name)), None) if classes else None
        if loose is not None:
            warnings.warn(f"{self.root}: pictures beside the class folders are ignored, {loose} for one.", stacklevel=2)
        self.files = files  # paths inside root, with "/"
        self.flat = not classes
        self.class_names = ("all",) if self.flat else tuple(classes)
        number = {name: k for k, name in enumerate(classes)}
        self.labels = np.array([0 if self.flat else number[f.split("/")[0]] for f in files], np.int32)  # [n]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        file, label = self.describe(i), self.labels[i]
        caption = words(Path(file).stem if self.flat else self.class_names[label])
        return {"image": decode_image(file, file), "label": label, "caption": caption}

    def describe(self, i):
        return str(self.root / self.files[i])


class TFDS:
    """A data set that TensorFlow Datasets prepared as ArrayRecord; reads it without tensorflow.

    `image` uint8 [H W 3], `label` int32 (0 if the data set has none), `caption` = the feature of that name, else the
    name of the class, else "".

    Args:
      dataset: the TFDS name, with config and version if you like: "imagenet2012", "cifar10:3.0.2".
      split: a TFDS split, slices included: "train", "validation[:10%]".
      data_dir: where it was prepared; None is TFDS's own default.

    Raises:
      FileNotFoundError: not prepared there as ArrayRecord; names the folder tried and the command that prepares it.
      ValueError: unknown split, or no `image` among the features.
    """

    read_threads = 8

    def __init__(self, dataset, split="train", data_dir=None):
        import tensorflow_datasets as tfds

        place = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        recipe = f"python -m jaxtok.data.prepare --name={dataset} --data_dir={place}"
        try:
            builder = tfds.builder(dataset, data_dir=place)
        except (tfds.core.DatasetNotFoundError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"No TFDS data set {dataset!r} in {place} ({reason}) To prepare it: {recipe}"
            ) from None  # TFDS appends all the names it knows
        if not builder.info.splits:
            raise FileNotFoundError(f"No TFDS data set {dataset!r} in {builder.data_dir}. To prepare it: {recipe}")
        if builder.info.file_format.value != "array_record":
            raise FileNotFoundError(
                f"TFDS data set {dataset!r} in {builder.data_dir} is {builder.info.file_format.value}, which has no "
                f"random access. Prepare it again, in another folder, as ArrayRecord: {recipe}/array_record"
            )
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"TFDS data set {dataset!r} has no feature 'image', only {', '.join(features)}.")
        self.dataset, self.split = dataset, split
        names = getattr(features["label"], "names", None) if "label" in features else None
        self.class_names = tuple(names or ("all",))
        self.has_caption = "caption" in features
        self.examples = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        try:
            example = self.examples[i]
        except Exception as error:
            raise BadRecord(f"{self.describe(i)}: {error}") from error
        label = int(example.get("label", 0))
        if self.has_caption:
            caption = example["caption"].decode()
        else:  # a test set may hide its labels as -1
            caption = words(self.class_names[label]) if 0 <= label < len(self.class_names) else ""
        return {
            "image": decode_image(example["image"], self.describe(i)),  # [H W 3]
            "label": np.int32(label),
            "caption": caption,
        }

    def describe(self, i):
        return f"TFDS {self.dataset} {self.split} record {i}"


def is_picture(name):
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def class_folders(root):
    """Names of the sub-folders that hold a picture at any depth, sorted."""
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    return [name for name in folders if next(walk(root / name), None) is not None]


def pictures(root, inside="."):
    """Paths of all pictures under root/inside, relative to root, with "/", sorted."""
    start = len(os.path.join(root, ""))
    return sorted(file[start:].replace(os.sep, "/") for file in walk(root / inside))


def walk(folder):
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (os.path.join(place, file) for file in files if is_picture(file))


def words(name):
    return name.replace("_", " ").replace("-", " ")
