"""Perturbed and swapped codes: how many change, into what, and that nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.quantizers import perturb
from jaxtok.quantizers.binary import LFQ
from jaxtok.quantizers.fsq import FSQ
from jaxtok.quantizers.perturb import Perturbed, Swapped
from jaxtok.quantizers.vq import VQ

LATENTS = jax.random.normal(jax.random.key(0), (20, 50, 3))
TABLE = jax.random.normal(jax.random.key(1), (32, 3))
HELD = {"params": {"quantizer": {"codebook": TABLE}}}


def run(module, held=HELD, key=0, **options):
    return module.apply(held, LATENTS, train=True, rngs={"train": jax.random.key(key)}, **options)


def plain(module=None):
    return VQ(32).apply({"params": {"codebook": TABLE}}, LATENTS)


def ranks(origins, indices):
    """Which neighbour of its origin [M D] each code is, 0 the nearest."""
    distances = np.square(np.asarray(origins).reshape(-1, 1, 3) - TABLE).sum(-1)
    return (distances.argsort(1) == np.asarray(indices).reshape(-1, 1)).argmax(1)


@pytest.mark.parametrize("rank_from", ["code", "z"])
def test_the_share_that_changes_and_the_neighbours_it_becomes(rank_from):
    """alpha (1 - 1 / delta) of the tokens, the delta nearest equally often; 1000 tokens, four standard errors."""
    codes, true = run(Perturbed(VQ(32), 0.6, 1.0, 8, rank_from)), plain()
    share = (codes.indices != true.indices).mean()
    np.testing.assert_allclose(share, 0.6 * (1 - 1 / 8), atol=0.063)
    found = ranks(true.z if rank_from == "code" else LATENTS, codes.indices)
    assert found.max() == 7
    counts = np.bincount(found, minlength=8)
    np.testing.assert_allclose(counts[1:] / 1000, 0.6 / 8, atol=0.034)
    np.testing.assert_array_equal(codes.z, TABLE[codes.indices])


def test_what_cannot_change_does_not():
    true = plain()
    for module in (Perturbed(VQ(32), alpha=0.0), Perturbed(VQ(32), delta=1), Perturbed(VQ(32), beta=0.0)):
        codes = run(module.clone(delta=min(module.delta, 32)))
        np.testing.assert_array_equal(codes.indices, true.indices)
        np.testing.assert_array_equal(codes.z, true.z)
    used = Perturbed(VQ(32), 1.0, 1.0, 8).apply(HELD, LATENTS)  # not in training
    np.testing.assert_array_equal(used.indices, true.indices)


def test_only_a_share_of_the_pictures_is_touched_and_not_always_the_same():
    touched = [
        np.flatnonzero((run(Perturbed(VQ(32), 1.0, 0.25, 8), key=key).indices != plain().indices).any(1))
        for key in range(3)
    ]
    assert [len(pictures) for pictures in touched] == [5, 5, 5]
    assert len(set(map(tuple, touched))) > 1
    small = Perturbed(VQ(32), 1.0, 0.001, 8)
    assert (run(small).indices != plain().indices).any(1).sum() == 1  # at least one


def test_losses_and_gradients_are_those_of_the_true_codes():
    module, weight = Perturbed(VQ(32), 1.0, 1.0, 8), jax.random.normal(jax.random.key(3), LATENTS.shape)
    for name, value in plain().aux.items():
        np.testing.assert_array_equal(run(module).aux[name], value)
    through = lambda x: (module.apply(HELD, x, train=True, rngs={"train": jax.random.key(0)}).z * weight).sum()
    np.testing.assert_allclose(jax.grad(through)(LATENTS), weight, rtol=1e-6)


def test_bits_flip_as_many_as_the_logarithm_of_delta():
    true = LFQ(8).apply({}, jnp.tile(LATENTS, 3)[..., :8])
    codes = Perturbed(LFQ(8), 0.5, 1.0, 8).apply(
        {}, jnp.tile(LATENTS, 3)[..., :8], train=True, rngs={"train": jax.random.key(0)}
    )
    flips = (codes.z != true.z).sum(-1)
    assert set(np.unique(flips)) == {0, 3}
    np.testing.assert_allclose((flips == 3).mean(), 0.5, atol=0.063)
    assert (codes.z != true.z).mean((0, 1)).min() > 0.1  # any of the bits


def test_the_schedule_falls_in_a_line_and_is_counted_in_training_steps():
    np.testing.assert_allclose(perturb.anneal(np.array([0, 10, 20, 30, 99]), 10, 30, 0.2), [1, 1, 0.6, 0.2, 0.2])
    module = Perturbed(VQ(32), 1.0, 1.0, 16, schedule=(1, 3, 0.125))
    held = {**module.init({"params": jax.random.key(0), "train": jax.random.key(0)}, LATENTS, train=True), **HELD}
    assert held["codebook"]["step"] == 0
    widest = []
    for _ in range(5):
        codes, after = run(module, held, mutable=["codebook"])
        held = {**held, **after}
        widest.append(int(ranks(plain().z, codes.indices).max()) + 1)
    assert widest == [16, 16, 9, 2, 2]  # of 1, 1, 0.5625, 0.125, 0.125
    assert held["codebook"]["step"] == 5
    module.apply(held, LATENTS, mutable=["codebook"])


@pytest.mark.parametrize(
    "module, says",
    [
        (Perturbed(VQ(32), rank_from="latent"), 'rank_from is "code" or "z"'),
        (Perturbed(VQ(32), delta=33), "delta is 33, but there are 32 codes"),
        (Perturbed(FSQ((3, 3, 3))), "codes\\(\\) or bits, which FSQ has not"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(module, says):
    with pytest.raises(ValueError, match=says):
        run(module)


def test_swapped_codes_come_from_the_same_place_of_another_picture():
    module = Swapped(VQ(32), pictures=0.5, tokens=0.4)
    codes, true = run(module), plain()
    changed = np.asarray((codes.z != true.z).any(-1))
    touched = changed.any(1)
    assert 3 <= touched.sum() <= 17  # of 20, at 0.5
    np.testing.assert_allclose(changed[touched].mean(), 0.4, atol=0.12)  # less those whose code is the same
    for b in np.flatnonzero(touched):
        places = np.flatnonzero(changed[b])
        same = (np.asarray(true.indices)[:, places] == np.asarray(codes.indices)[b, places]).all(1)
        assert same.any() and not same[b]
    np.testing.assert_array_equal(codes.z, TABLE[codes.indices])
    np.testing.assert_array_equal(module.apply(HELD, LATENTS).indices, true.indices)
