"""Published discrete tokenizers, by the shapes of their keys alone: no checkpoint is opened, nothing is allocated."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import hub
from jaxtok.build import build
from jaxtok.pretrained import llamagen_vq, maskgit_vqgan, one_d_piece, titok
from jaxtok.pretrained.convert import flatten, match

LLAMAGEN = dict(codes=16384, width=8, between=256)
# name: (spec, the table, reasons for which keys are set aside and how many, pixels a side, millions, a text's shape)
PUBLISHED = {
    "maskgit_vqgan": (maskgit_vqgan.model(), maskgit_vqgan.rules(), 0, "54.5", None),
    "llamagen_vq16": (llamagen_vq.model((128, 128, 256, 256, 512), **LLAMAGEN), llamagen_vq.RULES, 1, "71.9", None),
    "llamagen_vq8": (llamagen_vq.model((128, 256, 256, 512), **LLAMAGEN), llamagen_vq.RULES, 1, "70.1", None),
    "titok_l32": (
        titok.model(256, (1024, 24), (1024, 24), 32, 12, 4096, "codes"),
        titok.rules("codes"),
        *(0, "641.1", None),
    ),
    "titok_b64": (
        titok.model(256, (768, 12), (768, 12), 64, 12, 4096, "codes"),
        titok.rules("codes"),
        0,
        "204.8",
        None,
    ),
    "titok_s128": (titok.model(256, (512, 8), (512, 8), 128, 12, 4096, "codes"), titok.rules("codes"), 0, "83.7", None),
    "titok_bl128_vae": (titok.model(256, (768, 12), (1024, 24), 128, 16), titok.rules("pixels"), 0, "389.6", None),
    "tatitok_bl32_vq": (
        titok.model(256, (768, 12), (1024, 24), 32, 64, 8192, text=True),
        titok.rules("pixels"),
        *(1, "390.8", (1, 77, 768)),
    ),
}


def shapes(spec, text=None):
    """Of our parameters."""
    model = build(spec)
    context = None if text is None else {"tokens": jnp.zeros(text), "mask": jnp.ones(text[:2], bool)}
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    init = partial(model.init, keys, context=context)
    return jax.eval_shape(init, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.uint8))["params"]


def zeros(name):
    """The published keys: zeros that own one number each."""
    listed = json.loads((Path(__file__).parent / "state_dicts" / f"{name}.json").read_text())
    return {key: np.broadcast_to(np.zeros((), np.float32), shape) for key, shape in listed.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_covers_the_published_keys(name):
    spec, rules, aside, millions, text = PUBLISHED[name]
    foreign, like = zeros(name), shapes(spec, text)
    pieces, report = match(foreign, rules, like)
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    assert sum(map(len, report.set_aside.values())) == aside and len(pieces) == len(foreign) - aside
    ours = sum(leaf.size for leaf in flatten(like).values())
    assert ours == sum(foreign[key].size for key in pieces) and f"{ours / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", ["titok_l32", "titok_bl128_vae", "titok_s128"])
def test_sizes_are_read_off_the_arrays(name):
    assert titok.model(**titok.sizes(zeros(name))) == {
        **PUBLISHED[name][0],
        "encoder": PUBLISHED[name][0]["encoder"] | dict(patch=16),
        "decoder": with_patch(PUBLISHED[name][0]["decoder"]),
    }


def with_patch(decoder):
    if "body" in decoder:
        return decoder | dict(body=decoder["body"] | dict(patch=16))
    return decoder | dict(patch=16)


def test_a_file_of_another_model_is_named():
    with pytest.raises(ValueError, match="This is no TiTok: it has no 'encoder.patch_embed.weight'"):
        titok.sizes(zeros("maskgit_vqgan"))
    with pytest.raises(ValueError, match="This is no VQ autoencoder of LlamaGen"):
        llamagen_vq.load(zeros("maskgit_vqgan"), {}, hub.part_shapes)
    with pytest.raises(ValueError, match="This decoder reads a text"):
        titok.load(zeros("tatitok_bl32_vq"), {}, hub.part_shapes)
    lacking = {key: a for key, a in zeros("maskgit_vqgan").items() if "decoder.up.4.upsample" not in key}
    with pytest.raises(ValueError, match="decoder/up_0/upsample/conv/kernel"):
        maskgit_vqgan.load(lacking, {}, hub.part_shapes)


def test_levels_of_the_decoder_are_counted_from_the_other_end():
    pieces, _ = match(zeros("maskgit_vqgan"), maskgit_vqgan.rules(), shapes(maskgit_vqgan.model()))
    assert pieces["decoder.up.4.upsample_conv.weight"].path == "decoder/up_0/upsample/conv/kernel"
    assert pieces["decoder.up.0.block.1.norm2.bias"].path == "decoder/up_4/block_1/norm2/bias"
    assert pieces["encoder.down.4.block.0.nin_shortcut.weight"].path == "encoder/down_4/block_0/shortcut/kernel"


def test_one_d_piece_is_a_titok_of_256_tokens_that_any_first_of_rebuild(monkeypatch):
    """The keys of the reference are in a golden; the pixel decoder's are TiTok's."""
    tables = ("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.latent_token_positional_embedding")
    foreign = zeros("titok_s128")
    foreign |= {key: np.broadcast_to(np.zeros((), np.float32), (256, 512)) for key in tables}
    with np.load(Path(__file__).parents[1] / "goldens" / "one_d" / "onedpiece_tail_drop.npz") as golden:
        reference = {key.removeprefix("param/") for key in golden if key.startswith("param/")}
    assert reference == {key for key in foreign if not re.search(r"^pixel_|transformer\.[2-7]\.", key)}
    monkeypatch.setattr(titok, "convert", match)
    config, _, report = one_d_piece.load(foreign, {}, hub.part_shapes)
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    model = build(config["task"]).model
    assert model.encoder.tokens == 256 and model.encoder.misread and model.nested_dropout.law == "uniform_batch"
    assert config["task"]["token_counts"] == (1, 2, 4, 8, 16, 32, 64, 128, 256)
