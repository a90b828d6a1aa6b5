"""A decoder of several scales: the pyramid, who sees whom, and what is left of one scale."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoders.multiscale import MultiScale
from jaxtok.decoders.vit import ViT
from jaxtok.nn import masks, pyramid
from jaxtok.pretrained.convert import flatten, unflatten
from jaxtok.structs import Codes

SCALES, SIZES = (1, 2, 4), dict(width=16, depth=2, patch=2, head_dim=8)
ENDS = np.cumsum(np.square((0, *SCALES)))  # where each scale begins and ends
RNG = np.random.default_rng(0)


def codes(z):
    """Of latents [B n n C]."""
    z = jnp.asarray(z, jnp.float32)
    rows = z.reshape(len(z), -1, z.shape[-1])
    return Codes(rows, None, jnp.ones(rows.shape[:2], bool), z.shape[1:3])


# In sixteenths, so that means over 4 and over 16 of them are exact, whatever their order.
Z = RNG.integers(-16, 17, (2, 4, 4, 3)) / 16


@pytest.fixture(scope="module")
def params():
    flat = flatten(jax.jit(MultiScale(SCALES, **SIZES).init)(jax.random.key(0), codes(Z), target=None)["params"])
    return unflatten({k: v + 0.2 * RNG.normal(size=v.shape).astype(np.float32) for k, v in flat.items()})


def tokens(params, z, causal=True):
    """What the transformer makes of every token of every scale, [B L D]."""
    module = MultiScale(SCALES, **SIZES, causal=causal)
    run = partial(module.apply, capture_intermediates=lambda part, _: part.name == "norm_post", mutable="intermediates")
    _, seen = jax.jit(partial(run, method="sample"))({"params": params}, codes(z))
    return np.asarray(seen["intermediates"]["norm_post"]["__call__"][0])


# ---- the pyramid ----


def test_pooled_tokens_are_means_of_squares_coarse_before_fine():
    pooled = np.asarray(pyramid.pool(jnp.asarray(Z), SCALES))
    assert pooled.shape == (2, 1 + 4 + 16, 3)
    np.testing.assert_array_equal(pooled[:, 0], Z.mean((1, 2)).astype(np.float32))
    np.testing.assert_array_equal(pooled[:, 1 + 2], Z[:, 2:, :2].mean((1, 2)).astype(np.float32))  # row 1, column 0
    np.testing.assert_array_equal(pooled[:, 5:], Z.reshape(2, 16, 3).astype(np.float32))


def test_coarsened_tokens_hold_the_means_of_their_square_and_no_more():
    rough = np.asarray(pyramid.coarsen(jnp.asarray(Z), 2))
    np.testing.assert_array_equal(
        rough[:, 2:, :2], np.broadcast_to(Z[:, 2:, :2].mean((1, 2), keepdims=True), (2, 2, 2, 3))
    )
    np.testing.assert_array_equal(pyramid.pool(rough, (1, 2)), pyramid.pool(jnp.asarray(Z), (1, 2)))
    np.testing.assert_array_equal(pyramid.coarsen(jnp.asarray(Z), 4), Z.astype(np.float32))


@pytest.mark.parametrize("shape, scale", [((4, 4), 3), ((4, 4), 8), ((4, 4), 0), ((4, 8), 2)])
def test_squares_that_do_not_come_out_even_are_refused(shape, scale):
    with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} tokens has no means over {scale} x {scale}"):
        pyramid.pool(jnp.zeros((1, *shape, 2)), (scale,))


def test_the_mask_by_hand():
    mask = masks.scale_causal((1, 2))
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0, 0]] + [[1, 1, 1, 1, 1]] * 4)
    assert masks.scale_causal((4,)).all()


# ---- the decoder ----


@pytest.mark.parametrize("scale", [2, 4])
def test_coarser_tokens_do_not_move_with_finer_ones(params, scale):
    """Not by a bit; with every token in sight of every other, all of them move, and finer ones do in either case."""
    side = 4 // scale
    sign = np.kron((-1.0) ** np.add.outer(np.arange(scale), np.arange(scale)), np.ones((side, side)))
    noise = sign[None, :, :, None] * RNG.integers(1, 9, (2, 1, 1, 3)) / 16  # 0 in the mean of what is coarser
    end = ENDS[SCALES.index(scale)]
    for causal in (True, False):
        moved = np.abs(tokens(params, Z + noise, causal) - tokens(params, Z, causal)).max((0, 2))
        assert (moved[end:] > 1e-3).all()
        assert (moved[:end] == 0).all() if causal else (moved[:end] > 1e-4).all()


def test_finer_tokens_move_with_coarser_ones(params):
    before = tokens(params, Z)
    table = params["pos_embed"] + np.eye(ENDS[-1], 1) * np.linspace(-1, 1, 16)  # the first row, the coarsest token's
    embedded = params | {"pos_embed": table.astype(np.float32)}
    assert (np.abs(tokens(embedded, Z) - before).max((0, 2)) > 1e-4).all()


def test_one_scale_is_the_plain_decoder(params):
    one = params | {"pos_embed": params["pos_embed"][-16:]}
    ours = MultiScale((4,), **SIZES).apply({"params": one}, codes(Z), method="sample")
    plain = ViT(**SIZES).apply({"params": one}, codes(Z), method="sample")
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert np.std(ours) > 0.1


def test_a_coarse_picture_reads_means_only(params):
    sample = jax.jit(partial(MultiScale(SCALES, **SIZES).apply, method="sample"), static_argnames="scale")
    rough = codes(pyramid.coarsen(jnp.asarray(Z), 2))
    np.testing.assert_array_equal(sample({"params": params}, codes(Z), scale=2), sample({"params": params}, rough))
    assert np.abs(sample({"params": params}, rough) - sample({"params": params}, codes(Z))).max() > 1e-3
    np.testing.assert_array_equal(sample({"params": params}, codes(Z), scale=4), sample({"params": params}, codes(Z)))


@pytest.mark.parametrize(
    "scales, given, says",
    [
        ((1, 2), codes(Z), "must rise to n, .* one of 4 x 4"),
        ((2, 1, 4), codes(Z), "must rise"),
        ((1, 2, 4), codes(Z).replace(grid=None), "these have no grid"),
        ((1, 3, 4), codes(Z), "no means over 3 x 3"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales, given, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(partial(MultiScale(scales, **SIZES).init, target=None), jax.random.key(0), given)
