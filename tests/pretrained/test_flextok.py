"""The published checkpoints, by the shapes of their keys alone: no checkpoint is opened and nothing is allocated."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.codecs.identity import Identity
from jaxtok.decoders.flow import FlowDecoder
from jaxtok.encoders.latent1d import Latent1D
from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained.convert import flatten, match
from jaxtok.pretrained.flextok import RULES, from_state_dict, tables
from jaxtok.quantizers.fsq import FSQ
from jaxtok.tokenizer import Tokenizer

# depth of encoder and decoder; keys, and parameters in millions of encoder, decoder and codec, as published
PUBLISHED = {
    "d12_d12": (12, 12, 462, "85.38", "172.45", "83.82"),
    "d18_d18": (18, 18, 558, "287.33", "578.59", "83.82"),
    "d18_d28": (18, 28, 648, "287.33", "2169.74", "83.82"),
}


def our_shapes(encoder_depth, decoder_depth):
    """Shapes of our parameters on latents of 32 x 32 x 16; width 64 x depth."""
    encoder = Latent1D(width=64 * encoder_depth, depth=encoder_depth, registers=256, channels=6)
    decoder = FlowDecoder(width=64 * decoder_depth, depth=decoder_depth, registers=256, shape=(32, 32, 16))
    module, x = Tokenizer(Identity(), encoder, FSQ((8, 8, 8, 5, 5, 5)), decoder), jnp.zeros((1, 32, 32, 16))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, time=jnp.zeros(1), noise=x))["params"]


def foreign_zeros(name):
    """The published keys: zeros that own one number each, but true sine-cosine tables."""
    listed = json.loads((Path(__file__).parent / "state_dicts" / f"flextok_{name}.json").read_text())
    arrays = {key: np.broadcast_to(np.zeros((), dtype), shape) for key, (shape, dtype) in listed.items()}
    for key in ("encoder.module_dict.enc_posemb_module", "decoder.module_dict.dec_patches_posemb_module"):
        width = arrays[f"{key}.posembs"].shape[1]
        arrays[f"{key}.posembs"] = np.moveaxis(sincos_2d(16, 16, width), -1, 0)[None]
    return arrays


def millions(arrays):
    return f"{sum(a.size for a in arrays) / 1e6:.2f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_covers_the_published_keys(name):
    encoder_depth, decoder_depth, keys, *_ = PUBLISHED[name]
    foreign = foreign_zeros(name)
    pieces, report = match(foreign, RULES, our_shapes(encoder_depth, decoder_depth), tables(foreign))
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    assert list(report.set_aside) == ["codec"]
    assert all(key.startswith("vae.") for key in report.set_aside["codec"])
    assert len(foreign) == keys == len(pieces) + len(tables(foreign)) + len(report.set_aside["codec"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_models_have_the_published_sizes(name):
    encoder_depth, decoder_depth, _, encoder, decoder, codec = PUBLISHED[name]
    params, foreign = our_shapes(encoder_depth, decoder_depth), foreign_zeros(name)
    # the published counts include the fixed tables, which are no parameters of ours
    fixed = {path.split("/")[0]: [table] for path, table in tables(foreign).items()}
    assert millions([*flatten(params["encoder"]).values(), *fixed["encoder"]]) == encoder
    assert millions([*flatten(params["decoder"]).values(), *fixed["decoder"]]) == decoder
    assert millions([a for key, a in foreign.items() if key.startswith("vae.")]) == codec
    assert set(params) == {"encoder", "decoder"}


def test_a_checkpoint_of_another_size_is_refused():
    foreign = foreign_zeros("d18_d18")
    with pytest.raises(ValueError) as error:
        from_state_dict(foreign, our_shapes(12, 12))
    assert "encoder.module_dict.enc_register_module.registers: encoder/registers needs (256, 768)" in str(error.value)
    assert "blocks.17.attn.wq.weight" in str(error.value)  # every key is listed, not the first alone


def test_every_missing_layer_is_named():
    foreign = {key: a for key, a in foreign_zeros("d12_d12").items() if ".blocks.7." not in key}
    _, report = match(foreign, RULES, our_shapes(12, 12), tables(foreign))
    trunk = {"attn/qkv/kernel[7,:,:,0]", "attn/qkv/kernel[7,:,:,1]", "attn/qkv/kernel[7,:,:,2]", "attn/out/kernel[7]"}
    trunk |= {"mlp/gate/kernel[7]", "mlp/value/kernel[7]", "mlp/out/kernel[7]"}
    expected = {f"{part}/blocks/{leaf}" for part in ("encoder", "decoder") for leaf in trunk}
    assert set(report.missing) == expected | {"decoder/blocks/adaln/kernel[7]", "decoder/blocks/adaln/bias[7]"}


@pytest.fixture(scope="module")
def small():
    """Random weights of a small model under the published names, and our tree for them."""
    folder = Path(__file__).parents[1] / "goldens" / "flextok"
    with np.load(folder / "weights.npz") as archive:
        weights = dict(archive)
    encoder = Latent1D(width=64, depth=2, registers=16, channels=6, head_dim=32)
    decoder = FlowDecoder(width=64, depth=2, registers=16, shape=(8, 8, 16), head_dim=32)
    module, x = Tokenizer(Identity(), encoder, FSQ((8, 8, 8, 5, 5, 5)), decoder), jnp.zeros((1, 8, 8, 16))
    return weights, jax.eval_shape(lambda: module.init(jax.random.key(0), x, time=jnp.zeros(1), noise=x))["params"]


def test_linear_layers_keep_their_meaning(small):
    weights, like = small
    params, report = from_state_dict(weights, like)
    assert str(report) == ""
    x = np.random.default_rng(0).normal(size=64)
    block = "decoder.module_dict.dec_transformer.blocks.1."
    ours = params["decoder"]["blocks"]
    wk = weights[block + "attn.wk.weight"] @ x
    np.testing.assert_allclose(
        np.einsum("i,ihd->hd", x, ours["attn"]["qkv"]["kernel"][1, :, :, 1]).ravel(), wk, rtol=1e-5
    )
    out = np.einsum("hd,hdo->o", x.reshape(2, 32), ours["attn"]["out"]["kernel"][1])
    np.testing.assert_allclose(out, weights[block + "attn.proj.weight"] @ x, rtol=1e-5)
    # the sixth of twelve vectors is the patches' scale_mlp, the seventh the registers' gate_attn
    m = weights[block + "adaLN_modulation.1.weight"] @ x
    adaln = np.einsum("i,ismo->smo", x, ours["adaln"]["kernel"][1])
    np.testing.assert_allclose(adaln[0, 5], m[5 * 64 : 6 * 64], rtol=1e-5)
    np.testing.assert_allclose(adaln[1, 0], m[6 * 64 : 7 * 64], rtol=1e-5)


def test_projectors_are_set_aside_and_unknown_keys_warn(small):
    weights, like = small
    extra = {"decoder.module_dict.dec_repa_proj.0.weight": np.zeros(3), "decoder.module_dict.new": np.zeros(3)}
    with pytest.warns(UserWarning, match=r"decoder\.module_dict\.new"):
        _, report = from_state_dict(weights | extra, like)
    assert report.unused == ["decoder.module_dict.new"]
    assert [keys for reason, keys in report.set_aside.items() if "projector" in reason] == [
        ["decoder.module_dict.dec_repa_proj.0.weight"]
    ]


def test_a_wrong_position_table_is_an_error(small):
    weights, like = small
    key = "encoder.module_dict.enc_posemb_module.posembs"
    with pytest.raises(ValueError, match=r"encoder/pos_embed is computed here and differs"):
        from_state_dict(weights | {key: weights[key].swapaxes(2, 3)}, like)
