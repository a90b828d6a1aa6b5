"""The config that FlexTok's checkpoints carry (arXiv 2502.13967) -> the spec of our `Tokenizer`.

It is a tree of entries that each name a class of the reference (`_target_`) and its arguments, a stage of the model
each: `encoder.module_dict.enc_transformer`, for instance. The classes, their arguments and defaults are known from the
public code (apple/ml-flextok); the names of stages with weights from the keys of those, which contain them. **No
published config was seen when this was written.** So an entry may lie at any depth, a stage without weights may have
any name, and nothing is taken for granted: an argument that changes what is computed must have the value that our parts
compute, what changes nothing is listed below, and all else is an error that names it.
"""

import ast
import json
import warnings

from jaxtok.pretrained import vae

_NORM, _SILU = "Fp32LayerNorm without affine", "SiLU"
_HEAD = dict(dim=..., use_mup_readout=..., norm_layer=_NORM, proj_bias=True, adaLN_emb_read_key=None)
# Class -> the arguments that mean something here, with the reference's defaults (...: it has none), and those that do
# not: how weights began, what only training does, how it ran. Other names of values that stages hand on ("_key") go by.
_CLASSES = {
    "StableDiffusionVAE": (
        dict(latent_channels=16, scaling_factor=None, hf_hub_path=None),
        # whatever the first two say, our codec encodes to the mean of the posterior, in float32
        "sample_posterior dtype_override learnable_logvar logvar_init compile_encode_fn force_vae_encode frozen",
    ),
    "FSQ": (
        dict(levels=...),
        "drop_quant_p corrupt_tokens_p min_corrupt_tokens_p apply_corrupt_tokens_p packed_call",
    ),
    "MinRFNoiseModule": (dict(ln=True, mode_scale=0.0), "stratisfied"),
    "MinRFPipeline": (dict(out_channels=None), ""),
    "PatchEmbedder": (dict(channels_in=..., dim=None, patch_sizes=...), "flatten_patches weight_init_style"),
    "PositionalEmbeddingAdder": (
        dict(dim=..., max_sizes=..., posemb_type="sincos", posemb_scaling="absolute", write_key=...),
        "",
    ),
    "Registers1D": (
        dict(dim=..., n_max=..., n_eval=None, registers_write_key=..., extra_registers_write_key=None),
        "n_min size_sampling_mode ordering_mode extra_registers_dim",  # of fewer registers than all
    ),
    "BlockWiseSequencePacker": (
        dict(mask_mode="full", per_subseq_embs=False, input_list_read_keys=...),
        "max_seq_len pad_to_multiple compile_block_mask return_materialized_mask",
    ),
    "FlexTransformer": (
        dict(dim=768, depth=12, head_dim=64, mlp_ratio=4.0, qkv_bias=False, proj_bias=False, mlp_bias=False)
        | dict(act_layer=_SILU, norm_layer=_NORM, gated_mlp=True, qk_norm=True, adaLN_expansion=1)
        | dict(adaLN_emb_read_key=None, rope_forward_read_key=None, score_mod_read_key=None),
        "drop drop_path_rate use_act_checkpoint weight_init_style zero_init_query_proj intermediate_layers",
    ),
    "LinearHead": (_HEAD | dict(dim_out=...), "adaLN_bias weight_init_style dtype_override"),
    "ToPatchesLinearHead": (
        _HEAD | dict(channels_out=..., patch_sizes=..., adaLN_bias=True),
        "weight_init_style dtype_override",
    ),
    "LinearLayer": (dict(dim_in=..., dim=..., proj_bias=True), "weight_init_style dtype_override"),
    "MaskedNestedDropout": (dict(dim=..., size_sampling_mode="uniform", read_write_key=...), ""),
    "LearnedNullCond": (
        dict(dim=..., dropout_prob=0.0, replace_with_single_token=False, read_write_key=...),
        "",
    ),
    "TimestepEmbedder": (
        dict(dim=..., frequency_embedding_size=256, max_timestep=1000.0, temb_as_tokens=False),
        "weight_init_style",
    ),
}
_TRUNK = dict(mlp_ratio=4.0, qkv_bias=False, proj_bias=False, mlp_bias=False, act_layer=_SILU, norm_layer=_NORM)
_TRUNK |= dict(gated_mlp=True, qk_norm=True, rope_forward_read_key=None, score_mod_read_key=None)
_PLAIN = dict(use_mup_readout=False, norm_layer=_NORM, proj_bias=True)
_SINCOS = dict(posemb_type="sincos", posemb_scaling="absolute")
# Stage -> its class, and what our parts compute: the values that its arguments must have.
_STAGES = {
    "vae": ("StableDiffusionVAE", {}),
    "regularizer": ("FSQ", {}),
    "flow_matching_noise_module": ("MinRFNoiseModule", {}),
    "pipeline": ("MinRFPipeline", {}),
    "enc_patch_emb": ("PatchEmbedder", {}),
    "enc_posemb_module": ("PositionalEmbeddingAdder", _SINCOS),
    "enc_register_module": ("Registers1D", dict(extra_registers_write_key=None)),
    "enc_seq_packer": ("BlockWiseSequencePacker", dict(mask_mode="causal_last")),
    "enc_transformer": ("FlexTransformer", _TRUNK | dict(adaLN_emb_read_key=None)),
    "enc_to_latents": ("LinearHead", _PLAIN | dict(adaLN_emb_read_key=None)),
    "dec_from_latents": ("LinearLayer", dict(proj_bias=True)),
    "dec_registers_posemb_module": ("PositionalEmbeddingAdder", dict(posemb_scaling="absolute")),
    "dec_nested_dropout": ("MaskedNestedDropout", {}),
    "dec_latent_dropout": ("LearnedNullCond", dict(replace_with_single_token=False)),
    "dec_noise_patch_emb": ("PatchEmbedder", {}),
    "dec_patches_posemb_module": ("PositionalEmbeddingAdder", _SINCOS),
    "dec_seq_packer": ("BlockWiseSequencePacker", dict(mask_mode="full", per_subseq_embs=True)),
    "dec_time_embedder": ("TimestepEmbedder", dict(frequency_embedding_size=256, temb_as_tokens=False)),
    "dec_transformer": ("FlexTransformer", _TRUNK | dict(adaLN_expansion=2)),
    "dec_to_patches": ("ToPatchesLinearHead", _PLAIN | dict(adaLN_bias=True)),
}
_LAYOUTS = ("channels_first_to_last", "channels_last_to_first")
_ORDERED = ("dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout")  # each overwrites the one before
_JOINED = {  # which of the values that stages hand on are packed into the sequence: of patches, then of registers
    "enc_seq_packer": (("enc_posemb_module", "write_key"), ("enc_register_module", "registers_write_key")),
    "dec_seq_packer": (("dec_patches_posemb_module", "write_key"), ("dec_latent_dropout", "read_write_key")),
}
_OPTIONAL = ("flow_matching_noise_module", "pipeline")  # not part of the tokenizer
# What must be equal: the widths of either trunk, then channels of latents and codes, patches, positions, registers.
_EQUAL = (
    "enc_transformer.dim enc_patch_emb.dim enc_posemb_module.dim enc_register_module.dim enc_to_latents.dim",
    "dec_transformer.dim dec_from_latents.dim dec_registers_posemb_module.dim dec_nested_dropout.dim "
    "dec_latent_dropout.dim dec_noise_patch_emb.dim dec_patches_posemb_module.dim dec_time_embedder.dim "
    "dec_to_patches.dim",
    "enc_patch_emb.channels_in dec_noise_patch_emb.channels_in dec_to_patches.channels_out pipeline.out_channels "
    "vae.latent_channels",
    "enc_to_latents.dim_out dec_from_latents.dim_in",
    "enc_patch_emb.patch_sizes dec_noise_patch_emb.patch_sizes dec_to_patches.patch_sizes",
    "enc_posemb_module.max_sizes dec_patches_posemb_module.max_sizes",
    "enc_register_module.n_max enc_register_module.n_eval",
)
_SIZES = (
    "enc_transformer.depth enc_transformer.head_dim dec_transformer.depth dec_transformer.head_dim regularizer.levels "
    "dec_registers_posemb_module.max_sizes",
)


def config_from(published, vae_config=None) -> dict:
    """The config of a checkpoint, as a dict -> the spec of the model, for `build` or a config's `task.model`.

    Args:
      published: the content of config.json, or the metadata of a .safetensors file (each value a Python literal).
      vae_config: config.json of the codec's own repository (an AutoencoderKL), where `published` names that repository
        (`vae.hf_hub_path`) instead of a scaling factor.

    Raises ValueError that lists everything that is missing, unknown, not ours or at odds with the rest.
    """
    tree = _tree(published)
    wrong = [*_strangers(tree)]
    stages = {} if wrong else _arguments(tree)
    wrong = wrong or [*_not_ours(stages)] or [*_no_numbers(stages)] or [*_conflicts(stages)]
    if not wrong and not stages["vae"]["scaling_factor"] and vae_config is None:
        owner = stages["vae"]["hf_hub_path"] or "the codec"
        wrong = [f"vae.scaling_factor is absent: take it from config.json of {owner}, and write it into this one"]
    if wrong:
        raise ValueError("\n  ".join(["This FlexTok config cannot be read:", *wrong]))
    return _spec(stages, vae_config)


def codec_of(published) -> str | None:
    """The repository whose config.json `config_from` needs for the codec's scaling factor, or None."""
    for stage, _, arguments, _ in _entries(_tree(published)):
        if stage == "vae" and not arguments.get("scaling_factor"):
            return arguments.get("hf_hub_path")
    return None


def _spec(stages, vae_config):
    at = lambda stage, argument: stages[stage][argument]
    channels, patch = at("enc_patch_emb", "channels_in"), at("enc_patch_emb", "patch_sizes")[0]
    rows, columns = at("enc_posemb_module", "max_sizes")
    codec = {"latent_channels": channels}
    if vae_config is not None:
        codec = vae.config(vae_config) | {"shift_factor": 0.0}  # which the reference does not use
    if at("vae", "scaling_factor"):
        codec["scaling_factor"] = float(at("vae", "scaling_factor"))
    trunks = {
        part: dict(
            width=at(f"{part}_transformer", "dim"),
            depth=at(f"{part}_transformer", "depth"),
            head_dim=at(f"{part}_transformer", "head_dim"),
            registers=at("enc_register_module", "n_max"),
            patch=patch,
            grid=(rows, columns),
        )
        for part in ("enc", "dec")
    }
    noise, time = stages.get("flow_matching_noise_module"), {}
    if noise and noise["ln"]:
        warnings.warn("This FlexTok was trained at logit-normal times; fine-tuned here it would not be.", stacklevel=3)
    elif noise:
        time = {"time": dict(name="nn.flow.mode_time", scale=float(noise["mode_scale"]))}
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.vae.VAE", **codec),
        encoder=dict(name="encoders.latent1d.Latent1D", channels=at("enc_to_latents", "dim_out"), **trunks["enc"]),
        quantizer=dict(name="quantizers.fsq.FSQ", levels=tuple(at("regularizer", "levels"))),
        decoder=dict(
            name="decoders.flow.FlowDecoder",
            shape=(rows * patch, columns * patch, channels),
            prediction="velocity",
            null_rate=float(at("dec_latent_dropout", "dropout_prob")),
            max_timestep=float(at("dec_time_embedder", "max_timestep")),
            **trunks["dec"],
            **time,
        ),
        nested_dropout=dict(name="nn.nested_dropout.NestedDropout", law=at("dec_nested_dropout", "size_sampling_mode")),
    )


def _tree(published):
    """The tree of entries, whatever it is wrapped in; literals read."""
    tree = {key: _literal(value) for key, value in published.items()}
    if isinstance(tree.get("config"), dict):
        tree = {key: _literal(value) for key, value in tree["config"].items()}
    return {key: value for key, value in tree.items() if key != "format"}  # which is of the tensors


def _literal(value):
    if not isinstance(value, str):
        return value
    for read in (ast.literal_eval, json.loads):
        try:
            return read(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return value  # a plain string


def _entries(node, place=""):
    """Every entry of a tree, down to the first class that is no mere container: (stage, class, arguments, place)."""
    for key, value in node.items():
        here, name = f"{place}{key}", _short(value.get("_target_")) if isinstance(value, dict) else None
        if isinstance(value, dict) and name in (None, "SequentialModuleDictWrapper"):
            yield from _entries({k: v for k, v in value.items() if k[:1] != "_"}, f"{here}.")
        elif key.startswith("dec_repa") or value is None:  # the former projects to a teacher, in training
            continue
        elif name == "SequenceUnpacker" or (name == "PerSampleOp" and _value(value.get("per_sample_op")) in _LAYOUTS):
            continue
        elif key != "_target_":
            packer = f"{'enc' if 'encoder' in place else 'dec'}_seq_packer"
            arguments = {k: v for k, v in value.items() if k not in ("_target_", "_partial_")} if name else {}
            yield packer if name == "BlockWiseSequencePacker" else key, name, arguments, here


def _strangers(tree):
    """What of the tree is not known here, and what it lacks."""
    if _short(tree.get("_target_", "FlexTok")) not in ("FlexTok", "FlexTokFromHub"):
        yield f"it is the config of a {_short(tree['_target_'])}"
    found = []
    for stage, name, arguments, place in _entries(tree):
        found.append(stage)
        if stage not in _STAGES:
            yield f"{place} is unknown here, so nothing that it changes would be right"
            continue
        expected = _STAGES[stage][0]
        meant, unused = _CLASSES[expected]
        if name != expected:
            yield f"{place} is {f'a {name}' if name else 'of no class'}, and here it is a {expected}"
            continue
        for key in arguments:
            if key not in (*meant, *unused.split()) and not key.endswith(("_key", "_keys")):
                yield f"{place}.{key} is unknown here, so its meaning would be lost"
        for key, default in meant.items():
            if default is ... and key not in arguments:
                yield f"{place}.{key} is absent"
    missing = [stage for stage in _STAGES if stage not in (*found, *_OPTIONAL)]
    if missing:
        grid = "; it is the one of a 2D grid of tokens, which is not read here" * ("enc_register_module" in missing)
        yield f"it lacks {', '.join(missing)}{grid}"


def _arguments(tree):
    """{stage: {argument: value}}, defaults filled in."""
    stages = {}
    for stage, name, arguments, _ in _entries(tree):
        stages[stage] = {key: _value(arguments.get(key, default)) for key, default in _CLASSES[name][0].items()}
    return stages


def _not_ours(stages):
    """What is computed otherwise than by our parts."""
    for stage, arguments in stages.items():
        for key, value in _STAGES[stage][1].items():
            if arguments[key] != value:
                yield f"{stage}.{key} is {arguments[key]!r}, and here it is {value!r}"
    for stage in ("dec_transformer", "dec_to_patches"):
        if not stages[stage]["adaLN_emb_read_key"]:
            yield f"{stage}.adaLN_emb_read_key is absent, and here the time modulates it"
    if stages["dec_registers_posemb_module"]["posemb_type"] not in ("learnable_sum", "learnable_prod"):
        yield "dec_registers_posemb_module is not learnt"
    order = tuple(stage for stage in stages if stage in _ORDERED)
    if order != _ORDERED:
        yield f"its stages come in the order {', '.join(order)}, and here in the order {', '.join(_ORDERED)}"
    for part, written in _JOINED.items():
        names = [stages[stage][key] for stage, key in written]
        if stages[part]["input_list_read_keys"] != names:
            yield f"{part} joins {stages[part]['input_list_read_keys']}, and here {names}: patches, then tokens"


def _no_numbers(stages):
    """Sizes that are none."""
    for name in " ".join((*_EQUAL, *_SIZES)).split():
        stage, key = name.split(".")
        value = stages.get(stage, {}).get(key)
        values = value if isinstance(value, list) else [value]
        if not all(n is None or (type(n) is int and n > 0) for n in values):
            yield f"{name} is {value!r}, and not a size"
    for stage, key in (("vae", "scaling_factor"), ("dec_latent_dropout", "dropout_prob")):
        if not isinstance(stages[stage][key], (int, float, type(None))):
            yield f"{stage}.{key} is {stages[stage][key]!r}, and not a number"


def _conflicts(stages):
    """What does not fit together."""
    for line in _EQUAL:
        values = {name: stages.get(stage, {}).get(key) for name in line.split() for stage, key in [name.split(".")]}
        if stages["vae"]["hf_hub_path"]:
            values.pop("vae.latent_channels", None)  # then the reference does not use it
        (first, one), *others = [(name, value) for name, value in values.items() if value is not None]
        for name, other in others:
            if other != one:
                yield f"{name} is {other}, and {first} is {one}"
    patch, grid = stages["enc_patch_emb"]["patch_sizes"], stages["enc_posemb_module"]["max_sizes"]
    if not isinstance(patch, list) or len(patch) != 2 or patch[0] != patch[1]:
        yield f"enc_patch_emb.patch_sizes is {patch}, and here patches are squares"
    if not isinstance(grid, list) or len(grid) != 2:
        yield f"enc_posemb_module.max_sizes is {grid}, and here it is rows and columns"
    channels, levels = stages["enc_to_latents"]["dim_out"], stages["regularizer"]["levels"]
    if not isinstance(levels, list) or len(levels) != channels:
        yield f"enc_to_latents.dim_out is {channels}, for the levels {levels}"
    registers, places = stages["enc_register_module"]["n_max"], stages["dec_registers_posemb_module"]["max_sizes"]
    if places != [registers]:
        yield f"dec_registers_posemb_module.max_sizes is {places}, for {registers} registers"


def _short(target):
    """The class that a `_target_` names, without the modules it lies in."""
    return target.rsplit(".", 1)[-1] if isinstance(target, str) else target


def _value(value):
    """An argument; a layer or function as its name, and tuples as lists."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    name = _short(value.get("path", value["_target_"]))  # "path": of hydra.utils.get_class
    plain = value.get("elementwise_affine") is False and value.get("eps", 1e-5) == 1e-5
    return _NORM if name == _NORM.split()[0] and plain else name
