"""Residual and multi-scale quantization: what is left over falls, codes add up, scales resize as they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.nn.interpolate import cubic
from jaxtok.quantizers import residual
from jaxtok.quantizers.binary import LFQ
from jaxtok.quantizers.residual import MultiScale, Residual
from jaxtok.quantizers.vq import VQ

KEY = jax.random.key(0)
LATENTS = jax.random.normal(KEY, (8, 16, 3))
RNGS = {"train": jax.random.key(5)}
SCALES = ((1, 1), (2, 2), (4, 4))


def fitted(module, latents=LATENTS):
    """Variables after one training step, in which k-means makes the codes of every level."""
    held = jax.jit(lambda: module.init({"params": jax.random.key(1), "train": KEY}, latents, train=True))()
    run = jax.jit(lambda held: module.apply(held, latents, train=True, rngs=RNGS, mutable=["codebook"])[1])
    return {**held, **run(held)}


def errors(module, held, lengths, cut, latents=LATENTS):
    """Mean squared errors of what the first indices give, for several lengths."""
    indices = module.apply(held, latents).indices
    found = [module.apply(held, cut(indices, n), method="lookup") for n in lengths]
    return [float(np.square(latents - z).mean()) for z in found]


def test_the_error_falls_with_every_level():
    module = Residual((VQ(8, kmeans=4), VQ(8, kmeans=4), VQ(8, kmeans=4), VQ(8, kmeans=4)))
    found = errors(module, fitted(module), (1, 2, 3, 4), lambda indices, n: indices[..., :n])
    assert all(b < 0.8 * a for a, b in zip(found, found[1:], strict=False)) and found[0] < 0.7


def test_levels_by_hand():
    """Codes 0, 10 and then -1, 0, 1, 2: 11.8 is 10 + 2, 8.9 is 10 - 1, 1.2 is 0 + 1."""
    module = Residual((VQ(2), VQ(4)))
    tables = {"levels_0": jnp.array([[0.0], [10.0]]), "levels_1": jnp.array([[-1.0], [0.0], [1.0], [2.0]])}
    held = {"params": {name: {"codebook": table} for name, table in tables.items()}}
    latents = jnp.array([[[11.8], [8.9], [1.2]]])
    codes = module.apply(held, latents)
    np.testing.assert_array_equal(codes.indices, [[[1, 3], [1, 0], [0, 2]]])
    np.testing.assert_allclose(codes.z[..., 0], [[12, 9, 1]])
    rest = np.array([[1.8, -1.1, 1.2], [-0.2, -0.1, 0.2]])
    for name in ("commitment", "codebook"):
        np.testing.assert_allclose(codes.aux[name], np.square(rest).mean(), rtol=1e-5)
    loss = lambda held, x: module.apply(held, x).aux["codebook"]
    gradient = jax.grad(loss)(held, latents)["params"]
    first = 2 * -(rest[0] + rest[1]) / 6  # the first code is in both sums
    np.testing.assert_allclose(gradient["levels_0"]["codebook"][:, 0], [first[2], first[0] + first[1]], rtol=1e-4)
    np.testing.assert_allclose(gradient["levels_1"]["codebook"][3, 0], 2 * -rest[1][0] / 6, rtol=1e-4)


def test_the_gradient_passes_the_sum_once_whatever_the_depth():
    for module in (Residual((VQ(8),), repeat=3), MultiScale(VQ(8), SCALES)):
        held = module.init({"params": KEY}, LATENTS)
        gradient = jax.grad(lambda x, m=module, h=held: (m.apply(h, x).z * LATENTS).sum())(LATENTS)
        np.testing.assert_allclose(gradient, LATENTS, rtol=1e-6)


def test_one_codebook_may_serve_all_levels_and_moves_with_all_of_them():
    module = Residual((VQ(8, ema=0.9),), repeat=3)
    held = module.init({"params": KEY}, LATENTS)
    assert held["codebook"].keys() == {"levels_0"} and module.vocabulary == (8, 8, 8)
    _, after = module.apply(held, LATENTS, train=True, mutable=["codebook"])
    count = after["codebook"]["levels_0"]["count"]
    np.testing.assert_allclose(count.sum(), 0.9**3 * 8 + 0.1 * 128 * (1 + 0.9 + 0.81), rtol=1e-5)


def test_levels_may_be_of_any_kind():
    """Signs on ever smaller scales would need scaled codes; here signs come first and codes mend them."""
    module = Residual((LFQ((2, 1)), VQ(16, kmeans=4)))
    assert module.vocabulary == (4, 2, 16)
    held = fitted(module)
    first, both = errors(module, held, (2, 3), lambda indices, n: indices[..., :n])
    assert both < 0.5 * first


# ---- scales ----


def test_the_error_falls_with_every_scale():
    module = MultiScale(VQ(32, kmeans=4), SCALES)
    held = fitted(module, jnp.tile(LATENTS, (1, 1, 1)))
    found = errors(module, held, (1, 5, 21), lambda indices, n: indices[:, :n])
    assert found[0] > found[1] > 1.1 * found[2]
    codes = module.apply(held, LATENTS)
    assert codes.indices.shape == (8, 21) and codes.grid == (4, 4) and module.vocabulary == 32
    with pytest.raises(ValueError, match=r"takes whole scales, \[1, 5, 21\] indices, not 7"):
        module.apply(held, codes.indices[:, :7], method="lookup")


def test_scales_by_hand():
    """A sequence of two tokens, 4 and 6: their mean 5 is coded as 5, what is left, -1 and 1, as such."""
    module = MultiScale(VQ(3), ((1,), (2,)))
    held = {"params": {"quantizer": {"codebook": jnp.array([[-1.0], [1.0], [5.0]])}}}
    codes = module.apply(held, jnp.array([[[4.0], [6.0]]]))
    np.testing.assert_array_equal(codes.indices, [[2, 0, 1]])
    np.testing.assert_allclose(codes.z[..., 0], [[4, 6]])
    np.testing.assert_allclose(codes.aux["commitment"], (1 + 0) / 2)


@pytest.mark.parametrize("matrix", [residual.area, cubic])
def test_resizing_keeps_constants_and_equal_sizes(matrix):
    for size, to in ((7, 3), (3, 7), (1, 5), (5, 1), (4, 4)):
        np.testing.assert_allclose(matrix(size, to).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(matrix(4, 4), np.eye(4))


def test_resizing_by_hand():
    np.testing.assert_allclose(residual.area(5, 2), [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]])
    twice = [-0.10546875, 0.0859375, 0.3515625, 2.1171875, 4.4453125, 4.7421875, 2.8203125, 1.68359375]  # by PyTorch
    np.testing.assert_allclose(cubic(4, 8) @ [0, 1, 5, 2], twice, rtol=1e-6)
    x = jnp.arange(24.0).reshape(1, 12, 2)  # a grid of 3 x 4, rows first
    halves = residual.resize(x, (3, 4), (3, 2), residual.area)
    np.testing.assert_allclose(halves[0, :, 0], [1, 5, 9, 13, 17, 21])


def test_convolutions_smooth_what_a_scale_adds():
    """Shared by neighbouring scales: of two, the first has the first two of four scales. Half of it is the identity."""
    scales = ((1, 1), (2, 2), (3, 3), (4, 4))
    module = MultiScale(VQ(8), scales, smooth=2)
    held = jax.jit(lambda: module.init({"params": KEY}, LATENTS))()
    assert set(held["params"]) == {"quantizer", "smoothing_0", "smoothing_1"}
    zero = jax.tree.map(jnp.zeros_like, held["params"])
    plain = MultiScale(VQ(8), scales)
    quantizer = {"quantizer": held["params"]["quantizer"]}
    indices = plain.apply({"params": quantizer}, LATENTS).indices
    found = module.apply({"params": {**zero, **quantizer}}, indices, method="lookup")
    np.testing.assert_allclose(found, plain.apply({"params": quantizer}, indices, method="lookup") / 2, atol=1e-6)
    for name, used in (("smoothing_0", (1, 5)), ("smoothing_1", (14, 30))):
        bias = {name: {"conv": {**zero[name]["conv"], "bias": jnp.ones(3)}}}
        shifted = lambda n, b=bias: (
            module.apply({"params": {**zero, **quantizer, **b}}, indices[:, :n], method="lookup")
            - module.apply({"params": {**zero, **quantizer}}, indices[:, :n], method="lookup")
        )
        steps = [float(shifted(n).mean()) for n in (1, 5, 14, 30)]
        np.testing.assert_allclose(np.diff([0, *steps]), [0.5 * (n in used) for n in (1, 5, 14, 30)], atol=1e-5)


def test_a_dropped_scale_adds_nothing_and_is_never_the_first():
    module = MultiScale(VQ(8), SCALES, drop=1.0)
    held = {"params": {"quantizer": {"codebook": jax.random.normal(KEY, (8, 3))}}}
    run = jax.jit(lambda key: module.apply(held, LATENTS, train=True, rngs={"train": key}))
    counts, seen = (1, 4, 16), set()
    for i in range(12):
        codes = run(jax.random.key(i))
        parts = np.split(np.asarray(codes.indices), np.cumsum(counts)[:-1], 1)
        quantize = functools.partial(module.apply, held, method="lookup")
        scales = [quantize(jnp.concatenate(parts[: s + 1], 1)) for s in range(3)]
        adds = [scales[0], scales[1] - scales[0], scales[2] - scales[1]]
        without = [np.abs(sum(adds[:s] + adds[s + 1 :]) - codes.z).max() for s in range(3)]
        assert min(without) < 1e-5
        seen.add(int(np.argmin(without)))
    assert seen == {1, 2}
    control = MultiScale(VQ(8), SCALES)
    np.testing.assert_array_equal(module.apply(held, LATENTS).z, control.apply(held, LATENTS).z)


def test_scales_take_one_index_a_token():
    with pytest.raises(ValueError, match="must give one index a token"):
        MultiScale(LFQ((1, 2)), SCALES).apply({}, LATENTS)
