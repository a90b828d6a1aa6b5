"""The adversarial terms: one backward pass against two, the forms, the averages, and what they do to a run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.losses import adversarial
from jaxtok.losses.adversarial import Adversarial
from jaxtok.losses.critics import Blurred, PatchGAN, blur, max_pool_to
from jaxtok.structs import Codes, Decoded
from jaxtok.tasks import TokenizerTask


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def outputs(fake, real):
    return {"decoded": Decoded(fake, real)}


CRITICS = {
    "patches": PatchGAN(features=4, layers=2),
    "blurred": Blurred(features=4, multipliers=(1, 2), places=2, groups=2),
}


@pytest.mark.parametrize("critic", CRITICS.values(), ids=CRITICS)
def test_one_backward_pass_gives_what_two_give(critic):
    """A decoder of one number a pixel, w, makes the fake pictures."""
    term, noise, real = Adversarial(critic, weight=0.3), normal(2, 16, 16, 3), normal(2, 16, 16, 3, seed=1)
    w = normal(16, 16, 3, seed=2)
    theta = term.init(jax.random.key(0), outputs(noise, real), {})["params"]["critic"]
    logits = lambda theta, x: critic.apply({"params": theta}, x)

    @jax.jit
    def both(w, theta):
        return jax.grad(lambda w, p: term.apply({"params": {"critic": p}}, outputs(w * noise, real), {}), (0, 1))(
            w, theta
        )

    @jax.jit
    def apart(w, theta):
        fake = w * noise
        generator = lambda w: -0.3 * logits(theta, w * noise).mean()
        one = lambda theta: jax.nn.relu(1 - logits(theta, real)).mean() + jax.nn.relu(1 + logits(theta, fake)).mean()
        return jax.grad(generator)(w), jax.grad(lambda theta: 0.5 * one(theta))(theta)

    ours, expected = both(w, theta), apart(w, theta)
    assert all(np.abs(leaf).max() > 1e-7 for leaf in jax.tree.leaves(expected[0]))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 1e-3
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * np.abs(b).max())


def test_each_network_hears_its_own_term_only():
    term, real, fake = Adversarial(CRITICS["patches"], weight=0.0), normal(2, 16, 16, 3), normal(2, 16, 16, 3, seed=1)
    params = term.init(jax.random.key(0), outputs(fake, real), {})
    of_fake = jax.grad(lambda fake, weight: term.clone(weight=weight).apply(params, outputs(fake, real), {}))
    assert not of_fake(fake, 0.0).any() and of_fake(fake, 1.0).any()  # the critic's term moves no picture
    of_critic = lambda weight: jax.grad(lambda p: term.clone(weight=weight).apply(p, outputs(fake, real), {}))(params)
    for a, b in zip(jax.tree.leaves(of_critic(0.0)), jax.tree.leaves(of_critic(5.0)), strict=True):
        np.testing.assert_array_equal(a, b)  # nor the generator's term the critic


def test_the_logits_of_the_fakes_are_computed_once():
    """Convolutions of the compiled loss: as many as without the generator's own pass."""
    term, real, fake = Adversarial(PatchGAN(4, 1, "none")), normal(2, 8, 8, 3), normal(2, 8, 8, 3, seed=1)
    params = term.init(jax.random.key(0), outputs(fake, real), {})
    value = jax.jit(lambda params, fake: term.apply(params, outputs(fake, real), {}))
    text = value.lower(params, fake).compile().as_text()
    assert text.count(" convolution(") == 2 * 3  # of real and fake pictures, three layers


def test_values_by_hand():
    real, fake = jnp.array([[2.0, 0.5], [-1.0, 0.0]]), jnp.array([[-2.0, -0.5], [1.0, 3.0]])
    assert adversarial.hinge_critic(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2 + 1) / 4 + (0 + 0.5 + 2 + 4) / 4))
    assert adversarial.hinge_generator(fake) == pytest.approx(-0.375)
    softplus = lambda x: np.log1p(np.exp(x))
    expected = 0.5 * (softplus(-np.asarray(real)).mean() + softplus(np.asarray(fake)).mean())
    assert adversarial.softplus_critic(real, fake) == pytest.approx(expected)
    assert adversarial.softplus_generator(fake) == pytest.approx((softplus(1.25) + softplus(-2)) / 2)
    logits = adversarial.lecam(real, fake, 0.2, -0.1)
    by_hand = np.square(np.maximum(np.asarray(real) + 0.1, 0)).mean() + np.square(np.maximum(0.2 - fake, 0)).mean()
    assert logits == pytest.approx(float(by_hand))


def test_r1_of_a_quadratic_critic():
    real = normal(3, 4, 4, 2)
    penalty = adversarial.r1(lambda x: 0.5 * jnp.square(x).sum((1, 2, 3)), real)  # its gradient is x itself
    assert penalty == pytest.approx(np.square(real).sum((1, 2, 3)).mean(), rel=1e-5)
    term = lambda weight: Adversarial(CRITICS["patches"].clone(norm="none"), r1=weight)
    real, fake = normal(2, 16, 16, 3), normal(2, 16, 16, 3, seed=1)
    params = term(0.0).init(jax.random.key(0), outputs(fake, real), {})
    difference = term(200.0).apply(params, outputs(fake, real), {}) - term(0.0).apply(params, outputs(fake, real), {})
    critic = functools.partial(term(0.0).critic.apply, {"params": params["params"]["critic"]})
    assert difference == pytest.approx(100 * float(adversarial.r1(critic, real)), rel=1e-2)


@pytest.mark.parametrize("of", ["means", "logits"])
def test_lecam_keeps_averages_of_both_sides(of):
    term = Adversarial(CRITICS["patches"], lecam=1.0, lecam_of=of)
    plain, real, fake = term.clone(lecam=0.0), normal(2, 16, 16, 3), normal(2, 16, 16, 3, seed=1)
    variables = term.init(jax.random.key(0), outputs(fake, real), {})
    assert variables["lecam"] == {"real": 0, "fake": 0}
    params = {"params": variables["params"]}
    means = [term.critic.apply({"params": params["params"]["critic"]}, x).mean() for x in (real, fake)]
    state = {"real": jnp.float32(0.5), "fake": jnp.float32(-0.25)}
    value, after = term.apply(params | {"lecam": state}, outputs(fake, real), {}, mutable=["lecam"])
    new = [0.999 * old + 0.001 * mean for old, mean in zip(state.values(), means, strict=True)]
    np.testing.assert_allclose([after["lecam"]["real"], after["lecam"]["fake"]], new, rtol=1e-6)
    logits = [term.critic.apply({"params": params["params"]["critic"]}, x) for x in (real, fake)]
    expected = adversarial.lecam(*means, *state.values()) if of == "means" else adversarial.lecam(*logits, *new)
    assert value - plain.apply(params, outputs(fake, real), {}) == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ValueError, match='"means" or "logits", not "both"'):
        term.clone(lecam_of="both").init(jax.random.key(0), outputs(fake, real), {})


# ---- critics ----


def test_a_logit_of_patches_sees_70_pixels():
    critic, x = PatchGAN(features=2, norm="none"), normal(1, 96, 96, 3)
    params = critic.init(jax.random.key(0), x)
    slope = jax.grad(lambda x: critic.apply(params, x)[0, 5, 5, 0])(x)
    assert critic.apply(params, x).shape == (1, 10, 10, 1)
    seen = np.flatnonzero(np.abs(slope[0]).sum((1, 2)))
    assert seen.max() - seen.min() + 1 == 70
    with pytest.raises(ValueError, match="at least 24 pixels a side, got 16 x 16: lower the critic's `layers`"):
        critic.init(jax.random.key(0), normal(1, 16, 16, 3))
    with pytest.raises(ValueError, match='"batch", "group" or "none", not "layer"'):
        critic.clone(norm="layer").init(jax.random.key(0), x)


def test_layers_of_the_published_size():
    shapes = jax.eval_shape(PatchGAN().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    assert [shapes[f"conv_{i}"]["kernel"].shape[2:] for i in range(4)] == [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 2_765_633
    assert set(shapes["conv_1"]) == {"kernel"} and set(shapes["conv_0"]) == {"kernel", "bias"}


def test_batches_are_normalised_over_pictures_and_places():
    critic, x = PatchGAN(features=4, layers=1), 100 * normal(3, 8, 8, 3)
    params = critic.init(jax.random.key(0), x)
    _, seen = critic.apply(params, x, capture_intermediates=True, mutable=["intermediates"])
    y = np.asarray(seen["intermediates"]["norm_1"]["__call__"][0])
    scale = params["params"]["norm_1"]["scale"]
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), scale, rtol=1e-2)
    assert 0 < np.abs(scale - 1).max() < 0.2


def test_blur_is_the_outer_product_of_1331_and_halves():
    x = np.zeros((1, 8, 8, 1), np.float32)
    x[0, 3, 4] = 64
    expected = np.outer([0, 3, 1, 0], [0, 1, 3, 0])  # row 3 is the third tap of place 1 and the first of place 2
    np.testing.assert_allclose(blur(jnp.asarray(x))[0, :, :, 0], expected)
    assert blur(jnp.ones((1, 5, 8, 2))).shape == (1, 3, 4, 2)


@pytest.mark.parametrize("n, size", [(8, 4), (7, 4), (3, 5), (4, 4)])
def test_the_maximum_goes_to_any_number_of_places(n, size):
    x = normal(2, n, 3)
    expected = [x[:, i * n // size : -(-(i + 1) * n // size)].max(1) for i in range(size)]
    np.testing.assert_array_equal(max_pool_to(jnp.asarray(x), size, 1), np.stack(expected, 1))


# ---- in a task ----


class Scaled(nn.Module):
    """A model that gives back its pictures times w."""

    quantizer = text_tower = None

    @nn.compact
    def __call__(self, pixels, *, train=False):
        w = self.param("w", nn.initializers.ones, ())
        x = pixels.astype(jnp.float32) / 255
        codes = Codes(jnp.zeros((len(x), 1, 1)), None, jnp.ones((len(x), 1), bool))
        return {"codes": codes, "decoded": Decoded(w * x, x)}


def test_a_task_carries_the_averages_and_logs_either_side():
    term = dict(fn=Adversarial(CRITICS["patches"], lecam=0.1), start=2)
    task = TokenizerTask(Scaled(), {"gan": term}, (), ())
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)}
    trees = task.init(jax.random.key(0), batch)
    assert trees["mutable"] == {"lecam": {"objective": {"gan": {"real": 0, "fake": 0}}}}
    assert set(trees["params"]) == {"w", "objective"} and set(trees["params"]["objective"]["gan"]) == {"critic"}
    grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    for step, moves in ((1, False), (2, True)):
        args = trees["mutable"], trees["frozen"], batch, jax.random.key(1), step
        (value, (mutable, logs)), slopes = grad(trees["params"], *args)
        assert jax.tree.structure(mutable) == jax.tree.structure(trees["mutable"])
        assert mutable["lecam"]["objective"]["gan"]["real"] != 0
        assert (value != 0) == moves and (slopes["w"] != 0) == moves
        assert any(leaf.any() for leaf in jax.tree.leaves(slopes["objective"])) == moves
    assert {"loss/gan", "gan/critic_loss", "gan/generator_loss", "gan/real", "gan/fake"} <= set(logs)
    assert logs["gan/generator_loss"] == pytest.approx(-logs["gan/fake"])
