"""A small FlexTok learns emoji of 16 px in seconds, and what it learns is an order.

One-step PSNR in dB after 1,200 steps of 32 (`python -m tests.test_learning 0 1 2`):

    tokens                      1      2      4      8   another picture's codes
    nested, seed 0          14.27  15.03  15.28  15.65   12.67
            seed 1          14.21  15.22  15.65  16.06   12.75
            seed 2          13.86  14.61  15.32  15.72   12.58
    plain,  seed 0          12.25  13.00  14.65  17.22   12.88
            seed 1          11.05  11.94  12.62  16.90   12.72
            seed 2          11.48  11.99  13.86  17.51   12.98

The tests train seed 0. Nested beats plain by 2.0 dB or more at one token and at two, by 0.6, 3.0 and 1.5 at four.
The best constant picture gives 11.79, each picture's mean colour 12.77.
"""

import sys

import numpy as np
import pytest

from configs import flextok
from tests import fits


def learn(nested, seed=0, steps=1200):
    """Held-out metrics of a run with nested dropout or without it; all else is equal."""
    config = flextok.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, schedule=dict(warmup=50))
    config.task.token_counts, config.task.samplers = (1, 2, 4, 8), (dict(title="one step", steps=1),)
    if not nested:
        config.task.model.nested_dropout = None
    return fits.evaluate(*fits.fit(config, fits.emoji("train"), seed)[:2], fits.emoji("test")["image"])


@pytest.fixture(scope="module")
def nested():
    return learn(True)


@pytest.fixture(scope="module")
def plain():
    return learn(False)


def best_constant():
    """PSNR of the mean training picture, the best that a decoder can do that reads no codes."""
    known, new = (fits.emoji(split)["image"] / 255 for split in ("train", "test"))
    return float(np.mean(-10 * np.log10(np.square(new - known.mean(0)).mean((1, 2, 3)))))


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
    assert nested["psnr/one step@8"] > nested["psnr/another picture's codes"] + 2.5
    assert nested["codes/distinct first tokens"] > 0.5


if __name__ == "__main__":
    print(f"best constant {best_constant():.2f}")
    for arm in (True, False):
        for number in map(int, sys.argv[1:]):
            found = {k: round(v, 2) for k, v in learn(arm, number).items() if not k.startswith("ssim")}
            print(f"nested {arm}, seed {number}: {found}", flush=True)
