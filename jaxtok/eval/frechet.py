"""Fréchet distance between two sets of features: their Gaussians' (Heusel et al. 2017, arXiv 1706.08500, equation 6).

All of it is float64 on the host. Features arrive in batches and only their moments are kept, so a set has any size.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """What a set of features leaves behind: how many, their mean, and the sum of outer products of deviations."""

    count: int
    mean: np.ndarray  # float64 [D]
    m2: np.ndarray  # float64 [D D]


def empty(width: int) -> Moments:
    """The moments of no features of this width."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


def update(moments: Moments, features: np.ndarray, mask: np.ndarray | None = None) -> Moments:
    """The moments with a batch added.

    Args:
      features: [B D] of any float type.
      mask: bool [B], which rows count; all by default. The others may hold anything: a last batch is padded with them.

    Raises:
      ValueError for other shapes and for features that are not finite; the message says which row.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(moments.mean):
        raise ValueError(f"features are [B {len(moments.mean)}] here, got {features.shape}")
    rows = np.arange(len(features))
    if mask is not None:
        if np.shape(mask) != rows.shape or np.asarray(mask).dtype != bool:
            raise ValueError(f"the mask of {len(rows)} features is bool [{len(rows)}], got {np.shape(mask)}")
        rows = rows[np.asarray(mask)]
    features = features[rows]
    wrong = rows[~np.isfinite(features).all(1)]
    if len(wrong):
        raise ValueError(f"features of row {wrong[0]} are not finite: look at that picture")
    if not len(features):
        return moments
    mean = features.mean(0)
    deviations = features - mean
    return merge(moments, Moments(len(features), mean, deviations.T @ deviations))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub, LeVeque 1979); no difference of large sums is taken."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of widths {len(a.mean)} and {len(b.mean)} do not merge: two extractors made them")
    count = a.count + b.count
    if not count:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + np.outer(delta, delta) * (a.count * b.count / count))


def distance(a: Moments, b: Moments) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), with the unbiased covariances A and B. At least 0.

    The trace of the root is the sum of the singular values of F^T G, where A = F F^T and B = G G^T come from an
    eigen-decomposition without its zeros. So it is real and exact to rounding where N is far below D, too. There the
    distance is biased: it is high for equal distributions, and falls about as 1/N.

    Raises:
      ValueError for fewer than two features on a side, or other widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of widths {len(a.mean)} and {len(b.mean)} have no distance: two extractors")
    f, g = _root(a), _root(b)
    mean = np.square(a.mean - b.mean).sum()
    trace = np.square(f).sum() + np.square(g).sum() - 2 * np.linalg.svd(f.T @ g, compute_uv=False).sum()
    return float(max(mean + trace, 0))


def variance(a: Moments) -> float:
    """The trace of the covariance. A distance divided by the reference's compares across extractors."""
    return float(np.trace(_covariance(a)))


def first_half(indices: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which examples of a stream are in the first of two random halves, by their index: bool, shape of `indices`.

    Of every two neighbours, 2k and 2k + 1, a coin of (seed, k) sends one to each half, so the halves differ in size by
    one at most, however the stream is cut into batches. Keep the two halves' moments: `merge` gives the whole, and
    `distance` the floor.
    """
    indices = np.asarray(indices, np.uint64)
    x = (indices >> np.uint64(1)) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's mixing
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    coin = (x >> np.uint64(63)) & np.uint64(1)
    return (coin ^ (indices & np.uint64(1))).astype(bool)


def _covariance(a):
    if a.count < 2:
        raise ValueError(f"a covariance needs two features at least, and there is {a.count}: evaluate more pictures")
    return a.m2 / (a.count - 1)


def _root(a):
    """F [D r] with F F^T = the covariance; eigenvalues that are rounding errors are left out."""
    values, vectors = np.linalg.eigh(_covariance(a))
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
