"""TexTok: a text says what a picture shows, so that its tokens need only say the rest (Zha et al., arXiv 2412.05796).

    python -m jaxtok.train --config=configs/textok.py --workdir=runs/textok

A caption stands behind the latents in encoder and decoder; the tokens are continuous. TA-TiTok (arXiv 2501.07730) reads
it in the decoder alone.

Variants: none = a small one on the emoji of a pip package and their names, minutes on two CPU cores; tiny = seconds,
for tests. On your own pictures of 256 px: n32, n64, n128, n256 = TexTok's sizes; ta_bl32, ta_bl64, ta_bl128 (8,192
codes) and ta_bl32_kl, ta_bl64_kl, ta_sl128_kl (16 channels) = TA-TiTok's. They read the captions of the data by a
frozen tower: T5-XL, and TA-TiTok's by CLIP's text model. The files of its repository, tokenizer.json among them, stand
in the folder t5, or clip_text (docs/pretrained.md):

    python -m jaxtok.pretrained.convert t5 --kind=t5 --out=runs/t5
    python -m jaxtok.pretrained.convert clip_text --kind=clip_text --out=runs/clip_text
    python -m jaxtok.train --config=configs/textok.py:n32 --workdir=runs/textok_n32 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

n32_standin ... read them by a frozen MiniLM instead (--kind=minilm, of the folder minilm, to runs/minilm); n32_bytes
... by a small tower of bytes that trains with the run, as the small ones do; n32_off ... are the control: that tower
and never a text.

Published: rFID better by 29.2 % at 256 px and by 48.1 % at 512 px than without text, on average over numbers of tokens;
with a DiT over the tokens, gFID 1.46 and 1.62, and at 512 px with 32 tokens 93.5 times as fast as DiT. TA-TiTok's
README: rFID, on ImageNet without training on it, 3.95, 2.43, 1.53 for 32, 64, 128 codes; KL: 1.53, 1.47, 0.90.

What differs from the papers. Texts are dropped from a tenth of the pictures in training, so that there is something to
say of a picture without one. Of TexTok no code is public: T5-XL, its 128 tokens, patches of 8 px, widths, depths and
channels are as reported by others; the weights of the losses, the critic and the optimizer are TiTok's, as of
configs/titok.py, whose other differences are also here, and so is LPIPS (runs/lpips_vgg). TA-TiTok's batch is its own,
1,024. There are no sizes for 512 px. The small ones have L2 alone.
"""

from configs import common, titok

TOWERS = {  # by the kind of `convert`, whose workdir is runs/KIND: the model, and how many tokens it reads
    "t5": (dict(name="pretrained.t5.T5Encoder"), 128),
    "clip_text": (dict(name="pretrained.clip_text.ClipText", padding=True), 77),
    "minilm": (dict(name="pretrained.minilm.MiniLM"), 128),
}
TOWER_RULES = ((r".*", r"text_tower/\g<0>"),)
BYTES = dict(name="data.transforms.caption_bytes", length=128)


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    model = titok.titok(32, (128, 3), (128, 3), tokens=4, channels=8, codes=None, patch=8, low=-1.0, head_dim=32)
    config = titok.small()
    config.task = titok.task(reading(model, ("encoder", "decoder"), byte_tower(128, length=48)), titok.losses(None))
    return captioned(config, BYTES | dict(length=48))


def tiny():
    model = titok.titok(16, (64, 1), (64, 1), tokens=2, channels=8, codes=None, patch=4, low=-1.0, head_dim=32)
    config = titok.tiny()
    config.task = titok.task(reading(model, ("encoder", "decoder"), byte_tower(64, length=24)), titok.losses(None))
    return captioned(config, BYTES | dict(length=24))


def published(model, parts, batch_size, tower):
    """A run of a published size. parts: who reads the text. tower: of TOWERS, "bytes", or "off" for no text."""
    if tower in TOWERS:
        spec, length = TOWERS[tower]
        config = titok.one_stage(reading(model, parts, spec | dict(dtype="bfloat16")))
        config.task.frozen = ("text_tower",)
        config.init_from = (*config.init_from, dict(path=f"runs/{tower}", rules=TOWER_RULES))
        ids = dict(name="data.transforms.caption_words", tokenizer=f"{tower}/tokenizer.json", length=length)
    else:
        dropout = 1.0 if tower == "off" else 0.1
        config, ids = titok.one_stage(reading(model, parts, byte_tower(384, length=128), dropout)), BYTES
    config.batch_size = batch_size
    return captioned(config, ids)


def reading(model, parts, tower, dropout=0.1):
    """A model of configs/titok.py whose `parts` read what a tower makes of a text."""
    return (
        model | {part: model[part] | dict(text=True) for part in parts} | dict(text_tower=tower, text_dropout=dropout)
    )


def byte_tower(width, length):
    return dict(name="encoders.text.TextTransformer", width=width, depth=2, length=length)


def captioned(config, ids):
    """The run with the ids of its data's captions; ids: the transform that makes them."""
    for split in (config.data.train, config.data.eval):
        split.transforms = (*split.get("transforms", ()), ids)
    return config


def textok(tokens):
    return titok.titok(256, *2 * [titok.SIZES["b"]], tokens, 8, None, patch=8, dtype="bfloat16", remat="full")


SIZES = {
    f"n{tokens}": lambda tokens=tokens: (textok(tokens), ("encoder", "decoder"), 256) for tokens in (32, 64, 128, 256)
}
TA_SIZES = {  # as of configs/titok.py
    "ta_bl32": ("bl", 32, 8192),
    "ta_bl64": ("bl", 64, 8192),
    "ta_bl128": ("bl", 128, 8192),
    "ta_bl32_kl": ("bl", 32, None, 16),
    "ta_bl64_kl": ("bl", 64, None, 16),
    "ta_sl128_kl": ("sl", 128, None, 16),
}
SIZES |= {
    name: lambda sizes=sizes: (titok.sized(*sizes, vq=dict(clustering=True)), ("decoder",), 1024)
    for name, sizes in TA_SIZES.items()
}
VARIANTS = {"": small, "tiny": tiny} | {
    name + suffix: lambda size=size, tower=tower: published(*size(), tower)
    for name, size in SIZES.items()
    for suffix, tower in (
        ("", "clip_text" if name in TA_SIZES else "t5"),
        ("_standin", "minilm"),
        ("_bytes", "bytes"),
        ("_off", "off"),
    )
}
