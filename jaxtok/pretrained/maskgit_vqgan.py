"""MaskGIT's VQGAN (arXiv 2202.04200) as TiTok's authors publish it for PyTorch (Apache-2.0) -> a Tokenizer of ours.

Its pictures lie in [0, 1], and where a residual block changes the width, the shortcut reads the branch: what the block
was given is lost.
"""

from jaxtok.pretrained.convert import AFFINE, CONV, Report, convert, rules_of

LICENCE = "The code that these weights belong to is under Apache-2.0, and its README says: for research purposes."

# Fields of encoders.cnn.CNN and decoders.cnn.CNN.
TRUNK = dict(channels=(128, 128, 256, 256, 512), blocks=2, block=dict(bias=False, shortcut="branch"), attention="none")
ENCODER = dict(down="pool", last=1, latent=0)
DECODER = dict(more=0, first=0)

_BLOCK = ((r"(norm[12])", r"/\2", AFFINE), (r"(conv[12])", r"/\2", CONV), (r"nin_shortcut", "/shortcut", CONV))


def model(width=256, codes=1024, **trunk) -> dict:
    """The spec of the Tokenizer; width: of a code. trunk: fields of both trunks that are not the published ones."""
    trunk = TRUNK | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity", low=0.0),
        encoder=dict(name="encoders.cnn.CNN", out=width, **trunk, **ENCODER),
        quantizer=dict(name="quantizers.vq.VQ", size=codes),
        decoder=dict(name="decoders.cnn.CNN", **trunk, **DECODER),
    )


def rules(levels=5) -> tuple[tuple[str, str, str], ...]:
    """The table of a whole VQGAN."""
    levels_down = tuple((rf"down\.{i}\.block\.(\d+)\.", rf"encoder/down_{i}/block_\1") for i in range(levels))
    blocks = (*levels_down, (r"mid\.(\d+)\.", r"encoder/mid/block_\1"))
    ends = ((r"(conv_in|conv_out)", r"encoder/\1", CONV), (r"norm_out", "encoder/norm_out", AFFINE))
    return (
        *rules_of(ends, r"encoder\."),
        *(rule for key, path in blocks for rule in rules_of(_BLOCK, r"encoder\." + key, path)),
        *decoder_rules(r"decoder\.", "decoder/", levels),
        (r"quantize\.embedding\.weight", "quantizer/codebook", "k d -> k d"),
    )


def decoder_rules(key, path, levels=5) -> tuple[tuple[str, str, str], ...]:
    """The table of the decoder alone, behind `key` and `path`. Levels count from full resolution there, to it here."""
    up = [(rf"up\.{i}\.", f"up_{levels - 1 - i}") for i in range(levels)]
    blocks = [(rf"{level}block\.(\d+)\.", rf"{ours}/block_\1") for level, ours in up]
    ends = ((r"(conv_in|conv_out)", r"\1", CONV), (r"norm_out", "norm_out", AFFINE))
    return (
        *rules_of(ends, key, path),
        *(r for k, p in (*blocks, (r"mid\.(\d+)\.", r"mid/block_\1")) for r in rules_of(_BLOCK, key + k, path + p)),
        *(r for k, p in up for r in rules_of(((r"upsample_conv", "/upsample/conv", CONV),), key + k, path + p)),
    )


def task(model, tokens=256) -> dict:
    """A task for a model's spec: for evaluation and fine-tuning."""
    return dict(
        name="tasks.TokenizerTask",
        model=model,
        losses=dict(pixel=dict(fn=dict(name="losses.pixel.l2"))),
        token_counts=(tokens,),
        samplers=(dict(title="one pass"),),
    )


def load(state_dict, published, shapes) -> tuple[dict, dict, Report]:
    """A state dict {key: array} -> ({"task": ...}, params, report); there is no config to read (`published`).

    shapes: spec -> the parameters of that part as shapes. Raises ValueError as `convert` does.
    """
    spec = model()
    params, report = convert(state_dict, rules(), shapes(spec))
    return {"task": task(spec)}, params, report
