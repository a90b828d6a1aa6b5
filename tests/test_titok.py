"""TiTok as a system: its tokens are a row and not a bag, and its two stages hand on what they must.

PSNR in dB on held-out shapes of 16 px, with the tokens turned by one, and with another picture's, 1,500 steps of 32
(`python -m tests.test_titok 0 1 2`): seed 0 19.13, 14.26, 12.79; seed 1 19.55, 13.93, 12.75; seed 2 19.67, 13.73,
12.65.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, llamagen_vq, maskgit_vqgan, one_d_piece, titok
from jaxtok import stages, train
from jaxtok.checkpoint import Checkpoints
from jaxtok.pretrained import llamagen_vq as llamagen_weights
from jaxtok.pretrained import maskgit_vqgan as maskgit_weights
from jaxtok.pretrained import titok as titok_weights
from tests import fits, runs


def learn(seed=0, steps=1500):
    """PSNR of held-out pictures after a run, with their tokens turned by one, and with another picture's."""
    config = titok.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, ema=0.95, schedule=dict(peak_lr=2e-3, warmup=50))
    task, variables, _ = fits.fit(config, fits.shapes("train", 512), seed)
    turn = lambda axis: lambda codes: codes.replace(z=jnp.roll(codes.z, 1, axis))
    changes = {"right": lambda codes: codes, "turned": turn(1), "others": turn(0)}
    images = fits.shapes("test", 256)["image"]
    return {name: fits.quality(task, variables, images, change) for name, change in changes.items()}


LONG = (1500, 4000)


def row_or_grid(row, seed=0, steps=1500):
    """PSNR of held-out pictures from 24 bits: a row of 4 tokens, or the control, a grid of 2 x 2."""
    model = titok.titok(16, (64, 1), (64, 1), tokens=4, channels=8, codes=64, patch=4, **titok.SMALL)
    if not row:
        trunk = dict(width=64, depth=1, patch=8, head_dim=32)
        model["encoder"] = dict(name="encoders.vit.ViT", channels=8, **trunk)
        model["decoder"] = dict(name="decoders.vit.ViT", **trunk)
    config = titok.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, ema=0.95, schedule=dict(peak_lr=2e-3, warmup=50))
    config.task = common.tokenizer_task(model, titok.losses(64), (4,), (dict(title="one pass"),))
    task, variables, _ = fits.fit(config, fits.shapes("train", 512), seed)
    return fits.quality(task, variables, fits.shapes("test", 256)["image"])


def test_tokens_are_read_in_order():
    """A decoder that pools its tokens would not mind if they changed places."""
    found = learn()
    assert found["right"] > found["turned"] + 3 and found["right"] > found["others"] + 3


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """Workdirs of a VQGAN of 4 x 4 codes, random ones, and of both stages that learn from it: two steps each."""
    folder = tmp_path_factory.mktemp("titok")
    config = maskgit_vqgan.get_config("tiny")
    config.task.model = maskgit_vqgan.vqgan(codes=32, width=4, channels=(8, 8, 16), groups=4)
    config.task.token_counts = (16,)
    runs.untrained(config, folder / "vqgan")
    vqgan = config.task.model.to_dict()
    recipe = stages.runs(titok.get_config("l32"), folder, train.KEYS)
    for (workdir, published), sources in zip(recipe, (("vqgan", "vqgan"), ("codes",)), strict=True):
        config = titok.get_config("tiny")
        config.task, config.optimizer = published.task, published.optimizer
        small = dict(width=64, depth=1, patch=4, head_dim=32, dtype="float32", remat="none")
        model = config.task.model
        model.encoder.update(small, tokens=8)
        model.quantizer.size = 16
        model.decoder.body.update(small, shape=(16, 16, 3), vocabulary=32)
        model.decoder.pixels.update(channels=(8, 8, 16), groups=4)
        model.decoder.channels = 4
        config.task.token_counts = (8,)
        if workdir.name == "codes":
            config.task.losses.codes.fn.tower = vqgan
        else:
            config.task.losses.perceptual = common.OFF
            critic = dict(features=8, multipliers=(1, 2), places=2, groups=4)
            config.task.losses.gan = common.gan(1.0, 0, critic="Blurred", lecam=0.001, **critic)
        rules = [source["rules"] for source in published.init_from]
        config.init_from = tuple(dict(path=str(folder / s), rules=r) for s, r in zip(sources, rules, strict=False))
        config.update(total_steps=2, log_every=1)
        config.checkpoint.every = 2
        runs.alone(config, workdir)
    return folder


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_first_stage_learns_the_codes_and_leaves_their_decoder_alone(two_stages):
    there = Checkpoints(two_stages / "vqgan").restore_params()
    ours = Checkpoints(two_stages / "codes").restore_params()
    assert runs.logged(two_stages / "codes", "loss/codes")[1] == pytest.approx(np.log(32), rel=0.2)
    for name, leaf in flat(there["decoder"]).items():
        np.testing.assert_array_equal(flat(ours["decoder"]["pixels"])[name], leaf)
    np.testing.assert_array_equal(ours["decoder"]["codebook"], there["quantizer"]["codebook"])
    tower = Checkpoints(two_stages / "codes" / "frozen").restore_params(which="frozen")["objective"]["codes"]["tower"]
    assert set(tower) == {"encoder", "quantizer"}


def test_the_second_stage_moves_the_decoder_and_neither_encoder_nor_codebook(two_stages):
    first = Checkpoints(two_stages / "codes").restore_params()
    second = Checkpoints(two_stages / "pixels").restore_params()
    frozen = Checkpoints(two_stages / "pixels" / "frozen").restore_params(which="frozen")
    assert set(frozen) == {"encoder", "quantizer"} and set(second) == {"decoder", "objective"}
    for name in frozen:
        for path, leaf in flat(frozen[name]).items():
            np.testing.assert_array_equal(leaf, flat(first[name])[path])
    after = flat(second["decoder"])
    for path in ("['codebook']", "['pixels']['conv_out']['kernel']", "['body']['head2']['kernel']"):
        assert np.abs(after[path] - flat(first["decoder"])[path]).max() > 0


def same(spec):
    """A spec without what only training or memory wants."""
    return {
        k: same(v) if isinstance(v, dict) else v
        for k, v in spec.items()
        if k not in ("dtype", "remat", "trains", "patch", "misread", "nested_dropout")
    }


@pytest.mark.parametrize(
    "system, variant, sizes, tokens, codes",
    [
        (titok, "bl64", "bl", 64, 8192),
        (titok, "bl128_kl", "bl", 128, None),
        (titok, "l32", "ll", 32, 4096),
        (one_d_piece, "s", "ss", 256, 4096),
    ],
)
def test_configs_and_converters_speak_of_the_same_models(system, variant, sizes, tokens, codes):
    channels, form = (12, "codes") if codes == 4096 else (64 if codes else 16, "pixels")
    theirs = titok_weights.model(256, *(titok.SIZES[letter] for letter in sizes), tokens, channels, codes, form)
    ours = same(system.get_config(variant).task.model.to_dict())
    if codes:
        ours["quantizer"].setdefault("normalize", "none")
    assert ours == same(theirs)


def test_so_do_those_of_the_convolutional_tokenizers():
    assert same(maskgit_vqgan.get_config("f16").task.model.to_dict()) == maskgit_weights.model()
    for name, channels in llamagen_vq.CHANNELS.items():
        assert same(llamagen_vq.get_config(name).task.model.to_dict()) == llamagen_weights.model(channels)


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        says = ", ".join(f"{k} {v:.2f}" for k, v in learn(number).items())
        pairs = ", ".join(
            f"{n} steps {row_or_grid(True, number, n):.2f} {row_or_grid(False, number, n):.2f}" for n in LONG
        )
        print(f"seed {number}: {says}; a row and a grid after {pairs}", flush=True)
