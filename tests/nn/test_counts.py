"""Analytic FLOPs and codebook usage, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import step
from jaxtok.nn import codebook, flops
from tests import runs


def test_flops_of_products_convolutions_and_loops():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
    assert flops.count(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 7

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=6)[0]

    assert flops.count(loop, jnp.zeros((8, 8))) == 6 * 2 * 8**3
    assert flops.count(jax.jit(loop), jnp.zeros((8, 8))) == 6 * 2 * 8**3
    x, kernel = jnp.zeros((2, 9, 9, 4)), jnp.zeros((3, 3, 4, 6))
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.count(convolve, x, kernel) == 2 * 2 * 7 * 7 * 6 * 3 * 3 * 4
    with pytest.raises(ValueError, match="lax.scan"):
        flops.count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.zeros((8, 8)))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_flops_of_a_training_step_are_three_forwards(remat):
    """By hand: 2 MAC x 3 (forward, and two products backward) of every matrix, plus attention. Remat adds nothing."""
    config = runs.tiny()
    for part in (config.task.model.encoder, config.task.model.decoder):
        part.update(remat=remat, shortcuts=())
    shapes = {"image": jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.uint8)}
    counted = step.count_flops(config, shapes)
    width, tokens, hidden = 64, 16 + 8, 170
    block = 2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width
    by_hand = 3 * 16 * 3 * block  # forward and backward, batch, blocks
    assert by_hand < counted < 1.2 * by_hand  # and embeddings, adaLN, heads
    assert step.count_flops(runs.tiny(), shapes) < 0.85 * counted  # the shortcuts, of blocks so few


def test_usage_counts_codes():
    indices = jnp.array([[5, 5, 9], [63_999, 5, 9]])
    perplexity, distinct = codebook.usage(indices)
    p = np.array([3, 2, 1]) / 6
    np.testing.assert_allclose(perplexity, np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
    np.testing.assert_allclose(distinct, 3, rtol=1e-6)
