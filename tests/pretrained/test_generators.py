"""Published generators over codes, by the shapes of their keys alone: no checkpoint is opened, nothing is allocated."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate.ar import AR
from jaxtok.generate.masked import Masked
from jaxtok.generate.rar import RAR
from jaxtok.pretrained import llamagen, maskgit_generator, rar
from jaxtok.pretrained.convert import flatten, match, with_one_type

LLAMA = dict(position="rotary_2d", classes=1000, class_token=True)
# name: (our model, the table, what is done to a state dict before, how many keys that folds into others, millions)
PUBLISHED = {
    "llamagen_gpt_b": (
        AR(16384, 256, 768, 12, dict(norm="rms", hidden=2048), **LLAMA),
        llamagen.RULES,
        lambda state, like: state,
        0,
        "110.9",
    ),
    "rar_b": (RAR(1024, 256, 768, 24, 1000, dict(head_dim=48, hidden=3072)), rar.RULES, rar.used_rows, 0, "260.9"),
    "titok_generator_l32_vit": (
        Masked(4096, 32, 768, 24, 1000, dict(head_dim=48, post_norm=True, eps=1e-12)),
        maskgit_generator.VIT,
        lambda state, like: with_one_type(state, "model."),
        1,
        "177.2",
    ),
    "titok_generator_s128_uvit": (
        Masked(4096, 128, 1024, 20, 1000, dict(bias=("out", "mlp")), skips=True),
        maskgit_generator.UVIT,
        lambda state, like: with_one_type(state, "model."),
        0,
        "295.0",
    ),
}


def shapes(module):
    """Of our parameters."""
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    init = partial(module.init, keys, method="loss")
    return jax.eval_shape(init, jnp.zeros((1, module.length), int), {"label": jnp.zeros(1, int)})["params"]


def zeros(name):
    """The published keys: zeros that own one number each."""
    listed = json.loads((Path(__file__).parent / "state_dicts" / f"{name}.json").read_text())
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in listed.items()}


def millions(arrays):
    return f"{sum(a.size for a in arrays) / 1e6:.1f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_covers_the_published_keys(name):
    module, rules, before, folded, size = PUBLISHED[name]
    foreign, like = zeros(name), shapes(module)
    pieces, report = match(before(foreign, like), rules, like)
    assert str(report) == "" and len(pieces) == len(foreign) - folded
    assert millions(foreign.values()) == size
    spare = sum(a.size for a in foreign.values()) - sum(a.size for a in flatten(like).values())
    # RAR has 1022 rows to spare in two tables and 98 in a third, 2 of targets; BERT has a table of two types of tokens
    assert spare == {"rar_b": (2 * 1022 + 98 + 2) * 768, "titok_generator_l32_vit": 2 * 768}.get(name, 0)


def test_a_missing_layer_and_another_size_are_named():
    foreign = {key: a for key, a in zeros("llamagen_gpt_b").items() if not key.startswith("layers.7.feed")}
    with pytest.raises(ValueError, match=r"blocks/mlp/gate/kernel\[7\]"):
        llamagen.from_state_dict({"model": foreign}, shapes(PUBLISHED["llamagen_gpt_b"][0]))
    with pytest.raises(
        ValueError, match=r"blocks\.23\.mlp\.fc1\.weight: blocks/mlp/fc1/kernel\[23\] needs \(768, 3000\)"
    ):
        rar.from_state_dict(zeros("rar_b"), shapes(RAR(1024, 256, 768, 24, 1000, dict(head_dim=48, hidden=3000))))


def test_the_type_of_tokens_goes_into_their_places():
    arrays = {
        "model.embeddings.position_embeddings.weight": np.ones((3, 2)),
        "model.embeddings.token_type_embeddings.weight": np.array([[1.0, 2.0], [9.0, 9.0]]),
    }
    [(key, value)] = with_one_type(arrays, "model.").items()
    assert key.endswith("position_embeddings.weight") and value.tolist() == [[2.0, 3.0]] * 3
    assert arrays["model.embeddings.position_embeddings.weight"].tolist() == [[1.0, 1.0]] * 3  # unchanged
