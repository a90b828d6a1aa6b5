"""HieraTok: pictures from coarse scales alone, and what the scales are worth beside one.

PSNR of held-out emoji of 16 px from means over 1, 2 x 2 and all 4 x 4 places, and how far pictures move with noise on
their latents (`python -m tests.test_hieratok 400 0 1 2`, and 1500):

                                          400 steps                        1,500 steps
    scales (1, 2, 4), seed 0  12.77 14.02 20.11  0.0210        12.75 13.99 23.46  0.0260
                      seed 1  12.66 13.97 19.59  0.0229        12.71 14.01 23.04  0.0255
                      seed 2  12.79 14.01 20.05  0.0246        12.79 14.00 23.04  0.0272
    scales (4,),      seed 0              20.05  0.0209        12.68 13.95 23.26  0.0253
                      seed 1              19.48  0.0228        12.71 13.98 22.96  0.0250
                      seed 2              20.11  0.0247        12.74 13.95 22.99  0.0266

Coarse scales alone give coarse pictures, but a decoder that never saw them gives as good ones from the same means. What
several scales are worth beside one is 0.05 to 0.20 dB after 1,500 steps, less than a test can hold; smoother latents
are not seen. That coarse tokens do not hear of fine ones holds exactly (tests/decoders/test_multiscale.py).
"""

import sys

import jax
import numpy as np

from configs import hieratok
from tests import fits

MODEL = dict(channels=8, patch=4, scales=(1, 2, 4), encoder=(64, 1, 32), decoder=(64, 2, 32))


def trained(seed=0, steps=400, **changes):
    """(task, variables) of emoji of 16 px, 4 x 4 tokens."""
    config = hieratok.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, ema=0.99, schedule=dict(peak_lr=2e-3, warmup=30))
    config.task = hieratok.task(MODEL | changes, hieratok.losses())
    return fits.fit(config, fits.emoji("train"), seed)[:2]


def quality(task, variables, **options):
    return fits.quality(task, variables, fits.emoji("test")["image"], **options)


def roughness(task, variables):
    """How far pictures move, root mean square, when noise of a tenth of the latents' deviation is added to them."""
    codes = fits.encode(task, variables, fits.emoji("test")["image"])
    noise = 0.1 * codes.z.std() * jax.random.normal(jax.random.key(0), codes.z.shape)
    moved = fits.decode(task, variables, codes.replace(z=codes.z + noise)) - fits.decode(task, variables, codes)
    return float(np.sqrt(np.square(moved).mean()))


def test_pictures_gain_with_every_scale():
    run = trained()
    coarse = [quality(*run, scale=scale) for scale in (1, 2, 4)]
    assert coarse[1] > coarse[0] + 0.5 and coarse[2] > coarse[1] + 2


if __name__ == "__main__":
    steps, *seeds = map(int, sys.argv[1:])
    for scales in ((1, 2, 4), (4,)):
        for number in seeds:
            run = trained(number, steps, scales=scales)
            coarse = [round(quality(*run, scale=s), 2) for s in (1, 2, 4)]
            print(f"{steps} steps, scales {scales}, seed {number}: PSNR {coarse}, {roughness(*run):.4f}", flush=True)
