"""Transformers between pictures and grids of tokens: encoders.vit.ViT and decoders.vit.ViT, inside a Tokenizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.codecs.identity import Identity
from jaxtok.decoders.vit import ViT as Decoder
from jaxtok.encoders.vit import ViT as Encoder
from jaxtok.pretrained.convert import flatten, unflatten
from jaxtok.quantizers.gaussian import Gaussian
from jaxtok.tokenizer import Tokenizer

SIZES = dict(width=16, depth=2, patch=4, head_dim=8)
KINDS = {"learned": dict(), "rotary": dict(positions="rotary", mlp="swiglu")}
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)  # 2 x 3 patches


def model(kind, **fields):
    sizes = SIZES | KINDS[kind] | fields
    return Tokenizer(Identity(), Encoder(channels=6, **sizes), Gaussian(), Decoder(**sizes))


def shaken(params):
    """All parameters around their initial values, so that none is without effect."""
    rng = np.random.default_rng(1)
    return unflatten({k: v + 0.2 * rng.normal(size=v.shape).astype(np.float32) for k, v in flatten(params).items()})


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """(kind, the model, its variables)."""
    ours, keys = model(request.param), {"params": jax.random.key(0), "train": jax.random.key(1)}
    params = jax.jit(lambda: ours.init(keys, PICTURES, train=True))()["params"]
    return request.param, ours, {"params": shaken(params)}


@pytest.fixture(scope="module")
def alone(trained):
    """(model, variables) in which nothing that attention reads arrives, so that every token is on its own."""
    _, ours, variables = trained
    flat = flatten(variables["params"])
    return ours, {"params": unflatten({k: v * ("/attn/out/" not in k) for k, v in flat.items()})}


def encode(ours, variables, images=PICTURES):
    return jax.jit(partial(ours.apply, method="encode"))(variables, images)


def decode(ours, variables, codes):
    return jax.jit(partial(ours.apply, method="decode"))(variables, codes)


def test_shapes_types_and_what_each_kind_has(trained):
    kind, ours, variables = trained
    codes = encode(ours, variables)
    assert codes.grid == (2, 3) and codes.z.shape == (2, 6, 3) and codes.z.dtype == jnp.float32
    picture = decode(ours, variables, codes)
    assert picture.shape == PICTURES.shape and picture.dtype == jnp.float32
    for part in ("encoder", "decoder"):
        params = variables["params"][part]
        assert ("pos_embed" in params) == (kind == "learned")
        assert set(params["blocks"]["mlp"]) == ({"fc1", "fc2"} if kind == "learned" else {"gate", "value", "out"})
    half = model(kind, dtype=jnp.bfloat16)
    rough = encode(half, variables)
    assert rough.z.dtype == jnp.float32 and 0 < np.abs(rough.z - codes.z).max() < 0.2
    assert decode(half, variables, codes).dtype == jnp.float32


def test_a_latent_stands_where_its_patch_does(alone):
    changed = PICTURES.copy()
    changed[:, 4:, 4:8] = 255 - changed[:, 4:, 4:8]  # row 1, column 1
    before, after = encode(*alone).z, encode(*alone, changed).z
    moved = np.abs(after - before).max((0, 2)) > 1e-5
    assert moved.tolist() == [i == 1 * 3 + 1 for i in range(6)]


def test_a_patch_of_pixels_stands_where_its_token_does(alone):
    """The 3x3 behind the patches carries one pixel further."""
    codes = encode(*alone)
    changed = codes.replace(z=codes.z.at[:, 2].add(1))  # row 0, column 2
    moved = np.abs(decode(*alone, changed) - decode(*alone, codes)).max((0, 3)) > 1e-6
    assert not moved[5:].any() and not moved[:, :7].any() and moved[:4, 8:].any(1).all()


def test_tokens_see_each_other_and_know_their_places(trained):
    _, ours, variables = trained
    swapped = PICTURES.copy()
    swapped[:, :4, :4], swapped[:, 4:, 8:] = PICTURES[:, 4:, 8:], PICTURES[:, :4, :4]  # the first patch and the last
    before, after = encode(ours, variables).z, encode(ours, variables, swapped).z
    order = np.array([5, 1, 2, 3, 4, 0])
    assert np.abs(after - before[:, order]).max() > 1e-2  # without places they would only trade places
    changed = PICTURES.copy()
    changed[:, :4, :4] = 255 - changed[:, :4, :4]
    assert (np.abs(encode(ours, variables, changed).z - before).max((0, 2)) > 1e-4).all()


def test_rotary_places_serve_any_size_and_learned_ones_one(trained):
    kind, ours, variables = trained
    larger = np.concatenate([PICTURES, PICTURES], 1)  # 4 x 3 patches
    if kind == "learned":
        with pytest.raises(Exception, match="pos_embed"):
            encode(ours, variables, larger)
        return
    codes = encode(ours, variables, larger)
    assert codes.grid == (4, 3) and decode(ours, variables, codes).shape == larger.shape


def test_training_predicts_what_sampling_gives(trained):
    _, ours, variables = trained
    codes = encode(ours, variables)
    call = lambda m, codes: m.decoder(codes, target=jnp.zeros(PICTURES.shape), train=True)
    decoded = jax.jit(partial(ours.apply, method=call))(variables, codes)
    expected = np.clip((decoded.prediction + 1) / 2, 0, 1)
    np.testing.assert_allclose(decode(ours, variables, codes), expected, atol=1e-6)
    assert decoded.target.shape == PICTURES.shape


def test_a_token_that_is_not_kept_is_zero_in_its_place(trained):
    _, ours, variables = trained
    codes = encode(ours, variables)
    dropped = decode(ours, variables, codes.replace(keep=codes.keep.at[:, 4].set(False)))
    zeroed = decode(ours, variables, codes.replace(z=codes.z.at[:, 4].set(0)))
    np.testing.assert_allclose(dropped, zeroed, atol=1e-6)
    assert np.abs(dropped - decode(ours, variables, codes)).max() > 1e-4


def test_what_does_not_fit_is_refused(trained):
    kind, ours, variables = trained
    with pytest.raises(ValueError, match="these have no grid"):
        decode(ours, variables, encode(ours, variables).replace(grid=None))
    with pytest.raises(ValueError, match="does not divide into patches of 4"):
        encode(ours, variables, PICTURES[:, :7])
    with pytest.raises(ValueError, match='ViT.positions is "learned" or "rotary", not "both"'):
        encode(model(kind, positions="both"), variables)
