"""Procedural pictures: what the labels say is what the pixels show."""

import numpy as np
import pytest

from jaxtok.data.shapes import COLOURS, SHAPES, Shapes


def owners(image):
    """Read back from pixels alone, [H W]: number of the nearest colour, -1 = background, -2 = an antialiased border."""
    palette = np.array(list(COLOURS.values()))  # [8 3]
    distance = np.abs(image[:, :, None].astype(int) - palette).max(axis=-1)  # [H W 8]
    owner = np.where(distance.min(axis=-1) <= 1, distance.argmin(axis=-1), -2)
    background = (np.abs(image.astype(int) - image[0, 0]) <= 1).all(axis=-1)
    return np.where(background, -1, owner)


@pytest.fixture(scope="module")
def source():
    return Shapes(size=64, n=60, seed=3)


def test_example(source):
    example = source[0]
    assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32 and example["patch_labels"].dtype == np.int32
    assert example["patch_labels"].shape == (8, 8)
    assert len(source.class_names) == len(SHAPES) * len(COLOURS)
    assert len(source) == 60
    with pytest.raises(IndexError):
        source[60]


def test_every_object_has_its_colour_and_the_label_is_the_largest(source):
    counts = set()
    for i in range(len(source)):
        example, (background, objects) = source[i], source.scene(i)
        counts.add(len(objects))
        owner, names = owners(example["image"]), list(COLOURS)
        np.testing.assert_array_equal(example["image"][0, 0], background)
        for o in objects:
            assert names[owner[int(o["y"] * 64), int(o["x"] * 64)]] == o["colour"]
            assert source.class_names[o["class_id"]] == f"{o['colour']} {o['shape']}"
        assert set(np.unique(owner)) - {-1, -2} == {names.index(o["colour"]) for o in objects}
        assert example["label"] == objects[0]["class_id"]
        area = {c: (owner == names.index(c)).sum() for c in {o["colour"] for o in objects}}
        assert area[objects[0]["colour"]] == max(area.values())
    assert counts == {1, 2, 3}


def test_shapes_have_their_areas():
    """The filled share of the circumscribed square tells the five shapes apart."""
    expected = {"circle": np.pi / 4, "square": 0.71**2, "triangle": 1.299 / 4, "diamond": 0.5, "cross": 0.499}
    seen = set()
    source = Shapes(size=128, n=80, seed=1)
    for i in range(len(source)):
        _, (main, *rest) = source.scene(i)
        if not rest:
            share = (owners(source[i]["image"]) != -1).sum() / (2 * main["radius"] * 128) ** 2
            assert share == pytest.approx(expected[main["shape"]], rel=0.12)
            seen.add(main["shape"])
    assert seen == set(SHAPES)


def test_a_triangle_points_up():
    source = Shapes(size=64, n=200, seed=0)
    i = next(i for i in range(200) if [o["shape"] for o in source.scene(i)[1]] == ["triangle"])
    rows = np.flatnonzero((owners(source[i]["image"]) >= 0).any(axis=1))
    width = [(owners(source[i]["image"])[r] >= 0).sum() for r in (rows[1], rows[-1])]
    assert width[0] < width[1] / 3


def test_patch_labels_are_what_most_pixels_show(source):
    kinds = set()
    for i in range(30):
        example, (_, objects) = source[i], source.scene(i)
        if len({o["colour"] for o in objects}) < len(objects):
            continue  # pixels alone cannot tell these objects apart
        owner = owners(example["image"]).reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(8, 8, 64)
        border = (owner == -2).sum(axis=-1)
        ids = [0] + [1 + o["class_id"] for o in objects]
        numbers = [-1] + [list(COLOURS).index(o["colour"]) for o in objects]
        pixels = np.stack([(owner == number).sum(axis=-1) for number in numbers])  # [objects h w]
        best = np.array(ids)[pixels.argmax(axis=0)]
        ranked = np.sort(pixels, axis=0)
        clear = ranked[-1] - ranked[-2] > border if len(ids) > 1 else np.ones((8, 8), bool)
        np.testing.assert_array_equal(example["patch_labels"][clear], best[clear])
        kinds |= set(example["patch_labels"][clear].tolist())
        assert clear.mean() > 0.8
    assert 0 in kinds and len(kinds) > 10


def test_captions(source):
    captions = {len(source.scene(i)[1]): (source[i]["caption"], source.scene(i)[1]) for i in range(60)}
    for count, (caption, objects) in captions.items():
        names = [("an " if o["colour"] == "orange" else "a ") + f"{o['colour']} {o['shape']}" for o in objects]
        expected = {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}[count]
        assert caption == expected.format(*names)


def test_deterministic_and_disjoint():
    def images(**kwargs):
        source = Shapes(size=32, n=40, **kwargs)
        return [source[i]["image"] for i in range(len(source))]

    train, again, other, test = images(), images(), images(seed=1), images(split="test")
    np.testing.assert_array_equal(train, again)
    assert not any(np.array_equal(a, b) for a, b in zip(train, other, strict=True))
    assert {int(x[0, 0, 0]) % 2 for x in train} == {0} and {int(x[0, 0, 0]) % 2 for x in test} == {1}
    assert Shapes(size=32, n=90)[7]["caption"] == Shapes(size=32, n=40)[7]["caption"]  # n changes no picture


@pytest.mark.parametrize(
    "kwargs, words",
    [({"split": "val"}, "no split 'val'"), ({"size": 8}, "at least 16"), ({"patch": 7}, "patch=7 must divide")],
)
def test_impossible_settings(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Shapes(**kwargs)
