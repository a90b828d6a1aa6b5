"""LlamaGen's VQ autoencoders (arXiv 2406.06525, MIT) -> a Tokenizer of ours: vq_ds16_c2i.pt, vq_ds8_c2i.pt.

A file holds the state dict under "model" (or under "ema", which `jaxtok.hub` does not look for).
"""

from jaxtok.pretrained.convert import AFFINE, CONV, Report, convert, rules_of
from jaxtok.pretrained.maskgit_vqgan import task

LICENCE = "MIT, as the code that these weights belong to."

_POINT = ((r"\.weight", "/kernel", "o i 1 1 -> i o"), (r"\.bias", "/bias", "o -> o"))  # a 1x1 as a linear layer


def _block(key, path, n):
    """Of a residual block; n: how many groups are in `key`."""
    layers = (
        (r"(norm[12])", rf"/\{n + 1}", AFFINE),
        (r"(conv[12])", rf"/\{n + 1}", CONV),
        (r"nin_shortcut", "/shortcut", CONV),
    )
    return rules_of(layers, key, path)


def _attention(key, path, n):
    layers = ((r"norm", "/norm", AFFINE), (r"([qkv])", rf"/\{n + 1}", _POINT), (r"proj_out", "/out", _POINT))
    return rules_of(layers, key, path)


def _side(side, level):
    """Of one trunk; level: what ours calls its levels."""
    blocks, ours = rf"{side}\.conv_blocks\.(\d+)\.", rf"{side}/{level}_\1/"
    return (
        *rules_of(
            ((r"(conv_in|conv_out)", rf"{side}/\1", CONV), (r"norm_out", f"{side}/norm_out", AFFINE)), rf"{side}\."
        ),
        *_block(blocks + r"res\.(\d+)\.", ours + r"block_\2", 2),
        *_attention(blocks + r"attn\.(\d+)\.", ours + r"attn_\2", 2),
        *rules_of(((r"(down|up)sample\.conv", r"\2sample/conv", CONV),), blocks, ours),
        *_block(rf"{side}\.mid\.0\.", f"{side}/mid/block_0", 0),
        *_attention(rf"{side}\.mid\.1\.", f"{side}/mid/attn", 0),
        *_block(rf"{side}\.mid\.2\.", f"{side}/mid/block_1", 0),
    )


RULES = (
    *_side("encoder", "down"),
    *_side("decoder", "up"),
    *rules_of(((r"quant_conv", "encoder/quant_conv", CONV), (r"post_quant_conv", "decoder/post_quant_conv", CONV))),
    (r"quantize\.embedding\.weight", "quantizer/codebook", "k d -> k d"),
    (r"quantize\.codebook_used", None, "a record of training"),
)


def model(channels, codes=16384, width=8, between=256, **trunk) -> dict:
    """The spec of the Tokenizer.

    channels: of the levels: (128, 128, 256, 256, 512) halves four times, (128, 256, 256, 512) three times.
    width: of a code. between: channels between it and a trunk. trunk: further fields of both trunks.
    """
    trunk = dict(channels=channels, blocks=2, attention="last") | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=between, latent=width, **trunk),
        quantizer=dict(name="quantizers.vq.VQ", size=codes, normalize="both"),
        decoder=dict(name="decoders.cnn.CNN", first=between, **trunk),
    )


def load(state_dict, published, shapes) -> tuple[dict, dict, Report]:
    """A state dict {key: array} -> ({"task": ...}, params, report); sizes are those of its arrays, not `published`.

    shapes: spec -> the parameters of that part as shapes. Raises ValueError as `convert` does.
    """
    levels = {int(key.split(".")[2]) for key in state_dict if key.startswith("encoder.conv_blocks.")}
    last = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in sorted(levels)]
    if not levels or not all(key in state_dict for key in (*last, "quantize.embedding.weight")):
        raise ValueError("This is no VQ autoencoder of LlamaGen: it has no encoder.conv_blocks.0.res.0.conv1.weight.")
    codes, width = state_dict["quantize.embedding.weight"].shape
    tokens = (256 >> len(levels) - 1) ** 2  # of pictures of 256 pixels; others have others
    spec = model(tuple(len(state_dict[key]) for key in last), codes, width, len(state_dict["encoder.conv_out.weight"]))
    params, report = convert(state_dict, RULES, shapes(spec))
    return {"task": task(spec, tokens)}, params, report
