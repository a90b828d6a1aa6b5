import numpy as np
import pytest

from jaxtok.eval.probe import WIDE, accuracies, latents, prefix, probe
from jaxtok.structs import Codes


def clouds(n, noise, seed=0, classes=3, width=8):
    """Gaussian clouds about fixed centres, far from zero and of unequal scales, as latents are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    y = rng.integers(0, classes, n)
    x = (centres[y] + noise * rng.normal(size=(n, width))) * np.logspace(-2, 2, width) + 50
    return x.astype(np.float32), y


def test_classes_that_a_line_separates_are_found_and_noise_is_not():
    found = probe(clouds(300, 0.3), clouds(200, 0.3, seed=1), 3)
    assert found["accuracy"] > 0.95 and found["balanced"] > 0.95  # 1.000 with five seeds
    x, y = clouds(300, 0.3)
    shuffled = np.random.default_rng(5).permutation(y)
    assert probe((x, shuffled), clouds(200, 0.3, seed=1), 3)["accuracy"] < 0.6  # 0.27 to 0.38
    assert found["chance"] == pytest.approx(1 / 3)
    majority = np.bincount(y).argmax()
    assert found["majority"] == np.mean(clouds(200, 0.3, seed=1)[1] == majority)


def test_the_penalty_is_strong_where_little_is_to_be_learned():
    """Many noisy features, few pictures: the chosen penalty is above the least, and the same seed chooses it again."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 200)).astype(np.float32), rng.integers(0, 2, 80)
    x[:, 0] += 2 * y
    first = probe((x, y), (x[:40], y[:40]), 2)
    assert first["l2"] > 1e-3 and first == probe((x, y), (x[:40], y[:40]), 2)


def test_features_that_never_change_are_harmless():
    x, y = clouds(200, 0.3)
    x[:, 2] = 7.0
    test_x, test_y = clouds(100, 0.3, seed=1)
    test_x[:, 2] = 1e6  # and if they do where it is tested, they say nothing
    assert probe((x, y), (test_x, test_y), 3)["accuracy"] > 0.9


def test_balanced_counts_every_class_the_same():
    labels = np.array([0] * 8 + [1] * 2)
    assert accuracies(np.zeros(10, int), labels) == {"accuracy": 0.8, "balanced": 0.5}


def test_a_prefix_is_the_first_tokens():
    z = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2) + 1  # [B N D]
    encode = lambda variables, batch: Codes(batch["image"], None, None)
    batch = {"image": z, "label": np.zeros(2), "mask": np.ones(2, bool)}
    found, *_ = latents(encode, (1, 3), {}, batch)
    np.testing.assert_array_equal(prefix(found, 0, 1)[0], [1, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(prefix(found, 1, 3)[1], z[1].ravel())
    wide = np.tile(z, (1, 1, WIDE // 6 + 1))
    found, *_ = latents(encode, (1, 2), {}, batch | {"image": wide})
    np.testing.assert_allclose(prefix(found, 1, 2), wide[:, :2].mean(1))


def test_labels_that_do_not_fit():
    x, y = clouds(10, 0.1)
    with pytest.raises(ValueError, match=r"held_out is features \(10, 8\) and labels \(9,\)"):
        probe((x, y), (x, y[:9]), 3)
    with pytest.raises(ValueError, match=r"0 ... 1"):
        probe((x, y), (x, y), 2)
