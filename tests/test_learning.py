"""A small FlexTok learns, from drawn shapes, in under a minute; and what it learns is an order.

Thresholds come from three seeds of both arms (`python -m tests.test_learning`), see CALIBRATION.
"""

import functools
import sys
import tempfile

import jax
import numpy as np
import pytest

from jaxtok import sharding, train
from jaxtok.build import build
from tests import runs

CALIBRATION = ""


def learn(workdir, nested, seed=0):
    """Held-out metrics of a run with nested dropout or without it; all else is equal."""
    config = runs.tiny(
        seed=seed,
        total_steps=500,
        batch_size=32,
        log_every=50,
        checkpoint__every=1000,
        schedule__warmup=50,
        data__train__source__n=4000,
        data__eval__source__n=128,
        data__eval__batch_size=128,
        task__token_counts=(1, 2, 4, 8),
        task__samplers=(dict(title="one step", steps=1),),
    )
    if not nested:
        config.task.model.nested_dropout = None
    with pytest.MonkeyPatch.context() as patch:  # eight fake devices on two cores only cost time
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        return train.train(config, workdir)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("nested"), True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("plain"), False)


def best_constant():
    """PSNR of the mean training picture, the best that a decoder can do that reads no codes."""
    data = runs.tiny(data__train__source__n=1000, data__eval__source__n=128).data
    train_set, held_out = build(data.train.source), build(data.eval.source)
    mean = np.mean([train_set[i]["image"] for i in range(1000)], 0)
    errors = [np.square((held_out[i]["image"] - mean) / 255).mean() for i in range(128)]
    return float(np.mean(-10 * np.log10(errors)))


def test_it_beats_every_constant_picture(nested):
    assert nested["psnr/one step@8"] > best_constant() + 3


def test_the_order_is_real(nested, plain):
    """That PSNR rises with k proves nothing, for it rises without nested dropout too; the level at small k does."""
    for k in (1, 2):
        assert nested[f"psnr/one step@{k}"] > plain[f"psnr/one step@{k}"] + 1.5
    levels = [nested[f"psnr/one step@{k}"] for k in (1, 2, 4, 8)]
    assert levels == sorted(levels) and levels[-1] > levels[0] + 1
    assert nested["psnr/one step@1"] > nested["psnr/mean colour"]


def test_the_decoder_reads_the_codes(nested):
    assert nested["psnr/one step@8"] > nested["psnr/another picture's codes"] + 3
    assert nested["codes/distinct first tokens"] > 0.2


if __name__ == "__main__":
    print(f"best constant {best_constant():.2f}")
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        for arm in (True, False):
            with tempfile.TemporaryDirectory() as workdir:
                m = learn(workdir, arm, seed)
            values = {k.removeprefix("psnr/one step@"): round(v, 2) for k, v in m.items() if not k.startswith("ssim")}
            print(f"seed {seed} nested {arm}: {values}", flush=True)
