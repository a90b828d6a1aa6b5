"""Bits in groups learn, and are used because the entropies say so; a second stage begins where the first ended.

Emoji of 16 px, 4 x 4 tokens, 300 steps of 16, without a critic (`python -m tests.test_wetok 0 3`). PSNR in dB of
held-out pictures; share of the 256 codes of a group that they use; least entropy of a bit:

                              seed 0               seed 1               seed 2
    4 bits                    14.82  1.000  0.98   14.41  1.000  0.99   15.65  1.000  0.94
    16 bits                   15.66  0.912  0.91   15.81  0.850  0.92   15.87  0.932  0.95
    16 bits, no entropies     15.72  0.025  0.00   14.52  0.045  0.00   15.80  0.035  0.00

The tests train seed 0.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, wetok
from jaxtok.decoders.cnn import CNN
from jaxtok.structs import Codes
from tests import runs

TRUNK = dict(channels=(8, 16, 16), blocks=1, groups=4)
ARMS = {"4 bits": ((4,), 1.0), "16 bits": ((8, 8), 1.0), "16 bits, no entropies": ((8, 8), 0.0)}


def config_of(bits, entropy, seed=0, generative=False):
    config = runs.emoji(wetok.get_config("tiny"), steps=300, batch=16)
    config.seed, config.schedule.peak_lr = seed, 4e-3
    config.task = wetok.task(TRUNK, bits, 16, common.gan(0.02, 0, features=4, layers=2), generative=generative)
    if not generative:
        del config.task.losses["gan"]
        config.optimizer = dict(b1=0.5, b2=0.9, clip=1.0)
        config.task.losses.sample_entropy.weight *= entropy
        config.task.losses.batch_entropy.weight *= entropy
    return config


def learn(folder, bits, entropy, seed=0):
    """(PSNR, share of codes in use, least entropy of a bit) of a run in `folder`."""
    config = config_of(bits, entropy, seed)
    metrics = runs.alone(config, folder)
    model, variables, images = runs.weights(folder, config)
    codes = jax.jit(lambda v: model.apply(v, images, method="encode"))(variables)
    p = np.asarray(codes.z > 0).mean((0, 1))
    entropy = -(p * np.log2(p + 1e-9) + (1 - p) * np.log2(1 - p + 1e-9))
    return metrics["psnr/one pass@16"], metrics["codes/used"], float(entropy.min())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {arm: tmp_path_factory.mktemp("wetok") for arm in ARMS}


@pytest.fixture(scope="module")
def found(folders):
    return {arm: learn(folders[arm], *ARMS[arm]) for arm in ARMS}


@pytest.mark.slow
def test_more_bits_show_more(found):
    assert found["16 bits"][0] > found["4 bits"][0] + 0.5


@pytest.mark.slow
def test_the_entropies_keep_codes_in_use_and_every_bit_alive(found):
    assert found["16 bits"][2] > 0.9
    assert found["16 bits"][1] > found["16 bits, no entropies"][1] + 0.1


@pytest.mark.slow
def test_the_second_stage_begins_with_the_pictures_of_the_first(found, folders, tmp_path):
    """Before its first step, whatever the noise; then the noise shows, and the encoder is what it was."""
    config = config_of((8, 8), 1.0, generative=True)
    config.update(total_steps=3, init_from=(dict(path=str(folders["16 bits"])),), schedule=dict(peak_lr=0.0, warmup=0))
    runs.alone(config, tmp_path / "first")
    before, variables, images = runs.weights(folders["16 bits"], config)
    after, same, _ = runs.weights(tmp_path / "first", config)
    images = images[:8]
    there = lambda m, key: lambda v: m.apply(v, m.apply(v, images, method="encode"), key, method="decode")
    pictures = lambda m, v, key: jax.jit(there(m, key))(v)
    # Two programs, whose sums XLA may fuse and so round otherwise: pictures are numbers in 0 ... 1.
    np.testing.assert_allclose(
        pictures(after, same, jax.random.key(1)), pictures(before, variables, None), rtol=0, atol=1e-6
    )

    config.schedule.peak_lr = 3e-3
    runs.alone(config, tmp_path / "second")
    after, trained, _ = runs.weights(tmp_path / "second", config)
    one, again, other = (pictures(after, trained, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-4
    for a, b in zip(
        jax.tree.leaves(trained["params"]["encoder"]), jax.tree.leaves(variables["params"]["encoder"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_generative_decoder_asks_for_its_noise():
    codes = Codes(jnp.ones((1, 4, 2)), None, jnp.ones((1, 4), bool), (2, 2))
    with pytest.raises(ValueError, match="is generative: give `sample` a key"):
        CNN(channels=(4,), groups=2, generative=True).init(jax.random.key(0), codes, method="sample")


if __name__ == "__main__":
    for number in range(*map(int, sys.argv[1:3])):
        for arm, settings in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                psnr, used, entropy = learn(folder, *settings, number)
            print(f"seed {number} {arm}: {psnr:.2f} dB, {used:.3f} used, {entropy:.3f} bits", flush=True)
