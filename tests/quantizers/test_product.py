"""Product: parts of a latent and streams of latents, their order, and how alike they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.quantizers.binary import LFQ
from jaxtok.quantizers.fsq import FSQ
from jaxtok.quantizers.product import Product
from jaxtok.quantizers.vq import VQ

KEY = jax.random.key(0)
LATENTS = jax.random.normal(KEY, (4, 9, 6))


def variables(module, latents=LATENTS):
    return module.init({"params": jax.random.key(1)}, latents)


def test_books_take_the_channels_in_order():
    module = Product((FSQ((5, 5)), LFQ(1), FSQ((3, 3, 3))), widths=(2, 1, 3))
    codes = module.apply({}, LATENTS)
    assert module.vocabulary == (25, 2, 27)
    for g, (book, part) in enumerate(zip(module.books, jnp.split(LATENTS, [2, 3], -1), strict=True)):
        alone = book.apply({}, part)
        np.testing.assert_array_equal(codes.indices[..., g], alone.indices)
        np.testing.assert_array_equal(jnp.split(codes.z, [2, 3], -1)[g], alone.z)
        found = module.apply(
            {}, codes.indices.at[..., g].set(0), method="lookup"
        )  # an index is a book's, not another's
        before, after = (jnp.split(x, [2, 3], -1) for x in (codes.z, found))
        changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [i == g for i in range(3)]


def test_named_streams_keep_the_order_of_the_books():
    module = Product({"visual": VQ(7), "semantic": VQ(5)})
    streams = {"semantic": LATENTS[..., :2], "visual": LATENTS[..., 2:]}
    held = variables(module, streams)
    assert set(held["params"]) == {"books_visual", "books_semantic"} and module.vocabulary == (7, 5)
    codes = module.apply(held, streams)
    assert codes.z.shape == (4, 9, 6) and codes.indices.shape == (4, 9, 2)
    alone = VQ(7).apply({"params": held["params"]["books_visual"]}, streams["visual"])
    np.testing.assert_array_equal(codes.z[..., :4], alone.z)
    with pytest.raises(ValueError, match=r"are named \['semantic', 'visual'\], but the encoder gives \['pixel'\]"):
        module.apply(held, {"pixel": LATENTS})
    with pytest.raises(ValueError, match="gives a single array"):
        module.apply(held, LATENTS)


def test_losses_are_sums_over_the_books_that_have_them():
    module = Product((VQ(7), FSQ((3, 3)), VQ(5, ema=0.9)))
    held = variables(module)
    aux = module.apply(held, LATENTS).aux
    params = {"params": held["params"]["books_0"]}, {"codebook": held["codebook"]["books_2"]}
    first, third = VQ(7).apply(params[0], LATENTS[..., :2]), VQ(5, ema=0.9).apply(params[1], LATENTS[..., 4:])
    np.testing.assert_allclose(aux["commitment"], first.aux["commitment"] + third.aux["commitment"], rtol=1e-6)
    np.testing.assert_allclose(aux["codebook"], first.aux["codebook"], rtol=1e-6)


def test_overlap_is_1_for_parallel_codes_and_0_for_orthogonal_ones():
    def overlap(*vectors):
        books = tuple(VQ(1) for _ in vectors)
        held = {"params": {f"books_{g}": {"codebook": jnp.array([v])} for g, v in enumerate(vectors)}}
        return Product(books).apply(held, jnp.ones((2, 3, 2 * len(vectors)))).aux["overlap"]

    np.testing.assert_allclose(overlap([1.0, 0.0], [-3.0, 0.0]), 1, rtol=1e-6)
    np.testing.assert_allclose(overlap([1.0, 0.0], [0.0, 2.0]), 0, atol=1e-7)
    np.testing.assert_allclose(overlap([1.0, 0.0], [1.0, 1.0]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(overlap([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]), 1 / 3, rtol=1e-6)  # the mean of three pairs
    unequal = Product((LFQ(2), LFQ(4)), widths=(2, 4)).apply({}, LATENTS)
    assert "overlap" not in unequal.aux


def test_the_gradient_of_the_overlap_turns_latents_apart():
    module = Product((VQ(5, normalize="both"), VQ(5, normalize="both")))
    held = variables(module)
    gradient = jax.grad(lambda x: module.apply(held, x).aux["overlap"])(LATENTS)
    assert np.abs(gradient).max() > 1e-4


def test_widths_must_fit():
    for module in (Product((VQ(3),) * 4), Product((VQ(3), VQ(3)), widths=(3, 4)), Product((VQ(3),), widths=(3, 3))):
        with pytest.raises(ValueError, match="but the encoder gives 6 channels"):
            variables(module)
    with pytest.raises(ValueError, match="takes 2 indices a token, got 1"):
        module = Product((LFQ(3), LFQ(3)))
        module.apply({}, jnp.zeros((4, 9, 1), int), method="lookup")
