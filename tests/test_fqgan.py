"""FQGAN: the codes of a place are held apart, both books are in use, and say more than one of as many codes.

After 1,000 steps, seeds 0 / 1 / 2 (python -m tests.test_fqgan 0 1 2): two books 18.32 / 18.42 / 18.46 dB, the lesser
used to 97 / 100 / 94 %, overlap 0.011 / 0.007 / 0.005; free to overlap 18.36 / 18.40 / 18.61 dB, overlap 0.113 / 0.184
/ 0.105; one book 17.93 / 17.78 / 17.77 dB. The mutual information of the two indices does not fall by it at this size:
1.80 / 1.64 / 1.66 bits held apart, 1.60 / 1.45 / 1.42 free.

Pictures from one book alone, the other's codes at their mean over pictures: where the second must name the class, 16.67
/ 16.58 / 16.10 dB from the first and 13.74 / 13.65 / 14.04 from the second (from both 17.44 / 17.46 / 17.46); where it
need not, 15.57 / 15.47 / 15.11 and 15.47 / 15.23 / 15.52. That the second then names the class better does not show: by
a linear probe 0.68 / 0.68 / 0.62 against 0.65 / 0.63 / 0.68 from the first, and 0.63 / 0.67 / 0.65 against 0.67 / 0.59
/ 0.65 where it need not.

The tests train seed 0.
"""

import functools
import sys

import jax
import numpy as np
import pytest

from configs import fqgan
from tests import fits

TRUNK = dict(width=32, depth=1, patch=4, head_dim=16)
K, CHANNELS = 32, 8


def trained(
    seed=0, branches=("visual", "semantic"), codes=K, depth=1, between=16, overlap=0.1, taught=False, steps=1000
):
    """(task, variables) of emoji of 16 px: 16 places."""
    config = fqgan.get_config("tiny")
    config.update(total_steps=steps, batch_size=32, ema=0.99, schedule=dict(peak_lr=2e-3, warmup=30))
    losses = fqgan.losses()
    losses["overlap"]["weight"] = overlap
    if len(branches) == 1:
        del losses["overlap"]  # which takes two
    if taught:
        losses["class"] = fqgan.prediction(1, CHANNELS, dict(width=64, depth=1, head_dim=16), classes=10)
    model = fqgan.fqgan(branches, codes, CHANNELS, dict(groups=4), dict(depth=depth, between=between, head_dim=16))
    # Transformers for LlamaGen's convolutions.
    model["encoder"]["trunk"] = dict(name="encoders.vit.ViT", channels=32, **TRUNK)
    model["decoder"] = dict(name="decoders.vit.ViT", **TRUNK)
    config.task = fqgan.task(model, losses, places=16)
    return fits.fit(config, fits.emoji("train"), seed)[:2]


def one_book(seed=0, **options):
    """The control: one book of as many codes, and a branch with about as many parameters as the other two."""
    return trained(seed, ("visual",), 2 * K, depth=2, between=32, **options)


taught = functools.partial(trained, taught=True)
ARMS = {
    "two": trained,
    "two, the second taught": taught,
    "two, free to overlap": functools.partial(trained, overlap=0.0),
    "one": one_book,
}


def indices(task, variables):
    """int [M G] of all places of the held-out pictures."""
    found = fits.encode(task, variables, fits.emoji("test")["image"]).indices
    return np.asarray(found).reshape(-1, found.shape[-1])


def shared(pairs):
    """The mutual information of two columns [M 2], in bits, from their counts."""
    joint = np.zeros((K, K))
    np.add.at(joint, tuple(pairs.T), 1 / len(pairs))
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / alone[there])).sum())


def overlap(task, variables):
    """The mean squared cosine of the two codes of a place."""
    return float(fits.encode(task, variables, fits.emoji("test")["image"]).aux["overlap"])


def used(task, variables):
    """The share of each book's codes that occur."""
    books = task.model.quantizer.vocabulary
    return [len(np.unique(column)) / k for column, k in zip(indices(task, variables).T, books, strict=True)]


def quality(task, variables):
    return fits.quality(task, variables, fits.emoji("test")["image"])


def of(book):
    """Where its numbers lie in those of both."""
    return slice(book * CHANNELS, (book + 1) * CHANNELS)


def alone(task, variables, book):
    """The quality where the codes of the other book are at their mean over pictures."""
    constant = lambda z: z.at[..., of(1 - book)].set(z[..., of(1 - book)].mean(0))
    change = lambda codes: codes.replace(z=constant(codes.z))
    return fits.quality(task, variables, fits.emoji("test")["image"], change)


def probe(task, variables, book):
    """How often a ridge regression on the codes of one book names the class of a held-out picture."""

    def seen(split):
        z = np.asarray(fits.encode(task, variables, fits.emoji(split)["image"]).z)[..., of(book)]
        return np.pad(z.reshape(len(z), -1), ((0, 0), (0, 1)), constant_values=1), fits.emoji(split)["label"]

    (x, known), (y, new) = seen("train"), seen("test")
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ np.eye(10)[known])
    return float(((y @ weights).argmax(1) == new).mean())


@pytest.fixture(scope="module")
def two():
    return trained()


def test_both_books_are_in_use(two):
    assert min(used(*two)) > 0.8


def test_the_codes_of_a_place_are_held_apart(two):
    assert overlap(*two) < 0.5 * overlap(*trained(overlap=0.0))


def test_two_books_say_more_than_one_of_as_many_codes(two):
    one = one_book()
    sizes = [sum(x.size for x in jax.tree.leaves(run[1]["params"])) for run in (two, one)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    assert quality(*two) > quality(*one) + 0.2


def test_a_book_that_names_the_class_leaves_the_picture_to_the_other(two):
    run = taught()
    assert abs(alone(*two, 0) - alone(*two, 1)) < 1 < 1.5 < alone(*run, 0) - alone(*run, 1)


def test_the_mutual_information_by_hand():
    same, apart = np.stack([np.arange(4)] * 2, 1), np.stack(np.divmod(np.arange(16), 4), 1)
    assert shared(same) == pytest.approx(2) and shared(apart) == pytest.approx(0)


if __name__ == "__main__":
    for name, arm in ARMS.items():
        for number in map(int, sys.argv[1:]):
            run = arm(number)
            size = sum(x.size for x in jax.tree.leaves(run[1]["params"]))
            says = f"{name}, seed {number}: PSNR {quality(*run):.2f}, used {np.round(used(*run), 2)}, {size} parameters"
            if name != "one":
                says += f", shared {shared(indices(*run)):.3f} bits, overlap {overlap(*run):.3f}"
                says += ", alone {:.2f} {:.2f}, probe {:.3f} {:.3f}".format(
                    *(f(*run, b) for f in (alone, probe) for b in (0, 1))
                )
            print(says, flush=True)
