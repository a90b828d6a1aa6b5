"""The masked model and its sampler: every place is filled once, the law of masks, guidance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate import masked, sampling
from jaxtok.nn import flops
from tests.generate import models
from tests.generate.models import CLASSES, K, N, run

RNG = jax.random.key(7)
BODIES = {"pre": dict(), "post": dict(block=dict(post_norm=True, eps=1e-12)), "skips": dict(skips=True)}


@pytest.fixture(scope="module")
def trained():
    """(module, parameters, codes, condition)."""
    module = models.masked(skips=True)
    return module, models.parameters(module), *models.batch(module)


# ---- the sampler ----


@pytest.mark.parametrize("n, steps", [(9, 1), (9, 4), (32, 8), (128, 64), (4, 9)])
def test_counts_fall_to_nothing(n, steps):
    left = masked.counts(n, steps)
    assert len(left) == steps and left[-1] == 0 and (left[:-1] >= 1).all()
    before = np.concatenate([[n], left[:-1]])
    assert ((left < before) | (before == 1)).all()


def test_counts_follow_the_arccosine():
    assert masked.counts(12, 6).tolist() == [10, 9, 8, 6, 4, 0]
    assert masked.counts(100, 4).tolist() == [83, 66, 46, 0]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_every_place_is_filled_once_and_the_surest_first(temperature):
    n, steps, batch = 32, 8, 6
    indices, hidden = jnp.zeros((batch, n), int), jnp.ones((batch, n), bool)
    filled = np.zeros((batch, n), int)
    for step, count in enumerate(masked.counts(n, steps)):
        keys = jax.random.split(jax.random.fold_in(RNG, step), 3)
        logits = jax.random.normal(keys[0], (batch, n, K))
        uniforms = jax.random.uniform(keys[1], (batch, n, K)), jax.random.uniform(keys[2], (batch, n))
        after, still = masked.reveal(indices, hidden, logits, uniforms, temperature, count)
        assert (still.sum(-1) == count).all() and not (still & ~hidden).any()
        assert np.array_equal(jnp.where(hidden, 0, after), jnp.where(hidden, 0, indices))  # what stood, stands
        if temperature == 0:
            assert np.array_equal(jnp.where(hidden, after, 0), jnp.where(hidden, logits.argmax(-1), 0))
            sure = logits.max(-1)
            assert (jnp.where(still, sure, -9).max(-1) <= jnp.where(hidden & ~still, sure, 9).min(-1)).all()
        filled += hidden & ~still
        indices, hidden = after, still
    assert (filled == 1).all()


def test_ties_do_not_fill_more_than_they_should():
    shape = (2, 6, 5)
    uniforms = jnp.full(shape, 0.5), jnp.full(shape[:2], 0.5)
    _, still = masked.reveal(jnp.zeros(shape[:2], int), jnp.ones(shape[:2], bool), jnp.zeros(shape), uniforms, 1.0, 4)
    assert (still.sum(-1) == 4).all()


@pytest.mark.parametrize("body", BODIES)
def test_one_sure_step_is_the_likeliest_of_all_masks(body):
    module = models.masked(**BODIES[body])
    params, (_, condition) = models.parameters(module), models.batch(module)
    codes = run(module, "sample", params, RNG, condition, steps=1, temperature=0.0)
    logits = run(module, "__call__", params, jnp.full((4, N), K), condition)
    np.testing.assert_array_equal(codes, logits.argmax(-1))


def test_samples_are_codes_and_follow_the_key(trained):
    module, params, _, condition = trained
    sample = lambda seed, **o: run(module, "sample", params, jax.random.key(seed), condition, steps=4, **o)
    codes = sample(0)
    assert codes.shape == (4, N) and codes.dtype == jnp.int32 and codes.min() >= 0 and codes.max() < K
    np.testing.assert_array_equal(codes, sample(0))
    assert (codes != sample(1)).any() and (codes != sample(0, anneal=True)).any()


def test_guidance(trained):
    """1.0 saves the second pass and changes nothing; 0 is the null class."""
    module, params, _, condition = trained
    sample = lambda condition, **o: run(module, "sample", params, RNG, condition, steps=4, temperature=1.0, **o)
    cost = lambda guidance: flops.count(
        partial(module.apply, method="sample", steps=4, guidance=guidance), params, RNG, condition
    )
    assert cost(3.0) == 2 * cost(1.0)
    plain = sample(condition)
    np.testing.assert_array_equal(plain, sample(condition, guidance=partial(sampling.constant, scale=1.0)))
    none = sample(None, batch=4)
    np.testing.assert_array_equal(none, sample(condition, guidance=partial(sampling.constant, scale=0.0)))
    np.testing.assert_array_equal(none, sample({"label": jnp.full(4, CLASSES)}))
    assert (plain != none).any() and (plain != sample(condition, guidance=6.0)).any()


# ---- training ----


def test_masks_follow_the_arccosine():
    u = jnp.array([0.0, 0.5, 0.99, 1.0])
    assert masked.masked_count(u, 12).tolist() == [12, 8, 1, 1]  # at least one
    count = masked.masked_count(jax.random.uniform(RNG, (20_000,)), 1000)
    assert abs(count.mean() / 1000 - 2 / np.pi) < 0.01  # the mean of acos(u) / (pi/2)


def test_the_loss_weighs_masked_tokens_and_smooths_labels(trained):
    module, params, codes, condition = trained
    codes, condition = jnp.tile(codes, (50, 1)), {"label": jnp.tile(condition["label"], 50)}
    scores = run(module, "loss", params, codes, condition, train=True, rngs={"train": RNG})
    is_masked = np.isclose(scores.weight, 1)
    assert (is_masked | np.isclose(scores.weight, 0.1)).all() and (is_masked.sum(-1) >= 1).all()
    assert abs(is_masked.mean() - 2 / np.pi) < 0.1
    np.testing.assert_allclose(scores.mean(), np.average(scores.loss, weights=scores.weight), rtol=1e-5)
    plain = run(module, "loss", params, codes, condition, rngs={"train": RNG})  # not smoothed
    np.testing.assert_array_equal(plain.weight, scores.weight)
    shown = jnp.where(is_masked, K, codes)
    likely = jax.nn.log_softmax(run(module, "__call__", params, shown, condition))
    np.testing.assert_allclose(plain.loss, -jnp.take_along_axis(likely, codes[..., None], -1)[..., 0], atol=1e-5)


def test_every_token_reads_every_visible_one(trained):
    module, params, codes, condition = trained
    shown = codes.at[:, 3].set(K)
    logits = run(module, "__call__", params, shown, condition)
    other = run(module, "__call__", params, shown.at[:, 0].set((codes[:, 0] + 1) % K), condition)
    assert (np.abs(logits - other).max((0, 2)) > 1e-3).all()


def test_conditions_are_dropped_at_the_given_rate():
    module = models.masked(null_rate=0.3, smoothing=0.0)
    models.drops_conditions(module, models.parameters(module), jnp.arange(N), RNG)


def test_remat_changes_no_gradient():
    def gradients(module):
        params, (codes, condition) = models.parameters(models.masked(skips=True)), models.batch(module)
        loss = lambda p: module.apply(p, codes, condition, train=True, method="loss", rngs={"train": RNG}).mean()
        return jax.jit(jax.value_and_grad(loss))(params)

    both = (jax.tree.leaves(gradients(models.masked(skips=True, remat=kind))) for kind in ("full", "none"))
    for ours, plain in zip(*both, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_errors_say_what_is_wrong():
    module = models.masked()
    params, (codes, condition) = models.parameters(module), models.batch(module)
    with pytest.raises(ValueError, match="even depth, got 3"):
        models.masked(skips=True, depth=3).init(RNG, codes, condition)
    models.refuses_what_cannot_be(module, params, codes, RNG)
