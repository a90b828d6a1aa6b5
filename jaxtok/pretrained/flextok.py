"""FlexTok's published checkpoints (arXiv 2502.13967) -> `params` of our `Tokenizer`.

Sizes are nowhere in the table: they come from our own tree, so one table serves every size.
"""

import re

from jaxtok.nn.nested_dropout import powers_of_two
from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained import vae
from jaxtok.pretrained.convert import Report, convert
from jaxtok.pretrained.flextok_config import codec_of as codec_of
from jaxtok.pretrained.flextok_config import config_from as config_from

LICENCE = (
    "The weights of FlexTok are under the Apple Machine Learning Research Model License Agreement: for research alone, "
    "and so are models made from them."
)

_PART = r"(encoder|decoder)\.module_dict\."
_BLOCK = _PART + r"(?:enc|dec)_transformer\.blocks\.(\d+)\."
_DEC = r"decoder\.module_dict\."
_TABLE = _PART + r"(?:enc|dec_patches)_posemb_module\.posembs"

# Linear kernels are [out in] there, [in out] here; h heads, d head_dim, r registers.
_TRUNKS = (
    # both trunks
    (_PART + r"(?:enc|dec_noise)_patch_emb\.patch_proj\.weight", r"\1/patch_embed/kernel", "o i -> i o"),
    (_PART + r"(?:enc|dec_noise)_patch_emb\.patch_proj\.bias", r"\1/patch_embed/bias", "o -> o"),
    (_BLOCK + r"attn\.wq\.weight", r"\1/blocks/attn/qkv/kernel[\2,:,:,0]", "(h d) i -> i h d"),
    (_BLOCK + r"attn\.wk\.weight", r"\1/blocks/attn/qkv/kernel[\2,:,:,1]", "(h d) i -> i h d"),
    (_BLOCK + r"attn\.wv\.weight", r"\1/blocks/attn/qkv/kernel[\2,:,:,2]", "(h d) i -> i h d"),
    (_BLOCK + r"attn\.proj\.weight", r"\1/blocks/attn/out/kernel[\2]", "o (h d) -> h d o"),
    (_BLOCK + r"mlp\.fc1\.weight", r"\1/blocks/mlp/gate/kernel[\2]", "o i -> i o"),
    (_BLOCK + r"mlp\.fc3\.weight", r"\1/blocks/mlp/value/kernel[\2]", "o i -> i o"),
    (_BLOCK + r"mlp\.fc2\.weight", r"\1/blocks/mlp/out/kernel[\2]", "o i -> i o"),
    # encoder
    (r"encoder\.module_dict\.enc_register_module\.registers", "encoder/registers", "r d -> r d"),
    (r"encoder\.module_dict\.enc_to_latents\.proj\.weight", "encoder/head/kernel", "o i -> i o"),
    (r"encoder\.module_dict\.enc_to_latents\.proj\.bias", "encoder/head/bias", "o -> o"),
    # decoder
    (_DEC + r"dec_from_latents\.proj\.weight", "decoder/code_embed/kernel", "o i -> i o"),
    (_DEC + r"dec_from_latents\.proj\.bias", "decoder/code_embed/bias", "o -> o"),
    (_DEC + r"dec_registers_posemb_module\.posembs", "decoder/register_pos_embed", "1 1 d r -> r d"),
    (_DEC + r"dec_nested_dropout\.dropout_mask_token", "decoder/mask_token", "d -> d"),
    (_DEC + r"dec_latent_dropout\.nullcond", "decoder/null_token", "d -> d"),
    (_DEC + r"dec_time_embedder\.mlp\.0\.weight", "decoder/time/fc1/kernel", "o i -> i o"),
    (_DEC + r"dec_time_embedder\.mlp\.0\.bias", "decoder/time/fc1/bias", "o -> o"),
    (_DEC + r"dec_time_embedder\.mlp\.2\.weight", "decoder/time/fc2/kernel", "o i -> i o"),
    (_DEC + r"dec_time_embedder\.mlp\.2\.bias", "decoder/time/fc2/bias", "o -> o"),
    # s: patches, registers; m: gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp
    (_BLOCK + r"adaLN_modulation\.1\.weight", r"\1/blocks/adaln/kernel[\2]", "(s m o) i -> i s m o"),
    (_BLOCK + r"adaLN_modulation\.1\.bias", r"\1/blocks/adaln/bias[\2]", "(s m o) -> s m o"),
    # m: shift, scale
    (_DEC + r"dec_to_patches\.adaLN_modulation\.1\.weight", "decoder/head_adaln/kernel", "(m o) i -> i m o"),
    (_DEC + r"dec_to_patches\.adaLN_modulation\.1\.bias", "decoder/head_adaln/bias", "(m o) -> m o"),
    (_DEC + r"dec_to_patches\.proj\.weight", "decoder/head/kernel", "o i -> i o"),
    (_DEC + r"dec_to_patches\.proj\.bias", "decoder/head/bias", "o -> o"),
    # not parameters of the tokenizer
    (_TABLE, r"\1/pos_embed", "1 d h w -> h w d"),  # fixed sine-cosine tables: computed here, compared with theirs
    (_DEC + r"dec_repa.*", None, "projector to a teacher, used only in training"),
    (r"vae\.logvar", None, "of the codec's own loss"),
)
RULES = (*_TRUNKS, *vae.rules("vae.vae.", "codec/"))
WITHOUT_CODEC = (*_TRUNKS, (r"vae\..*", None, "codec"))


def tables(state_dict) -> dict:
    """Our sine-cosine tables at the sizes of the foreign ones: {path: float32 [h w D]}, the `constants` of a match."""
    found = ((re.fullmatch(_TABLE, key), array.shape) for key, array in state_dict.items())
    return {f"{m[1]}/pos_embed": sincos_2d(*shape[2:], shape[1]) for m, shape in found if m and len(shape) == 4}


def task(model) -> dict:
    """A task for a model's spec, for evaluation and fine-tuning: the published sampler, the codec frozen."""
    return dict(
        name="tasks.TokenizerTask",
        model=model,
        losses=dict(flow=dict(fn=dict(name="losses.flow.flow_matching"))),
        token_counts=tuple(powers_of_two(model["encoder"]["registers"])),
        samplers=(dict(title="20 steps, guided", steps=20, guidance=7.5),),
        frozen=("codec",),
    )


def from_state_dict(state_dict, like, grid=None, put=None) -> tuple[dict, Report]:
    """A state dict {key: array} -> (params, report).

    Args:
      state_dict: its values may be views of a file: they are read one by one.
      like: our params, or their `jax.eval_shape`. Without "codec" in it, keys of the codec (`vae.`) are set aside.
      grid: (rows, columns) that the model has patches for; the position tables must be of that size. None: any.
      put: see `convert`.

    Raises ValueError as `convert` does.
    """
    rules = RULES if "codec" in like else WITHOUT_CODEC
    constants = tables(state_dict)
    if grid is not None:
        constants = {path: sincos_2d(*grid, table.shape[-1]) for path, table in constants.items()}
    return convert(state_dict, rules, like, constants, put)
