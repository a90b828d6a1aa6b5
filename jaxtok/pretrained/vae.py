"""KL autoencoders in diffusers' format (Stable Diffusion, SDXL, SD3, FLUX, FlexTok's) -> `codecs.vae.VAE`.

The licence of the weights is the checkpoint's: see its card. Sizes are nowhere in the table: they come from our own
tree, so one table serves every size.
"""

import re

from jaxtok.pretrained.convert import AFFINE, CONV, LINEAR, Report, convert, rules_of

LICENCE = "The weights are under the licence of their repository: read its card before you use or pass them on."

_TRUNK = r"(encoder|decoder)\."
_LEVEL = _TRUNK + r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\."
_MID = _TRUNK + r"mid_block\.resnets\.(\d+)\."
_ATTN = _TRUNK + r"mid_block\.attentions\.0\."
_LAYERS = (
    (_TRUNK + r"(conv_in|conv_out)", r"\1/\2", CONV),
    (_TRUNK + r"conv_norm_out", r"\1/norm_out", AFFINE),
    (_LEVEL + r"(norm[12])", r"\1/\2_\3/block_\4/\5", AFFINE),
    (_LEVEL + r"(conv[12])", r"\1/\2_\3/block_\4/\5", CONV),
    (_LEVEL + r"conv_shortcut", r"\1/\2_\3/block_\4/shortcut", CONV),
    (_TRUNK + r"(down|up)_blocks\.(\d+)\.(downsample|upsample)rs\.0\.conv", r"\1/\2_\3/\4/conv", CONV),
    (_MID + r"(norm[12])", r"\1/mid/block_\2/\3", AFFINE),
    (_MID + r"(conv[12])", r"\1/mid/block_\2/\3", CONV),
    (_ATTN + r"group_norm", r"\1/mid/attn/norm", AFFINE),
    # the second names are those of old files
    (_ATTN + r"(?:to_q|query)", r"\1/mid/attn/q", LINEAR),
    (_ATTN + r"(?:to_k|key)", r"\1/mid/attn/k", LINEAR),
    (_ATTN + r"(?:to_v|value)", r"\1/mid/attn/v", LINEAR),
    (_ATTN + r"(?:to_out\.0|proj_attn)", r"\1/mid/attn/out", LINEAR),
    (r"(quant_conv|post_quant_conv)", r"\1", CONV),
)

_FIELDS = {
    "block_out_channels": "channels",
    "layers_per_block": "blocks",
    "norm_num_groups": "groups",
    "latent_channels": "latent_channels",
}
# What our VAE does, by the key that would change it.
_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_OPTIONAL = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv")
_IGNORED = ("sample_size", "force_upcast", "_diffusers_version", "_name_or_path")  # nothing of these is computed


def rules(prefix="", target="") -> tuple[tuple[str, str, str], ...]:
    """The table for `convert`: keys behind `prefix` ("vae.vae.") -> paths behind `target` ("codec/")."""
    return rules_of(_LAYERS, re.escape(prefix), target)


def config(foreign) -> dict:
    """The config.json of an AutoencoderKL, as a dict -> the fields of `codecs.vae.VAE`.

    An absent scaling_factor is 0.18215, the format's default. Raises ValueError for keys that are unknown, missing, or
    mean an architecture other than ours; the message names each.
    """
    wrong = [f"it lacks {key}" for key in _FIELDS if key not in foreign]
    known = {*_FIELDS, *_FIXED, *_BLOCKS, *_OPTIONAL, *_IGNORED}
    wrong += [f"{key} is unknown here" for key in foreign if key not in known]
    for key, value in _FIXED.items():
        if foreign.get(key, value) != value:
            wrong.append(f"{key} is {foreign[key]!r}, and ours is {value!r}")
    for key, block in _BLOCKS.items():
        expected = [block] * len(foreign.get("block_out_channels", ()))
        if list(foreign.get(key, expected)) != expected:
            wrong.append(f"{key} is {foreign[key]!r}, and ours is {block!r} for every entry of block_out_channels")
    quant_convs = foreign.get("use_quant_conv", True)
    if foreign.get("use_post_quant_conv", True) != quant_convs:
        wrong.append("use_quant_conv and use_post_quant_conv differ, and here both layers are there or neither")
    if wrong:
        raise ValueError(f"This AutoencoderKL's config cannot be read: {'; '.join(wrong)}.")
    fields = {ours: foreign[key] for key, ours in _FIELDS.items()}
    return fields | {
        "channels": tuple(fields["channels"]),
        "scaling_factor": foreign.get("scaling_factor", 0.18215),
        "shift_factor": foreign.get("shift_factor") or 0.0,
        "quant_convs": quant_convs,
    }


def load(state_dict, published, shapes) -> tuple[dict, dict, Report]:
    """A published state dict {key: array} and its config.json -> ({"codec": spec of the VAE}, its params, report).

    shapes: spec -> the parameters of that part as shapes. Raises ValueError as `config` and `convert` do.
    """
    spec = dict(name="codecs.vae.VAE", **config(published))
    params, report = convert(state_dict, rules(), shapes(spec))
    return {"codec": spec}, params, report
