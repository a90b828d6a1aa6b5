"""The adaptive weight: against two plain gradients by the last kernel, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, llamagen_vq, robusttok
from jaxtok.build import build
from jaxtok.losses.adversarial import hinge_critic, hinge_generator
from jaxtok.nn import flops

BATCH = {"image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)}
CNN = "decoder/conv_out/kernel"


def task_of(config, path, start=0, weight=0.5, **fields):
    """A tiny config's task, with a small critic."""
    task = config.get_config("tiny").task.to_dict()
    task["losses"]["gan"] = common.gan(weight, start, features=4, layers=2)
    task["losses"]["gan"]["fn"] |= dict(adaptive=path, **fields)
    return build(task)


@functools.cache
def trees_of(task_name):
    config, path = {"cnn": (llamagen_vq, CNN), "vit": (robusttok, "decoder/head/kernel")}[task_name]
    return path, config, task_of(config, path).init(jax.random.key(1), BATCH)


def value_and_grad(task, trees, step=0):
    grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    return grad(trees["params"], trees["mutable"], trees["frozen"], BATCH, jax.random.key(2), step)


def plainly(task, trees, path):
    """(factor, gradients): the paper's equation by three backward passes through everything."""
    key, params, head = jax.random.key(2), trees["params"], path.split("/")

    def outputs(params):
        variables = {"params": params, **trees["mutable"]}
        return task.model.apply(variables, BATCH["image"], train=True, rngs={"train": key}, mutable=["none"])[0]

    def others(params):
        return sum(
            term.get("weight", 1.0) * term["fn"](outputs(params), BATCH)
            for name, term in task.losses.items()
            if name != "gan"
        )

    critic = task.losses["gan"]["fn"].critic
    logits = lambda params, x: critic.apply({"params": params["objective"]["gan"]["critic"]}, x)
    generator = lambda params, theta: hinge_generator(logits(theta, outputs(params)["decoded"].prediction))

    def norm(fn):
        tree = functools.reduce(lambda tree, name: tree[name], head, jax.grad(fn)(params))
        return jnp.linalg.norm(tree)

    factor = jnp.clip(norm(others) / (norm(lambda p: generator(p, params)) + 1e-4), 0, 1e4)

    def total(p):
        made = jax.lax.stop_gradient(outputs(p)["decoded"])
        critic = hinge_critic(logits(p, made.target), logits(p, made.prediction))
        return others(p) + critic + 0.5 * factor * generator(p, jax.lax.stop_gradient(params))

    return factor, jax.grad(total)(params)


@pytest.mark.parametrize("layer", ["head", "conv_out"])
def test_one_pass_gives_what_plain_gradients_give(layer):
    _, config, trees = trees_of("vit")
    path = f"decoder/{layer}/kernel"
    task = task_of(config, path)
    factor, expected = jax.jit(functools.partial(plainly, task, path=path))(trees)
    (_, (_, logs)), ours = value_and_grad(task, trees)
    assert logs["gan/adaptive"] == pytest.approx(float(factor), rel=1e-5)
    fixed = value_and_grad(task_of(config, ""), trees)[1]

    def apart(tree):
        """The largest difference in an array, relative to it, or to a thousandth of the largest of all."""
        largest = max(np.abs(b).max() for b in jax.tree.leaves(expected))
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
        return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest) for a, b in pairs)

    assert apart(ours) < 1e-5 < 1e-2 < apart(fixed)


def test_a_generator_that_hears_nothing_gives_a_finite_weight():
    path, config, trees = trees_of("vit")
    deaf = task_of(config, path, generator_loss=dict(name="tests.losses.test_adaptive.nothing"))
    (value, (_, logs)), slopes = value_and_grad(deaf, trees)
    assert 0 < logs["gan/adaptive"] <= 1e4 and np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    bounded = value_and_grad(task_of(config, path, limits=(0.0, 0.01)), trees)[0][1][1]
    assert bounded["gan/adaptive"] == pytest.approx(0.01)


def nothing(fake):
    return 0.0 * fake.mean()


def test_before_its_start_the_term_moves_nothing_and_the_step_compiles_once():
    path, config, trees = trees_of("vit")
    task, count = task_of(config, path, start=2), 0

    @jax.jit
    def grad(params, step):
        nonlocal count
        count += 1
        args = trees["mutable"], trees["frozen"], BATCH, jax.random.key(2), step
        return jax.grad(task.loss, has_aux=True)(params, *args)[0]

    before, after = grad(trees["params"], 1), grad(trees["params"], 2)
    moved = lambda tree: any(leaf.any() for leaf in jax.tree.leaves(tree["objective"]))
    assert (moved(before), moved(after), count) == (False, True, 1)
    none = {name: term for name, term in task.losses.items() if name != "gan"}
    alone = value_and_grad(type(task)(task.model, none, (), ()), trees)[1]
    for a, b in zip(jax.tree.leaves(before["decoder"]), jax.tree.leaves(alone["decoder"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_it_costs_two_gradients_of_the_last_kernel():
    """In products, as counted from the program: nothing before or behind that layer is gone through again."""
    path, config, trees = trees_of("cnn")

    def products(path):
        task = task_of(config, path)
        grad = lambda params: jax.grad(task.loss, has_aux=True)(params, *args)[0]
        args = trees["mutable"], trees["frozen"], BATCH, jax.random.key(2), 0
        return flops.count(grad, trees["params"])

    kernel = trees["params"]["decoder"]["conv_out"]["kernel"]
    assert products(path) - products("") == 2 * 2 * kernel.size * BATCH["image"].size // 3


def test_what_names_no_kernel_is_refused():
    path, config, trees = trees_of("cnn")
    with pytest.raises(ValueError, match="there is no \"decoder/last/kernel\", but .*'decoder/conv_out/kernel'"):
        value_and_grad(task_of(config, "decoder/last/kernel"), trees)
    term = task_of(config, path).losses["gan"]["fn"]
    with pytest.raises(ValueError, match="which a TokenizerTask gives"):
        term.apply({"params": trees["params"]["objective"]["gan"]}, {"decoded": None}, BATCH)
