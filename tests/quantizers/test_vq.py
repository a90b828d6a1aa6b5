"""VQ: losses and gradients by definition, and what no gradient does: moving averages, k-means, revival, clustering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtok.quantizers import vq
from jaxtok.quantizers.vq import VQ

KEY = jax.random.key(0)
LATENTS = jax.random.normal(KEY, (8, 6, 4))
RNGS = {"train": jax.random.key(5)}


def variables(module, latents=LATENTS, codes=None):
    """Initial ones, with given codes where they are a parameter."""
    made = module.init({"params": jax.random.key(1), "train": jax.random.key(2)}, latents, train=True)
    if codes is not None:
        made = {**made, "params": {"codebook": codes}}
    return made


def step(module, held, latents=LATENTS, rngs=RNGS):
    """(Codes, variables after a training step)."""
    codes, after = module.apply(held, latents, train=True, rngs=rngs, mutable=["codebook"])
    return codes, {**held, **after}


def some_codes(size=10, width=4):
    return jax.random.normal(jax.random.key(3), (size, width))


def distortion(module, held, latents=LATENTS):
    return float(module.apply(held, latents).aux["commitment"])


# ---- losses and gradients ----


def test_losses_and_gradients_by_definition():
    """Commitment moves latents towards their codes, codebook codes towards their latents, z passes straight through."""
    module, table = VQ(10), some_codes()
    apply = lambda table, x: module.apply({"params": {"codebook": table}}, x)
    codes = apply(table, LATENTS)
    q, x, size = np.asarray(table)[codes.indices], np.asarray(LATENTS), LATENTS.size
    for name in ("commitment", "codebook"):
        np.testing.assert_allclose(codes.aux[name], np.square(x - q).mean(), rtol=1e-6)
    gradient = lambda f: jax.jit(jax.grad(lambda *a: f(apply(*a)), (0, 1)))(table, LATENTS)
    to_table, to_x = gradient(lambda codes: codes.aux["commitment"])
    np.testing.assert_array_equal(to_table, np.zeros_like(table))
    np.testing.assert_allclose(to_x, 2 * (x - q) / size, atol=1e-7)
    to_table, to_x = gradient(lambda codes: codes.aux["codebook"])
    expected = np.zeros_like(table)
    np.add.at(expected, np.asarray(codes.indices), 2 * (q - x) / size)
    np.testing.assert_array_equal(to_x, np.zeros_like(x))
    np.testing.assert_allclose(to_table, expected, atol=1e-7)
    to_table, to_x = gradient(lambda codes: (codes.z * x).sum())
    np.testing.assert_array_equal(to_table, np.zeros_like(table))
    np.testing.assert_allclose(to_x, x, rtol=1e-6)


def test_the_codebook_loss_agrees_with_finite_differences():
    module, table = VQ(10), some_codes()
    loss = lambda table: module.apply({"params": {"codebook": table}}, LATENTS).aux["codebook"]
    direction = jax.random.normal(jax.random.key(4), table.shape)
    slope = (loss(table + 1e-3 * direction) - loss(table - 1e-3 * direction)) / 2e-3  # no latent changes its code
    np.testing.assert_allclose(slope, (jax.grad(loss)(table) * direction).sum(), rtol=1e-2)


def test_rotation_changes_the_gradient_and_not_the_value():
    apply = lambda rotation, x: VQ(10, rotation=rotation).apply({"params": {"codebook": some_codes()}}, x).z
    np.testing.assert_array_equal(apply(True, LATENTS), apply(False, LATENTS))
    gradient = jax.grad(lambda x: apply(True, x).sum())(LATENTS)
    assert np.abs(gradient - 1).max() > 0.1


@pytest.mark.parametrize("normalize, latents_length, codes_length", [("both", 1, 1), ("latents", 1, 2)])
def test_what_is_normalized(normalize, latents_length, codes_length):
    """Codes of length 2: with "latents" they keep it. The commitment loss sees the scaled latents."""
    table = some_codes()
    table = 2 * table / np.linalg.norm(table, axis=1, keepdims=True)
    module = VQ(10, normalize=normalize)
    codes = module.apply({"params": {"codebook": table}}, LATENTS)
    np.testing.assert_allclose(np.linalg.norm(codes.z, axis=-1), codes_length, rtol=1e-5)
    unit = np.asarray(LATENTS) / np.linalg.norm(LATENTS, axis=-1, keepdims=True)
    np.testing.assert_allclose(codes.aux["commitment"], np.square(unit - codes.z).mean(), rtol=1e-5)
    scaled = module.apply({"params": {"codebook": table}}, 7 * LATENTS)
    np.testing.assert_array_equal(scaled.indices, codes.indices)


def test_entropies_come_with_a_temperature_and_only_in_training():
    names = lambda train, **f: set(VQ(10, **f).apply({"params": {"codebook": some_codes()}}, LATENTS, train=train).aux)
    losses, entropies = {"commitment", "codebook"}, {"sample_entropy", "batch_entropy"}
    assert names(True) == names(False, temperature=0.1) == losses
    assert names(True, temperature=0.1) == losses | entropies


def test_a_codebook_of_2_18_trains_in_a_fraction_of_the_distance_matrix():
    module, rows, size = VQ(2**18, normalize="both", temperature=0.01), 1024, 2**18

    def loss(params, x):
        codes = module.apply({"params": params}, x, train=True)
        return codes.z.sum() + sum(codes.aux.values())

    shapes = {"codebook": jax.ShapeDtypeStruct((size, 4), jnp.float32)}, jax.ShapeDtypeStruct((1, rows, 4), jnp.float32)
    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * size * 4 / 8  # 85 MiB of 1024


# ---- moving averages ----


def test_a_moving_average_step_by_hand():
    """Two codes, three latents in one dimension, decay 0.9: 1 and 2 fall to the first code, 9 to the second."""
    module = VQ(2, ema=0.9)
    held = {"codes": jnp.array([[0.0], [10.0]]), "count": jnp.array([4.0, 1.0]), "sum": jnp.array([[2.0], [8.0]])}
    codes, after = step(module, {"codebook": held}, jnp.array([[[1.0], [2.0], [9.0]]]))
    np.testing.assert_array_equal(codes.indices, [[0, 0, 1]])
    np.testing.assert_allclose(codes.z, [[[0.0], [0.0], [10.0]]])  # of the codes as they were
    count = [0.9 * 4 + 0.1 * 2, 0.9 * 1 + 0.1 * 1]
    sums = [0.9 * 2 + 0.1 * 3, 0.9 * 8 + 0.1 * 9]
    np.testing.assert_allclose(after["codebook"]["count"], count, rtol=1e-6)
    np.testing.assert_allclose(after["codebook"]["sum"][:, 0], sums, rtol=1e-6)
    np.testing.assert_allclose(after["codebook"]["codes"][:, 0], np.array(sums) / count, rtol=1e-5)
    assert set(codes.aux) == {"commitment"}  # codes that move by themselves have no loss


def test_moving_averages_settle_on_the_means_of_their_latents():
    module = VQ(10, ema=0.5, kmeans=1)
    held = variables(module)
    run = jax.jit(lambda held: step(module, held)[1])
    errors = [distortion(module, held := run(held)) for _ in range(12)]
    assert errors[0] > errors[-1] and "params" not in held
    indices, found = module.apply(held, LATENTS).indices, held["codebook"]["codes"]
    for k in np.unique(indices):
        np.testing.assert_allclose(found[k], np.asarray(LATENTS)[indices == k].mean(0), atol=2e-3)


@pytest.mark.parametrize("fields", [{"ema": 0.9}, {"revive": 1.0}, {"kmeans": 2}, {"clustering": True}])
def test_nothing_is_written_but_in_training_to_a_mutable_collection(fields):
    module = VQ(10, **fields)
    held = variables(module)
    _, after = module.apply(held, LATENTS, mutable=["codebook"])
    jax.tree.map(np.testing.assert_array_equal, dict(after["codebook"]), dict(held["codebook"]))
    trained = module.apply(held, LATENTS, train=True, rngs=RNGS)  # a collection that is not mutable is only read
    np.testing.assert_array_equal(trained.z, module.apply(held, LATENTS).z)
    _, after = step(module, held)
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (after, held)), strict=True)]
    assert any(changed)


def test_a_plain_codebook_has_no_state():
    assert set(variables(VQ(10))) == {"params"}


# ---- k-means ----


@pytest.mark.parametrize("fields", [{}, {"ema": 0.99}, {"normalize": "both"}])
def test_kmeans_makes_the_first_codes_and_runs_once(fields):
    module, control = VQ(10, kmeans=5, **fields), VQ(10, **fields)
    held = variables(module)
    codes, after = step(module, held)
    np.testing.assert_array_equal(codes.indices, module.apply(after, LATENTS).indices) if not fields else None
    assert float(codes.aux["commitment"]) < 0.5 * distortion(control, variables(control))
    other = LATENTS + 3
    frozen = {**after, "codebook": {**after["codebook"], "started": jnp.array(True)}}
    _, second = step(module, frozen, other, {"train": jax.random.key(9)})
    moved = np.abs(module.apply(second, method="codes") - module.apply(after, method="codes")).max()
    assert moved < (0.2 if "ema" in fields else 1e-6)  # by averaging, not by another k-means
    if "params" in held:  # the optimizer's parameter is untouched; the offset holds the rest
        np.testing.assert_array_equal(after["params"]["codebook"], held["params"]["codebook"])


def test_kmeans_codes_without_latents_stay_where_they_are():
    """More codes than latents: after averaging steps each is still a latent, or near one, and none fell to zero."""
    module, latents = VQ(100, ema=0.9, kmeans=2), 10 + LATENTS
    held = variables(module, latents)
    for _ in range(3):
        _, held = step(module, held, latents)
    assert np.abs(held["codebook"]["codes"] - 10).max() < 5


def test_an_optimizer_goes_on_from_kmeans_as_if_the_codes_were_its_own():
    """The gradient of the parameter is that of the codes, and a step of the parameter is a step of the codes."""
    module = VQ(10, kmeans=5)
    _, held = step(module, variables(module))
    loss = lambda params: module.apply({**held, "params": params}, LATENTS).aux["codebook"]
    gradient = jax.grad(loss)(held["params"])["codebook"]
    table = module.apply(held, method="codes")
    plain = jax.grad(lambda t: VQ(10).apply({"params": {"codebook": t}}, LATENTS).aux["codebook"])(table)
    np.testing.assert_allclose(gradient, plain, atol=1e-7)
    moved = {**held, "params": {"codebook": held["params"]["codebook"] - 0.1 * gradient}}
    np.testing.assert_allclose(module.apply(moved, method="codes"), table - 0.1 * gradient, atol=1e-6)


# ---- codes that are not used ----


@pytest.mark.parametrize("fields", [{"revive": 0.5}, {"revive": 0.5, "ema": 0.9}])
def test_dead_codes_become_latents_of_the_batch(fields):
    """All codes but one lie far off. Their counts fall below the threshold, and they come back among the latents."""
    far = jnp.full((10, 4), 100.0) + jnp.arange(10.0)[:, None]
    module, control = VQ(10, **fields), VQ(10, **fields | {"revive": 1e-9})
    used = []
    for one in (module, control):
        held = variables(one, codes=None if "ema" in fields else far.at[0].set(0))
        if "ema" in fields:
            held = {"codebook": {**held["codebook"], "codes": far.at[0].set(0), "sum": far.at[0].set(0)}}
        run = jax.jit(lambda held, key, one=one: step(one, held, rngs={"train": key})[1])
        for i in range(110):
            held = run(held, jax.random.fold_in(KEY, i))
        used.append(len(np.unique(one.apply(held, LATENTS).indices)))
    assert used[0] >= 8 and used[1] == 1


def test_a_revived_code_is_exactly_a_latent_and_has_time_to_be_used():
    state = {"codes": some_codes(), "count": jnp.array([3.0] * 7 + [0.1] * 3), "sum": some_codes()}
    rows = LATENTS.reshape(-1, 4)
    after = vq.revive(state, KEY, rows, 0.5)
    np.testing.assert_array_equal(after["codes"][:7], state["codes"][:7])
    revived = np.asarray(after["codes"][7:])
    assert all((np.abs(np.asarray(rows) - code).sum(1) == 0).any() for code in revived)
    assert len(np.unique(revived, axis=0)) == 3
    np.testing.assert_array_equal(after["count"], [3.0] * 7 + [1.0] * 3)
    np.testing.assert_allclose(after["sum"][7:] / after["count"][7:, None], revived)
    for other in (KEY, jax.random.key(1)):
        assert np.array_equal(vq.revive(state, other, rows, 0.5)["codes"], after["codes"]) == (other is KEY)


def test_clustering_moves_codes_the_further_the_less_they_are_used():
    """By the definition: with share of use s and K codes, exp(-10 K s / (1 - decay) - 0.001) of the way."""
    codes, rows = some_codes(), LATENTS.reshape(-1, 4)
    count = jnp.array([0.0, 0.02, *[5.0] * 8])
    nearest = jnp.arange(10)
    after = vq.cluster({"codes": codes, "count": count}, nearest, rows)["codes"]
    shares = np.asarray(count) / len(rows)
    way = np.exp(-10 * 10 * shares / 0.01 - 0.001)[:, None]
    np.testing.assert_allclose(after, (1 - way) * codes + way * rows[:10], rtol=1e-4, atol=1e-6)
    assert way[0] > 0.99 and 0.01 < way[1] < 0.99 and way[2] < 1e-6


def test_clustering_brings_far_codes_back_to_the_latents():
    """Six of ten codes lie far off on all sides; the four others have all latents."""
    table = some_codes().at[4:].multiply(50)
    module = VQ(10, clustering=True)
    held = variables(module, codes=table)
    used = lambda held: len(np.unique(module.apply(held, LATENTS).indices))
    assert used(held) == 4
    for _ in range(3):
        _, held = step(module, held)
    assert used(held) >= 8 and np.abs(module.apply(held, method="codes")).max() < 4


# ---- on devices ----

CASES = {
    "moving": {"ema": 0.9},
    "k-means": {"ema": 0.9, "kmeans": 3},
    "revival": {"ema": 0.9, "revive": 1.2},
    "written": {"kmeans": 3, "revive": 1.2, "normalize": "both"},
    "clustering": {"clustering": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_batch_split_over_devices_gives_the_state_of_the_whole_batch(name):
    module = VQ(10, **CASES[name])
    held = variables(module)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.jit(lambda held, x: step(module, held, x))
    split = jax.device_put(LATENTS, NamedSharding(mesh, P("data")))
    for _ in range(2):
        (one, held_one), (many, held) = run(held, LATENTS), run(held, split)
        np.testing.assert_array_equal(one.indices, many.indices)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dict(held_one), dict(held))
    assert len(held["codebook"]) > 0


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"normalize": "l2"}, 'VQ.normalize is "none", "both" or "latents"'),
        ({"clustering": True, "ema": 0.9}, "VQ.clustering"),
        ({"clustering": True, "revive": 1.0}, "VQ.clustering"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        variables(VQ(10, **fields))
