"""Codes as digits: a law over codes like any other, and the same one in training, on a cache and in a draw."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate import heads, sampling
from jaxtok.generate.heads import Digits
from jaxtok.quantizers.fsq import FSQ
from tests.generate import models
from tests.generate.models import K, N, run

LEVELS = (3, 2, 2)
RISING = partial(sampling.linear, scale=4.0)


@pytest.fixture(scope="module")
def head():
    module = Digits(LEVELS, 8)
    x = jax.random.normal(jax.random.key(0), (5, 8))
    params = module.init(jax.random.key(1), x, jnp.zeros(5, jnp.int32), method="score")
    leaves, tree = jax.tree.flatten(module.init(jax.random.key(1), jnp.zeros(5, jnp.int32), method="embed"))
    params = {"params": params["params"] | tree.unflatten(leaves)["params"]}
    return module, models.noisy(params, 1.0), x  # heads begin at zero


def test_digits_are_those_of_fsq():
    levels, codes = (8, 8, 8, 5, 5, 5), jnp.arange(0, 64_000, 997)
    digits = heads.split(codes, levels)
    np.testing.assert_array_equal(heads.join(digits, levels), codes)
    of_fsq = FSQ(levels).apply({}, codes[None], method="lookup")[0] * (np.array(levels) // 2) + np.array(levels) // 2
    np.testing.assert_allclose(np.stack(digits, -1), of_fsq, atol=1e-5)


def test_probabilities_of_all_codes_sum_to_one_and_no_digit_is_independent(head):
    module, params, x = head
    every = jnp.broadcast_to(jnp.arange(K)[:, None], (K, 5))
    p = jnp.exp(-run(module, "score", params, jnp.broadcast_to(x, (K, 5, 8)), every).loss)  # [K 5]
    np.testing.assert_allclose(p.sum(0), 1, rtol=1e-5)
    table = p.reshape(2, 2, 3, 5)  # the first digit is the least significant
    product = table.sum((0, 1)) * table.sum((0, 2))[:, None] * table.sum((1, 2))[:, None, None]
    assert np.abs(table - product).max() > 0.02


def test_draws_follow_the_probabilities(head):
    """4000 draws at one feature: total variation under 0.05; a law over 12 codes gives 0.02 to 0.03 by chance."""
    module, params, x = head
    p = jnp.exp(-run(module, "score", params, jnp.broadcast_to(x[:1], (K, 8)), jnp.arange(K)).loss)
    draw = lambda logits, g: sampling.draw(jax.random.fold_in(jax.random.key(3), g), logits)
    codes = module.apply(params, jnp.broadcast_to(x[:1], (4000, 8)), draw, method="draw")
    assert np.abs(np.bincount(codes, minlength=K) / 4000 - p).sum() / 2 < 0.05


def test_right_is_a_code_of_which_every_digit_is(head):
    module, params, x = head
    codes = module.apply(params, x, lambda logits, g: logits.argmax(-1), method="draw")
    np.testing.assert_array_equal(run(module, "score", params, x, codes).correct, 1)
    *same, last = heads.split(codes, LEVELS)
    other = heads.join([*same, 1 - last], LEVELS)
    np.testing.assert_array_equal(run(module, "score", params, x, other).correct, 0)


def test_sampling_on_a_cache_is_sampling_from_the_whole_prefix():
    """Digit for digit, guided by a schedule."""
    module, rng = models.ar("digits"), jax.random.key(7)
    params, (_, condition) = models.parameters(module), models.batch(module)
    options = dict(temperature=0.8, top_k=2, guidance=RISING)
    codes = run(module, "sample", params, rng, condition, **options)
    assert len(np.unique(codes)) > 3
    given = run(module, "__call__", params, codes, condition)
    null = run(module, "__call__", params, codes, condition, null=jnp.ones(4, bool))
    for i in range(N):

        def digit(logits, g, i=i):
            logits = sampling.guide_pairs(logits, RISING, i, N)
            chosen = sampling.draw(jax.random.fold_in(jax.random.fold_in(rng, i), g), logits, 0.8, 2)
            return sampling.pair(chosen, chosen)

        pairs = module.apply(params, sampling.pair(given[:, i], null[:, i]), digit, method="_draw")
        np.testing.assert_array_equal(codes[:, i], sampling.unpair(pairs)[0])


def test_levels_that_do_not_make_the_vocabulary_are_refused():
    module = models.ar("digits", levels=(3, 2))
    with pytest.raises(ValueError, match="make 6 codes, and not 12"):
        models.parameters(module)
