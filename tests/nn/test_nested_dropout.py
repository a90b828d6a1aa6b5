"""Laws of the number of tokens that are kept."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.nested_dropout import NestedDropout
from jaxtok.structs import Codes


def test_one_length_for_the_whole_batch():
    """Every length from 1 to 5, each about as often; the control draws one for each sample."""
    codes = Codes(z=jnp.zeros((6, 5, 1)), indices=None, keep=jnp.ones((6, 5), bool))

    def lengths(law):
        draw = lambda key: NestedDropout(law).apply({}, codes, train=True, rngs={"train": key}).keep.sum(1)
        return np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 500)))  # [500 6]

    shared = lengths("uniform_batch")
    assert (shared == shared[:, :1]).all()
    np.testing.assert_allclose(
        np.bincount(shared[:, 0], minlength=6)[1:] / 500, 0.2, atol=0.072
    )  # four standard errors
    assert (lengths("uniform").std(1) > 0).mean() > 0.9
