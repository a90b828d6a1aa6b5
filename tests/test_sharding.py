from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxtok import sharding
from jaxtok.build import build
from jaxtok.nn import linear
from jaxtok.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    on_mesh,
    path_name,
    put_batch,
    shardings,
)
from jaxtok.step import program
from tests.runs import init_sharded, tiny

# What each device holds of each array on meshes of (data, fsdp, tensor), worked out by hand from RULES.
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
RULES = [
    ("attn/qkv/kernel$", (None, "fsdp", "tensor")),
    ("bias$", "replicate"),
    (".*", "fsdp"),
]
HELD = {
    "attn/qkv/kernel": [(2, 64, 96), (2, 16, 96), (2, 32, 48)],
    "attn/qkv/bias": [(2, 20000), (2, 20000), (2, 20000)],  # large, but its rule says replicate
    "mlp/kernel": [(128, 160), (128, 40), (128, 80)],  # the largest dimension is split
    "tall/kernel": [(160, 128), (40, 128), (80, 128)],
    "norm/scale": [(64,), (64,), (64,)],  # below min_size
    "odd/kernel": [(131, 127), (131, 127), (131, 127)],  # nothing divides
    "half/kernel": [(3 * 83, 82), (3 * 83, 82), (3 * 83, 41)],  # the smaller dimension, where fsdp=2 divides it
}
SHAPES = {name: held[0] for name, held in HELD.items()}


def init_state(key):
    """A train state as train.py has it: everything but the data."""
    flat = {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(SHAPES.items())}
    params = {}
    for name, x in flat.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = x
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "step": jnp.int32(0),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
        "mutable": {"usage": jnp.zeros((64, 512))},
        "key": jax.random.key(1),
    }


def test_only_data_crosses_tpu_slices(monkeypatch):
    """Slices that take turns in the list of devices: the mesh puts each one together."""

    def device(i, platform="tpu"):
        place = dict(coords=(i // 2 % 2, i // 4, 0), core_on_chip=0, slice_index=i % 2, process_index=i)
        return SimpleNamespace(id=i, platform=platform, device_kind="none", **place)

    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid)  # a Mesh wants devices of jax
    for sizes in [(4, 2, 1), (-1, 2, 1), (2, 2, 2), (2, 4, 1)]:
        grid = make_mesh(*sizes, devices=[device(i) for i in range(8)])
        slices = [{d.slice_index for d in row.flat} for row in grid]
        assert slices == [{0}] * (len(grid) // 2) + [{1}] * (len(grid) // 2)
        assert len({d.id for d in grid.flat}) == 8
    with pytest.raises(ValueError, match="2 slices, and data=1 is no multiple"):
        make_mesh(1, 8, devices=[device(i) for i in range(8)])
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, axes, axis_types, devices: sizes)
    assert make_mesh(1, 8, devices=[device(i, "gpu") for i in range(8)]) == (1, 8, 1)


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(devices=jax.devices()[:1]).size == 1
    assert set(make_mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=-1, fsdp=3), r"mesh\(data=-1, fsdp=3, tensor=1\) does not fit 8 devices"),
        (dict(data=4, fsdp=1), r"mesh\(data=4, fsdp=1, tensor=1\) does not fit 8 devices"),
        (dict(data=16), "does not fit 8 devices.*leave one size -1"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "each size is a positive number"),
        (dict(data=-2), "each size is a positive number"),
    ],
)
def test_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize("case", range(len(MESHES)), ids=str)
def test_each_array_lies_as_its_rule_says(case):
    mesh = make_mesh(*MESHES[case])
    state, layout = init_sharded(init_state, mesh, RULES, jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(layout)

    seen = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        place, _, name = path_name(path).partition("/")
        if place == "opt_state":  # opt_state/1/0/mu/attn/qkv/kernel
            place, _, name = name.removeprefix("1/0/").partition("/")
        held = {shard.data.shape for shard in x.addressable_shards}
        assert len(x.addressable_shards) == 8
        seen.setdefault(name, {})[place] = held
    for name, held in HELD.items():
        assert seen[name] == {place: {held[case]} for place in ("params", "ema", "mu", "nu")}, name
    assert seen["usage"] == {"mutable": {[(64, 512), (64, 128), (64, 256)][case]}}
    assert seen[""] == {place: {()} for place in ("step", "key", "count")}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_layout_does_not_change_the_values(sizes):
    state, _ = init_sharded(init_state, make_mesh(*sizes), RULES, jax.random.key(0))
    whole = jax.jit(init_state)(jax.random.key(0))
    state["key"], whole["key"] = jax.random.key_data(state["key"]), jax.random.key_data(whole["key"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, whole)  # the last bit is XLA's


def test_works_on_shapes_alone():
    mesh = make_mesh(2, 4)
    layout = shardings(jax.eval_shape(init_state, jax.random.key(0)), mesh, RULES)
    assert layout["opt_state"][1][0].mu["mlp"]["kernel"].spec == P(None, "fsdp")
    assert layout["ema"]["attn"]["qkv"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert layout["step"].spec == layout["key"].spec == P()


def one(shape, rules, sizes=(2, 2, 2), **options):
    """The spec of params/block/kernel, the only array of a tree."""
    tree = {"params": {"block": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
    return shardings(tree, make_mesh(*sizes), rules, **options)["params"]["block"]["kernel"].spec


def test_first_match_wins():
    rules = [("block", "replicate"), ("kernel", "fsdp"), ("params/.*/kernel$", (None, "tensor"))]
    assert one((256, 256), rules) == P()
    assert one((256, 256), rules[1:]) == P("fsdp", None)
    assert one((256, 256), rules[2:]) == P(None, "tensor")


def test_small_arrays_stay_whole():
    assert one((128, 127), [(".*", "fsdp")]) == P()
    assert one((128, 128), [(".*", "fsdp")]) == P("fsdp", None)
    assert one((4, 2), [(".*", "fsdp")], min_size=8) == P("fsdp", None)
    assert one((128, 128), [(".*", "fsdp")], sizes=(4, 1, 2)) == P()


def test_rules_from_a_config_file_may_be_lists():
    assert one((4, 6), [["kernel", [None, "fsdp"]]]) == P(None, "fsdp")


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("kernel", ("fsdp",))], ["params/block/kernel", "(6, 8)", "'kernel'", "1 entries", "2 dimensions"]),
        ([("kernel", ("fsdp", None))], ["params/block/kernel", "(6, 8)", "'kernel'", "6", "fsdp=4", "mesh.fsdp=2 can"]),
        ([("kernel", (None, "model"))], ["params/block/kernel", "data, fsdp, tensor"]),
        ([("kernel", ("fsdp", "fsdp"))], ["params/block/kernel", "at most once"]),
        ([("kernel", "fdsp")], ["params/block/kernel", "'fdsp'", '"fsdp", "replicate"']),
        (
            [("encoder", "fsdp")],
            ["no rule matches params/block/kernel (6, 8)", "the rules 'encoder'", "mend the regex"],
        ),
        ([("bias", "fsdp"), (".*", "fsdp"), ("scale", "fsdp")], ["the rules 'bias', 'scale'"]),
        ([], ["no rule matches params/block/kernel (6, 8)", 'add one, such as (".*", "fsdp")']),
    ],
)
def test_rules_that_do_not_fit(rules, words):
    with pytest.raises(ValueError) as error:
        one((6, 8), rules, sizes=(2, 4, 1))
    for word in words:
        assert word in str(error.value)


def test_a_large_array_that_fsdp_cannot_split_is_no_silent_copy_on_every_device():
    rules = [(".*", "fsdp")]
    assert one((1023, 1025), rules, sizes=(2, 4, 1)) == P()  # 2**20 - 1 elements
    with pytest.raises(ValueError, match=r"\(1026, 1025\): fsdp=4 divides none of its dimensions; mesh.fsdp=2 can"):
        one((1026, 1025), rules, sizes=(2, 4, 1))
    with pytest.raises(ValueError, match=r"\(1025, 1025\): fsdp=4 divides none of its dimensions\.$"):
        one((1025, 1025), rules, sizes=(2, 4, 1))
    assert one((1026, 1025), rules, sizes=(4, 2, 1)) == P("fsdp", None)
    assert one((1025, 1025), [(".*", "replicate")], sizes=(2, 4, 1)) == P()


def test_unmatched_arrays_are_listed_and_counted():
    tree = {f"w{i:02}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(13)}
    with pytest.raises(ValueError, match=r"w00 \(2,\), .*w09 \(2,\) and 3 more"):
        shardings(tree, make_mesh(), [])


def test_scalars_and_keys_need_no_rule():
    tree = {"step": jnp.int32(0), "key": jax.random.key(0), "keys": jax.random.split(jax.random.key(0), 8)}
    assert {s.spec for s in shardings(tree, make_mesh(), []).values()} == {P()}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_put_batch(sizes):
    mesh = make_mesh(*sizes)
    batch = {"image": np.random.default_rng(0).normal(size=(16, 4, 4, 3)).astype("float32"), "label": np.arange(16)}
    placed = put_batch(batch, mesh)
    assert placed.keys() == batch.keys()
    for name, x in placed.items():
        np.testing.assert_array_equal(x, batch[name])
        assert x.sharding == batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in x.addressable_shards} == {16 // (sizes[0] * sizes[1])}


def test_batch_that_the_mesh_does_not_divide():
    mesh = make_mesh(2, 2, 2)
    check_batch_size(12, mesh)
    message = (
        r"A batch of 10 cannot be split over data=2 x fsdp=2 of the mesh: take a multiple of 4 \(such as 8 or 12\)"
    )
    with pytest.raises(ValueError, match=message):
        check_batch_size(10, mesh)
    with pytest.raises(ValueError, match=message):
        put_batch({"image": np.zeros((10, 2))}, mesh)
    with pytest.raises(ValueError, match=r"A batch of 2 .* \(such as 4\)"):
        check_batch_size(2, mesh)


def test_batch_of_unequal_arrays():
    with pytest.raises(ValueError, match=r"equally many examples; these hold \{'image': 8, 'label': 7\}"):
        put_batch({"image": np.zeros((8, 2)), "label": np.zeros(7)}, make_mesh())


def test_a_device_holds_no_more_than_its_share_of_a_step(monkeypatch):
    """With the state split over fsdp the compiler, left alone, gives every device the whole batch."""
    config, held = tiny(batch_size=64), {}
    config.task.model.encoder.width = config.task.model.decoder.width = 128  # large enough to be split
    shapes = {"image": jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.uint8)}
    for arm in ("split", "left alone"):
        if arm == "left alone":
            monkeypatch.setattr(linear, "split_batch", lambda x: x)
        _, state, step = program(config, build(config.task), make_mesh(1, 8), shapes)
        held[arm] = step.lower(state, shapes).compile().memory_analysis().temp_size_in_bytes
    assert held["split"] < 0.5 * held["left alone"], held


def test_the_batch_stays_split_where_a_mesh_is_at_hand():
    mesh = make_mesh(2, 4)
    x = jnp.zeros((16, 4))
    traced = str(jax.make_jaxpr(on_mesh(mesh, linear.split_batch))(x))
    assert "sharding_constraint" in traced and "('data', 'fsdp')" in traced
    for function, value in [(linear.split_batch, x), (on_mesh(mesh, linear.split_batch), jnp.zeros((12, 4)))]:
        assert "sharding_constraint" not in str(jax.make_jaxpr(function)(value))  # no mesh; a batch it does not divide
