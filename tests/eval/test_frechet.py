"""The distance against the formula written out with scipy, closed forms, and what a stream may look like."""

import numpy as np
import pytest
import scipy.linalg

from jaxtok.eval.frechet import Moments, distance, empty, first_half, merge, update, variance


def gaussian(n, width, seed=0, mean=0.0):
    """Correlated features, float32 as extractors give them."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width))
    return (rng.normal(size=(n, width)) @ mix + mean).astype(np.float32)


def of(features, chunks=1):
    moments = empty(features.shape[1])
    for part in np.array_split(features, chunks):
        moments = update(moments, part)
    return moments


def written_out(x, y):
    """Heusel et al., equation 6, by the root of a matrix that is not symmetric."""
    a, b = (np.cov(z.astype(np.float64), rowvar=False) for z in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    return np.square(x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)).sum() + np.trace(a + b - 2 * root)


def known(mean, covariance, count=10):
    return Moments(count, np.asarray(mean, np.float64), np.asarray(covariance, np.float64) * (count - 1))


# ---- moments ----


def test_moments_are_those_of_the_whole():
    x = gaussian(50, 6)
    moments = of(x, 7)
    assert moments.count == 50 and moments.mean.dtype == moments.m2.dtype == np.float64
    np.testing.assert_allclose(moments.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(moments.m2 / 49, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    assert variance(moments) == pytest.approx(np.var(x.astype(np.float64), axis=0, ddof=1).sum(), rel=1e-10)


def test_chunks_make_no_difference():
    x, y = gaussian(64, 5, 0), gaussian(64, 5, 1, 0.3)
    whole, parts = of(x), of(x, 8)
    np.testing.assert_allclose(parts.m2, whole.m2, rtol=1e-10)
    assert distance(of(y), parts) == pytest.approx(distance(of(y), whole), rel=1e-10)


def test_merging_in_any_order_gives_the_whole():
    x = gaussian(41, 4)
    a, b, c = (of(part) for part in np.split(x, [3, 20]))
    whole = of(x)
    for merged in (merge(merge(a, b), c), merge(a, merge(c, b)), merge(c, merge(empty(4), merge(b, a)))):
        assert merged.count == 41
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-10)


def test_far_from_zero_no_digits_are_lost():
    """Where sums of squares would lose all of them: the spread is 1e-6 of the mean."""
    x = 1e6 + np.random.default_rng(0).normal(size=(500, 3))
    moments = of(x, 50)
    np.testing.assert_allclose(moments.m2 / 499, np.cov(x - 1e6, rowvar=False), rtol=1e-6, atol=1e-6)


def test_masked_rows_count_for_nothing():
    x = gaussian(10, 3)
    padded = np.concatenate([x[:7], np.full((3, 3), np.nan, np.float32)])
    masked = update(empty(3), padded, np.arange(10) < 7)
    np.testing.assert_array_equal(masked.m2, of(x[:7]).m2)
    assert masked.count == 7
    assert update(masked, padded, np.zeros(10, bool)) is masked


@pytest.mark.parametrize(
    "features, mask, says",
    [
        (np.zeros((4, 2)), None, r"features are \[B 3\] here, got \(4, 2\)"),
        (np.zeros(3), None, r"got \(3,\)"),
        (np.zeros((4, 3)), np.ones(3, bool), r"the mask of 4 features is bool \[4\]"),
        (np.zeros((4, 3)), np.ones(4), "is bool"),
        (np.array([[0, 0, 0], [1, np.nan, 0]]), None, "of row 1 are not finite"),
    ],
)
def test_what_does_not_fit_is_an_error(features, mask, says):
    with pytest.raises(ValueError, match=says):
        update(empty(3), features, mask)


# ---- distance ----


def test_the_distance_is_the_formula():
    x, y = gaussian(60, 8, 0), gaussian(90, 8, 1, 0.5)
    y[:, 0] *= 3
    assert distance(of(x), of(y)) == pytest.approx(written_out(x, y), rel=1e-8)
    assert distance(of(x), of(y)) == pytest.approx(distance(of(y), of(x)), rel=1e-10)


def test_the_distance_of_known_gaussians():
    eye = np.eye(3)
    assert distance(known([0, 0, 0], eye), known([1, 2, 2], eye)) == pytest.approx(9)
    # covariances that commute: the squared differences of their standard deviations
    a, b = known([0, 0, 0], np.diag([4.0, 9, 1])), known([0, 1, 0], np.diag([1.0, 1, 0]))
    assert distance(a, b) == pytest.approx(1 + 1 + 4 + 1)
    # and turned together, the same
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a, b = (known(turn @ m.mean, turn @ m.m2 @ turn.T / 9) for m in (a, b))
    assert distance(a, b) == pytest.approx(7)
    # two that do not commute: A = diag(1, 4), B = A turned by 45 degrees; tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    a = np.diag([1.0, 4])
    b = np.array([[2.5, 1.5], [1.5, 2.5]])
    expected = 10 - 2 * np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    assert distance(known([0, 0], a), known([0, 0], b)) == pytest.approx(expected)


def test_nothing_is_lost_where_there_are_far_fewer_features_than_dimensions():
    """N = 5 in 40 dimensions, where most eigenvalues are 0. The trace of the root is that of a 5 x 5 matrix there."""
    x, y = gaussian(5, 40, 0), gaussian(6, 40, 1)
    centred = [(z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x.astype(np.float64), y.astype(np.float64))]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = np.square(x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)).sum()
    expected = means + sum(np.square(z).sum() for z in centred) - 2 * root
    assert distance(of(x), of(y)) == pytest.approx(expected, rel=1e-9)
    assert distance(of(x), of(x)) < 1e-9 * variance(of(x))
    constant = of(np.ones((5, 40)))
    assert distance(constant, constant) == 0
    assert distance(constant, of(x)) == pytest.approx(
        variance(of(x)) + np.square(x.mean(0, dtype=np.float64) - 1).sum(), rel=1e-9
    )


def test_a_distance_needs_two_features_of_one_width():
    with pytest.raises(ValueError, match="two features at least, and there is 1"):
        distance(of(np.zeros((1, 3))), of(np.zeros((5, 3))))
    with pytest.raises(ValueError, match="widths 3 and 4 have no distance"):
        distance(of(np.zeros((5, 3))), of(np.zeros((5, 4))))
    with pytest.raises(ValueError, match="widths 3 and 4 do not merge"):
        merge(empty(3), empty(4))


# ---- the floor ----


@pytest.mark.parametrize("seed", range(3))
def test_halves_are_random_equal_and_the_same_in_any_order(seed):
    first = first_half(np.arange(10_000), seed)
    assert first.sum() == 5000 and (first[::2] != first[1::2]).all()
    assert abs(first[::2].mean() - 0.5) < 0.03  # four standard deviations
    assert abs((first[:-2:2] == first[2::2]).mean() - 0.5) < 0.03
    order = np.random.default_rng(0).permutation(10_000)
    np.testing.assert_array_equal(first_half(order, seed), first[order])
    assert 0.4 < (first == first_half(np.arange(10_000), seed + 1)).mean() < 0.6
    assert first_half(np.arange(5), seed).sum() in (2, 3)


def floor(x):
    """The distance between two random halves of a set [N D]."""
    first = first_half(np.arange(len(x)))
    return distance(of(x[first]), of(x[~first]))


def test_the_floor_falls_with_the_number_of_features_and_streams():
    floors = [floor(gaussian(n, 16)) / variance(of(gaussian(n, 16))) for n in (40, 400, 4000)]
    # Over 20 seeds: .31 to .49, .022 to .048, .0027 to .0045, and never less than 5 times the next.
    assert floors[0] > 3 * floors[1] > 9 * floors[2] > 0
    x = gaussian(64, 16)
    halves = [empty(16), empty(16)]
    for indices in np.array_split(np.arange(64), 5):
        first = first_half(indices)
        halves = [update(half, x[indices], mask) for half, mask in zip(halves, (first, ~first), strict=True)]
    assert distance(*halves) == pytest.approx(floor(x), rel=1e-9)
    np.testing.assert_allclose(merge(*halves).m2, of(x).m2, rtol=1e-10)
