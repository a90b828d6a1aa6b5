"""An encoder with a branch for each book, inside a Tokenizer."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxtok.build import build
from jaxtok.pretrained.convert import flatten, unflatten

TRUNK = dict(channels=(4, 8), blocks=1, groups=2)
VQ = dict(name="quantizers.vq.VQ", size=16, normalize="both")
SPEC = dict(
    name="tokenizer.Tokenizer",
    codec=dict(name="codecs.identity.Identity"),
    encoder=dict(
        name="encoders.factorized.Factorized",
        trunk=dict(name="nn.conv.ConvEncoder", out=0, **TRUNK),
        branches=("visual", "semantic"),
        channels=4,
        depth=1,
        between=6,
        head_dim=4,
        groups=2,
    ),
    quantizer=dict(name="quantizers.product.Product", books=dict(visual=VQ, semantic=VQ)),
    decoder=dict(name="decoders.cnn.CNN", first=6, **TRUNK),
)
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return build(SPEC)


@pytest.fixture(scope="module")
def variables(model):
    params = jax.jit(partial(model.init, train=True))(jax.random.key(0), PICTURES)["params"]
    rng = np.random.default_rng(1)
    noisy = {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in flatten(params).items()}
    return {"params": unflatten(noisy)}


def encode(model, variables):
    return jax.jit(partial(model.apply, method="encode"))(variables, PICTURES)


def test_every_place_has_an_index_in_each_book_and_the_grid_is_kept(model, variables):
    codes = encode(model, variables)
    assert codes.grid == (3, 4) and codes.indices.shape == (3, 12, 2) and codes.z.shape == (3, 12, 8)
    assert all(len(np.unique(codes.indices[..., g])) > 3 for g in range(2))
    again = model.apply(variables, codes.indices, 12, method="lookup")
    np.testing.assert_array_equal(again.z, codes.z)
    picture = jax.jit(partial(model.apply, method="decode"))(variables, codes)
    assert picture.shape == PICTURES.shape


def test_a_branch_feeds_its_own_book_and_no_other(model, variables):
    params, before = variables["params"], encode(model, variables)
    encoder = params["encoder"]
    semantic = jax.tree.map(lambda x: -x, encoder["semantic"])
    after = encode(model, {"params": params | {"encoder": encoder | {"semantic": semantic}}})
    np.testing.assert_array_equal(after.indices[..., 0], before.indices[..., 0])  # the visual book, the first
    assert (after.indices[..., 1] != before.indices[..., 1]).any()


def test_the_trunk_ends_behind_its_middle(model, variables):
    encoder = variables["params"]["encoder"]
    assert set(encoder) == {"trunk", "visual", "semantic"}
    assert set(encoder["trunk"]) == {"conv_in", "down_0", "down_1", "mid"}
    assert set(encoder["visual"]) == {"adapter", "norm_out", "conv_out", "quant_conv"}
