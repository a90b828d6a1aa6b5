"""TiTok: a picture as a short row of codes, which have no place in it (Yu et al., NeurIPS 2024, arXiv 2406.07550).

    python -m jaxtok.train --config=configs/titok.py --workdir=runs/titok

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests. On
your own pictures of 256 px, in one stage: bl64, bl128, sl256 (8,192 codes) and ll32_kl, bl64_kl, bl128_kl (16
channels), with LPIPS (runs/lpips_vgg, see configs/maskgit_vqgan.py) or, as bl64_off ..., without it. In two stages:
l32, b64, s128, where the first, WORKDIR/codes, learns the codes that MaskGIT's VQGAN gives of a picture (runs/vqgan,
see there; or a run of that config), and the second, WORKDIR/pixels, the way from these to pixels:

    python -m jaxtok.train --config=configs/titok.py:l32 --workdir=runs/titok_l32 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

masked = a generator over runs/titok that fills in many codes a step, masked_tiny = over runs/titok_tiny; masked_l32,
masked_b64, masked_s128 = the published ones, over what python -m jaxtok.tokenize --checkpoint=runs/titok_l32/pixels
--out=runs/codes_titok_l32 writes:

    python -m jaxtok.train --config=configs/titok.py:masked --workdir=runs/titok_masked
    python -m jaxtok.generate --checkpoint=runs/titok_masked --labels=all --out=samples.png

Published weights in the same modules (rFID by their README: L-32 2.21, B-64 1.70, S-128 1.71; BL-64 2.06, BL-128 1.49,
SL-256 1.03; KL: LL-32 1.61, BL-64 1.25, BL-128 0.84): `python -m jaxtok.pretrained.convert REPOSITORY --kind=titok`.
gFID by the same, of the masked models: L-32 2.77, B-64 2.48, S-128 1.97.

What differs from the published recipes: there is no perceptual loss from ConvNeXt's logits (0.1 beside LPIPS in one
stage, alone in the second of two, where LPIPS stands here), l32 ... read their latents as they lie (the published
weights need `misread`), and layers begin as all of ours do. Crops have 0.8 to 1 of the shorter side (theirs: all of
it), and the critic's rate is the tokenizer's at that step (theirs has a warm-up of its own). The masked models' EMA is
ours. The small one has no LPIPS and no critic, its pixels lie in [-1, 1], its codes have length 1, and those that
nothing chooses come back to life.
"""

from configs import common, maskgit_vqgan

SMALL = dict(vq=dict(normalize="both", revive=1.0), low=-1.0, head_dim=32)
SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}  # (width, depth)
DECAY = (r"^(?!.*embed/).*kernel$",)  # not on what embeds
VQGAN = maskgit_vqgan.vqgan(codes=1024, width=256, channels=(128, 128, 256, 256, 512))


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        total_steps=3000,
        batch_size=64,
        optimizer=dict(b2=0.99, weight_decay=0.05, clip=1.0, decay=DECAY),
        task=task(titok(32, (128, 3), (128, 3), tokens=16, channels=8, codes=512, patch=8, **SMALL), losses(codes=512)),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(titok(16, (64, 1), (64, 1), tokens=8, channels=8, codes=64, patch=4, **SMALL), losses(codes=64))
    return config


def published(total_steps, warmup, b2=0.999):
    """What all of the published runs share."""
    config = common.base()
    config.update(
        total_steps=total_steps,
        batch_size=256,
        ema=0.999,
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        schedule=dict(peak_lr=1e-4, warmup=warmup, end=0.1),
        optimizer=dict(b2=b2, weight_decay=1e-4, clip=1.0, decay=DECAY),
        data=common.folder(crop="data.transforms.random_crop", batch_size=32),
    )
    return config


def one_stage(model, perceptual=True):
    """A run of a published size that learns pixels at once."""
    config = published(650_000, warmup=10_000)
    gan = common.gan(0.1, 200_000, critic="Blurred", lecam=0.001)
    lpips = common.perceptual(low=0.0) if perceptual else common.OFF
    config.task = task(model, losses(model["quantizer"].get("size")) | dict(perceptual=lpips, gan=gan))
    config.optimizer.apart = (r"^objective/gan/",)
    config.init_from = common.LPIPS if perceptual else ()
    return config


def codes_stage(size, tokens):
    """The first of two stages."""
    config = published(1_000_000, warmup=10_000, b2=0.99)
    codes = dict(fn=dict(name="losses.proxy.CodeCrossEntropy", tower=VQGAN))
    config.task = task(proxy(size, tokens, trains="codes"), dict(codes=codes) | quantizer_losses(4096))
    config.optimizer.decay = (r"^(?!decoder/pixels/)(?!.*embed/).*kernel$",)  # this stage leaves the VQGAN's alone
    encoder = ((r"((?:encoder|quantizer)/.*)", r"objective/codes/tower/\1"), (r".*", None))
    decoder = (
        (r"decoder/(.*)", r"decoder/pixels/\1"),
        (r"quantizer/codebook", "decoder/codebook"),
        (r".*", None),
    )
    config.init_from = (dict(path="runs/vqgan", rules=encoder), dict(path="runs/vqgan", rules=decoder))
    return config


def pixels_stage(size, tokens):
    """The second, which begins with the first."""
    config = published(500_000, warmup=5000)
    config.task = task(
        proxy(size, tokens, trains="pixels"),
        dict(
            pixel=dict(fn=dict(name="losses.pixel.l2")),
            perceptual=common.perceptual(low=0.0, weight=0.1),
            gan=common.gan(0.01, 20_000, critic="Blurred", lecam=0.001),
        ),
        frozen=("encoder", "quantizer"),
    )
    config.optimizer.apart = (r"^objective/gan/",)
    config.init_from = (dict(path="codes", rules=((r"objective/.*", None), (r".*", r"\g<0>"))), *common.LPIPS)
    return config


def two_stages(size, tokens):
    return common.in_stages(codes=codes_stage(size, tokens), pixels=pixels_stage(size, tokens))


def titok(size, encoder, decoder, tokens, channels, codes, vq=None, low=0.0, **shared):
    """The model. encoder, decoder: (width, depth). codes: None for Gaussians. vq: more fields of the quantizer. low: of
    the range of pixels. shared: of both transformers."""
    quantizer = dict(name="quantizers.gaussian.Gaussian")
    if codes:
        quantizer = dict(name="quantizers.vq.VQ", size=codes) | (vq or {})
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity", low=low),
        encoder=dict(
            name="encoders.vit.Latents",
            width=encoder[0],
            depth=encoder[1],
            tokens=tokens,
            channels=channels if codes else 2 * channels,
            **shared,
        ),
        quantizer=quantizer,
        decoder=dict(
            name="decoders.vit.MaskTokens", shape=(size, size, 3), width=decoder[0], depth=decoder[1], **shared
        ),
    )


def sized(sizes, tokens, codes, channels=64, **fields):
    """A published model. sizes: the letters of encoder and decoder. fields: as `titok` has them."""
    encoder, decoder = (SIZES[letter] for letter in sizes)
    return titok(256, encoder, decoder, tokens, channels, codes, dtype="bfloat16", remat="full", **fields)


def proxy(size, tokens, trains):
    """The model of two stages."""
    model = sized(2 * size, tokens, 4096, channels=12, vq=dict(normalize="both"))
    pixels = {key: value for key, value in VQGAN["decoder"].items() if key != "first"}
    model["decoder"] = dict(
        name="decoders.proxy.SoftCodes",
        body=model["decoder"] | dict(vocabulary=1024),
        pixels=pixels | dict(name="nn.conv.ConvDecoder"),
        channels=256,
        trains=trains,
    )
    return model


def losses(codes):
    """L2, and the terms of the quantizer."""
    return dict(pixel=dict(fn=dict(name="losses.pixel.l2"))) | quantizer_losses(codes)


def quantizer_losses(codes):
    terms = dict(codebook=1.0, commitment=0.25) if codes else dict(kl=1e-6)
    return {term: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=w) for term, w in terms.items()}


def task(model, losses, frozen=()):
    samplers = (dict(title="one pass"),)
    return common.tokenizer_task(model, losses, (model["encoder"]["tokens"],), samplers, frozen)


def masked(tokenizer, tokens, body, **sampler):
    """A published masked model. body: its fields. sampler: how it draws."""
    config = common.large_generator(tokenizer, 2e-4, name=MASKED, vocabulary=4096, length=tokens, **body)
    config.update(total_steps=500_000, batch_size=2048, eval_every=10_000, checkpoint=dict(keep_every=50_000))
    config.schedule.warmup = 10_000
    config.optimizer.update(b2=0.96, weight_decay=0.03)
    config.task.tokenizer = f"runs/{tokenizer}/pixels"
    config.task.samplers = (dict(title="its class", anneal=True, **sampler),)
    return config


MASKED = "generate.masked.Masked"
VIT = dict(width=768, depth=24, block=dict(head_dim=48, post_norm=True, eps=1e-12))
UVIT = dict(width=1024, depth=20, skips=True, block=dict(bias=("out", "mlp")))
# How they draw: by their README, whose scales are ours minus 1 where guidance is linear.
rising = lambda scale: dict(name="generate.sampling.linear", scale=scale)
bending = lambda scale: dict(name="generate.sampling.power_cosine", scale=scale, power=3.0)
GENERATORS = {
    "masked": lambda: common.small_generator("titok", name=MASKED, vocabulary=512, length=16),
    "masked_tiny": lambda: common.tiny_generator("titok_tiny", name=MASKED, vocabulary=64, length=8),
    "masked_l32": lambda: masked("titok_l32", 32, VIT, steps=8, temperature=9.5, guidance=rising(5.5)),
    "masked_b64": lambda: masked("titok_b64", 64, VIT, steps=8, temperature=11.0, guidance=rising(4.0)),
    "masked_s128": lambda: masked("titok_s128", 128, UVIT, steps=64, temperature=2.8, guidance=bending(6.9)),
}
ONE_STAGE = {  # (sizes of encoder and decoder, tokens, codes, channels)
    "bl64": ("bl", 64, 8192),
    "bl128": ("bl", 128, 8192),
    "sl256": ("sl", 256, 8192),
    "ll32_kl": ("ll", 32, None, 16),
    "bl64_kl": ("bl", 64, None, 16),
    "bl128_kl": ("bl", 128, None, 16),
}
TWO_STAGES = {"l32": ("l", 32), "b64": ("b", 64), "s128": ("s", 128)}
VARIANTS = (
    {"": small, "tiny": tiny}
    | {name: lambda sizes=sizes: one_stage(sized(*sizes)) for name, sizes in ONE_STAGE.items()}
    | {f"{name}_off": lambda sizes=sizes: one_stage(sized(*sizes), False) for name, sizes in ONE_STAGE.items()}
    | {name: lambda sizes=sizes: two_stages(*sizes) for name, sizes in TWO_STAGES.items()}
    | GENERATORS
)
