"""Critics with a frozen tower or a statistic of the batch behind them, and what critics are shown."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import common, flextok
from jaxtok.build import build
from jaxtok.losses.adversarial import Adversarial
from jaxtok.losses.augment import diffaugment, shift
from jaxtok.losses.critics import SpectralConv, StyleGAN, differences, spectral_norm
from jaxtok.nn import flops
from jaxtok.pretrained.standin import PatchTokens
from jaxtok.pretrained.vit import ViT
from jaxtok.structs import Codes, Decoded
from jaxtok.tasks import TokenizerTask, apart

VIT = dict(name="pretrained.vit.ViT", width=16, depth=3, head_dim=8, patch=4, grid=(4, 4), size=16)
STANDIN = dict(name="pretrained.standin.PatchTokens", width=16, depth=2, patch=4, size=16, head_dim=8)
TOWERS = {"vit": (VIT, (0, 1, 3)), "standin": (STANDIN, (0, 1))}
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- a frozen tower ----


class Painter(nn.Module):
    """A model of one 1x1 convolution on its pictures."""

    quantizer = text_tower = None

    @nn.compact
    def __call__(self, pixels, *, train=False):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        codes = Codes(jnp.zeros((len(x), 1, 1)), None, jnp.ones((len(x), 1), bool))
        return {"codes": codes, "decoded": Decoded(nn.Conv(3, (1, 1), name="conv_out")(x), x)}


@pytest.mark.parametrize("tower, blocks", TOWERS.values(), ids=TOWERS)
def test_the_tower_is_frozen_and_pictures_and_heads_hear_the_critic(tower, blocks):
    gan = common.gan(0.5, 0, critic="Projected", tower=tower, blocks=blocks, size=3, lecam=0.1)
    gan["fn"] |= dict(augment=dict(name="losses.augment.diffaugment"), adaptive="conv_out/kernel")
    task = TokenizerTask(Painter(), build(dict(pixel=dict(fn=dict(name="losses.pixel.l2")), gan=gan)), (), ())
    trees = jax.jit(task.init)(jax.random.key(0), BATCH)
    heads = trees["params"]["objective"]["gan"]["critic"]
    assert set(heads) == {f"heads_{i}" for i in range(len(blocks))}
    assert set(trees["frozen"]["objective"]["gan"]["critic"]) == {"tower"}
    assert set(trees["mutable"]["lecam"]["objective"]["gan"]) == {"real", "fake"}
    grad = jax.jit(jax.grad(task.loss, has_aux=True))
    slopes, (_, logs) = grad(trees["params"], trees["mutable"], trees["frozen"], BATCH, jax.random.key(1), 0)
    assert slopes["conv_out"]["kernel"].any()
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes["objective"]):
        assert np.isfinite(leaf).all() and (leaf.any() or path[-1].key == "bias")  # in front of a norm it says nothing
    assert np.isfinite(logs["gan/adaptive"]) and logs["gan/adaptive"] > 0


def test_the_stand_in_comes_whole_from_the_default_run():
    encoder, image = build(flextok.get_config().task.model.encoder), jnp.zeros((1, 32, 32, 3))
    theirs = jax.eval_shape(lambda key: encoder.init(key, image), jax.random.key(0))["params"]
    [term], [source] = common.dino_gan("standin", 0.5, 0)
    fields = common.EYES["standin"][1]["tower"]
    ours = jax.eval_shape(build(fields).init, jax.random.key(0), image.astype(jnp.uint8))["params"]
    flat = lambda tree, where: {f"{where}/{k}": v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    rule, rest = source["rules"]
    found = {
        re.sub(*rule, name): shape for name, shape in flat(theirs, "encoder").items() if re.fullmatch(rule[0], name)
    }
    assert found == flat(ours, f"objective/{term}/critic/tower") and rest == (".*", None)


def test_pictures_are_pulled_by_what_the_tower_sees_and_seen_once():
    critic = build(dict(name="losses.critics.Projected", tower=VIT, blocks=(0, 1, 3), size=3))
    real, fake = normal(4, 16, 16, 3), normal(4, 16, 16, 3, seed=1)
    term = Adversarial(critic)
    params = jax.jit(term.init)(jax.random.key(0), {"decoded": Decoded(fake, real)}, {})["params"]
    logits = jax.eval_shape(critic.apply, {"params": params["critic"]}, fake)
    assert logits.shape == (4, 3, 16, 1) and logits.dtype == jnp.float32
    without, within = apart({"objective": params}, "tower")

    def value(without, fake):
        critic = {"critic": without["objective"]["critic"] | within["objective"]["critic"]}
        return term.apply({"params": critic}, {"decoded": Decoded(fake, real)}, {})

    slope = jax.jit(jax.grad(value, 1))(without, fake)
    whole = jax.jit(jax.grad(lambda fake: -0.1 * critic.apply({"params": params["critic"]}, fake).mean()))(fake)
    np.testing.assert_allclose(slope, whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max())
    assert np.abs(slope).max() > 0
    forward = flops.count(lambda x: critic.apply({"params": params["critic"]}, x, method="see"), fake)
    both = flops.count(jax.grad(value, (0, 1)), without, fake)
    heads = flops.count(lambda x: critic.apply({"params": params["critic"]}, x), fake) - forward
    assert 3 * forward < both < 3.2 * forward + 9 * heads  # real, fake, and the way back from the fake


@pytest.mark.parametrize("tower, blocks", TOWERS.values(), ids=TOWERS)
def test_layers_agree_with_what_the_tower_is_known_by(tower, blocks):
    module = build(tower)
    params = jax.jit(module.init)(jax.random.key(0), BATCH["image"])
    seen = jax.jit(lambda x: module.apply(params, x, blocks, method="layers"))(BATCH["image"] / 255)
    whole = jax.jit(module.apply)(params, BATCH["image"]).reshape(4, 16, 16)
    assert [x.shape for x in seen] == [(4, 16, 16)] * len(blocks)
    last = seen[-1] - seen[-1].mean(1 if tower is STANDIN else -1, keepdims=True)
    last = last if tower is STANDIN else last / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(last, whole, atol=1e-4)
    with pytest.raises(ValueError, match="blocks"):
        module.apply(params, BATCH["image"] / 255, (7,), method="layers")
    assert isinstance(module, (ViT, PatchTokens))


@pytest.mark.parametrize("shape", [(1, 48, 48), (9, 32, 32), (1, 32, 1)])
def test_kernels_have_a_largest_singular_value_of_one(shape):
    kernel = normal(*shape)
    matrix = kernel.reshape(-1, shape[-1])
    assert spectral_norm(kernel) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-3)
    left, _, right = np.linalg.svd(matrix)
    slope = np.asarray(jax.grad(spectral_norm)(kernel)).reshape(matrix.shape)
    np.testing.assert_allclose(slope, np.outer(left[:, 0], right[0]), atol=0.03)
    layer, x = SpectralConv(shape[-1], shape[0], jnp.float32), normal(2, 12, shape[1])
    params = layer.init(jax.random.key(0), x)
    larger = jax.tree.map(lambda leaf: 7 * leaf, params)
    np.testing.assert_allclose(layer.apply(params, x), layer.apply(larger, x), rtol=1e-4, atol=1e-5)
    turned = layer.apply(params, np.roll(x, 5, 1))  # tokens are a ring
    np.testing.assert_allclose(turned, np.roll(layer.apply(params, x), 5, 1), rtol=1e-4, atol=1e-5)


# ---- StyleGAN's ----


def test_stylegan_gives_one_logit_a_picture_and_compares_those_of_a_group():
    critic, x = StyleGAN(features=4, widest=8), normal(4, 8, 8, 3)

    def slope_of_the_first(critic):
        params = jax.jit(critic.init)(jax.random.key(0), x)
        assert jax.eval_shape(critic.apply, params, x).shape == (4, 1, 1, 1)
        return np.abs(jax.jit(jax.grad(lambda x: critic.apply(params, x)[0].sum()))(x)).max((1, 2, 3))

    together, alone = slope_of_the_first(critic), slope_of_the_first(critic.clone(group=1))
    assert (together > 0).all() and alone[0] > 0 and not alone[1:].any()
    with pytest.raises(ValueError, match="4 pixels times a power of two, got 16 x 24"):
        jax.eval_shape(critic.init, jax.random.key(0), normal(4, 16, 24, 3))
    with pytest.raises(ValueError, match="group is 4, which does not divide a batch of 3"):
        jax.eval_shape(critic.init, jax.random.key(0), x[:3])


def test_stylegan_at_256_pixels():
    critic = StyleGAN()
    shapes = jax.eval_shape(critic.init, jax.random.key(0), jnp.zeros((4, 256, 256, 3)))["params"]
    widths = [shapes[f"down_{i}"]["kernel"].shape[3] for i in range(6)]
    assert widths == [128, 256, 512, 512, 512, 512] and "down_6" not in shapes
    assert shapes["fc"]["kernel"].shape == (4 * 4 * 512, 512) and shapes["conv_out"]["kernel"].shape[2] == 513


def test_the_statistic_is_the_deviation_of_a_group():
    x = normal(4, 2, 2, 3)
    groups = x.reshape(2, 2, 2, 2, 3)  # pictures 0 and 2, 1 and 3
    expected = np.tile(groups.std(0).mean((1, 2, 3)), 2)
    np.testing.assert_allclose(differences(x, 2)[:, 1, 0, 0], expected, rtol=1e-5)
    assert not differences(np.repeat(x[:1], 4, 0), 4).max() > 2e-4


# ---- what a critic is shown ----


def test_pictures_are_moved_each_by_its_own():
    x = normal(2, 5, 4, 1)
    moved = np.asarray(shift(jnp.asarray(x), jnp.array([2, -1]), 1))
    np.testing.assert_array_equal(moved[0, 2:], x[0, :3])
    np.testing.assert_array_equal(moved[1, :4], x[1, 1:])
    assert not moved[0, :2].any() and not moved[1, 4].any()


def test_diffaugment_by_its_bounds():
    x, key = jnp.asarray(np.clip(normal(64, 16, 16, 3), -1, 1)), jax.random.key(0)
    off = dict(color=False, translation=0, cutout=0)
    np.testing.assert_array_equal(diffaugment(key, x, **off), x)
    cut = np.asarray((diffaugment(key, jnp.ones_like(x), **off | dict(cutout=0.5)) == 0)[..., 0])
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    np.testing.assert_array_equal(cut.sum((1, 2)), rows * columns)  # a rectangle, whole or reaching beyond an edge
    assert rows.max() == columns.max() == 8 and rows.min() >= 4 and len(set(rows)) > 2
    moved = np.asarray(diffaugment(key, jnp.ones_like(x), **off | dict(translation=0.125)))
    assert (moved.any((2, 3)).sum(1) >= 14).all() and (moved.any((2, 3)).sum(1) < 16).any()
    colored = diffaugment(key, x, **off | dict(color=True))
    level = colored.mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert np.abs(level).max() <= 0.5 and np.abs(level).max() > 0.4
    slope = jax.grad(lambda x: diffaugment(key, x).sum())(x)
    assert np.isfinite(slope).all() and all(np.abs(slope).max((1, 2, 3)) > 0)


def test_either_term_sees_the_same_draw_of_a_fake_picture():
    """So that the generator deceives the critic about the picture that the critic judged."""
    term = Adversarial(StyleGAN(features=2, group=1), augment=diffaugment)
    outputs = {"decoded": Decoded(normal(2, 8, 8, 3), normal(2, 8, 8, 3, seed=1))}
    params = jax.jit(term.init)(jax.random.key(0), outputs, {})
    apply = jax.jit(lambda key: term.apply(params, outputs, {}, rngs={"train": key}, mutable="logs")[1]["logs"])
    first, second = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert first["generator_loss"] == pytest.approx(-first["fake"]) and first["fake"] != second["fake"]
    assert first["real"] != second["real"]
