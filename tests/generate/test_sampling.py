"""Which codes may be drawn, guidance and its schedules, against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate import sampling


@pytest.fixture
def logits():
    return 2 * jax.random.normal(jax.random.key(0), (50, 16))


@pytest.mark.parametrize("k", [1, 3, 15])
def test_top_k_keeps_the_k_largest(logits, k):
    kept = np.isfinite(sampling.filter_top_k(logits, k))
    assert (kept.sum(-1) == k).all()
    assert np.array_equal(kept, np.argsort(np.argsort(-logits, -1), -1) < k)


def test_top_k_keeps_what_equals_the_last_and_0_or_all_keeps_all(logits):
    ties = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0]])
    assert np.isfinite(sampling.filter_top_k(ties, 2)).tolist() == [[False, True, True, True, True]]
    for k in (0, 16, 99):
        assert sampling.filter_top_k(logits, k) is logits


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_top_p_keeps_the_least_set_that_has_more_than_p(logits, p):
    kept, mass = np.isfinite(sampling.filter_top_p(logits, p)), np.asarray(jax.nn.softmax(logits), np.float64)
    inside, least = np.where(kept, mass, 0).sum(-1), np.where(kept, mass, 1).min(-1)
    assert (np.where(kept, 0, mass).max(-1) < least).all()  # the likeliest,
    assert (inside > p).all()  # enough of them,
    assert (inside - least <= p + 1e-6).all()  # and not without the last


def test_top_p_treats_equals_alike_and_1_keeps_all(logits):
    assert np.isfinite(sampling.filter_top_p(jnp.zeros((1, 4)), 0.3)).all()
    assert sampling.filter_top_p(logits, 1.0) is logits


def test_top_p_counts_only_what_top_k_left():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))  # of the first two, 0.57 is the first
    assert np.isfinite(sampling.filtered(logits, 1.0, 2, 0.5)).tolist() == [[True, False, False, False]]
    assert np.isfinite(sampling.filtered(logits, 1.0, 0, 0.5)).tolist() == [[True, True, False, False]]


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draw = jax.jit(partial(sampling.draw, temperature=0.5, top_k=3))
    codes = draw(jax.random.key(0), jnp.tile(logits, (20_000, 1)))
    law = np.array([0.25, 0.09, 0.0225, 0]) / 0.3625  # squares, for the temperature halves
    counted = np.bincount(codes, minlength=4) / 20_000
    assert codes.dtype == jnp.int32 and counted[3] == 0
    np.testing.assert_allclose(counted, law, atol=5 * 0.5 / np.sqrt(20_000))  # five standard deviations


def test_temperature_0_takes_the_likeliest(logits):
    assert np.array_equal(sampling.draw(jax.random.key(0), logits, 0, 3, 0.5), logits.argmax(-1))


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=-0.1), dict(top_p=1.5)])
def test_options_out_of_range_are_refused(logits, wrong):
    with pytest.raises(ValueError, match="temperature=.* must be 0 or more, and top_p=.* in 0 ... 1"):
        sampling.draw(jax.random.key(0), logits, **wrong)


def test_draws_are_those_of_categorical_and_the_likeliest_is_the_argmax():
    logits = jnp.array([[0.0, 3.0, 3.0, -jnp.inf], [-jnp.inf] * 4, [2.0, 1.0, 0.0, 2.0]])
    assert sampling.likeliest(logits).tolist() == logits.argmax(-1).tolist() == [1, 0, 0]
    assert sampling.likeliest(logits).dtype == jnp.int32
    many = 2 * jax.random.normal(jax.random.key(1), (500, 37))
    draws = sampling.draw(jax.random.key(2), many, 0.7)
    assert np.array_equal(draws, jax.random.categorical(jax.random.key(2), many / 0.7))


def test_gumbel_is_finite_and_has_the_moments_of_its_law():
    assert np.isfinite(sampling.gumbel(jnp.array([0.0, 1e-30, 0.5, 1.0]))).all()
    noise = sampling.gumbel(jax.random.uniform(jax.random.key(0), (100_000,)))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - np.pi / 6**0.5) < 0.02


def test_guidance_extrapolates():
    cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])
    assert sampling.guide(cond, uncond, 1.0).tolist() == [1, 2]
    assert sampling.guide(cond, uncond, 0.0).tolist() == [0, 4]
    assert sampling.guide(cond, uncond, 3.0).tolist() == [3, -2]


def test_schedules():
    at = lambda schedule, **options: [round(float(schedule(i, 4, **options)), 4) for i in range(4)]
    assert at(sampling.constant, scale=3.0) == [3, 3, 3, 3]
    assert at(sampling.linear, scale=5.0) == [1, 2, 3, 4]
    assert at(sampling.linear, scale=0.0, start=4.0) == [4, 3, 2, 1]
    assert at(sampling.power_cosine, scale=5.0) == [1, 1.5858, 3, 4.4142]
    assert at(sampling.power_cosine, scale=5.0, power=0.0) == [5, 5, 5, 5]
    assert at(sampling.interval, scale=5.0, first=1, last=2) == [1, 5, 5, 1]
    assert at(sampling.interval, scale=5.0, first=2) == [1, 1, 5, 5]
    assert sampling.scale_at(1.5, 3, 4) == 1.5
    assert sampling.scale_at(partial(sampling.linear, scale=5.0), 3, 4) == 4


def test_pairs_stand_side_by_side():
    a, b = jnp.arange(6.0).reshape(3, 2), -jnp.arange(6.0).reshape(3, 2)
    pairs = sampling.pair(a, b)
    assert pairs[:2].tolist() == [a[0].tolist(), b[0].tolist()]
    assert all(np.array_equal(x, y) for x, y in zip(sampling.unpair(pairs), (a, b), strict=True))
