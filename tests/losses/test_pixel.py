import jax.numpy as jnp
import pytest

from jaxtok.losses.pixel import l1, l2
from jaxtok.structs import Decoded


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_means_over_all_elements_in_single_precision(dtype):
    prediction = jnp.array([[1.0, -1.0], [0.0, 4.0]], dtype)
    outputs = {"decoded": Decoded(prediction, jnp.array([[0.0, 1.0], [0.0, 1.0]]))}
    assert float(l1(outputs, None)) == 1.5 and float(l2(outputs, None)) == 3.5
    assert l1(outputs, None).dtype == l2(outputs, None).dtype == jnp.float32
