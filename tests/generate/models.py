"""Tiny generators with parameters at which nothing is zero, and what several tests ask of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate.ar import AR
from jaxtok.generate.masked import Masked
from jaxtok.generate.rar import RAR

K, N, CLASSES = 12, 9, 3
ROW = dict(vocabulary=K, length=N, width=16, depth=2, classes=CLASSES, dropout=0.0)
ARS = {
    "learned": dict(),
    "no classes": dict(classes=0),
    "sincos, layer norm after": dict(position="sincos", block=dict(post_norm=True)),
    "llamagen": dict(position="rotary_2d", class_token=True, block=dict(norm="rms", hidden=20)),
    "rotary, gelu, biases, q and k normalised": dict(
        position="rotary", block=dict(mlp="gelu", bias=("qkv", "out", "mlp"), qk_norm=True, norm="rms")
    ),
    "text": dict(classes=0, text=True),
    "text and classes": dict(text=True),
    "digits": dict(levels=(3, 2, 2)),
}


def ar(kind="learned", **fields):
    fields = ROW | ARS[kind] | fields
    return AR(**fields | dict(block=dict(head_dim=8) | fields.get("block", {})))


def rar(**fields):
    return RAR(**ROW | dict(block=dict(head_dim=8, hidden=24)) | fields)


def masked(**fields):
    fields = ROW | fields
    return Masked(**fields | dict(block=dict(head_dim=8, hidden=24) | fields.get("block", {})))


def batch(module, seed=0, size=4):
    """(codes [B N], a condition that the module reads)."""
    keys = jax.random.split(jax.random.key(seed), 4)
    condition = {}
    if module.classes:
        condition["label"] = jnp.arange(size) % module.classes
    if getattr(module, "text", False):
        condition["text"] = jax.random.normal(keys[0], (size, 5, 6))
        condition["text_mask"] = jnp.arange(5) < jax.random.randint(keys[1], (size, 1), 1, 6)
    return jax.random.randint(keys[2], (size, module.length), 0, module.vocabulary), condition or None


def parameters(module, scale=0.3, seed=0):
    """{"params": ...}: all of them normal around their initial values, for heads and gates begin at zero."""
    keys = {"params": jax.random.key(seed), "train": jax.random.key(seed + 1)}
    return noisy(jax.jit(partial(module.init, keys, method="loss"))(*batch(module)), scale, seed + 2)


def noisy(params, scale, seed=2):
    """A tree of arrays, all of them normal around what they are."""
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, noise, strict=True)])


def run(module, method, params, *args, **options):
    """module.method(*args, **options), jitted; options are static but for those that are arrays."""
    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    fixed = {k: v for k, v in options.items() if k not in arrays}
    return jax.jit(partial(module.apply, method=method, **fixed))(params, *args, **arrays)


# ---- of masked models ----


def drops_conditions(module, params, codes, rng, size=2000):
    """Of `size` equal samples, each has the loss of its class or of none, and of none as often as null_rate says."""
    codes, rate = jnp.broadcast_to(codes, (size, *codes.shape)), module.null_rate
    loss = lambda train, label: run(
        module, "loss", params, codes, {"label": jnp.full(size, label)}, train=train, rngs={"train": rng}
    ).loss.mean(1)
    dropped = np.isclose(loss(True, 1), loss(False, CLASSES), atol=1e-5)
    assert (dropped ^ np.isclose(loss(True, 1), loss(False, 1), atol=1e-5)).all()
    assert abs(dropped.mean() - rate) < 5 * (rate * (1 - rate) / size) ** 0.5


def refuses_what_cannot_be(module, params, codes, rng):
    """A loss without labels, and samples that there are not."""
    with pytest.raises(ValueError, match='needs a condition with the "label"'):
        module.apply(params, codes, method="loss", rngs={"train": rng})
    for options, says in (
        (dict(tokens=3), f"all of its {module.length} tokens, not 3"),
        (dict(steps=0), "at least 1 step, got 0"),
        (dict(guidance=2.0), "Guidance needs a condition"),
    ):
        with pytest.raises(ValueError, match=says):
            module.apply(params, rng, method="sample", **options)
