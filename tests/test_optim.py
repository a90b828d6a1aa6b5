"""Rates, decay masks, rates per parameter, EMA: against values by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import optim

PARAMS = {"encoder": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "decoder": {"kernel": jnp.ones(3)}}


def test_schedule_warms_up_and_falls():
    rate = optim.schedule(110, peak_lr=2.0, warmup=10, end=0.1)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 60, 110)], [0, 1, 2, 1.1, 0.2], rtol=1e-5)
    constant = optim.schedule(110, peak_lr=2.0, warmup=10, decay="constant")
    assert constant(10) == constant(110) == 2.0
    with pytest.raises(ValueError, match='"cosine" or "constant", not "linear"'):
        optim.schedule(10, peak_lr=1.0, decay="linear")


def test_decay_spares_biases_and_rates_differ_by_path():
    tx = optim.adamw(lambda step: 0.1, weight_decay=0.5, lr_factors=(("^encoder/", 0.01),))
    zero = {"encoder": {"kernel": jnp.zeros(3), "bias": jnp.zeros(3)}, "decoder": {"kernel": jnp.zeros(3)}}
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["decoder"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.1 * 0.5 * 0.01, rtol=1e-6)
    assert not updates["encoder"]["bias"].any()


def test_first_step_of_adam_is_the_rate_and_clipping_is_by_the_global_norm():
    grads = {"encoder": {"kernel": jnp.full(3, 30.0), "bias": jnp.zeros(3)}, "decoder": {"kernel": jnp.zeros(3)}}
    tx = optim.adamw(lambda step: 0.1, clip=1.0, eps=1.0)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    clipped = 1 / np.sqrt(3)
    np.testing.assert_allclose(updates["encoder"]["kernel"], -0.1 * clipped / (clipped + 1), rtol=1e-5)


def test_a_regex_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter matches '\^encodr'; the nearest paths are encoder/bias, enc"):
        optim.adamw(lambda step: 0.1, lr_factors=(("^encodr", 0.1),)).init(PARAMS)
    with pytest.raises(ValueError, match="no parameter matches"):
        optim.adamw(lambda step: 0.1, weight_decay=0.1, decay=("/krnl$",)).init(PARAMS)


def test_a_regex_behind_one_that_takes_all_of_its_own_is_an_error_of_another_kind():
    rules = (("kernel", 0.1), ("^encoder/kernel", 0.2), ("^encoder", 0.3))
    with pytest.raises(ValueError, match=r"rules before '\^encoder/kernel' match all its parameters"):
        optim.per_parameter(PARAMS, rules, 1.0)
    tree = optim.per_parameter(PARAMS, (rules[0], rules[2]), 1.0)
    assert tree == {"encoder": {"kernel": 0.1, "bias": 0.3}, "decoder": {"kernel": 0.1}}


def test_ema_forgets_its_start_and_then_averages():
    ema, params = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    np.testing.assert_allclose(optim.ema_update(ema, params, 0, 0.99)["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(optim.ema_update(ema, params, 10_000, 0.99)["w"], 0.01, rtol=1e-4)


def test_a_critic_is_clipped_by_its_own_norm():
    """The encoder's gradient, of norm 1, is left alone beside one a hundred times as large."""
    params = {"encoder": {"kernel": jnp.zeros(4)}, "objective": {"gan": {"kernel": jnp.zeros(4)}}}
    grads = {"encoder": {"kernel": jnp.full(4, 0.5)}, "objective": {"gan": {"kernel": jnp.full(4, 50.0)}}}

    def clipped(**options):
        tx = optim._clip(1.0, **options)
        return tx.update(grads, tx.init(params), params)[0]

    ours = clipped(apart=("^objective/gan/",))
    np.testing.assert_allclose(ours["encoder"]["kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ours["objective"]["gan"]["kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(clipped(apart=())["encoder"]["kernel"], 0.005, rtol=1e-3)
    with pytest.raises(ValueError, match="no parameter matches .*objective/critic"):
        clipped(apart=("^objective/critic/",))
