"""What every quantizer promises, whatever is inside: a spec as configs write it, and latents it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.build import build

VQ = {"name": "quantizers.vq.VQ", "size": 12}
LFQ = {"name": "quantizers.binary.LFQ", "bits": 5}
FSQ = {"name": "quantizers.fsq.FSQ", "levels": (4, 3)}
SCALES = ((1, 1), (2, 2), (3, 3))

# name: (spec, channels, vocabulary); batches are of 4 pictures of 9 tokens
SPECS = {
    "fsq": (FSQ, 2, 12),
    "vq": (VQ, 6, 12),
    "vq, unit length": (VQ | {"normalize": "both", "temperature": 0.1, "rotation": True}, 6, 12),
    "vq, unit latents, moving": (VQ | {"normalize": "latents", "ema": 0.9}, 6, 12),
    "vq, written codes": (VQ | {"kmeans": 3, "revive": 1.0}, 6, 12),
    "vq, clustering": (VQ | {"clustering": True}, 6, 12),
    "simvq": ({"name": "quantizers.simvq.SimVQ", "size": 12, "temperature": 0.1}, 6, 12),
    "ibq": ({"name": "quantizers.ibq.IBQ", "size": 12, "temperature": 0.1}, 6, 12),
    "lfq": (LFQ, 5, 32),
    "lfq, groups": (LFQ | {"bits": (2, 3), "temperature": 0.1}, 5, (4, 8)),
    "bsq": (LFQ | {"spherical": True}, 5, 32),
    "bernoulli": ({"name": "quantizers.binary.Bernoulli", "bits": 5, "width": 3}, 5, 32),
    "bernoulli, bits": ({"name": "quantizers.binary.Bernoulli", "bits": (1,) * 5}, 5, (2,) * 5),
    "residual": ({"name": "quantizers.residual.Residual", "levels": (VQ, VQ | {"size": 7})}, 6, (12, 7)),
    "residual, one codebook": ({"name": "quantizers.residual.Residual", "levels": (VQ,), "repeat": 3}, 6, (12,) * 3),
    "multi-scale": ({"name": "quantizers.residual.MultiScale", "quantizer": VQ, "scales": SCALES}, 6, 12),
    "multi-scale, smooth": (
        {"name": "quantizers.residual.MultiScale", "quantizer": VQ | {"ema": 0.9}, "scales": SCALES, "smooth": 2},
        6,
        12,
    ),
    "product": ({"name": "quantizers.product.Product", "books": (VQ, LFQ), "widths": (3, 5)}, 8, (12, 32)),
    "product of residuals": (
        {
            "name": "quantizers.product.Product",
            "books": (FSQ, {"name": "quantizers.residual.Residual", "levels": (VQ,), "repeat": 2}),
            "widths": (2, 4),
        },
        6,
        (12, 12, 12),
    ),
    "gaussian levels": ({"name": "quantizers.post_training.GaussianLevels", "channels": 6, "bits": 3}, 6, (8,) * 6),
    "perturbed": ({"name": "quantizers.perturb.Perturbed", "quantizer": VQ, "beta": 0.5, "delta": 4}, 6, 12),
    "swapped": ({"name": "quantizers.perturb.Swapped", "quantizer": LFQ, "pictures": 0.5, "tokens": 0.5}, 5, 32),
}


@pytest.fixture(scope="module", params=SPECS)
def made(request):
    """(module, apply(latents), lookup(indices), latents, Codes in training, Codes in use, vocabulary)."""
    spec, width, vocabulary = SPECS[request.param]
    module = build(spec)
    latents = jax.random.normal(jax.random.key(0), (4, 9, width))
    variables = jax.jit(lambda: module.init({"params": jax.random.key(1), "train": jax.random.key(2)}, latents))()
    if "codebook" in variables.get("params", {}):  # 1 / K is so small that all latents would share a code or two
        codes = jax.random.normal(jax.random.key(3), variables["params"]["codebook"].shape)
        variables = {**variables, "params": {**variables["params"], "codebook": codes}}

    @jax.jit
    def train(x):
        apply = lambda x: module.apply(variables, x, train=True, rngs={"train": jax.random.key(4)})
        return apply(x), jax.grad(lambda x: apply(x).z.sum())(x)

    apply = jax.jit(lambda x: module.apply(variables, x))
    lookup = lambda indices: module.apply(variables, indices, method="lookup")
    return module, apply, lookup, latents, train(latents), apply(latents), vocabulary


def test_indices_stand_for_what_the_decoder_sees(made):
    _, _, lookup, latents, (train, _), codes, _ = made
    for seen in (train, codes):
        found = jax.jit(lookup)(seen.indices)
        np.testing.assert_allclose(found, seen.z, atol=1e-6)
        assert found.dtype == seen.z.dtype == jnp.float32 and seen.z.shape[:2] == latents.shape[:2]


def test_the_vocabulary_is_a_number_for_one_index_and_a_tuple_for_several(made):
    module, _, _, _, (train, _), codes, vocabulary = made
    assert module.vocabulary == vocabulary and isinstance(module.vocabulary, type(vocabulary))
    assert codes.indices.dtype == jnp.int32 and codes.indices.ndim == (2 if isinstance(vocabulary, int) else 3)
    for indices in map(np.asarray, (codes.indices, train.indices)):
        assert (indices >= 0).all() and (indices < np.array(vocabulary)).all()
    if not isinstance(vocabulary, int):
        assert codes.indices.shape == (4, 9, len(vocabulary))
    assert codes.keep.shape == (4, 9) and codes.keep.all() and train.keep.all()


def test_aux_are_finite_scalars(made):
    for codes in (made[4][0], made[5]):
        for value in codes.aux.values():
            assert value.shape == () and np.isfinite(value)


def test_half_precision_latents_are_quantized_in_float32(made):
    _, apply, _, latents, *_ = made
    rounded = latents.astype(jnp.bfloat16)
    half, full = apply(rounded), apply(rounded.astype(jnp.float32))
    np.testing.assert_array_equal(half.indices, full.indices)
    np.testing.assert_array_equal(half.z, full.z)


def test_an_index_outside_is_an_error_and_nan_where_it_cannot_be_read(made):
    _, _, lookup, _, _, codes, _ = made
    for wrong in (-1, 10_000):
        indices = np.array(codes.indices)
        indices[0, 0] = wrong
        with pytest.raises(ValueError, match="were they made by another tokenizer"):
            lookup(indices)
        found = np.asarray(jax.jit(lookup)(indices))
        assert np.isnan(found[0]).any() and np.isfinite(found[1:]).all()


def test_gradients_reach_the_encoder(made):
    gradient = np.asarray(made[4][1])
    assert np.isfinite(gradient).all() and np.abs(gradient).max(-1).min() > 0


def test_a_wrong_number_of_channels_is_refused():
    for name in ("lfq", "bernoulli", "product", "gaussian levels", "multi-scale"):
        spec, width, _ = SPECS[name]
        shape = (4, 8, width) if name == "multi-scale" else (4, 9, width + 1)
        with pytest.raises(ValueError, match="the encoder gives|the latents have"):
            build(spec).init({"params": jax.random.key(0)}, jnp.zeros(shape))
