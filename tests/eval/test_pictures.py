import numpy as np
import pytest
from PIL import Image

from jaxtok.eval.pictures import CELL, GAP, PAGE, grid


def load(path):
    return np.asarray(Image.open(path).convert("RGB"))


def cells(sheet, colour):
    """The bounding box (top, left, height, width) of the pixels of one colour."""
    rows, columns = np.nonzero((sheet == colour).all(-1))
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def solid(colour, n=1, h=32, w=32):
    return np.full((n, h, w, 3), colour, np.uint8)


def test_rows_are_pictures_and_columns_are_titles(tmp_path):
    red, green, blue, pink = (200, 0, 0), (0, 200, 0), (0, 0, 200), (250, 0, 250)
    first, second = np.concatenate([solid(red), solid(green)]), np.concatenate([solid(blue), solid(pink)])
    grid({"original": first, "4 tokens": second}, tmp_path / "grid.png")
    sheet = load(tmp_path / "grid.png")
    places = [cells(sheet, colour) for colour in (red, green, blue, pink)]
    assert {place[2:] for place in places} == {(96, 96)}  # 32 pixels are drawn three times as large
    top, left = places[0][:2]
    step = CELL + GAP
    down, right = top + step, left + step
    assert [place[:2] for place in places] == [(top, left), (down, left), (top, right), (down, right)]
    assert sheet.shape == (top + 2 * step, GAP + 2 * step, 3)


def test_pixels_stay_squares(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    grid({"a": picture}, tmp_path / "grid.png", scale=5)
    sheet = load(tmp_path / "grid.png")
    shown = sheet[-GAP - 160 : -GAP, GAP : GAP + 160]
    np.testing.assert_array_equal(shown, picture[0].repeat(5, 0).repeat(5, 1))


@pytest.mark.parametrize("h, w, shown", [(32, 32, (96, 96)), (128, 100, (128, 100)), (20, 40, (100, 200))])
def test_no_cell_is_smaller_than_the_eye_needs(tmp_path, h, w, shown):
    grid({"a": solid((200, 0, 0), h=h, w=w)}, tmp_path / "grid.png")
    assert cells(load(tmp_path / "grid.png"), (200, 0, 0))[2:] == shown


def test_titles_are_written_above_their_columns_and_make_room(tmp_path):
    colours = {"one": (200, 0, 0), "a title wider than its picture": (0, 200, 0), "two\nlines": (0, 0, 200)}
    grid({title: solid(colour) for title, colour in colours.items()}, tmp_path / "grid.png")
    sheet = load(tmp_path / "grid.png")
    top, *_ = cells(sheet, colours["one"])
    ink = (sheet[:top] != PAGE).any(-1)
    used = np.nonzero(ink.any(0))[0]
    assert used.min() >= GAP and used.max() < sheet.shape[1] - GAP  # nothing is cut off at the sides
    assert not ink[0].any() and not ink[-2:].any()  # nor runs into the pictures
    widths = np.diff([cells(sheet, colour)[1] for colour in colours.values()])
    assert widths.max() > CELL + GAP
    for colour in colours.values():
        _, left, _, width = cells(sheet, colour)
        assert ink[:, left : left + width].any()


def test_columns_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"column '2 tokens' is uint8 \(2, 32, 32, 3\)"):
        grid({"original": solid(0, n=3), "2 tokens": solid(0, n=2)}, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="column 'original' is float64"):
        grid({"original": np.zeros((1, 32, 32, 3))}, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="columns is empty"):
        grid({}, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
