"""Continuous tokens, and the divergence that holds them near the prior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.losses import quantizer
from jaxtok.nn import gaussian
from jaxtok.quantizers.gaussian import Gaussian


def latents(mean, logvar, shape=(2, 3, 1)):
    return jnp.concatenate([jnp.full(shape, mean), jnp.full(shape, logvar)], -1)


def train(x, seed=0):
    return Gaussian().apply({}, x, train=True, rngs={"train": jax.random.key(seed)})


def test_the_divergence_of_the_prior_from_itself_is_zero():
    assert float(Gaussian().apply({}, latents(0.0, 0.0)).aux["kl"]) == 0


@pytest.mark.parametrize("mean, variance", [(1.0, 1.0), (0.0, 0.25), (-2.0, 3.0)])
def test_the_divergence_is_that_of_numerical_integration_summed_over_a_picture(mean, variance):
    x = np.linspace(-30, 30, 200_001)
    density = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    log_ratio = -((x - mean) ** 2) / (2 * variance) - np.log(variance) / 2 + x**2 / 2
    one = np.sum(density * log_ratio) * (x[1] - x[0])
    kl = Gaussian().apply({}, latents(mean, np.log(variance))).aux["kl"]
    np.testing.assert_allclose(kl, 3 * one, rtol=1e-5)  # three tokens a picture


def test_it_is_averaged_over_pictures_and_a_loss():
    x = jnp.concatenate([latents(0.0, 0.0, (1, 3, 1)), latents(2.0, 0.0, (1, 3, 1))])
    codes = Gaussian().apply({}, x)
    np.testing.assert_allclose(gaussian.kl(*gaussian.moments(x)), [0, 6])
    assert float(quantizer.aux({"codes": codes}, None, term="kl")) == 3


def test_training_draws_and_evaluation_takes_the_mean():
    """5000 draws of N(3, e^-2); the bounds are six standard errors."""
    x = latents(3.0, -2.0, (1, 5000, 1))
    codes, std = train(x), np.exp(-1)
    assert codes.z.shape == (1, 5000, 1) and codes.indices is None and codes.keep.all()
    assert abs(codes.z.mean() - 3) < 6 * std / np.sqrt(5000)
    assert abs(codes.z.std() / std - 1) < 6 / np.sqrt(10_000)
    np.testing.assert_allclose(codes.aux["std"], codes.z.std(), rtol=1e-5)
    assert (train(x, seed=1).z != codes.z).any()
    np.testing.assert_array_equal(Gaussian().apply({}, x).z, x[..., :1])


def test_the_gradient_reaches_mean_and_variance():
    x = latents(0.5, 0.5)
    gradient = jax.grad(lambda x: jnp.square(train(x).z).sum())(x)
    assert np.all(gradient != 0)
    divergence = jax.grad(lambda x: train(x).aux["kl"])(x)
    np.testing.assert_allclose(divergence[..., 0], 0.5 / 2)  # the mean itself, over two pictures
    np.testing.assert_allclose(divergence[..., 1], 0.5 * (np.exp(0.5) - 1) / 2, rtol=1e-6)


def test_latents_of_half_precision_are_computed_in_single():
    x = latents(0.0, -60.0).astype(jnp.bfloat16)
    codes = train(x)
    assert codes.z.dtype == jnp.float32 and codes.aux["kl"].dtype == jnp.float32
    np.testing.assert_allclose(codes.aux["kl"], 3 * 0.5 * (np.exp(-30) - 1 + 30), rtol=1e-6)  # clamped


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="gives 3 channels: set the encoder's `out` to twice"):
        Gaussian().apply({}, jnp.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="continuous: they have no indices"):
        Gaussian().apply({}, jnp.zeros((1, 2), int), method="lookup")
    assert Gaussian().vocabulary is None
