"""Randomised autoregression: what a token reads in any order, and that training's orders grow regular."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate import rar, sampling
from tests.generate import models
from tests.generate.models import CLASSES, N, run

RNG = jax.random.key(7)
RISING = partial(sampling.power_cosine, scale=4.0, power=1.5)


@pytest.fixture(scope="module")
def trained():
    """(module, parameters, codes, condition)."""
    module = models.rar(null_rate=0.0)
    return module, models.parameters(module), *models.batch(module)


def orders(seed, size=4):
    return jnp.argsort(jax.random.uniform(jax.random.key(seed), (size, N)), -1)


def test_sampling_on_a_cache_is_sampling_from_the_whole_prefix(trained):
    module, params, _, condition = trained
    law = dict(temperature=0.8, top_k=7, top_p=0.95)
    codes, logits = run(module, "rollout", params, RNG, condition, guidance=RISING, **law)
    full = run(module, "__call__", params, codes, condition)
    none = run(module, "__call__", params, codes)
    full = sampling.guide(full, none, RISING(jnp.arange(N), N)[:, None])
    np.testing.assert_allclose(logits, full, atol=1e-5)
    for i in range(N):
        np.testing.assert_array_equal(codes[:, i], sampling.draw(jax.random.fold_in(RNG, i), full[:, i], **law))
    greedy = run(module, "sample", params, RNG, condition, temperature=0)
    np.testing.assert_array_equal(greedy, run(module, "__call__", params, greedy, condition).argmax(-1))
    short = run(module, "sample", params, RNG, condition, tokens=4, guidance=RISING, **law)
    np.testing.assert_array_equal(short, codes[:, :4])


def test_null_is_no_condition(trained):
    module, params, codes, condition = trained
    none = run(module, "__call__", params, codes)
    for other in (dict(null=jnp.ones(4, bool)), {}):
        given = condition if other else {"label": jnp.full(4, CLASSES)}
        np.testing.assert_array_equal(run(module, "__call__", params, codes, given, **other), none)
    assert np.abs(none - run(module, "__call__", params, codes, condition)).max() > 0.1
    unguided = run(module, "sample", params, RNG, batch=4)
    np.testing.assert_array_equal(unguided, run(module, "sample", params, RNG, condition, guidance=lambda i, n: 0.0))


def test_places_have_no_meaning_of_their_own(trained):
    """The same tokens read in the same sequence score the same, wherever they stand, if the tables move with them."""
    module, params, codes, condition = trained
    order, where = orders(1), jnp.argsort(jax.random.uniform(jax.random.key(5), (N,)))  # place i becomes where[i]
    moved = {"params": dict(params["params"])}
    for name, first in (("pos_embed", 2), ("target_embed", 0)):
        table = params["params"][name]
        moved["params"][name] = table.at[first + where].set(table[first:])
    call = lambda params, codes, order: run(module, "__call__", params, codes, condition, order=order)
    logits = call(params, codes, order)
    again = call(moved, jnp.zeros_like(codes).at[:, where].set(codes), where[order])
    np.testing.assert_allclose(again, logits, atol=1e-6)
    assert np.abs(call(params, codes, where[order]) - logits).max() > 0.1


def test_a_token_reads_those_before_it_in_the_order_and_knows_where_it_will_stand(trained):
    module, params, _, _ = trained
    codes, condition, order = jnp.arange(N)[None], {"label": jnp.array([1])}, orders(2, 1)

    def logit(params, i):
        logits = module.apply(params, codes, condition, order=order)
        return (logits[0, i] * jnp.arange(1, models.K + 1)).sum()

    gradient = jax.jit(jax.vmap(lambda i: jax.grad(logit)(params, i)["params"]))(jnp.arange(N))
    reads = lambda table, rows: np.abs(table[:, rows]).max(-1) > 0  # [number in the order, row]
    before = np.tri(N, k=-1, dtype=bool)
    np.testing.assert_array_equal(reads(gradient["embed"]["embedding"], order[0]), before)
    np.testing.assert_array_equal(reads(gradient["pos_embed"], 2 + order[0]), before)
    np.testing.assert_array_equal(reads(gradient["target_embed"], order[0]), np.tri(N, dtype=bool))  # and its own


def test_the_share_of_random_orders_falls_with_the_step():
    ratio = lambda step: float(rar.random_ratio(step, 100, 300))
    assert [ratio(s) for s in (0, 100, 150, 200, 300, 999)] == [1, 1, 0.75, 0.5, 0, 0]
    assert [float(rar.random_ratio(s, 100, 100)) for s in (100, 101)] == [1, 0]
    n, module = 1000, models.rar(anneal=(100, 300), null_rate=0.0)
    params, codes = models.parameters(module), jnp.tile(jnp.arange(N), (n, 1))
    condition = {"label": jnp.ones(n, int)}
    loss = jax.jit(
        lambda step: module.apply(params, codes, condition, train=True, step=step, method="loss", rngs={"train": RNG})
    )
    raster = run(module, "loss", params, codes[:1], {"label": jnp.ones(1, int)}).loss
    for step, share in ((0, 1), (200, 0.5), (250, 0.25), (300, 0)):
        random = ~np.isclose(loss(step).loss, raster, atol=1e-5).all(-1)
        assert abs(random.mean() - share) <= 5 * (share * (1 - share) / n) ** 0.5 + 1e-3  # one order in 9! is raster


def test_scores_come_in_the_order_of_reading(trained):
    """At step 0 of training every order is random, and its scores are those of `__call__` in that order."""
    module, params, codes, condition = trained
    scores = run(module, "loss", params, codes, condition, train=True, rngs={"train": RNG})
    assert scores.loss.shape == scores.weight.shape == (4, N)
    plain = run(module, "loss", params, codes, condition)
    likely = -jax.nn.log_softmax(run(module, "__call__", params, codes, condition))
    np.testing.assert_allclose(plain.loss, jnp.take_along_axis(likely, codes[..., None], -1)[..., 0], rtol=1e-5)
    assert np.abs(scores.loss - plain.loss).max() > 0.1


def test_errors_say_what_is_wrong(trained):
    module, params, codes, condition = trained
    with pytest.raises(ValueError, match='needs a condition with the "label"'):
        module.apply(params, codes, method="loss")
    with pytest.raises(ValueError, match=f"1 to {N} tokens, not {N + 1}"):
        module.apply(params, RNG, condition, tokens=N + 1, method="sample")
    with pytest.raises(ValueError, match="Guidance needs a condition"):
        module.apply(params, RNG, guidance=2.0, method="sample")
