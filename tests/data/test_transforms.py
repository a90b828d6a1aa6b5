"""Transforms: pixels stay uint8, patch labels stay exact or go, and nothing changes its input."""

import numpy as np
import pytest
from PIL import Image

from jaxtok.data.shapes import Shapes
from jaxtok.data.transforms import caption_bytes, flip, random_crop, resize_crop, shift


def rng(seed=0):
    return np.random.default_rng(seed)


def example(h, w):
    return {"image": rng().integers(0, 256, (h, w, 3), np.uint8), "label": np.int32(1), "caption": "x"}


def test_resize_crop_is_short_side_then_centre():
    given = example(30, 47)
    got = resize_crop(16)(given, rng())["image"]
    # 47 * 16 / 30 = 25.07 -> 25; the crop of 16 starts at round(4.5) = 4.
    whole = np.asarray(Image.fromarray(given["image"]).resize((25, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got, whole[:, 4:20])
    assert got.dtype == np.uint8
    tall = resize_crop(16)({"image": given["image"].swapaxes(0, 1)}, rng())["image"]
    assert tall.shape == (16, 16, 3)
    bicubic = resize_crop(16, method="bicubic")(given, rng())["image"]
    assert not np.array_equal(bicubic, got)


def test_resize_crop_leaves_the_right_size_alone():
    given = Shapes(size=32)[0]
    got = resize_crop(32)(given, rng())
    np.testing.assert_array_equal(got["image"], given["image"])
    assert "patch_labels" in got
    assert "patch_labels" not in resize_crop(16)(given, rng())


def test_random_crop_stays_inside_and_varies():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (30, 40, 3)).copy()
    crops = [random_crop(8, scale=(0.5, 1.0))({"image": ramp}, rng(s))["image"] for s in range(20)]
    assert all(c.shape == (8, 8, 3) and c.dtype == np.uint8 for c in crops)
    assert len({c.tobytes() for c in crops}) > 15
    spans = np.array([int(c[0, -1, 0]) - int(c[0, 0, 0]) for c in crops]) / 6 * 8 / 7  # in pixels of the ramp
    assert spans.min() > 14 and spans.max() < 31  # sides of 0.5 to 1.0 of 30
    whole = random_crop(30, scale=(1.0, 1.0))({"image": ramp[:, :30]}, rng())["image"]
    np.testing.assert_array_equal(whole, ramp[:, :30])
    assert "patch_labels" not in random_crop(32)(Shapes(size=32)[0], rng())


def test_flip_turns_picture_and_patch_labels():
    source = Shapes(size=32, n=20)
    for i in range(5):
        given = source[i]
        got = flip(1.0)(given, rng())
        np.testing.assert_array_equal(got["image"], given["image"][:, ::-1])
        np.testing.assert_array_equal(got["patch_labels"], given["patch_labels"][:, ::-1])
        np.testing.assert_array_equal(flip(0.0)(given, rng())["image"], given["image"])
    given, turned = example(4, 6), 0
    for s in range(400):
        got = flip()(given, rng(s))["image"]
        turned += not np.array_equal(got, given["image"])
    assert 160 < turned < 240


@pytest.mark.parametrize("mode", ["edge", "reflect"])
def test_shift_moves_by_every_step_and_fills(mode):
    given = example(6, 7)
    padded = np.pad(given["image"], ((2, 2), (2, 2), (0, 0)), mode=mode)
    allowed = {padded[y : y + 6, x : x + 7].tobytes() for y in range(5) for x in range(5)}
    seen = {shift(2, mode=mode)(given, rng(s))["image"].tobytes() for s in range(400)}
    assert seen == allowed and len(allowed) == 25


def test_shift_always_drops_patch_labels():
    keys = {frozenset(shift(1)(Shapes(size=16)[0], rng(s))) for s in range(20)}
    assert keys == {
        frozenset({"image", "label", "caption"})
    }  # also when the draw is not to move: batches need equal keys


def test_the_input_is_not_changed():
    given = Shapes(size=32)[3]
    before = {k: np.copy(v) for k, v in given.items()}
    for transform in (resize_crop(16), random_crop(16), flip(1.0), shift(3)):
        transform(given, rng())
        for key, value in before.items():
            np.testing.assert_array_equal(given[key], value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: resize_crop(8, method="cubic"), "'cubic': choose one of .*bicubic"),
        (lambda: random_crop(8, scale=(0.0, 1.0)), "scale must be"),
        (lambda: flip(1.5), "probability, got 1.5"),
        (lambda: shift(1, mode="wrap"), "mode must be 'edge' or 'reflect'"),
        (lambda: shift(-1), "must not be negative"),
        (lambda: shift(6)(example(6, 9), rng()), "6 pixels is too much for a picture of 6 x 9"),
    ],
)
def test_impossible_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_captions_become_bytes_and_end_with_a_whole_character():
    read = lambda caption, length: caption_bytes(length)({"caption": caption}, None)["text"]
    assert read("ab", 4).tolist() == [98, 99, 0, 0] and read("ab", 4).dtype == np.int32
    assert read("", 2).tolist() == [0, 0]
    assert read("aé", 2).tolist() == [98, 0]  # é is two bytes, of which one would fit
    assert read("aé", 3).tolist() == [98, 0xC3 + 1, 0xA9 + 1]
    assert read("a\udc80", 2).tolist() == [98, ord("?") + 1]  # half of a surrogate pair is no character
    example = {"caption": "a", "label": 3}
    assert caption_bytes(1)(example, None)["label"] == 3 and "text" not in example


def test_captions_that_are_not_there_are_an_error():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        caption_bytes(0)
    with pytest.raises(ValueError, match="no caption to make a text of; this example has image, label"):
        caption_bytes(4)({"image": None, "label": 0}, None)
