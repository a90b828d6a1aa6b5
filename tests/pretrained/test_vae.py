"""Autoencoders in diffusers' format: their keys, by shapes alone, and their configs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.codecs.vae import VAE
from jaxtok.pretrained import vae
from jaxtok.pretrained.convert import convert, flatten, match

ROOT = Path(__file__).parent
TINY = json.loads((ROOT.parent / "goldens/flextok/vae_tiny_config.json").read_text())
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def shapes(codec):
    return jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


def published():
    """FlexTok's codec: {key without prefix: zeros that own one number}."""
    listed = json.loads((ROOT / "state_dicts/flextok_d12_d12.json").read_text())
    prefix = "vae.vae."
    return {
        key.removeprefix(prefix): np.broadcast_to(np.zeros((), dtype), shape)
        for key, (shape, dtype) in listed.items()
        if key.startswith(prefix)
    }


@pytest.fixture(scope="module")
def tiny():
    """Random weights of a small one."""
    with np.load(ROOT.parent / "goldens/flextok/vae_tiny.npz") as archive:
        return {name.removeprefix("w/"): archive[name] for name in archive if name.startswith("w/")}


def renamed(weights):
    """The names of old files."""
    for new, old in OLD.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): a for key, a in weights.items()}
    return weights


def test_every_published_key_has_its_place():
    foreign, like = published(), shapes(VAE())
    pieces, report = match(foreign, vae.rules(), like)
    assert str(report) == "" and pieces.keys() == foreign.keys()
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(like)) / 1e6:.2f}" == "83.82"


def test_prefix_and_target_move_the_table():
    foreign = {f"vae.vae.{key}": a for key, a in published().items()}
    pieces, report = match(foreign, vae.rules("vae.vae.", "codec/"), {"codec": shapes(VAE())})
    assert str(report) == "" and pieces.keys() == foreign.keys()
    assert (
        pieces["vae.vae.decoder.up_blocks.2.resnets.0.conv_shortcut.bias"].path
        == "codec/decoder/up_2/block_0/shortcut/bias"
    )
    assert match({"vaeXvae.quant_conv.bias": np.zeros(32)}, vae.rules("vae.vae."), {})[1].unused  # a dot is a dot


def test_both_names_of_the_attention_give_the_same_tree(tiny):
    like = shapes(VAE(**vae.config(TINY)))
    old = renamed(tiny)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old and old.keys() != tiny.keys()
    trees = [flatten(convert(weights, vae.rules(), like)[0]) for weights in (tiny, old)]
    assert trees[0].keys() == trees[1].keys()
    for path, leaf in trees[0].items():
        np.testing.assert_array_equal(leaf, trees[1][path])
    key = tiny["encoder.mid_block.attentions.0.to_k.weight"]
    np.testing.assert_array_equal(trees[0]["encoder/mid/attn/k/kernel"], key.T)


def test_a_missing_block_is_named(tiny):
    like = shapes(VAE(**vae.config(TINY | {"layers_per_block": 3})))
    with pytest.raises(ValueError, match="encoder/down_0/block_2/conv1/kernel") as error:
        convert(tiny, vae.rules(), like)
    assert "decoder/up_3/block_3/norm2/scale" in str(error.value)


def test_a_config_becomes_fields():
    fields = vae.config(TINY)
    assert fields == dict(
        channels=(8, 16, 16, 24),
        blocks=2,
        groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.0,
        quant_convs=True,
    )
    hash(VAE(**fields))  # tuples, not lists
    newer = dict(shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True)
    newer |= dict(latents_mean=None, latents_std=None, mid_block_add_attention=True)
    fields = vae.config(TINY | newer)
    assert fields["shift_factor"] == 0.1159 and not fields["quant_convs"]
    assert vae.config(TINY | {"shift_factor": None})["shift_factor"] == 0
    assert vae.config({k: v for k, v in TINY.items() if k != "scaling_factor"})["scaling_factor"] == 0.18215


@pytest.mark.parametrize(
    "change, says",
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu', and ours is 'silu'"),
        ({"norm_eps": 1e-5}, "norm_eps is unknown here"),
        ({"in_channels": 1}, "in_channels is 1, and ours is 3"),
        ({"latents_mean": [0.1] * 4}, "latents_mean is"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
        ({"use_quant_conv": False}, "both layers are there or neither"),
        ({"block_out_channels": [8, 16]}, "down_block_types is"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"]}, "up_block_types is"),
    ],
)
def test_what_a_config_means_that_is_not_ours_is_refused_by_name(change, says):
    with pytest.raises(ValueError, match="config cannot be read") as error:
        vae.config(TINY | change)
    assert says in str(error.value)


def test_every_fault_of_a_config_is_listed():
    with pytest.raises(ValueError) as error:
        vae.config({"act_fn": "relu", "dropout": 0.1})
    for fault in ("lacks block_out_channels", "lacks latent_channels", "dropout is unknown", "act_fn is 'relu'"):
        assert fault in str(error.value)
