"""What a quantizer reports, as terms of a config."""

import jax.numpy as jnp
import pytest

from jaxtok.build import build
from jaxtok.structs import Codes


def codes(**aux):
    return Codes(z=jnp.zeros((2, 3, 4)), indices=None, keep=jnp.ones((2, 3), bool), aux=aux)


def loss(term):
    return build({"name": "losses.quantizer.aux", "term": term})


def test_a_term_is_taken_by_its_name():
    assert loss("commitment")({"codes": codes(commitment=2.0, codebook=3.0)}, {}) == 2.0


def test_streams_are_summed_where_they_have_the_term():
    streams = {"a": codes(kl=1.0), "b": codes(commitment=2.0), "c": codes(commitment=5.0)}
    assert loss("commitment")({"codes": streams}, {}) == 7.0


@pytest.mark.parametrize("aux, known", [({"kl": 1.0, "std": 1.0}, "only kl, std"), ({}, "only nothing")])
def test_a_term_that_is_not_there_is_an_error_with_those_that_are(aux, known):
    with pytest.raises(ValueError, match=f'no "batch_entropy", {known}.*temperature'):
        loss("batch_entropy")({"codes": codes(**aux)}, {})
