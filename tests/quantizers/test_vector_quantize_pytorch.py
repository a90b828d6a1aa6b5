"""Our quantizers against those of the pip package vector-quantize-pytorch, where that and PyTorch are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.quantizers.binary import LFQ
from jaxtok.quantizers.fsq import FSQ
from jaxtok.quantizers.residual import Residual
from jaxtok.quantizers.simvq import SimVQ
from jaxtok.quantizers.vq import VQ

torch = pytest.importorskip("torch", reason="the comparison with vector-quantize-pytorch needs PyTorch")
theirs = pytest.importorskip("vector_quantize_pytorch", reason="the comparison needs the package of that name")

LATENTS = np.random.default_rng(0).normal(size=(4, 9, 6)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=LATENTS.shape).astype(np.float32)


def numpy(x):
    return x.detach().numpy()


def with_gradient(module, latents=LATENTS):
    """(quantized, indices, loss, gradient of sum(quantized * WEIGHT)) of a module of theirs in training."""
    x = torch.tensor(latents, requires_grad=True)
    quantized, indices, loss = module(x)[:3]
    (quantized * torch.tensor(WEIGHT)).sum().backward()
    return numpy(quantized), numpy(indices), numpy(loss), x.grad.numpy()


def gradient(module, variables):
    return jax.grad(lambda x: (module.apply(variables, x).z * WEIGHT).sum())(LATENTS)


def close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
def test_a_step_of_a_moving_average_codebook(cosine, rotation):
    """Values, losses, gradients, and the codes after the step."""
    options = {"decay": 0.9, "eps": 1e-7, "rotation_trick": rotation, "use_cosine_sim": cosine}
    reference = theirs.VectorQuantize(6, 12, **options).train()
    book = reference._codebook
    codes = np.random.default_rng(2).normal(size=(12, 6)).astype(np.float32)
    if cosine:
        codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    count = np.linspace(1, 3, 12, dtype=np.float32)
    for buffer, value in ((book.embed, codes), (book.embed_avg, codes * count[:, None]), (book.cluster_size, count)):
        buffer.data.copy_(torch.tensor(value)[None])
    module = VQ(12, normalize="both" if cosine else "none", rotation=rotation, ema=0.9)
    held = {"codebook": {"codes": codes, "sum": codes * count[:, None], "count": count}}
    quantized, indices, loss, slope = with_gradient(reference)
    ours, after = module.apply(held, LATENTS, train=True, mutable=["codebook"])
    np.testing.assert_array_equal(ours.indices, indices)
    close(ours.z, quantized)
    close(ours.aux["commitment"], loss)
    close(gradient(module, held), slope)
    close(after["codebook"]["count"], numpy(book.cluster_size)[0])
    close(module.apply({**held, **after}, method="codes"), numpy(book.embed)[0])


def test_a_codebook_that_is_trained_by_gradient():
    options = {"ema_update": False, "learnable_codebook": True, "rotation_trick": False, "commitment_weight": 1.0}
    reference = theirs.VectorQuantize(6, 12, **options).train()
    table = numpy(reference._codebook.embed)[0]
    quantized, indices, _, slope = with_gradient(reference)
    codes = VQ(12).apply({"params": {"codebook": table}}, LATENTS)
    np.testing.assert_array_equal(codes.indices, indices)
    close(codes.z, quantized)
    close(gradient(VQ(12), {"params": {"codebook": table}}), slope)


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq(rotation):
    reference = theirs.SimVQ(6, 12, rotation_trick=rotation).train()
    weights = {"kernel": numpy(reference.code_transform.weight).T, "bias": np.zeros(6, np.float32)}
    held = {"params": {"map": weights}, "codebook": {"table": numpy(reference.frozen_codebook)}}
    module = SimVQ(12, rotation=rotation)
    quantized, indices, loss, slope = with_gradient(reference)
    codes = module.apply(held, LATENTS, train=True)
    np.testing.assert_array_equal(codes.indices, indices)
    close(codes.z, quantized)
    close(codes.aux["codebook"] + 0.25 * codes.aux["commitment"], loss)
    close(gradient(module, held), slope)


@pytest.mark.parametrize("spherical, groups", [(False, 1), (False, 2), (True, 1)])
def test_lfq(spherical, groups):
    """Their first channel is the highest bit, ours the lowest; they scale each group to length 1, we the whole."""
    n = 6 // groups
    options = {"entropy_loss_weight": 1.0, "commitment_loss_weight": 0.0, "diversity_gamma": 0.7}
    reference = theirs.LFQ(codebook_size=2**n, num_codebooks=groups, dim=6, spherical=spherical, **options).train()
    module = LFQ(6 if groups == 1 else (n,) * groups, spherical=spherical, temperature=0.01)
    x = torch.tensor(LATENTS)
    (quantized, indices, loss), parts = reference(x, return_loss_breakdown=True)
    codes = module.apply({}, LATENTS, train=True)
    close(codes.z, numpy(quantized))
    bits = numpy(indices).reshape(4, 9, groups)[..., None] >> np.arange(n)[::-1] & 1
    ours = (bits << np.arange(n)).sum(-1)
    np.testing.assert_array_equal(codes.indices.reshape(4, 9, groups), ours)
    close(codes.aux["sample_entropy"], numpy(parts.per_sample_entropy))
    np.testing.assert_allclose(codes.aux["batch_entropy"], numpy(parts.batch_entropy), rtol=1e-3)


def test_residual_levels():
    options = {"decay": 0.9, "eps": 1e-7, "rotation_trick": False}
    reference = theirs.ResidualVQ(dim=6, num_quantizers=3, codebook_size=12, **options).train()
    books = [layer._codebook for layer in reference.layers]
    tables = np.random.default_rng(2).normal(size=(3, 12, 6)).astype(np.float32) * [[[1.0]], [[0.5]], [[0.25]]]
    held = {}
    for i, (book, table) in enumerate(zip(books, tables.astype(np.float32), strict=True)):
        for buffer, value in ((book.embed, table), (book.embed_avg, table), (book.cluster_size, np.ones(12))):
            buffer.data.copy_(torch.tensor(value)[None])
        held[f"levels_{i}"] = {"codes": table, "sum": table, "count": np.ones(12, np.float32)}
    module = Residual(tuple(VQ(12, ema=0.9) for _ in range(3)))
    with torch.no_grad():
        quantized, indices, losses = reference(torch.tensor(LATENTS))
    codes, after = module.apply({"codebook": held}, LATENTS, train=True, mutable=["codebook"])
    np.testing.assert_array_equal(codes.indices, numpy(indices))
    close(codes.z, numpy(quantized))
    close(codes.aux["commitment"], numpy(losses).mean())
    for i, book in enumerate(books):
        close(after["codebook"][f"levels_{i}"]["codes"], numpy(book.embed)[0])


def test_fsq():
    levels = (8, 5, 5, 4, 3, 3)
    reference = theirs.FSQ(list(levels)).train()
    quantized, indices = reference(torch.tensor(3 * LATENTS))
    codes = FSQ(levels).apply({}, jnp.asarray(3 * LATENTS))
    np.testing.assert_array_equal(codes.indices, numpy(indices))
    close(codes.z, numpy(quantized))
