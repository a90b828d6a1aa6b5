"""Pairing rows with many codes: in chunks as at once, in little memory, with codes split over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtok.nn import codebook

KEY = jax.random.key(0)


def rows_and_codes(rows=20, size=37, width=5):
    x, codes = (jax.random.normal(key, (n, width)) for key, n in zip(jax.random.split(KEY), (rows, size), strict=True))
    return x, codes


def distances(x, codes):
    return np.square(np.asarray(x, np.float64)[:, None] - np.asarray(codes, np.float64)).sum(-1)


def entropies_at_once(x, codes, temperature):
    """Of softmax(-squared distance / temperature), by the definition."""
    distance = jnp.square(x[:, None] - codes).sum(-1)
    p = jax.nn.softmax(-distance / temperature, -1)
    mean = p.mean(0)
    return -(p * jnp.log(p + 1e-30)).sum(-1).mean(), -(mean * jnp.log(mean + 1e-5)).sum()


def entropies_in_chunks(x, codes, temperature, chunk=None):
    return codebook.entropies(2 * x, codes, 2 * codebook.half_square(codes), temperature, chunk)


@pytest.mark.parametrize("chunk", [1, 8, 10, 37, 100])
def test_nearest_in_chunks_is_nearest(chunk):
    x, codes = rows_and_codes()
    expected = distances(x, codes).argsort(1)
    np.testing.assert_array_equal(codebook.nearest(x, codes, chunk), expected[:, 0])
    np.testing.assert_array_equal(codebook.neighbours(x, codes, 6, chunk), expected[:, :6])
    products = np.asarray(x @ codes.T)
    np.testing.assert_array_equal(codebook.best(x, codes, None, chunk), products.argmax(1))


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_of_equal_codes_the_first_wins_in_whatever_chunk(chunk):
    codes = jnp.array([[2.0], [1.0], [3.0], [1.0], [1.0]])
    np.testing.assert_array_equal(codebook.nearest(jnp.array([[1.0], [0.0], [2.9]]), codes, chunk), [1, 1, 2])


def agree(ours, theirs):
    """Two functions of (x, codes) have the same values and gradients."""
    x, codes = rows_and_codes()
    both = lambda f: jax.jit(lambda *a: (f(*a), jax.jacrev(f, (0, 1))(*a)))(x, codes)
    for got, want in zip(*map(jax.tree.leaves, (both(ours), both(theirs))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 100])
def test_entropies_in_chunks_and_their_gradients(chunk):
    agree(lambda *a: entropies_in_chunks(*a, 0.5, chunk), lambda *a: entropies_at_once(*a, 0.5))


@pytest.mark.parametrize("chunk", [8, 100])
def test_expectation_in_chunks_and_its_gradients(chunk):
    at_once = lambda x, codes: jax.nn.softmax(x @ codes.T, -1) @ jax.lax.stop_gradient(codes)
    agree(lambda *a: jnp.sin(codebook.expected(*a, None, chunk)).sum(), lambda *a: jnp.sin(at_once(*a)).sum())


# ---- memory, and codes over devices ----

ROWS, SIZE, WIDTH = 1024, 2**18, 4
WHOLE = ROWS * SIZE * 4  # bytes of the matrix that must not exist


def spread(x, codes):
    own, shared = entropies_in_chunks(x, codes, 0.01)
    return own - shared


SEARCHES = {
    "nearest": codebook.nearest,
    "gradient of the entropies": jax.grad(spread, (0, 1)),
    "gradient of the expectation": jax.grad(lambda x, codes: codebook.expected(x, codes).sum(), (0, 1)),
}


def compiled(f, x_sharding=None, codes_sharding=None):
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=x_sharding)
    codes = jax.ShapeDtypeStruct((SIZE, WIDTH), jnp.float32, sharding=codes_sharding)
    return jax.jit(f).lower(x, codes).compile()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_among_2_18_codes_takes_a_fraction_of_the_whole_matrix(name):
    assert compiled(SEARCHES[name]).memory_analysis().temp_size_in_bytes < WHOLE / 8  # 70 to 80 MiB of 1024


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", SEARCHES)
def test_codes_split_over_devices_stay_where_they_are(name, mesh):
    """A device holds a quarter of the codes, and never more of them: only what is said about rows travels."""
    program = compiled(SEARCHES[name], NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor")))
    assert program.memory_analysis().temp_size_in_bytes < WHOLE / 40
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program.as_text())
    assert [shape for shape in moved if np.prod([int(n) for n in shape.split(",") if n] or [1]) >= SIZE / 4] == []


def test_codes_split_over_devices_give_the_same(mesh):
    x, codes = rows_and_codes(rows=16, size=64)
    split = jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(codes, NamedSharding(mesh, P("tensor")))
    nearest = jax.jit(lambda x, codes: codebook.nearest(x, codes, 16))
    np.testing.assert_array_equal(nearest(*split), nearest(x, codes))
    gradient = jax.jit(jax.grad(spread, (0, 1)))
    for got, want in zip(gradient(*split), gradient(x, codes), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# ---- gradients past a rounding ----


def test_straight_through_is_exact_and_passes_the_gradient_to_z_alone():
    z, q = jnp.array([0.1, 1e8]), jnp.array([0.3, -7.7])
    np.testing.assert_array_equal(codebook.straight_through(z, q), q)
    gz, gq = jax.grad(lambda z, q: (codebook.straight_through(z, q) * jnp.array([2.0, 3.0])).sum(), (0, 1))(z, q)
    np.testing.assert_array_equal(gz, [2.0, 3.0])
    np.testing.assert_array_equal(gq, [0.0, 0.0])


def test_the_rotation_takes_z_to_q_and_keeps_angles():
    """Its gradient is a rotation times |q| / |z|: orthogonal columns of that length, and z itself goes to q."""
    z, q = jax.random.normal(KEY, (2, 6))
    np.testing.assert_array_equal(codebook.rotate(z, q), q)
    jacobian = np.asarray(jax.jit(jax.jacobian(codebook.rotate))(z, q))
    scale = np.linalg.norm(q) / np.linalg.norm(z)
    np.testing.assert_allclose(jacobian @ jacobian.T, scale**2 * np.eye(6), atol=1e-5)
    assert np.linalg.det(jacobian) > 0
    np.testing.assert_allclose(jacobian @ z, q, atol=1e-5)
    perpendicular = np.linalg.svd(np.stack([z, q]))[2][2:]  # to both: nothing turns it
    np.testing.assert_allclose(perpendicular @ jacobian.T, scale * perpendicular, atol=1e-5)


def test_normalizing_zero_gives_zero_and_no_nan_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(codebook.l2_normalize(x), [[0, 0], [0.6, 0.8]], atol=1e-7)
    weighted = lambda x: (codebook.l2_normalize(x) * np.arange(4.0).reshape(2, 2)).sum()
    assert np.isfinite(jax.jit(jax.grad(weighted))(x)).all()


# ---- k-means ----


def blobs(count=6, each=30):
    centres = 10 * jax.random.normal(KEY, (count, 3))
    noise = jax.random.normal(jax.random.key(1), (count, each, 3))
    return (centres[:, None] + 0.1 * noise).reshape(-1, 3)


kmeans = jax.jit(codebook.kmeans, static_argnums=(2, 3))


def distortion(x, codes):
    return distances(x, codes).min(1).mean()


def test_kmeans_lowers_the_distortion_and_counts_its_rows():
    x = blobs()
    errors = []
    for iterations in (0, 1, 5):
        codes, count = kmeans(jax.random.key(2), x, 12, iterations)
        errors.append(distortion(x, codes))
        assert count.sum() == len(x)
    assert errors[0] > errors[1] >= errors[2]
    members = distances(x, codes).argmin(1)
    np.testing.assert_array_equal(count, np.bincount(members, minlength=12))
    settled = kmeans(jax.random.key(2), x, 12, 30)[0]
    members = distances(x, settled).argmin(1)
    for k in np.unique(members):  # a fixed point: every code is the mean of its rows
        np.testing.assert_allclose(settled[k], np.asarray(x)[members == k].mean(0), rtol=1e-4)


def test_kmeans_with_fewer_rows_than_codes_uses_every_row_and_no_code_twice():
    x = blobs(3, 2)
    codes = kmeans(KEY, x, 15, 0)[0]
    assert (distances(x, codes).min(1) == 0).all() and len(np.unique(np.asarray(codes), axis=0)) == 15


def test_drawn_rows_repeat_only_when_all_were_drawn():
    drawn = np.asarray(codebook.draw_rows(KEY, jnp.arange(7), 17))
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7)) and not (drawn[:7] == np.arange(7)).all()
    np.testing.assert_array_equal(drawn, codebook.draw_rows(KEY, jnp.arange(7), 17))


# ---- indices ----


def test_indices_join_and_split():
    one, three = jnp.zeros((2, 4), int), jnp.arange(24).reshape(2, 4, 3)
    joined = codebook.join([one, three, one + 5])
    assert joined.shape == (2, 4, 5)
    vocabularies = (8, (24, 24, 24), 9)
    for got, want in zip(codebook.split(joined, vocabularies), (one, three, one + 5), strict=True):
        np.testing.assert_array_equal(got, want)
    assert codebook.flat(vocabularies) == (8, 24, 24, 24, 9)


def test_usage_counts_codes():
    perplexity, distinct = codebook.usage(jnp.array([[3, 3], [1, 7]]))
    np.testing.assert_allclose(perplexity, np.exp(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))), rtol=1e-6)
    assert distinct == 3
