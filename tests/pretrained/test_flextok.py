"""The published checkpoints, by the shapes of their keys alone: no checkpoint is opened and nothing is allocated."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.build import build
from jaxtok.codecs.identity import Identity
from jaxtok.codecs.vae import VAE
from jaxtok.decoders.flow import FlowDecoder
from jaxtok.encoders.latent1d import Latent1D
from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained.convert import flatten, match
from jaxtok.pretrained.flextok import RULES, WITHOUT_CODEC, codec_of, config_from, from_state_dict, tables
from jaxtok.quantizers.fsq import FSQ
from jaxtok.tokenizer import Tokenizer
from tests.pretrained import published
from tests.pretrained.published import D12, TINY_VAE, changed

# depth of encoder and decoder; keys, and parameters in millions of encoder, decoder, codec and all, as published
PUBLISHED = {
    "d12_d12": (12, 12, 462, "85.38", "172.45", "83.82", "341.65"),
    "d18_d18": (18, 18, 558, "287.33", "578.59", "83.82", "949.73"),
    "d18_d28": (18, 28, 648, "287.33", "2169.74", "83.82", "2540.88"),
}


def our_shapes(encoder_depth, decoder_depth, codec=None):
    """Shapes of our parameters on latents of 32 x 32 x 16; width 64 x depth."""
    encoder = Latent1D(width=64 * encoder_depth, depth=encoder_depth, registers=256, channels=6)
    decoder = FlowDecoder(width=64 * decoder_depth, depth=decoder_depth, registers=256, shape=(32, 32, 16))
    module, x = Tokenizer(codec or Identity(), encoder, FSQ((8, 8, 8, 5, 5, 5)), decoder), jnp.zeros((1, 32, 32, 16))
    pixels = x if codec is None else jnp.zeros((1, 256, 256, 3))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), pixels, time=jnp.zeros(1), noise=x))["params"]


def foreign_zeros(name):
    """The published keys: zeros that own one number each, but true sine-cosine tables."""
    arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in published.listed(name).items()}
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
    pieces, report = match(foreign, RULES, our_shapes(encoder_depth, decoder_depth, VAE()), tables(foreign))
    assert str(report) == ""
    assert len(foreign) == keys == len(pieces) + len(tables(foreign))


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_models_have_the_published_sizes(name):
    encoder_depth, decoder_depth, _, encoder, decoder, codec, total = PUBLISHED[name]
    params, foreign = our_shapes(encoder_depth, decoder_depth, VAE()), foreign_zeros(name)
    # the published counts include the fixed tables, which are no parameters of ours
    fixed = {path.split("/")[0]: [table] for path, table in tables(foreign).items()}
    assert millions([*flatten(params["encoder"]).values(), *fixed["encoder"]]) == encoder
    assert millions([*flatten(params["decoder"]).values(), *fixed["decoder"]]) == decoder
    assert millions(flatten(params["codec"]).values()) == codec
    assert millions([*flatten(params).values(), *fixed["encoder"], *fixed["decoder"]]) == total
    assert set(params) == {"encoder", "decoder", "codec"}


def test_without_a_codec_of_ours_theirs_is_set_aside():
    foreign = foreign_zeros("d12_d12")
    _, report = match(foreign, WITHOUT_CODEC, our_shapes(12, 12), tables(foreign))
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    assert list(report.set_aside) == ["codec"]
    assert report.set_aside["codec"] == [key for key in foreign if key.startswith("vae.")]
    assert len(report.set_aside["codec"]) == 248


def test_a_checkpoint_of_another_size_is_refused():
    foreign = foreign_zeros("d18_d18")
    with pytest.raises(ValueError) as error:
        from_state_dict(foreign, our_shapes(12, 12))
    assert "encoder.module_dict.enc_register_module.registers: encoder/registers needs (256, 768)" in str(error.value)
    assert "blocks.17.attn.wq.weight" in str(error.value)  # every key is listed, not the first alone


def test_every_missing_layer_is_named():
    foreign = {key: a for key, a in foreign_zeros("d12_d12").items() if ".blocks.7." not in key}
    _, report = match(foreign, WITHOUT_CODEC, our_shapes(12, 12), tables(foreign))
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


def test_a_position_table_of_another_size_is_an_error(small):
    weights, like = small
    from_state_dict(weights, like, grid=(4, 4))
    with pytest.raises(ValueError, match=r"encoder/pos_embed needs \(8, 8, 64\)"):
        from_state_dict(weights, like, grid=(8, 8))


def test_leaves_are_given_away_one_by_one(small):
    weights, like = small
    whole, _ = from_state_dict(weights, like)
    given = []
    tree, _ = from_state_dict(weights, like, put=lambda path, array: given.append((path, array)) or path)
    assert [path for path, _ in given] == list(flatten(like)) and flatten(tree) == {path: path for path, _ in given}
    for path, array in given:
        np.testing.assert_array_equal(array, flatten(whole)[path])


# ---- the config ----

ENC, DEC = "encoder.module_dict.enc_", "decoder.module_dict.dec_"


@pytest.fixture(scope="module")
def tree():
    return published.config(**D12)


def test_the_config_is_read(tree):
    trunk = dict(head_dim=64, registers=256, patch=2, grid=(16, 16))
    assert config_from(tree) == dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.vae.VAE", latent_channels=16, scaling_factor=0.7),
        encoder=dict(name="encoders.latent1d.Latent1D", width=768, depth=12, channels=6, **trunk),
        quantizer=dict(name="quantizers.fsq.FSQ", levels=(8, 8, 8, 5, 5, 5)),
        decoder=dict(
            name="decoders.flow.FlowDecoder",
            width=768,
            depth=12,
            shape=(32, 32, 16),
            prediction="velocity",
            time=dict(name="nn.flow.mode_time", scale=0.25),
            null_rate=0.2,
            max_timestep=1.0,
            **trunk,
        ),
        nested_dropout=dict(name="nn.nested_dropout.NestedDropout", law="pow2"),
    )
    build(config_from(tree))


def test_values_follow_the_config(tree):
    spec = config_from(published.config((128, 3), (192, 5), channels=8, registers=32, grid=8, scaling_factor=0.25))
    assert (spec["encoder"]["width"], spec["encoder"]["depth"], spec["encoder"]["registers"]) == (128, 3, 32)
    assert (spec["decoder"]["width"], spec["decoder"]["depth"], spec["decoder"]["registers"]) == (192, 5, 32)
    assert spec["decoder"]["shape"] == (16, 16, 8)
    assert spec["codec"] == dict(name="codecs.vae.VAE", latent_channels=8, scaling_factor=0.25)
    # absent arguments have the reference's defaults
    for path in ("time_embedder.max_timestep", "nested_dropout.size_sampling_mode", "latent_dropout.dropout_prob"):
        tree = changed(tree, DEC + path, ...)
    spec = config_from(tree)
    assert spec["decoder"]["max_timestep"] == 1000 and spec["decoder"]["null_rate"] == 0
    assert spec["nested_dropout"]["law"] == "uniform"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: {"config": tree},
        lambda tree: tree | {"_target_": "flextok.flextok_wrapper.FlexTok"},
        lambda tree: published.metadata(tree) | {"format": "pt"},
        lambda tree: {"config": str(tree)},
        lambda tree: {key: json.dumps(value) for key, value in tree.items()},
        lambda tree: json.loads(json.dumps(tree)),
        lambda tree: tree | {"encoder": tree["encoder"]["module_dict"], "decoder": {"a": {"b": tree["decoder"]}}},
        lambda tree: {key: tree[key] for key in ("vae", "encoder", "decoder", "regularizer")} | {"pipeline": None},
    ],
)
def test_however_it_is_wrapped(tree, wrap):
    spec, plain = config_from(wrap(tree)), config_from(tree)
    if "flow_matching_noise_module" not in wrap(tree) and "config" not in wrap(tree):
        plain["decoder"].pop("time")  # the reference's law of times is not known then
    assert spec == plain


def test_stages_without_weights_may_have_any_name(tree):
    stages = {
        key.replace("packer", "x").replace("channels", "y"): v for key, v in tree["encoder"]["module_dict"].items()
    }
    assert config_from(changed(tree, "encoder.module_dict", stages)) == config_from(tree)


NORM = published.NORM


@pytest.mark.parametrize(
    "path, value",
    [
        (ENC + "transformer.norm_layer", NORM),
        (ENC + "transformer.norm_layer", NORM | {"eps": 1e-5, "bias": False}),
        (ENC + "transformer.act_layer", {"_target_": "torch.nn.SiLU", "_partial_": True}),
        (ENC + "transformer.act_layer", {"_target_": "hydra.utils.get_class", "path": "torch.nn.SiLU"}),
        (ENC + "transformer.mlp_ratio", 4),
        (ENC + "transformer.drop_path_rate", 0.2),
        (ENC + "register_module.n_eval", 256),
        ("vae.compile_encode_fn", True),
        ("regularizer.levels", (8, 8, 8, 5, 5, 5)),
    ],
)
def test_what_changes_nothing(tree, path, value):
    assert config_from(changed(tree, path, value)) == config_from(tree)


@pytest.mark.parametrize(
    "path, value, says",
    [
        # unknown
        ("text_encoder", {"_target_": "x.T5"}, "text_encoder is unknown here"),
        (DEC + "new", {"_target_": "x.New"}, "dec_new is unknown here"),
        (DEC + "transformer.window", 7, "dec_transformer.window is unknown here, so its meaning would be lost"),
        (DEC + "latent_dropout._target_", "x.ZeroNullCond", "is a ZeroNullCond, and here it is a LearnedNullCond"),
        (ENC + "channels_to_last.per_sample_op", {"_target_": "x.normalise"}, "enc_channels_to_last is unknown"),
        ("_target_", "videoflextok.wrappers.VideoFlexTok", "the config of a VideoFlexTok"),
        ("encoder", 3, "encoder is unknown here"),
        (DEC + "to_patches", 3, "dec_to_patches is of no class, and here it is a ToPatchesLinearHead"),
        # missing
        (ENC + "register_module", ..., "lacks enc_register_module; it is the one of a 2D grid"),
        (DEC + "time_embedder", ..., "it lacks dec_time_embedder"),
        ("vae", ..., "it lacks vae"),
        ("regularizer.levels", ..., "regularizer.levels is absent"),
        ("vae.scaling_factor", ..., "vae.scaling_factor is absent: take it from config.json of the codec"),
        ("vae.scaling_factor", None, "vae.scaling_factor is absent"),
        # not ours
        (ENC + "seq_packer.mask_mode", "full", "enc_seq_packer.mask_mode is 'full', and here it is 'causal_last'"),
        (DEC + "seq_packer.per_subseq_embs", ..., "dec_seq_packer.per_subseq_embs is False, and here it is True"),
        (DEC + "transformer.adaLN_expansion", ..., "dec_transformer.adaLN_expansion is 1, and here it is 2"),
        (DEC + "transformer.adaLN_emb_read_key", None, "dec_transformer.adaLN_emb_read_key is absent"),
        (ENC + "transformer.qk_norm", False, "enc_transformer.qk_norm is False, and here it is True"),
        (ENC + "transformer.mlp_ratio", 3, "enc_transformer.mlp_ratio is 3, and here it is 4.0"),
        (ENC + "transformer.act_layer", {"_target_": "torch.nn.GELU"}, "act_layer is 'GELU', and here it is 'SiLU'"),
        (ENC + "transformer.norm_layer", NORM | {"eps": 1e-6}, "norm_layer is 'Fp32LayerNorm', and here it is"),
        (ENC + "transformer.norm_layer", {"_target_": NORM["_target_"]}, "norm_layer is 'Fp32LayerNorm', and here"),
        (ENC + "transformer.rope_forward_read_key", "rope", "rope_forward_read_key is 'rope', and here it is None"),
        (ENC + "to_latents.use_mup_readout", True, "enc_to_latents.use_mup_readout is True, and here it is False"),
        (ENC + "posemb_module.posemb_scaling", "interpolate", "posemb_scaling is 'interpolate'"),
        (DEC + "registers_posemb_module.posemb_type", "sincos", "dec_registers_posemb_module is not learnt"),
        (DEC + "latent_dropout.replace_with_single_token", True, "replace_with_single_token is True"),
        (DEC + "time_embedder.frequency_embedding_size", 128, "frequency_embedding_size is 128, and here it is 256"),
        (DEC + "seq_packer.input_list_read_keys", ["dec_registers", "dec_patches"], "dec_seq_packer joins"),
        # at odds
        (ENC + "posemb_module.dim", 64, "enc_posemb_module.dim is 64, and enc_transformer.dim is 768"),
        (DEC + "time_embedder.dim", 64, "dec_time_embedder.dim is 64, and dec_transformer.dim is 768"),
        (DEC + "noise_patch_emb.patch_sizes", [4, 4], r"patch_sizes is \[4, 4\], and enc_patch_emb"),
        ("vae.latent_channels", 4, "vae.latent_channels is 4, and enc_patch_emb.channels_in is 16"),
        ("pipeline.out_channels", 4, "pipeline.out_channels is 4"),
        ("regularizer.levels", [8, 8, 8], r"enc_to_latents.dim_out is 6, for the levels \[8, 8, 8\]"),
        (DEC + "registers_posemb_module.max_sizes", [128], r"max_sizes is \[128\], for 256 registers"),
        (ENC + "register_module.n_eval", 128, "enc_register_module.n_eval is 128"),
        (DEC + "patches_posemb_module.max_sizes", [32, 32], r"max_sizes is \[32, 32\], and enc_posemb_module"),
        # no numbers
        (ENC + "transformer.depth", "12", "enc_transformer.depth is '12', and not a size"),
        (ENC + "patch_emb.patch_sizes", 2, "patch_sizes is 2"),
        ("vae.scaling_factor", "big", "vae.scaling_factor is 'big', and not a number"),
        ("regularizer.levels", 8, "for the levels 8"),
    ],
)
def test_what_is_not_understood_is_named(tree, path, value, says):
    with pytest.raises(ValueError, match=f"This FlexTok config cannot be read:\n(.*\n)*.*{says}"):
        config_from(changed(tree, path, value))


def test_masking_before_the_position_would_be_another_model(tree):
    stages = tree["decoder"]["module_dict"]
    names = list(stages)
    i, j = names.index("dec_registers_posemb_module"), names.index("dec_nested_dropout")
    names[i], names[j] = names[j], names[i]
    with pytest.raises(ValueError, match="come in the order dec_nested_dropout, dec_registers_posemb_module"):
        config_from(changed(tree, "decoder.module_dict", {name: stages[name] for name in names}))


def test_a_codec_with_a_repository_of_its_own():
    tree = published.tiny_config()
    assert codec_of(tree) == codec_of(published.metadata(tree)) == "someone/tiny_vae"
    assert codec_of(published.config(**D12)) is None
    with pytest.raises(ValueError, match=r"take it from config\.json of someone/tiny_vae"):
        config_from(tree)
    spec = config_from(tree, TINY_VAE)
    assert spec["codec"]["channels"] == (4, 8, 12, 12) and spec["codec"]["scaling_factor"] == 0.5
    tree["vae"]["scaling_factor"] = 2.0  # goes before the codec's
    assert config_from(tree, TINY_VAE)["codec"]["scaling_factor"] == 2.0


def test_other_times_of_training_warn(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from(tree)
    with pytest.warns(UserWarning, match="logit-normal"):
        assert "time" not in config_from(changed(tree, "flow_matching_noise_module.ln", True))["decoder"]
