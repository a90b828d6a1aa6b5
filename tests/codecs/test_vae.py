"""The frozen VAE as a codec. tests/test_goldens.py holds it against the reference."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import flextok, kl_vae
from jaxtok.build import build
from jaxtok.codecs.vae import VAE
from jaxtok.pretrained.convert import flatten, unflatten

SIZES = dict(latent_channels=2, channels=(4, 6), blocks=1, groups=2)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(VAE(**SIZES).init)(jax.random.key(0), PIXELS)


def biased(variables, layer, bias):
    """The variables with another bias in one layer: "quant_conv" or "decoder/conv_out"."""
    flat = flatten(variables["params"])
    path = f"{layer}/bias"
    return {"params": unflatten(flat | {path: jnp.broadcast_to(jnp.asarray(bias, jnp.float32), flat[path].shape)})}


def run(variables, *args, method, **fields):
    """A method of the VAE, compiled."""
    return jax.jit(lambda v, *a: VAE(**SIZES | fields).apply(v, *a, method=method))(variables, *args)


def test_latents_are_a_grid_and_come_back_as_pictures(variables):
    latents = run(variables, PIXELS, method="encode")
    assert latents.shape == (2, 16, 24, 2) and latents.dtype == jnp.float32
    pictures = run(variables, latents, method="decode")
    assert pictures.shape == PIXELS.shape and pictures.dtype == jnp.float32
    assert set(variables["params"]) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_bytes_are_scaled_to_minus_one_and_one(variables):
    floats = PIXELS.astype(np.float32) / 255 * 2 - 1
    bytes_, scaled = (run(variables, x, method="encode") for x in (PIXELS, floats))
    np.testing.assert_allclose(bytes_, scaled, atol=1e-5)
    assert np.abs(bytes_ - run(variables, floats / 2 + 0.5, method="encode")).max() > 1e-2


def test_without_a_key_the_latents_are_the_mean(variables):
    mean, _ = run(variables, PIXELS, method="moments")
    np.testing.assert_array_equal(run(variables, PIXELS, method="encode"), mean)


def test_with_a_key_they_are_a_sample(variables):
    """Mean and deviation over 1000 draws; the bounds are six of their standard errors."""
    variables = biased(variables, "quant_conv", [0.0, 0.0, -2.0, 1.0])
    picture = PIXELS[:1, :4, :4]
    encode = lambda key: run(variables, picture, key, method="encode")
    samples = jax.vmap(encode)(jax.random.split(jax.random.key(1), 1000))
    mean, logvar = run(variables, picture, method="moments")
    std = np.exp(logvar / 2)
    assert std[..., 1].min() > 2 * std[..., 0].max()
    assert np.all(np.abs(samples.mean(0) - mean) < 6 * std / np.sqrt(1000))
    assert np.all(np.abs(samples.std(0) / std - 1) < 6 / np.sqrt(2000))
    np.testing.assert_array_equal(encode(jax.random.key(7)), encode(jax.random.key(7)))
    noise = jax.random.normal(jax.random.key(7), mean.shape)
    np.testing.assert_array_equal(run(variables, picture, None, noise, method="encode"), encode(jax.random.key(7)))


def test_log_variances_are_clamped(variables):
    extreme = biased(variables, "quant_conv", [0.0, 0.0, -1e3, 1e3])
    _, logvar = run(extreme, PIXELS, method="moments")
    assert np.all(logvar[..., 0] == -30) and np.all(logvar[..., 1] == 20)


def test_latents_are_shifted_and_scaled_and_decoding_takes_both_back(variables):
    plain = run(variables, PIXELS, method="encode")
    scaled = run(variables, PIXELS, method="encode", scaling_factor=0.5, shift_factor=0.25)
    np.testing.assert_allclose(scaled, (plain - 0.25) * 0.5, atol=1e-6)
    pictures = run(variables, plain, method="reconstruct")
    same = run(variables, scaled, method="reconstruct", scaling_factor=0.5, shift_factor=0.25)
    np.testing.assert_allclose(same, pictures, atol=1e-5)


def test_decoded_pictures_are_clipped_to_zero_and_one(variables):
    wide = biased(variables, "decoder/conv_out", [9.0, 0.0, -9.0])
    latents = run(wide, PIXELS, method="encode")
    raw, pictures = (run(wide, latents, method=method) for method in ("reconstruct", "decode"))
    assert raw[..., 0].min() > 1 and raw[..., 2].max() < -1
    assert np.all(pictures[..., 0] == 1) and np.all(pictures[..., 2] == 0)
    np.testing.assert_allclose(pictures[..., 1], np.clip((raw[..., 1] + 1) / 2, 0, 1), atol=1e-6)


def test_the_layers_between_are_left_out_where_the_family_has_none(variables):
    shapes = jax.eval_shape(VAE(**SIZES, quant_convs=False).init, jax.random.key(0), PIXELS)["params"]
    assert set(shapes) == {"encoder", "decoder"}
    trunks = {"params": {name: variables["params"][name] for name in shapes}}
    identity = {"kernel": np.eye(4, dtype=np.float32)[None, None], "bias": np.zeros(4, np.float32)}
    through = {"params": variables["params"] | {"quant_conv": identity}}
    bare = run(trunks, PIXELS, method="encode", quant_convs=False)
    np.testing.assert_allclose(bare, run(through, PIXELS, method="encode"), atol=1e-6)


def test_a_size_that_the_factor_does_not_divide_is_refused(variables):
    with pytest.raises(ValueError, match="32 x 47 does not shrink evenly by 2"):
        run(variables, PIXELS[:, :, :47], method="encode")


def test_a_trained_kl_vae_is_a_codec():
    """By the rules of configs/flextok.py; codec and tokenizer then do the same."""
    model = build(kl_vae.get_config("tiny").task.model)
    params = jax.jit(lambda: model.init({"params": jax.random.key(0), "train": jax.random.key(1)}, PIXELS))()["params"]
    moved = {}
    for path, leaf in flatten(params).items():
        match, target = next((m, to) for regex, to in flextok.VAE_AS_CODEC if (m := re.fullmatch(regex, path)))
        moved[match.expand(target).removeprefix("codec/")] = leaf
    codec = VAE(latent_channels=4, channels=(8, 16), blocks=1, groups=4)
    like = flatten(jax.eval_shape(codec.init, jax.random.key(0), PIXELS)["params"])
    assert {path: leaf.shape for path, leaf in moved.items()} == {path: leaf.shape for path, leaf in like.items()}

    codes = jax.jit(lambda p: model.apply(p, PIXELS, method="encode"))({"params": params})
    latents = jax.jit(lambda p: codec.apply(p, PIXELS, method="encode"))({"params": unflatten(moved)})
    np.testing.assert_allclose(codes.z.reshape(latents.shape), latents, atol=1e-5)
    theirs = jax.jit(lambda p: model.apply(p, codes, method="decode"))({"params": params})
    ours = jax.jit(lambda p: codec.apply(p, latents, method="decode"))({"params": unflatten(moved)})
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
