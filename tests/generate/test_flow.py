"""Rectified flow over latents: solvers, guidance, and that two classes are learnt apart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.generate import sampling
from jaxtok.generate.flow import Flow
from jaxtok.nn import flops, flow
from tests.generate.models import run

RNG = jax.random.key(7)
FIELDS = dict(shape=(4, 4, 3), width=16, depth=2, classes=2, block=dict(head_dim=8))
LABELS = {"label": jnp.array([0, 1, 1])}


@pytest.fixture(scope="module")
def trained():
    """(module, parameters): all normal around their initial values, for heads and gates begin at zero."""
    module, x = Flow(**FIELDS), jnp.zeros((3, 4, 4, 3))
    params = jax.jit(partial(module.init, method="loss"))({"params": RNG, "train": RNG}, x, LABELS)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(RNG, len(leaves))
    return module, tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_have_their_order(solver, order):
    """dx/dt = -x t: errors fall by 2^order when steps double."""
    true = np.exp(0.5)  # x(0) for x(1) = 1

    def error(steps):
        if solver == "euler":
            x, _ = flow.euler(lambda x, t, carry, _: (-x * t, carry), jnp.ones(1), flow.times(steps))
        else:
            x = flow.heun(lambda x, t, _: -x * t, jnp.ones(1), flow.times(steps))
        return abs(float(x[0]) - true)

    assert abs(np.log2(error(8) / error(16)) - order) < 0.25


def test_at_initialisation_the_velocity_is_0():
    module = Flow(**FIELDS)
    x = jax.random.normal(RNG, (3, 4, 4, 3))
    params = jax.jit(module.init)(RNG, x, jnp.ones(3), LABELS)
    assert not np.any(run(module, "__call__", params, x, jnp.ones(3), LABELS))
    noise = run(module, "sample", params, RNG, LABELS)
    np.testing.assert_array_equal(noise, jax.random.normal(RNG, (3, 4, 4, 3)))


def test_loss_is_the_error_of_the_velocity(trained):
    module, params = trained
    module = module.clone(time=lambda u: jnp.full_like(u, 0.25), scale=2.0)
    latents = jax.random.normal(RNG, (3, 4, 4, 3))
    scores = run(module, "loss", params, latents, LABELS, rngs={"train": RNG})
    assert scores.loss.shape == (3,)
    other = run(module, "loss", params, latents, {"label": jnp.array([1, 1, 1])}, rngs={"train": RNG})
    assert scores.loss[0] != other.loss[0] and (scores.loss[1:] == other.loss[1:]).all()
    dropped = run(module.clone(null_rate=1.0), "loss", params, latents, LABELS, train=True, rngs={"train": RNG})
    none = run(module, "loss", params, latents, {"label": jnp.full(3, 2)}, rngs={"train": RNG})
    np.testing.assert_allclose(dropped.loss, none.loss, rtol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance(trained, solver):
    """1.0 saves the second pass and changes nothing; 0 is the null class; an interval differs from both."""
    module, params = trained
    sample = lambda condition, **o: run(module, "sample", params, RNG, condition, steps=4, solver=solver, **o)
    cost = lambda guidance: flops.count(
        partial(module.apply, method="sample", steps=4, solver=solver, guidance=guidance), params, RNG, LABELS
    )
    assert cost(3.0) == 2 * cost(1.0)
    plain, none = sample(LABELS), sample(None, batch=3)
    np.testing.assert_allclose(sample(LABELS, guidance=partial(sampling.constant, scale=1.0)), plain, atol=1e-5)
    np.testing.assert_allclose(sample(LABELS, guidance=partial(sampling.constant, scale=0.0)), none, atol=1e-5)
    some = sample(LABELS, guidance=partial(sampling.interval, scale=5.0, first=1, last=2))
    for other in (plain, none, sample(LABELS, guidance=5.0)):
        assert np.abs(some - other).max() > 1e-4


def test_two_classes_are_learnt_apart():
    """Latents are 1 or -1 everywhere, by class, and a little noise.

    Means of the samples of both classes, on three seeds: -1.05 1.02, -1.06 1.01, -1.04 1.03.
    """
    low, high = learn(0)
    assert abs(low + 1) < 0.2 and abs(high - 1) < 0.2


def learn(seed, steps=150):
    """Means of samples of class 0 and 1."""
    module, tx = Flow((2, 2, 2), 16, 1, 2, patch=1, block=dict(head_dim=8)), optax.adam(1e-2)

    def data(key):
        label = jnp.arange(64) % 2
        return 2.0 * label[:, None, None, None] - 1 + 0.1 * jax.random.normal(key, (64, 2, 2, 2)), {"label": label}

    def step(state, i):
        params, opt_state = state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        loss = lambda p: module.apply(p, *data(keys[0]), train=True, method="loss", rngs={"train": keys[1]}).mean()
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def train():
        key = jax.random.key(seed)
        params = module.init({"params": key, "train": key}, *data(key), method="loss")
        params = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]
        x = module.apply(params, key, {"label": jnp.arange(64) % 2}, steps=8, solver="heun", method="sample")
        return x.reshape(32, 2, -1).mean((0, 2))

    return np.asarray(train())


def test_errors_say_what_is_wrong(trained):
    module, params = trained
    with pytest.raises(ValueError, match='needs a condition with the "label"'):
        module.apply(params, jnp.zeros((3, 4, 4, 3)), method="loss", rngs={"train": RNG})
    for options, says in (
        (dict(solver="rk4"), 'not "rk4"'),
        (dict(steps=0), "at least 1 step, got 0"),
        (dict(guidance=2.0), "Guidance needs a condition"),
    ):
        with pytest.raises(ValueError, match=says):
            module.apply(params, RNG, method="sample", **options)
