"""Any picture becomes RGB uint8, or a BadRecord that names it."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxtok.data.images import BadRecord, decode_image, stable_fraction

RED = (255, 0, 0)


def encode(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_camera_orientation_is_applied():
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees, clockwise
    image = decode_image(encode(picture, exif=exif), "turned")
    assert image.shape == (4, 2, 3)
    assert tuple(image[0, 1]) == RED


def palette_with_hole():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.putpixel((1, 0), 1)
    return encode(picture, transparency=1)


@pytest.mark.parametrize(
    "data, expected",
    [
        (encode(Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8))), [RED, (255, 255, 255)]),
        (encode(Image.fromarray(np.array([[[0, 0, 0, 51]]], np.uint8))), [(204, 204, 204)]),
        (palette_with_hole(), [RED, (255, 255, 255)]),
        (encode(Image.new("L", (1, 1), 7)), [(7, 7, 7)]),
        (encode(Image.new("LA", (1, 1), (7, 0))), [(255, 255, 255)]),
        (encode(Image.new("1", (1, 1), 1)), [(255, 255, 255)]),
        (encode(Image.fromarray(np.array([[0x80FF, 0xFFFF]], np.uint16))), [(128, 128, 128), (255, 255, 255)]),
        (encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
    ],
    ids=["alpha", "half", "palette", "grey", "grey alpha", "bits", "16 bits", "cmyk"],
)
def test_every_mode_becomes_rgb_on_white(data, expected):
    image = decode_image(data, "it")
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, np.array([expected], np.uint8))


def test_what_is_no_picture_is_a_bad_record_with_a_name(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = encode(noise, "JPEG")
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for data, name, reason in [
        (whole[: len(whole) // 2], "half.jpg", "truncated"),
        (encode(noise)[:600], "half.png", ""),
        (tmp_path / "text.png", "text.png", "no picture of a known format"),
        (tmp_path / "empty.png", "empty.png", "no picture of a known format"),
        (tmp_path / "gone.png", "gone.png", "No such file"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "float.tiff", "no known range"),
    ]:
        with pytest.raises(BadRecord, match=f"{name}: .*{reason}"):
            decode_image(data, name)


def test_stable_fraction_is_fixed_for_ever():
    assert stable_fraction("cat.png") == pytest.approx(0.7239, abs=1e-4)
    values = [stable_fraction(f"IMG_{k:05}.jpg") for k in range(4000)]
    assert 0.08 < np.mean(np.less(values, 0.1)) < 0.12
