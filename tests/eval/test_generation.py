"""Samples beside real pictures: what is counted, and what is said of it."""

import numpy as np

from jaxtok.eval import generation


def batch(rng, n, valid, **rows):
    mask = np.arange(n) < valid
    rows = {name: rng.integers(0, 3, n) for name in ("label", "class/a")} | rows | {"mask": mask}
    pictures = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
    return {"rows": rows, "features": rng.normal(size=(2, n, 5)), "pictures": pictures}


def test_a_pass_leaves_masked_rows_moments_of_halves_and_the_first_pictures():
    rng = np.random.default_rng(0)
    batches = [batch(rng, 8, 8, index=np.arange(8)), batch(rng, 8, 5, index=np.arange(8, 16))]
    rows, moments, shown = generation.collect(batches, ["a", "b"])
    kept = [b["rows"]["mask"] for b in batches]
    np.testing.assert_array_equal(rows["index"], np.arange(13))
    for i, title in enumerate("ab"):
        halves = moments[title]
        assert {m.count for m in halves} == {6, 7}
        features = np.concatenate([b["features"][i][k] for b, k in zip(batches, kept, strict=True)])
        np.testing.assert_allclose(generation.frechet.merge(*halves).mean, features.mean(0))
    labels = np.concatenate([b["rows"]["label"][k] for b, k in zip(batches, kept, strict=True)])
    pictures = np.concatenate([b["pictures"][k] for b, k in zip(batches, kept, strict=True)])
    for label, some in shown.items():
        np.testing.assert_array_equal(some, pictures[labels == label][: generation.SHOWN])


def test_without_features_or_labels_there_are_rows_and_one_column_of_pictures():
    rng = np.random.default_rng(0)
    one = batch(rng, 8, 3, index=np.arange(8)) | {"features": None}
    del one["rows"]["label"]
    rows, moments, shown = generation.collect([one], ["a", "b"])
    assert len(rows["index"]) == 3 and moments == {} and len(shown[0]) == 3


def test_copies_are_found_and_what_is_near_to_them_is_none():
    known = np.random.default_rng(0).integers(0, 1000, (50, 6))
    almost = known[7:9].copy()
    almost[:, 5] += 1
    np.testing.assert_array_equal(generation.nearest(np.concatenate([known[3:5], almost]), known), [6, 6, 5, 5])
    np.testing.assert_array_equal(generation.nearest(known[:4, :2], known), 2)  # shorter samples: the first codes
    metrics, part = generation.copies({"x": np.concatenate([known[3:4], almost])}, known)
    assert metrics["x"] == {"tokens": 6, "shared": 16 / 3, "copies": 1 / 3}
    assert part.tables["Codes in common"][0]["copies"] == "33.3 %"


def test_the_table_has_the_real_pictures_and_the_commonest_class_beside_the_samples():
    real = np.array([0, 0, 1, 0]), np.array([0, 0, 0, 1])
    named = {generation.REAL: real, "sample": (np.array([1, 0]), np.array([1, 1]))}
    metrics, part = generation.quality(named, {"sample": 2.0, "halves": 1.0}, "FD", ["text"])
    assert metrics[generation.REAL] == {"accuracy": 0.5, "balanced": 1 / 3}
    assert metrics["sample"] == {"accuracy": 0.5, "balanced": 0.5, "frechet": 2.0}
    assert metrics["commonest class"] == {"accuracy": 0.75, "balanced": 0.5}
    (table,) = part.tables.values()
    assert [line["pictures"] for line in table] == [generation.REAL, "sample", "halves", "always the commonest class"]
    assert [line["FD"] for line in table] == ["", "2.000", "1.000", ""]


def test_only_full_columns_are_drawn(tmp_path):
    full, few = [np.zeros((8, 8, 3), np.uint8)] * generation.SHOWN, [np.zeros((8, 8, 3), np.uint8)]
    assert generation.grid({0: few}, ["a"], tmp_path) == {} and not list(tmp_path.iterdir())
    assert list(generation.grid({0: few, 1: full}, ["a", "b"], tmp_path)) == [tmp_path / "samples.png"]
