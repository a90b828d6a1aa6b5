"""Convolutions between pictures and grids of tokens, inside a Tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.codecs.identity import Identity
from jaxtok.decoders.cnn import CNN as Decoder
from jaxtok.encoders.cnn import CNN as Encoder
from jaxtok.quantizers.gaussian import Gaussian
from jaxtok.tokenizer import Tokenizer

TRUNK = dict(channels=(4, 6), blocks=1, groups=2)
MODEL = Tokenizer(Identity(), Encoder(out=6, **TRUNK), Gaussian(), Decoder(**TRUNK))
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def variables():
    keys = {"params": jax.random.key(0), "train": jax.random.key(1)}
    return jax.jit(lambda: MODEL.init(keys, PICTURES, train=True))()


@pytest.fixture(scope="module")
def codes(variables):
    return jax.jit(lambda v: MODEL.apply(v, PICTURES, method="encode"))(variables)


@jax.jit
def decode(variables, codes):
    return MODEL.apply(variables, codes, method="decode")


def test_tokens_are_the_places_row_by_row_and_the_grid_is_kept(variables, codes):
    assert codes.grid == (3, 4) and codes.z.shape == (2, 12, 3) and codes.keep.shape == (2, 12)
    x = PICTURES.astype(np.float32) / 127.5 - 1
    latents = jax.jit(lambda v: Encoder(out=6, **TRUNK).apply(v, x))({"params": variables["params"]["encoder"]})
    assert latents.shape == (2, 3, 4, 6)
    np.testing.assert_allclose(codes.z[:, 2 * 4 + 1], latents[:, 2, 1, :3], atol=1e-5)  # row 2, column 1: the mean


def test_the_decoder_predicts_the_picture_that_it_is_given(variables):
    outputs = jax.jit(lambda v, key: MODEL.apply(v, PICTURES, train=True, rngs={"train": key}))(
        variables, jax.random.key(2)
    )
    decoded = outputs["decoded"]
    assert decoded.prediction.shape == decoded.target.shape == (2, 6, 8, 3)
    np.testing.assert_allclose(decoded.target, PICTURES / 127.5 - 1, atol=1e-6)
    assert outputs["codes"].grid == (3, 4) and float(outputs["codes"].aux["kl"]) > 0


def test_one_program_of_the_decoder_serves_its_training_and_its_use(variables, codes):
    picture = jax.jit(lambda v, c: MODEL.apply(v, c, method=lambda m, c: m.decoder(c, target=None).prediction))
    expected = np.clip((picture(variables, codes) + 1) / 2, 0, 1)
    np.testing.assert_allclose(decode(variables, codes), expected, atol=1e-6)


def test_a_token_that_is_not_kept_is_zero_in_its_place(variables, codes):
    keep = codes.keep.at[:, 5].set(False)
    dropped = decode(variables, codes.replace(keep=keep))
    assert np.abs(dropped - decode(variables, codes)).max() > 1e-4
    zeroed = codes.replace(z=codes.z.at[:, 5].set(0))
    np.testing.assert_allclose(dropped, decode(variables, zeroed), atol=1e-6)


def test_tokens_without_places_are_refused(variables, codes):
    with pytest.raises(ValueError, match="these Codes have no grid"):
        decode(variables, codes.replace(grid=None))


def test_latents_of_registers_get_no_grid():
    codes = MODEL.apply({}, jnp.zeros((2, 5, 6)), method="quantize")
    assert codes.grid is None and codes.z.shape == (2, 5, 3)
