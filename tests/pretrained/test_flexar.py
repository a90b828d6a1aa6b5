"""FlexAR's table against keys made up of the public code's modules, in the published sizes: nothing is allocated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ar_flextok import SIZES, TEXT_SIZES
from jaxtok.generate.ar import AR
from jaxtok.pretrained import flexar
from jaxtok.pretrained.convert import flatten, match

MODEL = "models.ar_image_model."


def keys(width, depth, hidden, text, *, codes=64_000, tokens=256, features=2048, classes=1000, apart=False, bias=True):
    """{key: shape}; `apart`: queries, keys and values are three; `bias`: norms have one."""
    found = {
        "preprocessor.positional_embedding": (tokens, width),
        "preprocessor.embedding.weight": (codes, width),
        "preprocessor.sos_token_embed": (1, 1, width),
        "trunk.post_trunk_norm.weight": (width,),
        "head.linear.weight": (codes, width),
    }
    if not text:
        found["preprocessor.cls_embedding.weight"] = (classes, width)
    for block in (f"trunk.blocks.{i}." for i in range(depth)):
        attention = block + ("self_attn." if text else "attn.")
        found |= (
            {attention + f"{name}_proj.weight": (width, width) for name in "qkv"}
            if apart
            else {attention + "qkv.weight": (3 * width, width)}
        )
        found |= {attention + "proj.weight": (width, width)}
        found |= {block + f"mlp.{fc}.weight": (hidden, width) for fc in ("fc1", "fc3")}
        found |= {block + "mlp.fc2.weight": (width, hidden)}
        if text:
            found |= {block + f"cross_attn.{name}.weight": (width, width) for name in ("Wq", "Wk", "Wv", "proj")}
        found |= {block + f"norm_{i}.weight": (width,) for i in range(1, 4 if text else 3)}
    if bias:
        found |= {key.replace("weight", "bias"): shape for key, shape in found.items() if "norm" in key}
    found = {MODEL + key: shape for key, shape in found.items()}
    if text:
        mlp = {"fc1": (features, features), "fc2": (width, features)}
        found |= {f"models.text_encoder.mlp.{fc}.weight": shape for fc, shape in mlp.items()}
        found["models.text_encoder.t5_embedder.model.shared.weight"] = (32_128, features)
    return found | {"models.image_tokenizer.flextok_model.encoder.something": (3,)}


def zeros(shapes):
    """Arrays that own one number each."""
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in shapes.items()}


def shapes(module, features=2048):
    """Of our parameters."""
    condition = {"text": jnp.zeros((1, 2, features))} if module.text else {"label": jnp.zeros(1, int)}
    names = {"params": jax.random.key(0), "train": jax.random.key(0)}
    init = partial(module.init, names, method="loss")
    return jax.eval_shape(init, jnp.zeros((1, module.length), int), condition)["params"]


@pytest.mark.parametrize("name, text", [("1.33B", False), *((name, True) for name in TEXT_SIZES)])
def test_the_table_covers_the_published_sizes(name, text):
    depth, width = (TEXT_SIZES if text else SIZES)[name]
    hidden = 8 * width // 3
    module = AR(64_000, 256, width, depth, dict(hidden=hidden), classes=0 if text else 1000, text=text)
    foreign = zeros(keys(width, depth, hidden, text))
    if text:
        foreign["null_text"] = np.broadcast_to(np.zeros((), np.float32), width)
    pieces, report = match(flexar.completed(foreign), flexar.rules(text), shapes(module))
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    aside = sum(map(len, report.set_aside.values()))
    assert aside == 1 + text and len(pieces) + aside == len(foreign)
    assert sum(p.value.size for p in pieces.values()) == sum(a.size for a in flatten(shapes(module)).values())


TINY = dict(width=16, depth=2, hidden=24, codes=12, tokens=9, features=6, classes=3)


def tiny(text, **options):
    """(a state dict of random numbers, our model)."""
    rng, shapes = np.random.default_rng(0), keys(**TINY, text=text, **options)
    module = AR(12, 9, 16, 2, dict(head_dim=8, hidden=24), classes=0 if text else 3, text=text, dropout=0.0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}, module


@pytest.mark.parametrize("text", [False, True])
def test_projections_apart_are_one_kernel_and_a_norm_without_a_bias_has_zero(text):
    state, module = tiny(text, bias=False)
    apart = dict(state)
    for i in range(2):
        prefix = f"{MODEL}trunk.blocks.{i}.{'self_attn' if text else 'attn'}."
        parts = np.split(apart.pop(prefix + "qkv.weight"), 3)
        apart |= {f"{prefix}{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    empty = np.linspace(-1, 1, 6, dtype=np.float32) if text else None
    one, other = (flexar.from_state_dict(s, shapes(module, 6), empty)[0] for s in (state, apart))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not one["blocks"]["norm1"]["bias"].any() and not one["norm"]["bias"].any()
    q = state[f"{MODEL}trunk.blocks.1.{'self_attn' if text else 'attn'}.qkv.weight"][:16]
    np.testing.assert_array_equal(one["blocks"]["attn"]["qkv"]["kernel"][1, :, 1, 0], q[8:].T)  # the second head


def test_the_null_text_is_the_empty_one():
    """Without a condition the model reads what it would read of the empty text's features."""
    state, module = tiny(True)
    empty = np.linspace(-1, 1, 6, dtype=np.float32)
    params, _ = flexar.from_state_dict(state, shapes(module, 6), empty)
    codes = jnp.arange(9)[None]
    logits = jax.jit(lambda condition: module.apply({"params": params}, codes, condition))
    np.testing.assert_allclose(logits(None), logits({"text": jnp.asarray(empty)[None, None]}), rtol=1e-4, atol=1e-4)
    other = logits({"text": jnp.ones((1, 1, 6))})
    assert np.abs(logits(None) - other).max() > 0.1


def test_what_is_missing_is_named():
    state, module = tiny(True)
    with pytest.raises(ValueError, match="FLAN-T5-XL's features of the empty text"):
        flexar.from_state_dict(state, shapes(module, 6))
    state, module = tiny(False)
    del state[f"{MODEL}trunk.blocks.1.mlp.fc3.weight"]
    with pytest.raises(ValueError, match=r"blocks/mlp/value/kernel\[1\]"):
        flexar.from_state_dict(state, shapes(module))
