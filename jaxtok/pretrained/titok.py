"""TiTok (arXiv 2406.07550), TA-TiTok and One-D-Piece (2501.10064) -> a Tokenizer of ours (Apache-2.0).

Sizes are read off the arrays. Three forms: with `pixel_decoder` (TiTok's two stages), with pictures from a convolution
(one stage), and the latter without a codebook (KL). Those of the first misread their latents, see encoders.vit.Latents.
"""

import math

from jaxtok.pretrained import maskgit_vqgan
from jaxtok.pretrained.convert import AFFINE, CONV, LINEAR, OUT, Report, convert, rules_of

LICENCE = (
    "TiTok, TA-TiTok: Apache-2.0 declared by their authors, whose README says: for research purposes. "
    "One-D-Piece: the code is under Apache-2.0."
)

_POINT = ((r"\.weight", "/kernel", "o i 1 1 -> i o"), (r"\.bias", "/bias", "o -> o"))  # a 1x1 as a linear layer
_QKV = (("_weight", "/kernel", "(t h d) i -> i h t d"), ("_bias", "/bias", "(t h d) -> h t d"))
_BLOCK = (
    (r"ln_([12])", r"norm\2", AFFINE),
    (r"attn\.in_proj", "attn/qkv", _QKV),
    (r"attn\.out_proj", "attn/out", OUT),
    (r"mlp\.c_fc", "mlp/fc1", LINEAR),
    (r"mlp\.c_proj", "mlp/fc2", LINEAR),
)
_PATCHES = ((r"\.weight", "/kernel", "o c p q -> p q c o"), (r"\.bias", "/bias", "o -> o"))


def rules(form, levels=5) -> tuple[tuple[str, str, str], ...]:
    """The table of a form, "pixels" (one stage) or "codes" (two); levels: of the other tokenizer's decoder."""
    body = "decoder/body/" if form == "codes" else "decoder/"

    def side(name, path):
        layers = ((r"ln_pre", "norm_pre", AFFINE), (r"ln_post", "norm_post", AFFINE))
        return (
            (name + r"class_embedding", path + "class_token", "n d -> n d"),
            (name + r"positional_embedding", path + "pos_embed", "n d -> n d"),
            (name + r"latent_token_positional_embedding", path + "latents_pos", "n d -> n d"),
            *rules_of(layers, name, path),
            *rules_of(_BLOCK, name + r"transformer\.(\d+)\.", path + "blocks/", r"[\1]"),
        )

    heads = ((r"ffn\.0", "head1", _POINT), (r"ffn\.2", "head2", _POINT))
    if form == "pixels":
        heads = ((r"ffn\.0", "head", _POINT), (r"conv_out", "conv_out", CONV))
    return (
        *side(r"encoder\.", "encoder/"),
        (r"latent_tokens", "encoder/latents", "n d -> n d"),
        *rules_of(((r"patch_embed", "patch_embed", _PATCHES), (r"conv_out", "head", _POINT)), r"encoder\.", "encoder/"),
        *side(r"decoder\.", body),
        (r"decoder\.mask_token", body + "mask_token", "1 n d -> n d"),
        (r"decoder\.text_guidance_positional_embedding", body + "text_pos", "n d -> n d"),
        *rules_of((*heads, (r"decoder_embed", "embed", LINEAR)), r"decoder\.", body),
        *rules_of(((r"text_guidance_proj", "text_embed", LINEAR),), r"decoder\.", body),
        (r"quantize\.embedding\.weight", "quantizer/codebook", "k d -> k d"),
        (r"quantize\.embed_prob", None, "how often codes were used in training"),
        (r"pixel_quantize\.embedding\.weight", "decoder/codebook", "k d -> k d"),
        *maskgit_vqgan.decoder_rules(r"pixel_decoder\.", "decoder/pixels/", levels),
    )


def model(size, encoder, decoder, tokens, channels, codes=None, form="pixels", pixels=None, text=False, **shared):
    """The spec of a Tokenizer.

    Args:
      size: pixels a side.
      encoder, decoder: (width, depth).
      tokens, channels: of a picture, and of a token.
      codes: how many there are; None: tokens are continuous.
      form: "pixels" or "codes", see the head of this file. Of "codes", the tokens have length 1.
      pixels: of "codes", what is not as published of the other tokenizer: fields of its decoder, `width` of its codes.
      text: whether the decoder reads one.
      shared: fields of both transformers.
    """
    legacy, width = form == "codes", channels if codes is not None else 2 * channels
    decoder = dict(name="decoders.vit.MaskTokens", shape=(size, size, 3), width=decoder[0], depth=decoder[1], **shared)
    decoder |= dict(text=True) if text else {}
    if legacy:
        trunk = maskgit_vqgan.TRUNK | dict(more=0) | (pixels or {})
        channels = trunk.pop("width", 256)
        decoder = dict(
            name="decoders.proxy.SoftCodes",
            body=decoder | dict(vocabulary=1024),
            pixels=dict(name="nn.conv.ConvDecoder", **trunk),
            channels=channels,
        )
    quantizer = dict(name="quantizers.gaussian.Gaussian")
    if codes is not None:
        quantizer = dict(name="quantizers.vq.VQ", size=codes, normalize="both" if legacy else "none")
    encoder = dict(width=encoder[0], depth=encoder[1], tokens=tokens, channels=width, misread=legacy)
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity", low=0.0),
        encoder=dict(name="encoders.vit.Latents", **encoder, **shared),
        quantizer=quantizer,
        decoder=decoder,
    )


def sizes(state_dict) -> dict:
    """The arguments of `model`, read off a state dict {key: array}. ValueError for one of another model."""
    depth = lambda side: 1 + max(int(key.split(".")[2]) for key in state_dict if key.startswith(f"{side}.transformer."))
    try:
        patch = state_dict["encoder.patch_embed.weight"].shape[-1]
        side = patch * math.isqrt(len(state_dict["encoder.positional_embedding"]) - 1)
        tokens, _ = state_dict["latent_tokens"].shape
        width, channels = state_dict["decoder.decoder_embed.weight"].shape
        found = dict(
            size=side,
            encoder=(state_dict["encoder.class_embedding"].shape[1], depth("encoder")),
            decoder=(width, depth("decoder")),
            tokens=tokens,
            channels=channels,
            form="codes" if "decoder.ffn.2.weight" in state_dict else "pixels",
            patch=patch,
        )
    except KeyError as error:
        raise ValueError(f"This is no TiTok: it has no {error}.") from None
    codebook = state_dict.get("quantize.embedding.weight")
    return found | ({} if codebook is None else dict(codes=len(codebook)))


def load(state_dict, published, shapes) -> tuple[dict, dict, Report]:
    """A state dict {key: array} -> ({"task": ...}, params, report); sizes are those of its arrays, not `published`.

    shapes: (spec, pixels a side) -> the parameters of that part as shapes. Raises ValueError as `convert` does, and for
    a TA-TiTok, whose decoder reads a text.
    """
    if "decoder.text_guidance_proj.weight" in state_dict:
        raise ValueError(
            "This decoder reads a text as CLIP ViT-L/14 sees it, and what is loaded whole is handed none: `convert` "
            'the state dict by pretrained.titok.rules("pixels"), and give a model(..., text=True) the features that '
            "pretrained.clip_text computes as `context`."
        )
    found = sizes(state_dict)
    spec = model(**found)
    params, report = convert(state_dict, rules(found["form"]), shapes(spec, found["size"]))
    return {"task": maskgit_vqgan.task(spec, found["tokens"])}, params, report
