"""IBQ: every code learns from every latent, and no softmax over all codes exists."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.quantizers.ibq import IBQ
from jaxtok.quantizers.vq import VQ

LATENTS = jax.random.normal(jax.random.key(0), (4, 9, 6))
TABLE = jax.random.normal(jax.random.key(1), (12, 6))


def apply(table, x, **options):
    return IBQ(12).apply({"params": {"codebook": table}}, x, **options)


def published(table, x):
    """A one-hot row with the gradient of the softmax, times the codes."""
    soft = jax.nn.softmax(x @ table.T, -1)
    hard = jax.nn.one_hot(soft.argmax(-1), len(table))
    return (hard + soft - jax.lax.stop_gradient(soft)) @ table


def test_value_and_gradients_are_those_of_the_one_hot_product():
    weight = jax.random.normal(jax.random.key(2), LATENTS.shape)
    gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * weight).sum(), (0, 1)))(TABLE, LATENTS)
    np.testing.assert_allclose(apply(TABLE, LATENTS).z, published(TABLE, LATENTS), atol=1e-6)
    ours = gradient(lambda *a: apply(*a).z)
    for got, want in zip(ours, gradient(published), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_code_gets_a_gradient_where_plain_vq_moves_the_chosen_ones():
    far = TABLE.at[6:].multiply(0.01)  # never the largest product
    moved = lambda loss: int((np.abs(jax.jit(jax.grad(loss))(far)).max(-1) > 0).sum())
    plain = lambda table: VQ(12).apply({"params": {"codebook": table}}, 100 * LATENTS).aux["codebook"]
    assert moved(lambda table: apply(table, LATENTS).aux["joint"]) == 12
    assert moved(plain) <= 6


def test_losses_by_definition():
    codes = apply(TABLE, LATENTS)
    error = np.square(np.asarray(LATENTS) - TABLE[codes.indices]).mean()
    for name in ("joint", "commitment", "codebook"):
        np.testing.assert_allclose(codes.aux[name], error, rtol=1e-5)
    gradient = lambda name: jax.grad(lambda *a: apply(*a).aux[name], (0, 1))(TABLE, LATENTS)
    assert not np.any(gradient("commitment")[0]) and not np.any(gradient("codebook")[1])
    assert np.any(gradient("joint")[0]) and np.any(gradient("joint")[1])


def test_2_18_codes_train_in_a_fraction_of_the_softmax():
    rows, size = 1024, 2**18

    def loss(params, x):
        codes = IBQ(size, temperature=0.01).apply({"params": params}, x, train=True)
        return codes.z.sum() + sum(codes.aux.values())

    shapes = {"codebook": jax.ShapeDtypeStruct((size, 4), jnp.float32)}, jax.ShapeDtypeStruct((1, rows, 4), jnp.float32)
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * size * 4 / 8  # 90 MiB of 1024
