"""ViT-VQGAN: short codes of length 1 stay in use, a larger decoder serves codes that are there, meshes change nothing.

Emoji of 16 px, 16 tokens of 64 codes, 400 steps (`python -m tests.test_parti 0 1 2`): the share of the codes that occur
in held-out pictures, and PSNR in dB.

                                      seed 0         seed 1         seed 2
    codes of 4 numbers, length 1   1.000  17.46   0.938  17.27   0.953  17.34
    of 64 numbers, as they are     0.172  15.98   0.234  16.22   0.234  16.35
    the first, a larger decoder    1.000  17.62   0.938  17.42   0.953  17.54

With 128 codes the first has 1.000, 0.867 and 0.961.
"""

import functools
import sys

import jax
import numpy as np
import pytest

from configs import parti
from jaxtok import hub, sharding, train
from tests import fits, runs

MODEL = dict(codes=64, channels=4, patch=4, encoder=(64, 1, 32), decoder=(64, 1, 32))


def trained(seed=0, decoder=None, given=None, **changes):
    """(task, variables) after 400 steps on emoji of 16 px, 16 tokens each. With a `decoder`, of the second stage."""
    config, model = parti.get_config("tiny"), MODEL | changes
    config.update(total_steps=400, batch_size=32, ema=0.99, schedule=dict(peak_lr=2e-3, warmup=30))
    config.task = parti.task(16, model, parti.pictures() | parti.codes())
    if model["channels"] == 64:  # the control
        config.task.model.quantizer.normalize = "none"
    if decoder:
        config = parti.second(config, 16, model, decoder, parti.pictures(), "runs/nowhere")
    return fits.fit(config, fits.emoji("train"), seed, given)[:2]


def larger(variables, seed=0):
    """The second stage, after a first that gave these variables."""
    return trained(seed, (96, 2, 32), {name: variables["params"][name] for name in ("encoder", "quantizer")})


def used(task, variables):
    """The share of the codes that occur in held-out pictures."""
    indices = fits.encode(task, variables, fits.emoji("test")["image"]).indices
    return len(np.unique(indices)) / task.model.quantizer.size


def quality(task, variables):
    return fits.quality(task, variables, fits.emoji("test")["image"])


@pytest.fixture(scope="module")
def first():
    return trained()


def test_short_codes_of_length_one_stay_in_use_and_plain_ones_do_not(first):
    assert used(*first) >= 0.9
    assert used(*trained(channels=64)) < 0.5


def test_a_larger_decoder_makes_more_of_the_same_codes(first):
    held_out = fits.emoji("test")["image"]
    second = larger(first[1])
    np.testing.assert_array_equal(fits.encode(*second, held_out).indices, fits.encode(*first, held_out).indices)
    assert quality(*second) > quality(*first) + 0.05


# ---- in the loop ----


def tiny(variant="tiny", **changes):
    config = parti.get_config(variant)
    config.update(log_every=1, **changes)
    return config


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The workdir of a tiny run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        only = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", only)
        train.train(tiny(), workdir)
    return workdir


def test_a_mesh_of_eight_devices_gives_the_losses_of_one(one_device, tmp_path):
    train.train(tiny(mesh=dict(data=2, fsdp=2, tensor=2)), tmp_path)
    ours, theirs = runs.logged(tmp_path), runs.logged(one_device)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-4, rtol=0)
    assert ours[6] < 0.9 * ours[1]  # it learns, so equal is not equally stuck


def test_the_second_stage_leaves_the_codes_as_they_are(one_device, tmp_path):
    """Bit by bit; the control trains all of it on from the same weights."""
    config = tiny("tiny_decoder")
    (source,) = config.init_from
    assert source["path"] == "runs/parti_tiny"
    config.init_from = (dict(path=str(one_device), rules=source["rules"]),)
    runs.alone(config, tmp_path / "second")
    runs.alone(tiny(init_from=(dict(path=str(one_device)),)), tmp_path / "control")
    held_out = fits.emoji("test")["image"]
    latents = {}
    for name, workdir in (("first", one_device), ("second", tmp_path / "second"), ("control", tmp_path / "control")):
        model, variables = hub.restore(workdir, None)
        encode = functools.partial(model.apply, method=lambda m, x: m.encoder(m.codec.encode(x)))
        latents[name] = np.asarray(jax.jit(encode)(variables, held_out))
    np.testing.assert_array_equal(latents["second"], latents["first"])
    assert np.abs(latents["control"] - latents["first"]).max() > 1e-3


if __name__ == "__main__":
    arms = {"short codes": lambda seed: trained(seed), "plain codes": lambda seed: trained(seed, channels=64)}
    arms["larger decoder"] = lambda seed: larger(trained(seed)[1], seed)
    for name, arm in arms.items():
        for number in map(int, sys.argv[1:]):
            run = arm(number)
            print(f"{name}, seed {number}: used {used(*run):.3f}, PSNR {quality(*run):.2f}", flush=True)
