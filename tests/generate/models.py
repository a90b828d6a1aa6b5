"""Tiny generators with parameters at which nothing is zero, and what several tests ask of them."""

from functools import partial

import jax
import jax.numpy as jnp

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
    params = jax.jit(partial(module.init, keys, method="loss"))(*batch(module))
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(jax.random.key(seed + 2), len(leaves))
    return tree.unflatten([p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, noise, strict=True)])


def run(module, method, params, *args, **options):
    """module.method(*args, **options), jitted; options are static but for those that are arrays."""
    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
    fixed = {k: v for k, v in options.items() if k not in arrays}
    return jax.jit(partial(module.apply, method=method, **fixed))(params, *args, **arrays)
