"""The text tower: what its features depend on, and that a generator trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.data.transforms import caption_bytes
from jaxtok.encoders.text import TextTransformer
from jaxtok.generate.ar import AR

LENGTH = 12
TOWER = TextTransformer(width=32, depth=2, length=LENGTH, head_dim=16)


def ids(*captions, length=LENGTH):
    return jnp.stack([caption_bytes(length)({"caption": c}, None)["text"] for c in captions])


@pytest.fixture(scope="module")
def params():
    return shaken(jax.jit(TOWER.init)(jax.random.key(0), ids("a")))


def shaken(params):
    """Parameters around their initial values, so that no part is without effect."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


@jax.jit
def features(params, text):
    return TOWER.apply(params, text)


def test_padding_changes_no_byte_and_other_samples_do_not_either(params):
    long, mask = features(params, ids("a cat", "a red dog"))
    short, short_mask = features(params, ids("a cat", length=7))
    assert long.dtype == jnp.float32 and long.shape == (2, LENGTH, 32) and mask.sum(1).tolist() == [5, 9]
    np.testing.assert_allclose(long[0, :5], short[0, :5], atol=1e-5)
    assert short_mask[0].tolist() == mask[0, :7].tolist()


def test_every_byte_reads_all_of_them_and_their_order(params):
    one, other = (features(params, ids(c))[0][0] for c in ("red cat", "cat red"))
    assert (np.abs(np.sort(one[:7], 0) - np.sort(other[:7], 0)).max(-1) > 1e-3).all()  # not the same set of vectors
    changed = features(params, ids("red car"))[0][0]
    assert (np.abs(one - changed)[:7].max(-1) > 1e-3).all()


def test_an_empty_text_has_one_place_to_attend_to(params):
    x, mask = features(params, ids(""))
    assert mask[0].tolist() == [True] + [False] * (LENGTH - 1) and np.isfinite(x).all()


def test_a_generator_trains_it(params):
    """The gradient of the generator's loss reaches the vector of every byte that is read, and no other."""
    generator = AR(8, 4, 32, 1, dict(head_dim=16), text=True, dropout=0.0, null_rate=0.0)
    codes, text = jnp.arange(8).reshape(2, 4), ids("ab", "c")
    x, mask = features(params, text)
    its = generator.init(jax.random.key(2), codes, {"text": x, "text_mask": mask}, method="loss")
    its = shaken(its)  # the head begins at zero

    def loss(params):
        x, mask = TOWER.apply(params, text)
        return generator.apply(its, codes, {"text": x, "text_mask": mask}, method="loss").mean()

    gradient = jax.jit(jax.grad(loss))(params)["params"]["embed"]["embedding"]
    assert np.flatnonzero(np.abs(gradient).max(-1)).tolist() == [ord(c) + 1 for c in "abc"]


def test_a_text_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="places for 12 bytes, got 13"):
        TOWER.init(jax.random.key(0), ids("a", length=13))
