"""A VAE quantized after its training: nothing trains, and six bits a channel cost next to nothing.

Held-out emoji of 16 px, of the VAE (`kl_vae.py:tiny`, 300 steps of 16) and with its latents at so many bits a channel;
seed 0: 17.75 dB, 17.73 with six bits, 17.38 with three (`python -m tests.test_tokenbridge 0 3`
prints three seeds). The tests train seed 0.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtok
from configs import kl_vae, tokenbridge
from jaxtok import train
from jaxtok.checkpoint import Checkpoints
from jaxtok.eval.reconstruction import psnr
from jaxtok.quantizers.post_training import GaussianLevels
from jaxtok.tokenize import tokenize
from tests import runs

pytestmark = pytest.mark.slow


def learn(folder, seed=0):
    """PSNR of a VAE whose run is below the folder."""
    config = runs.emoji(kl_vae.get_config("tiny"), steps=300, batch=16)
    config.seed = seed
    return runs.alone(config, folder / "vae")["psnr/mean@64"]


def levels(folder, bits):
    """The quantizer's fields for that VAE: five deviations of its latents."""
    reach = 5 * runs.logged(folder / "vae", "codes/std")[300]
    return dict(channels=4, bits=bits, low=-reach, high=reach)


def quantize(folder, bits):
    """PSNR of that VAE with its latents at levels, by a run of the config."""
    config = runs.emoji(tokenbridge.get_config("tiny"), steps=2, batch=16)
    config.schedule.warmup, config.init_from = 0, (dict(path=str(folder / "vae")),)
    config.task.model.quantizer.update(levels(folder, bits))
    return runs.alone(config, folder / f"bits_{bits}")["psnr/nearest levels@64"]


def measure(folder, bits):
    """The same without a run."""
    config = runs.emoji(tokenbridge.get_config("tiny"), steps=2)
    model, variables, images = runs.weights(folder / "vae", config)
    model = model.clone(quantizer=GaussianLevels(**levels(folder, bits)))
    there = lambda m, x: m.decode(m.encode(x))
    rebuilt = jax.jit(lambda v: model.apply(v, images, method=there))(variables)
    return float(psnr(images / 255, rebuilt).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenbridge")


@pytest.fixture(scope="module")
def found(folder):
    return learn(folder), quantize(folder, 6), measure(folder, 6), measure(folder, 3)


def test_six_bits_are_as_good_as_none_and_three_are_not(found):
    continuous, six, by_hand, three = found
    assert six == pytest.approx(by_hand, abs=0.02)  # the run's are rounded to uint8
    assert six > continuous - 0.3 and three < continuous - 0.2


def test_the_weights_are_those_of_the_vae_bit_for_bit(found, folder):
    theirs = Checkpoints(folder / "vae").restore_params(which="ema")
    ours = Checkpoints(folder / "bits_6" / "frozen").restore_params(which="frozen")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert "params" not in Checkpoints(folder / "bits_6").shapes()  # there is nothing to train


def generator(folder, **changes):
    config = tokenbridge.get_config("ar_tiny")
    config.task.tokenizer, config.log_every = str(folder / "bits_6"), 1
    config.data.train.transforms = ()
    return runs.changed(config, **changes)


def test_a_generator_learns_channels_made_on_the_fly_as_those_from_disk(found, folder):
    """And its samples are pictures."""
    config = generator(folder)
    metrics = train.train(config, folder / "ar")
    losses = runs.logged(folder / "ar")
    assert losses[6] < losses[1] and metrics["bits a token"] < 4 * 6 + 1
    drawn = jaxtok.load(folder / "ar")
    codes = drawn.sample([0, 1])
    assert codes.shape == (2, 64, 4) and codes.max() < 64
    assert drawn.decode(codes).shape == (2, 16, 16, 3)

    tokenize(folder / "bits_6", folder / "codes", batch=8, shard=32, data=config.data)
    for split in ("train", "eval"):
        config.data[split].source = dict(name="data.sources.Tokenized", path=str(folder / "codes" / split))
    train.train(config, folder / "from_disk")
    assert runs.logged(folder / "from_disk") == pytest.approx(losses, rel=1e-5)
    with pytest.raises(ValueError, match=r"task.grid is \(4, 16\), and that of these codes \[8, 8\]"):
        train.train(runs.changed(config, task__grid=(4, 16)), folder / "other")


def test_a_grid_that_is_not_that_of_the_pictures_is_refused(found, folder, tmp_path):
    with pytest.raises(ValueError, match=r"task.grid is \(4, 16\), and these pictures have \(8, 8\) tokens"):
        train.train(generator(folder, task__grid=(4, 16)), tmp_path)


if __name__ == "__main__":
    for number in range(*map(int, sys.argv[1:3])):
        with tempfile.TemporaryDirectory() as name:
            vae = learn(Path(name), number)
            says = ", ".join(f"{bits} bits {measure(Path(name), bits):.2f}" for bits in (3, 4, 6))
        print(f"seed {number}: VAE {vae:.2f}, {says}", flush=True)
