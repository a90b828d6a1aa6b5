"""Quantizers in a whole tokenizer: losses by name, codebooks that move through the task, several indices a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.build import build

LFQ = {"name": "quantizers.binary.LFQ", "bits": (2, 4), "temperature": 0.1}
VQ = {"name": "quantizers.vq.VQ", "size": 16, "ema": 0.5, "kmeans": 2, "revive": 0.1}


def task(quantizer, channels, losses):
    """A tiny model of 4 tokens on pictures of 12 x 12."""
    aux = lambda term, weight: {"fn": {"name": "losses.quantizer.aux", "term": term}, "weight": weight}
    sizes = {"width": 32, "depth": 1, "registers": 4, "patch": 4, "head_dim": 16}
    model = {
        "name": "tokenizer.Tokenizer",
        "codec": {"name": "codecs.identity.Identity"},
        "encoder": {"name": "encoders.latent1d.Latent1D", "channels": channels, "batch_norm": True, **sizes},
        "quantizer": quantizer,
        "decoder": {"name": "decoders.flow.FlowDecoder", "shape": (12, 12, 3), **sizes},
    }
    terms = {"flow": {"fn": {"name": "losses.flow.flow_matching"}}} | {k: aux(k, w) for k, w in losses.items()}
    samplers = ({"title": "1 step", "steps": 1},)
    spec = {"name": "tasks.TokenizerTask", "model": model, "losses": terms, "samplers": samplers}
    return build(spec | {"token_counts": (2, 4)})


BATCH = {"image": np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)}


def test_a_codebook_moves_and_is_logged():
    run = task(VQ, 6, {"commitment": 0.25})
    trees = jax.jit(run.init)(jax.random.key(0), BATCH)
    assert not trees["mutable"]["codebook"]["quantizer"]["started"]
    loss = jax.jit(jax.value_and_grad(run.loss, has_aux=True))
    arguments = trees["mutable"], trees["frozen"], BATCH, jax.random.key(1), 0
    (total, (mutable, logs)), gradient = loss(trees["params"], *arguments)
    book = mutable["codebook"]["quantizer"]
    assert book["started"] and not np.array_equal(book["codes"], trees["mutable"]["codebook"]["quantizer"]["codes"])
    np.testing.assert_allclose(total, logs["loss/flow"] + 0.25 * logs["loss/commitment"], rtol=1e-6)
    np.testing.assert_allclose(logs["loss/commitment"], logs["codes/commitment"])
    assert 1 <= logs["codes/perplexity"] <= 16 and logs["codes/used"] > 0.2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)) and "quantizer" not in gradient


def test_several_indices_a_token_are_counted_each_and_come_back():
    run = task(LFQ, 6, {"sample_entropy": 0.1, "batch_entropy": -0.1})
    trees = jax.jit(run.init)(jax.random.key(0), BATCH)
    variables = {"params": trees["params"], **trees["mutable"]}
    _, (_, logs) = jax.jit(run.loss)(trees["params"], trees["mutable"], {}, BATCH, jax.random.key(1), 0)
    encode = jax.jit(lambda images: run.model.apply(variables, images, method="encode"))
    indices = np.asarray(encode(BATCH["image"]).indices)
    assert indices.shape == (8, 4, 2) and len(np.unique(indices)) > 4
    rows = jax.jit(run.evaluate)(trees["params"], trees["mutable"], {}, BATCH, jax.random.key(1))["rows"]
    metrics, table = run.summarize(jax.tree.map(np.asarray, rows))
    assert [line["bytes"] for line in table][1:3] == ["1.5", "3.0"]  # 2 and 4 tokens of 6 bits
    used = [len(np.unique(indices[..., g])) / 2**n for g, n in enumerate((2, 4))]
    np.testing.assert_allclose(metrics["codes/used"], np.mean(used))
    shares = [np.bincount(indices[..., g].ravel()) / 32 for g in range(2)]
    entropies = [-(share[share > 0] * np.log(share[share > 0])).sum() for share in shares]
    np.testing.assert_allclose(metrics["codes/perplexity"], np.exp(entropies).mean())
    assert 1 <= logs["codes/perplexity"] <= 16 and 0 < logs["codes/used"] <= 1
    found = run.model.apply(variables, jnp.asarray(indices[:, :3]), 4, method="lookup")
    assert found.indices.shape == (8, 4, 2) and found.keep.sum() == 8 * 3
    np.testing.assert_array_equal(found.z[:, :3], encode(BATCH["image"]).z[:, :3])


def test_a_term_that_the_quantizer_does_not_report_stops_the_run():
    run = task({"name": "quantizers.fsq.FSQ", "levels": (4, 4)}, 2, {"commitment": 1.0})
    trees = jax.eval_shape(run.init, jax.random.key(0), BATCH)
    with pytest.raises(ValueError, match='reports no "commitment"'):
        jax.eval_shape(run.loss, trees["params"], trees["mutable"], {}, BATCH, jax.random.key(1), 0)
