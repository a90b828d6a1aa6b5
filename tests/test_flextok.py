"""What FlexTok's parts promise (arXiv 2502.13967), beyond the goldens."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.build import build
from jaxtok.decoders.flow import FlowDecoder
from jaxtok.encoders.latent1d import Latent1D
from jaxtok.nn import flops, flow, masks, position
from jaxtok.nn.nested_dropout import LAWS, NestedDropout, powers_of_two
from jaxtok.pretrained.flextok import from_state_dict
from jaxtok.quantizers import fsq
from jaxtok.structs import Codes
from tests import runs
from tests.goldens import flextok_arrays

GOLDENS = runs.ROOT / "tests" / "goldens" / "flextok"


@pytest.fixture(scope="module")
def model():
    """A tokenizer whose every parameter is random, so that no path is closed by a zero; and a batch."""
    model = build(runs.tiny(task__model__encoder__batch_norm=False).task.model)
    pixels = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1)
    keys = {"params": jax.random.key(0), "train": jax.random.key(2)}
    params = model.init(keys, pixels, train=True)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    params = tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    return model, {"params": params}, pixels


def test_at_initialisation_the_velocity_is_zero(model):
    model, _, pixels = model
    keys = {"params": jax.random.key(0), "train": jax.random.key(2)}
    model = model.clone(decoder=model.decoder.clone(prediction="velocity"))
    params = model.init(keys, pixels, train=True)
    decoded = model.apply(params, pixels, train=True, rngs=keys)["decoded"]
    assert not decoded.prediction.any() and decoded.target.any()


@pytest.mark.parametrize("shortcuts", [(), ("split",)])
def test_patches_see_no_register_and_registers_no_later_one(model, shortcuts):
    model, variables, pixels = model

    def outputs(registers):
        params = variables["params"]["encoder"] | {"registers": registers}
        plain = model.encoder.clone(shortcuts=shortcuts)
        latents, state = plain.apply({"params": params}, pixels, mutable=["intermediates"])
        (blocks,) = state["intermediates"]["blocks"]["out"]
        return latents[0, :, 0], blocks[-1, 0, :16]  # [R], [P D]

    by_latents, by_patches = jax.jacfwd(outputs)(variables["params"]["encoder"]["registers"])
    assert not by_patches.any()
    sees = jnp.abs(by_latents).max(-1) > 0  # [register out, register in]
    np.testing.assert_array_equal(sees, np.tril(np.ones((8, 8), bool)))


def test_encoding_the_first_registers_alone_is_the_start_of_encoding_all(model):
    model, variables, pixels = model
    params = variables["params"]["encoder"]
    full = model.encoder.apply({"params": params}, pixels)
    short = model.encoder.apply({"params": params}, pixels, tokens=3)
    np.testing.assert_allclose(short, full[:, :3], atol=1e-5)
    assert jnp.abs(full[:, 0] - full[:, 1]).max() > 1e-2


def velocity(model, variables, codes, null=None):
    x, t = jax.random.normal(jax.random.key(5), (2, 16, 16, 3)), jnp.array([0.4, 0.9])
    return model.decoder.apply({"params": variables["params"]["decoder"]}, x, t, codes, null, method="velocity")


def test_dropped_tokens_carry_nothing_and_kept_ones_do(model):
    model, variables, pixels = model
    codes = model.apply(variables, pixels, method="encode")
    other = codes.replace(z=codes.z.at[:, 3:].set(-codes.z[:, 3:]))
    prefix = masks.keep_prefix(jnp.array([3, 3]), 8)
    a, b = (velocity(model, variables, c.replace(keep=prefix)) for c in (codes, other))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(velocity(model, variables, codes) - velocity(model, variables, other)).max() > 1e-3


def test_the_unconditional_velocity_knows_neither_codes_nor_length(model):
    model, variables, pixels = model
    codes = model.apply(variables, pixels, method="encode")
    null = jnp.ones(2, bool)
    other = codes.replace(z=-codes.z, keep=masks.keep_prefix(jnp.array([1, 5]), 8))
    a, b = velocity(model, variables, codes, null), velocity(model, variables, other, null)
    np.testing.assert_array_equal(a, b)
    one = velocity(model, variables, codes, jnp.array([True, False]))
    np.testing.assert_array_equal(one[0], a[0])
    assert jnp.abs(one[1] - a[1]).max() > 1e-3


def test_prefixes_of_indices_decode_as_masked_codes(model):
    model, variables, pixels = model
    codes = model.apply(variables, pixels, method="encode")
    looked_up = model.apply(variables, codes.indices[:, :3], 8, method="lookup")
    kept = codes.replace(keep=masks.keep_prefix(jnp.array([3, 3]), 8))
    options = dict(steps=3, guidance=2.0, method="decode")
    a, b = (model.apply(variables, c, jax.random.key(0), **options) for c in (looked_up, kept))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.min() >= 0 and a.max() <= 1 and a.std() > 0.01


def test_x0_and_velocity_are_the_same_flow(model):
    """At a prediction of x0, the velocity leads straight there: one Euler step from any time lands on it."""
    model, variables, pixels = model
    codes = model.apply(variables, pixels, method="encode")
    noise = jax.random.normal(jax.random.key(7), pixels.shape)
    params, t = {"params": variables["params"]["decoder"]}, jnp.ones(2)
    x0 = model.decoder.apply(params, noise, t, codes, method="predict")
    one_step = model.decoder.apply(params, codes, steps=1, noise=noise, method="sample")
    np.testing.assert_allclose(one_step, x0, atol=1e-5 * jnp.abs(x0).max())  # two orders of summation
    x_t = flow.interpolate(x0, noise, jnp.array([0.3, 0.6]))
    v = flow.velocity_from_x0(x_t, x0, jnp.array([0.3, 0.6]))
    np.testing.assert_allclose(v, noise - x0, atol=1e-5)


def test_more_steps_approach_the_exact_flow():
    """For a Gaussian N(2, 0.5^2) the velocity is known, and the solver's error falls with the steps."""
    x1 = jnp.linspace(-2, 2, 9)[:, None]

    def velocity(x, t, carry, _):
        var = t**2 + 0.25 * (1 - t) ** 2
        score = (x - 2 * (1 - t)) / var
        return t * score - (0.25 * (1 - t) * score + 2), carry

    errors = [jnp.abs(flow.euler(velocity, x1, flow.times(n))[0] - (2 + 0.5 * x1)).max() for n in (4, 16, 64)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("law, sizes", [("uniform", range(1, 13)), ("pow2", [1, 2, 4, 8, 12])])
def test_nested_dropout_draws_every_length_alike(law, sizes):
    k = LAWS[law](jax.random.key(0), 6000, 12)
    values, counts = np.unique(np.asarray(k), return_counts=True)
    assert list(values) == list(sizes)
    assert np.abs(counts / 6000 - 1 / len(sizes)).max() < 4 * np.sqrt(1 / len(sizes) / 6000)


def test_uniform_pow2_rounds_up():
    k = np.asarray(LAWS["uniform_pow2"](jax.random.key(0), 8000, 16))
    assert sorted(set(k)) == powers_of_two(16)
    assert abs((k == 16).mean() - 0.5) < 0.03 and abs((k == 1).mean() - 1 / 16) < 0.02


def test_nested_dropout_keeps_prefixes_in_training_only():
    codes = Codes(jnp.zeros((512, 8, 2)), None, jnp.ones((512, 8), bool))
    part = NestedDropout(full=0.5)
    keep = np.asarray(part.apply({}, codes, train=True, rngs={"train": jax.random.key(0)}).keep)
    assert (np.diff(keep.astype(int), axis=1) <= 0).all() and keep[:, 0].all()  # prefixes, never empty
    assert abs(keep.all(1).mean() - (0.5 + 0.5 / 4)) < 0.08
    assert part.apply({}, codes).keep.all()


# ---- FSQ ----


def test_fsq_uses_every_code_and_finds_it_again():
    levels = (4, 5, 3)
    quantizer = fsq.FSQ(levels)
    assert quantizer.vocabulary == 60
    z = quantizer.apply({}, jnp.arange(60)[None], method="lookup")
    assert z.shape == (1, 60, 3) and z.min() == -1 and z.max() == 1
    np.testing.assert_array_equal(fsq.digits_to_indices(z * (np.array(levels) // 2), levels)[0], np.arange(60))
    wild = quantizer.apply({}, 4 * jax.random.normal(jax.random.key(0), (1, 5000, 3)))
    assert len(np.unique(wild.indices)) == 60
    np.testing.assert_allclose(wild.z, quantizer.apply({}, wild.indices, method="lookup"), atol=1e-6)


@pytest.mark.parametrize("n", range(2, 33))
def test_fsq_indexes_every_level(n):
    """Digits are rounded, not truncated: 26 and 27 levels are the ones that truncation gets wrong."""
    digits = jnp.arange(n) - n // 2
    z = digits / (n // 2)
    np.testing.assert_array_equal(fsq.digits_to_indices((z * (n // 2))[:, None], (n,)), np.arange(n))


def test_the_gradient_passes_rounding_and_not_tanh():
    z = jnp.array([[0.3, -2.0]])
    through = jax.grad(lambda z: fsq.FSQ((8, 5)).apply({}, z[None]).z.sum())(z)
    bounded = jax.grad(lambda z: (fsq.bound(z, (8, 5)) / np.array([4, 2])).sum())(z)
    np.testing.assert_allclose(through, bounded, atol=1e-6)
    assert through[0, 1] < 0.2 < through[0, 0]


@pytest.mark.parametrize("index", [-1, 40, 2**20])
def test_an_index_that_is_no_code_is_refused(index):
    quantizer = fsq.FSQ((8, 5))
    with pytest.raises(ValueError, match="must lie in 0 ... 39"):
        quantizer.apply({}, jnp.array([[0, index]]), method="lookup")
    traced = jax.jit(lambda i: quantizer.apply({}, i, method="lookup"))(jnp.array([[0, index]]))
    assert jnp.isnan(traced[0, 1]).all() and not jnp.isnan(traced[0, 0]).any()


# ---- batch norm of the latents ----


def test_batch_norm_centres_every_latent_and_evaluation_uses_what_training_saw():
    encoder = build(runs.tiny().task.model).encoder
    pixels = jax.random.uniform(jax.random.key(1), (64, 16, 16, 3), minval=-1)
    variables = encoder.init(jax.random.key(0), pixels, train=True)
    for _ in range(1200):  # the running statistics forget their start
        latents, seen = apply_training(encoder, variables, pixels)
        variables = variables | seen
    assert latents.shape == (64, 8, 6)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(0), 1, atol=1e-2)
    np.testing.assert_allclose(encoder.apply(variables, pixels), latents, atol=1e-3)
    alone = encoder.apply(variables, pixels[:1])  # in evaluation a picture's codes do not depend on its neighbours
    np.testing.assert_allclose(alone, encoder.apply(variables, pixels)[:1], atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def apply_training(encoder, variables, pixels):
    return encoder.apply(variables, pixels, train=True, mutable=["batch_stats"])


# ---- shortcuts, each against the plain form ----

ENCODER, DECODER = Latent1D.shortcuts, FlowDecoder.shortcuts


@functools.cache
def golden(**shortcuts):
    """The model of the goldens with their weights, so that values have the size of real ones; and their arrays."""
    config, weights = json.loads((GOLDENS / "config.json").read_text()), load("weights")
    model = flextok_arrays.tokenizer(config["model"], (8, 8))
    params, _ = from_state_dict(weights, flextok_arrays.shapes(config["model"], (8, 8)))
    parts = {part: getattr(model, part).clone(shortcuts=used) for part, used in shortcuts.items()}
    return model.clone(**parts), {"params": params}, load("forward") | load("sampling")


def load(name):
    with np.load(GOLDENS / f"{name}.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("used", [*([s] for s in ENCODER), ENCODER])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_encoding_with_shortcuts_equals_the_plain_form(used, tokens):
    plain, variables, arrays = golden(encoder=())
    x, fast = flextok_arrays.last(arrays["latents"]), golden(encoder=tuple(used))[0]
    params = {"params": variables["params"]["encoder"]}
    encode = jax.jit(lambda encoder, n: encoder.apply(params, x, tokens=n), static_argnums=(0, 1))
    np.testing.assert_allclose(encode(fast.encoder, tokens), encode(plain.encoder, 16)[:, :tokens], atol=2e-5)


@pytest.mark.parametrize("used", [*([s] for s in DECODER), DECODER])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_decoding_with_shortcuts_equals_the_plain_form(used, guidance):
    """Any prefix k in any bucket of tokens: what the codes lack is masked, as one token or as many."""
    plain, variables, arrays = golden(decoder=())
    fast = golden(decoder=tuple(used))[0]
    options = dict(steps=2, guidance=guidance, noise=flextok_arrays.last(arrays["noise_init"]))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def decode(model, indices, length):
        codes = model.apply(variables, indices, length, method="lookup")
        return model.decoder.apply({"params": variables["params"]["decoder"]}, codes, **options, method="sample")

    for k in (1, 3, 16):
        indices = arrays["indices"][:, :k]
        whole = decode(plain, indices, 16)
        for bucket in {k, 4 * -(-k // 4), 16}:
            np.testing.assert_allclose(decode(fast, indices, bucket), whole, atol=2e-5)
    assert jnp.abs(decode(plain, indices[:, :1], 16) - whole).max() > 0.1


def test_shortcuts_do_less():
    def cost(model, variables, arrays, k):
        codes = model.apply(variables, arrays["indices"][:, :k], k, method="lookup")
        options = dict(steps=2, guidance=3.0, noise=flextok_arrays.last(arrays["noise_init"]))
        decode = lambda params: model.decoder.apply({"params": params}, codes, **options, method="sample")
        return flops.count(decode, variables["params"]["decoder"])

    plain = cost(*golden(decoder=()), 4)
    alone = [cost(*golden(decoder=(shortcut,)), 4) for shortcut in DECODER]
    assert all(c < plain for c in alone) and cost(*golden(), 4) < min(alone)

    def encoding(model, variables, arrays, tokens):
        x = flextok_arrays.last(arrays["latents"])
        encode = lambda params: model.encoder.apply({"params": params}, x, tokens=tokens)
        return flops.count(encode, variables["params"]["encoder"])

    plain = encoding(*golden(encoder=()), 16)
    alone = [encoding(*golden(encoder=(shortcut,)), 16) for shortcut in ENCODER]
    assert all(c < plain for c in alone) and encoding(*golden(), 16) < min(alone)
    assert encoding(*golden(), 1) < 0.7 * encoding(*golden(), 16)


def test_more_tokens_than_there_are_is_refused(model):
    model, variables, pixels = model
    with pytest.raises(ValueError, match="1 to 8 tokens a picture, not 9"):
        model.apply(variables, pixels, tokens=9, method="encode")
    codes = Codes(jnp.zeros((2, 9, 6)), None, jnp.ones((2, 9), bool))
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        model.apply(variables, codes, jax.random.key(0), method="decode")


# ---- other sizes ----


def test_a_grid_of_the_same_size_changes_nothing_and_another_is_laid_over_it():
    table = position.sincos_2d(16, 16, 32)
    np.testing.assert_array_equal(position.sincos_2d(16, 16, 32, grid=(16, 16)), table)
    finer = position.sincos_2d(32, 48, 32, grid=(16, 16))
    omega = 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(finer[10, 0, :8], np.sin((10.5 / 2 - 0.5) * omega), atol=1e-6)  # rows by halves
    np.testing.assert_allclose(finer[0, 10, 16:24], np.sin((10.5 / 3 - 0.5) * omega), atol=1e-6)  # columns by thirds
    # three cells fill one: the middle one stands where the one stood
    np.testing.assert_allclose(position.sincos_2d(48, 48, 32, grid=(16, 16))[1::3, 1::3], table, atol=1e-6)


def test_a_model_with_a_grid_takes_other_sizes(model):
    model, variables, pixels = model
    grid = model.clone(encoder=model.encoder.clone(grid=(4, 4)), decoder=model.decoder.clone(grid=(4, 4)))
    encode = jax.jit(lambda model, pixels: model.apply(variables, pixels, method="encode"), static_argnums=0)
    np.testing.assert_array_equal(encode(grid, pixels).indices, encode(model, pixels).indices)
    codes = encode(grid, jnp.tile(pixels, (1, 2, 3, 1)))
    decode = functools.partial(grid.apply, variables, size=(32, 48), steps=1, method="decode")
    pictures = jax.jit(decode)(codes, jax.random.key(0))
    assert codes.indices.shape == (2, 8) and pictures.shape == (2, 32, 48, 3) and jnp.isfinite(pictures).all()


# ---- options that must not change the result ----


@pytest.mark.parametrize("options", [dict(remat="full"), dict(remat="dots"), dict(unroll=2), dict(dtype="bfloat16")])
def test_remat_unrolling_and_bfloat16_compute_the_same(model, options):
    model, variables, pixels = model
    changed = model.clone(decoder=model.decoder.clone(**options), encoder=model.encoder.clone(**options))

    def loss(variables, model):
        decoded = model.apply(variables, pixels, train=True, rngs={"train": jax.random.key(4)})["decoded"]
        return jnp.square(decoded.prediction - decoded.target).mean()

    small = jax.tree.map(lambda x: 0.2 * x, variables)
    differentiate = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, grad), (other, other_grad) = differentiate(small, model), differentiate(small, changed)
    tolerance = 0.05 if "dtype" in options else 1e-5
    np.testing.assert_allclose(other, value, rtol=tolerance)
    norm = lambda tree: np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(tree)))
    difference = norm(jax.tree.map(lambda a, b: a - b, grad, other_grad)) / norm(grad)
    assert difference < (0.2 if "dtype" in options else 1e-5)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(other_grad))
    if "dtype" in options:
        assert other != value  # it did compute in bfloat16
