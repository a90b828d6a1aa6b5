"""Levels of a Gaussian shape: what they lose on normal latents, and which channel comes first."""

import jax
import numpy as np
import pytest

from jaxtok.quantizers.post_training import GaussianLevels, channel_order, gaussian_levels

NORMAL = jax.random.normal(jax.random.key(0), (4, 2500, 2))


@pytest.mark.parametrize(
    "deviation, bits, decibels",
    [(1.0, 3, 13.9), (1.0, 4, 19.9), (1.0, 5, 25.8), (1.0, 6, 31.8), (5 / 3, 6, 24.0)],
)
def test_signal_to_noise_on_normal_latents(deviation, bits, decibels):
    """Figures of the levels for an infinite sample; 20,000 values give them to 0.1 dB (three seeds: within 0.25)."""
    x = deviation * NORMAL
    z = GaussianLevels(2, bits).apply({}, x).z
    found = 10 * np.log10(np.square(x).mean() / np.square(x - z).mean())
    np.testing.assert_allclose(found, decibels, atol=0.35)


def test_levels_are_used_evenly_where_the_latents_have_the_deviation_they_are_made_for():
    indices = GaussianLevels(2, 4).apply({}, 5 / 3 * NORMAL).indices
    share = np.bincount(np.asarray(indices).ravel(), minlength=16) / indices.size
    np.testing.assert_allclose(share, 1 / 16, atol=0.02)
    narrow = np.asarray(GaussianLevels(2, 4, low=-3.0, high=3.0).apply({}, NORMAL).indices)
    np.testing.assert_allclose(np.bincount(narrow.ravel(), minlength=16) / indices.size, share, atol=0.005)


def test_levels_are_means_of_their_cells():
    levels = gaussian_levels(3, reach=3.0)
    x = np.sort(np.asarray(NORMAL).ravel())
    x = x[np.abs(x) <= 3]
    cells = np.array_split(x, 8)  # equally likely
    np.testing.assert_allclose(levels, [cell.mean() for cell in cells], atol=0.05)
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-12)


def test_the_nearest_level_is_taken_and_the_outermost_beyond():
    module = GaussianLevels(1, 4)
    levels = module.levels()
    x = np.linspace(-9, 9, 1001, dtype=np.float32).reshape(1, -1, 1)
    codes = module.apply({}, x)
    np.testing.assert_array_equal(codes.indices[0, :, 0], np.abs(x[0] - levels).argmin(-1))
    assert codes.indices.min() == 0 and codes.indices.max() == 15
    np.testing.assert_array_equal(jax.grad(lambda x: module.apply({}, x).z.sum())(x), np.ones_like(x))


def test_smooth_channels_come_first():
    rng = np.random.default_rng(0)
    place = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    waves = [np.sin(k * place)[:, None] + np.sin(k * place) + 0.01 * rng.normal(size=(16, 16)) for k in (3, 1, 6, 2)]
    latents = np.stack(waves, -1)[None] * [1.0, 10.0, 0.1, 1.0] + 5  # neither scale nor mean decide
    np.testing.assert_array_equal(channel_order(latents), [1, 3, 0, 2])
