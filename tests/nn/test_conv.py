"""The blocks of the convolutional autoencoder, each against what it must do by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.conv import ConvDecoder, ConvEncoder, Downsample, GroupNorm, ResBlock, SpatialAttention, Upsample
from jaxtok.pretrained.convert import flatten, unflatten


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module, x, seed=1):
    """The module's variables, every leaf random: an init leaves scales at 1 and biases at 0."""
    shapes = flatten(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    leaves = {path: 0.3 * normal(*leaf.shape, seed=seed + i) for i, (path, leaf) in enumerate(shapes.items())}
    return {"params": unflatten(leaves)}


def test_group_norm_is_that_of_flax():
    x = 3 * normal(2, 5, 7, 12) + 40 * normal(2, 1, 1, 12, seed=1)  # channels of a group with unequal means
    variables = randomised(GroupNorm(4), x)
    expected = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False).apply(variables, x)
    np.testing.assert_allclose(GroupNorm(4).apply(variables, x), expected, atol=2e-5)


def test_group_norm_of_half_precision_has_statistics_of_single():
    x = jnp.asarray(normal(1, 64, 64, 8) + 200, jnp.bfloat16)  # a mean in bfloat16 would be off by up to a half
    y = GroupNorm(2, jnp.bfloat16).apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    groups = np.asarray(x, np.float64).reshape(-1, 2, 4)
    expected = (groups - groups.mean((0, 2), keepdims=True)) / groups.std((0, 2), keepdims=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64).reshape(-1, 2, 4), expected, rtol=2**-8, atol=1e-5)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="12 channels do not divide into 8 groups"):
        GroupNorm(8).init(jax.random.key(0), jnp.zeros((1, 2, 2, 12)))


def one_tap(row, column, channels):
    """A 3x3 kernel that passes one neighbour on: (0, 0) is up and left."""
    kernel = np.zeros((3, 3, channels, channels), np.float32)
    kernel[row, column] = np.eye(channels)
    return {"params": {"conv": {"kernel": kernel, "bias": np.zeros(channels, np.float32)}}}


@pytest.mark.parametrize("row, column", [(0, 0), (1, 2), (2, 2)])
def test_downsample_pads_at_the_bottom_and_the_right(row, column):
    x = normal(2, 4, 6, 3)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    y = Downsample().apply(one_tap(row, column, 3), x)
    assert y.shape == (2, 2, 3, 3)
    np.testing.assert_array_equal(y, padded[:, row : row + 3 : 2, column : column + 5 : 2])


def test_upsample_repeats_every_pixel_and_then_convolves():
    x = normal(2, 2, 3, 3)
    repeated = np.kron(x, np.ones((1, 2, 2, 1), np.float32))
    np.testing.assert_array_equal(Upsample().apply(one_tap(1, 1, 3), x), repeated)
    left = np.pad(repeated, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    np.testing.assert_array_equal(Upsample().apply(one_tap(1, 0, 3), x), left)


def test_the_shortcut_of_a_block_takes_its_input():
    x, block = normal(2, 4, 4, 6), ResBlock(10, groups=2)
    params = randomised(block, x)["params"]
    assert params["shortcut"]["kernel"].shape == (1, 1, 6, 10)
    params["conv2"] = jax.tree.map(np.zeros_like, params["conv2"])  # the branch is silent
    expected = x @ params["shortcut"]["kernel"][0, 0] + params["shortcut"]["bias"]
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=1e-5)


def test_a_block_of_the_same_width_has_no_shortcut():
    x, block = normal(1, 4, 4, 6), ResBlock(6, groups=2)
    params = randomised(block, x)["params"]
    assert set(params) == {"norm1", "conv1", "norm2", "conv2"}
    params["conv2"] = jax.tree.map(np.zeros_like, params["conv2"])
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)


def test_attention_is_over_all_places_with_one_head():
    x, module = normal(2, 3, 4, 8), SpatialAttention(groups=2)
    variables = randomised(module, x)
    params = variables["params"]
    y = GroupNorm(2).apply({"params": params["norm"]}, x).reshape(2, 12, 8)
    q, k, v = (y @ params[name]["kernel"] + params[name]["bias"] for name in "qkv")
    logits = np.einsum("bnc,bmc->bnm", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (weights @ v) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x), x + expected.reshape(x.shape), atol=1e-4)


TRUNK = dict(channels=(4, 6, 8), blocks=2, groups=2)


def test_the_trunks_halve_and_double_between_levels():
    x = normal(2, 16, 24, 3)
    encoder, decoder = ConvEncoder(10, **TRUNK), ConvDecoder(**TRUNK)
    z, variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), x))
    assert z.shape == (2, 4, 6, 10)
    params = variables["params"]
    assert set(params) == {"conv_in", "down_0", "down_1", "down_2", "mid", "norm_out", "conv_out"}
    assert set(params["down_0"]) == {"block_0", "block_1", "downsample"} and "downsample" not in params["down_2"]
    assert set(params["mid"]) == {"block_0", "attn", "block_1"}
    assert [params[f"down_{i}"]["block_1"]["conv1"]["kernel"].shape[-1] for i in range(3)] == [4, 6, 8]

    y, variables = jax.eval_shape(lambda: decoder.init_with_output(jax.random.key(0), jnp.zeros((2, 4, 6, 5))))
    assert y.shape == (2, 16, 24, 3)
    params = variables["params"]
    assert set(params) == {"conv_in", "mid", "up_0", "up_1", "up_2", "norm_out", "conv_out"}
    assert set(params["up_0"]) == {"block_0", "block_1", "block_2", "upsample"} and "upsample" not in params["up_2"]
    assert [params[f"up_{i}"]["block_0"]["conv2"]["kernel"].shape[-1] for i in range(3)] == [8, 6, 4]


def test_in_half_precision_parameters_and_results_are_single():
    x, sizes = normal(1, 8, 8, 3), dict(channels=(4, 6), blocks=1, groups=2)
    encoder, half = ConvEncoder(4, **sizes), ConvEncoder(4, **sizes, dtype=jnp.bfloat16)
    variables = jax.jit(half.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    y, expected = (jax.jit(module.apply)(variables, x) for module in (half, encoder))
    assert y.dtype == jnp.float32
    error = np.abs(y - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05  # it did compute in bfloat16


def test_sizes_that_do_not_shrink_evenly_are_refused():
    with pytest.raises(ValueError, match="16 x 18 does not shrink evenly by 4, .*multiples of 4"):
        ConvEncoder(4, **TRUNK).init(jax.random.key(0), jnp.zeros((1, 16, 18, 3)))
