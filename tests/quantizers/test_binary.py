"""LFQ, its groups and BSQ against brute force over all codes; Bernoulli bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.quantizers import binary
from jaxtok.quantizers.binary import LFQ, Bernoulli

LATENTS = jax.random.normal(jax.random.key(0), (4, 9, 6))


def test_pack_and_unpack_are_inverse_for_all_codes_and_the_first_bit_is_the_least():
    codes = jnp.arange(2**12)
    for sizes in ((12,), (5, 7), (1,) * 12):
        bits = binary.unpack(codes[:, None], (12,))
        packed = binary.pack(bits, sizes)
        assert packed.shape == (2**12, len(sizes)) and (packed < 2 ** np.array(sizes)).all()
        assert len(np.unique(packed, axis=0)) == 2**12
        np.testing.assert_array_equal(binary.unpack(packed, sizes), bits)
    np.testing.assert_array_equal(binary.pack(jnp.array([1, 0, 0, 1, 1]), (3, 2)), [1, 3])
    assert binary.pack(jnp.ones(30), (30,)) == 2**30 - 1


def test_signs_and_groups_by_hand():
    """Zero has the sign -1; channel 0 is the least bit of the first group."""
    latents = jnp.array([[[0.5, 0.0, 3.0, -1.0, 2.0]]])
    codes = LFQ(5).apply({}, latents)
    np.testing.assert_array_equal(codes.z, [[[1, -1, 1, -1, 1]]])
    assert codes.indices == 1 + 4 + 16
    np.testing.assert_array_equal(LFQ((2, 3)).apply({}, latents).indices, [[[1, 1 + 4]]])
    np.testing.assert_allclose(codes.aux["commitment"], (0.5**2 + 1 + 2**2 + 0 + 1) / 5)


def brute(x, scale, temperature):
    """The pair of entropies of softmax(2 <x, code> / temperature) over all codes, by the definition, in float64."""
    x = np.asarray(x, np.float64)
    n = x.shape[-1]
    codes = scale * (2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1) - 1)
    logits = 2 * x @ codes.T / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = lambda p, eps=1e-300: -(p * np.log(p + eps)).sum(-1)
    return entropy(p).mean(), entropy(p.mean(0), 1e-5)


@pytest.mark.parametrize("bits", [6, (6,), (2, 4), (3, 3), (1,) * 6])
def test_entropies_are_those_of_all_codes(bits):
    codes = LFQ(bits, temperature=0.7).apply({}, LATENTS, train=True)
    rows, sizes = LATENTS.reshape(-1, 6), (bits,) if isinstance(bits, int) else bits
    groups = np.split(rows, np.cumsum(sizes)[:-1], -1)
    own, shared = np.mean([brute(group, 1, 0.7) for group in groups], 0)
    np.testing.assert_allclose(codes.aux["sample_entropy"], own, rtol=1e-5)
    np.testing.assert_allclose(codes.aux["batch_entropy"], shared, rtol=1e-5)


def test_spherical_entropies_and_codes_lie_on_the_sphere():
    codes = LFQ((3, 3), spherical=True, temperature=0.3).apply({}, 5 * LATENTS, train=True)
    np.testing.assert_allclose(np.linalg.norm(codes.z, axis=-1), 1, rtol=1e-6)
    unit = np.asarray(LATENTS) / np.linalg.norm(LATENTS, axis=-1, keepdims=True)
    np.testing.assert_allclose(codes.aux["commitment"], np.square(unit - codes.z).mean(), rtol=1e-5)
    groups = np.split(unit.reshape(-1, 6), 2, -1)
    own, shared = np.mean([brute(group, 6**-0.5, 0.3) for group in groups], 0)
    np.testing.assert_allclose(codes.aux["sample_entropy"], own, rtol=1e-5)
    np.testing.assert_allclose(codes.aux["batch_entropy"], shared, rtol=1e-5)
    np.testing.assert_array_equal(codes.indices, LFQ((3, 3)).apply({}, LATENTS).indices)


def test_pooled_groups_hide_a_group_that_always_says_the_same():
    """Two groups, each constant but unlike: a group alone has no entropy over the batch, the pool has ln 2."""
    latents = jnp.broadcast_to(jnp.array([1.0, 1.0, -1.0, -1.0]), (2, 5, 4))
    found = {
        pooled: LFQ((2, 2), temperature=0.01, pooled=pooled).apply({}, latents, train=True).aux["batch_entropy"]
        for pooled in (False, True)
    }
    np.testing.assert_allclose(found[False], 0, atol=1e-4)
    np.testing.assert_allclose(found[True], np.log(2), atol=1e-4)
    rows = jnp.concatenate(jnp.split(LATENTS.reshape(-1, 6), 2, -1))
    pooled = LFQ((3, 3), temperature=0.5, pooled=True).apply({}, LATENTS, train=True).aux
    np.testing.assert_allclose((pooled["sample_entropy"], pooled["batch_entropy"]), brute(rows, 1, 0.5), rtol=1e-5)


def test_the_entropy_of_18_bits_takes_a_fraction_of_all_codes_for_all_rows():
    rows = 2048
    loss = lambda x: sum(binary.entropies(x, (18,)))
    shape = jax.ShapeDtypeStruct((rows, 18), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * 2**18 * 4 / 40  # 17 MiB of 2048


def test_the_gradient_passes_the_sign_as_if_it_were_not_there():
    weight = jnp.arange(6.0)
    gradient = jax.grad(lambda x: (LFQ(6).apply({}, x).z * weight).sum())(LATENTS)
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(weight, LATENTS.shape))


@pytest.mark.parametrize(
    "module, says",
    [
        (LFQ(31), "LFQ.bits"),
        (LFQ(()), "LFQ.bits"),
        (LFQ((2, 4), pooled=True), "LFQ.pooled needs groups of equal size"),
        (LFQ(5), "set the encoder's `channels`"),
        (Bernoulli((3, 4)), "set the encoder's `channels`"),
    ],
)
def test_fields_that_cannot_be_are_refused(module, says):
    with pytest.raises(ValueError, match=says):
        module.apply({}, LATENTS)


# ---- Bernoulli ----


def bernoulli(latents, train, key=0, **fields):
    rngs = {"train": jax.random.key(key)}
    return Bernoulli(latents.shape[-1], **fields).apply({}, latents, train=train, rngs=rngs)


def test_bits_are_drawn_in_training_and_thresholded_in_use():
    latents = jnp.broadcast_to(jnp.array([-4.0, -1.0, 0.0, 1.0, 4.0]), (20, 50, 5))
    drawn = bernoulli(latents, True).z
    np.testing.assert_allclose(drawn.mean((0, 1)), jax.nn.sigmoid(latents[0, 0]), atol=0.06)  # 4 standard errors
    np.testing.assert_array_equal(bernoulli(latents, False).z[0, 0], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(drawn, bernoulli(latents, True).z)
    assert not np.array_equal(drawn, bernoulli(latents, True, key=1).z)
    hot = bernoulli(latents, True, temperature=4.0).z.mean((0, 1))
    np.testing.assert_allclose(hot, jax.nn.sigmoid(latents[0, 0] / 4), atol=0.06)


def test_the_gradient_of_a_drawn_bit_is_that_of_its_probability():
    for train in (True, False):
        gradient = jax.grad(lambda x, train=train: bernoulli(x, train, temperature=2.0).z.sum())(LATENTS)
        p = jax.nn.sigmoid(LATENTS / 2)
        np.testing.assert_allclose(gradient, p * (1 - p) / 2, rtol=1e-5)


def test_bernoulli_reports_how_sure_and_how_even_its_bits_are():
    sure = bernoulli(jnp.stack([jnp.full((3, 4), 40.0), jnp.full((3, 4), -40.0)]), False).aux
    np.testing.assert_allclose((sure["uncertainty"], sure["bit_entropy"]), (0, 1), atol=1e-5)
    unsure = bernoulli(jnp.zeros((2, 3, 4)), False).aux
    np.testing.assert_allclose((unsure["uncertainty"], unsure["bit_entropy"]), (0.25, 1), atol=1e-5)
    idle = bernoulli(jnp.full((2, 3, 4), 40.0), False).aux
    np.testing.assert_allclose(idle["bit_entropy"], 0, atol=1e-5)


def test_z_is_a_sum_of_one_vector_a_bit():
    module = Bernoulli((2, 4), width=3)
    variables = module.init({"params": jax.random.key(0)}, LATENTS)
    codes = module.apply(variables, LATENTS)
    np.testing.assert_allclose(codes.z, (np.asarray(LATENTS) > 0) @ variables["params"]["vectors"], atol=1e-6)
    assert codes.indices.shape == (4, 9, 2) and codes.z.shape == (4, 9, 3)
