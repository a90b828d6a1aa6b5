"""A VAE quantized after its training: nothing trains, and six bits a channel cost next to nothing.

Held-out emoji of 16 px, 4 x 4 tokens of 4 channels, a VAE after 400 steps of 32, and with its latents at 6, 4 or 3 bits
a channel (`python -m tests.test_tokenbridge 0 1 2`): PSNR in dB 18.17, 18.16, 18.00, 17.54 (seed 0), 17.81, 17.80,
17.66, 17.28 (seed 1), 18.16, 18.15, 18.04, 17.73 (seed 2). The tests train seed 0.
"""

import functools
import sys

import jax
import numpy as np
import pytest

import jaxtok
from configs import kl_vae, tokenbridge
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from jaxtok.eval.reconstruction import psnr
from jaxtok.quantizers.post_training import GaussianLevels
from jaxtok.tokenize import tokenize
from tests import fits, runs


def learn(seed=0, steps=400):
    """A VAE of emoji: (task, variables, five deviations of its latents)."""
    config = kl_vae.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, ema=0.99, schedule=dict(peak_lr=2e-3, warmup=30))
    trunk = dict(width=64, depth=1, patch=4, head_dim=32)  # transformers for its convolutions
    config.task.model.encoder = dict(name="encoders.vit.ViT", channels=8, **trunk)
    config.task.model.decoder = dict(name="decoders.vit.ViT", **trunk)
    config.task.token_counts = (16,)
    task, variables, logs = fits.fit(config, fits.emoji("train"), seed)
    return task, variables, 5 * float(logs["codes/std"][-100:].mean())


def quality(task, variables, reach, bits=None):
    """PSNR of held-out pictures, from latents as they are or at levels of so many bits."""
    images = fits.emoji("test")["image"]
    if bits is None:
        return fits.quality(task, variables, images)
    quantizer = GaussianLevels(channels=4, bits=bits, low=-reach, high=reach)
    there = lambda m, x: m.decode(m.encode(x))
    rebuilt = jax.jit(lambda v: task.model.clone(quantizer=quantizer).apply(v, images, method=there))(variables)
    return float(psnr(images, rebuilt).mean())


def test_six_bits_are_as_good_as_none_and_three_are_not():
    vae = learn()
    continuous, six, three = (quality(*vae, bits) for bits in (None, 6, 3))
    assert six > continuous - 0.1 and three < continuous - 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a tiny VAE."""
    folder = tmp_path_factory.mktemp("tokenbridge")
    runs.untrained(kl_vae.get_config("tiny"), folder / "vae")
    return folder


@pytest.fixture(scope="module")
def bits_6(folder):
    """Metrics of a run that quantizes that VAE."""
    config = tokenbridge.get_config("tiny")
    config.init_from = (dict(path=str(folder / "vae")),)
    return runs.alone(config, folder / "bits_6")


def test_the_weights_are_those_of_the_vae_bit_for_bit(bits_6, folder):
    theirs = Checkpoints(folder / "vae").restore_params(which="ema")
    ours = Checkpoints(folder / "bits_6" / "frozen").restore_params(which="frozen")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert "params" not in Checkpoints(folder / "bits_6").shapes()  # there is nothing to train


def test_the_run_says_of_its_pictures_what_the_weights_do(bits_6, folder):
    config = tokenbridge.get_config("tiny")
    images = fits.pictures(build(config.data.eval.source))["image"]
    variables = Checkpoints(folder / "vae").restore_params(which="ema")
    there = lambda m, x: m.decode(m.encode(x))
    rebuilt = jax.jit(lambda v: build(config.task).model.apply({"params": v}, images, method=there))(variables)
    assert bits_6["psnr/nearest levels@64"] == pytest.approx(float(psnr(images / 255, rebuilt).mean()), abs=1e-3)


def generator(folder, **changes):
    config = tokenbridge.get_config("mar_tiny")
    config.task.tokenizer, config.log_every = str(folder / "bits_6"), 1
    config.data.train.transforms = ()
    return runs.changed(config, **changes)


def test_a_generator_learns_channels_made_on_the_fly_as_those_from_disk(bits_6, folder):
    """And its samples are pictures."""
    config = generator(folder)
    metrics = runs.alone(config, folder / "mar")
    losses = runs.logged(folder / "mar")
    assert losses[6] < losses[1] and metrics["bits a token"] < 4 * 6 + 1
    drawn = jaxtok.load(folder / "mar")
    codes = drawn.sample([0, 1])
    assert codes.shape == (2, 64, 4) and codes.max() < 64
    assert drawn.decode(codes).shape == (2, 16, 16, 3)

    tokenize(folder / "bits_6", folder / "codes", batch=8, shard=32, data=config.data)
    for split in ("train", "eval"):
        config.data[split].source = dict(name="data.sources.Tokenized", path=str(folder / "codes" / split))
    runs.alone(config, folder / "from_disk")
    assert runs.logged(folder / "from_disk") == pytest.approx(losses, rel=1e-5)
    with pytest.raises(ValueError, match=r"task.grid is \(4, 16\), and that of these codes \[8, 8\]"):
        runs.alone(runs.changed(config, task__grid=(4, 16)), folder / "other")


def test_a_grid_that_is_not_that_of_the_pictures_is_refused(bits_6, folder, tmp_path):
    with pytest.raises(ValueError, match=r"task.grid is \(4, 16\), and these pictures have \(8, 8\) tokens"):
        runs.alone(generator(folder, task__grid=(4, 16)), tmp_path)


@pytest.mark.parametrize("variant, published", [("mar_l", 486), ("mar_h", 910)])
def test_the_masked_models_have_about_as_many_parameters_as_the_published_ones(variant, published):
    """In millions, by their README. Of ours, 64 vectors a channel stand for a number's column of a matrix: 1 M more."""
    model = build(tokenbridge.get_config(variant).task.model)
    codes, condition = jax.ShapeDtypeStruct((1, 256, 16), int), {"label": jax.ShapeDtypeStruct((1,), int)}
    keys = {"params": jax.random.key(0), "train": jax.random.key(1)}
    shapes = jax.eval_shape(functools.partial(model.init, keys, method="loss"), codes, condition)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert count == pytest.approx(published + 1, abs=1)


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        vae = learn(number)
        says = ", ".join(f"{bits} bits {quality(*vae, bits):.2f}" for bits in (3, 4, 6))
        print(f"seed {number}: VAE {quality(*vae):.2f}, {says}", flush=True)
