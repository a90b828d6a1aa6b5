"""ViTok: a plain transformer autoencoder with continuous tokens (Hansen-Estruch et al., arXiv 2501.09755).

    python -m jaxtok.train --config=configs/vitok.py --workdir=runs/vitok
    python -m jaxtok.train --config=configs/vitok.py:decoder --workdir=runs/vitok_decoder

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; decoder = its second stage, from
runs/vitok: the encoder stays, the decoder meets a critic; tiny, tiny_decoder = seconds, for tests; s_b16, s_l16 = the
published sizes, 16 x 16 tokens of 16 channels, on your own pictures of 256 px, with LPIPS (runs/lpips_vgg, see
configs/llamagen_vq.py), s_b16_decoder, s_l16_decoder = their second stage; s_b16_off ... = without LPIPS:

    python -m jaxtok.train --config=configs/vitok.py:s_b16 --workdir=runs/vitok_s_b16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES
    python -m jaxtok.train --config=configs/vitok.py:s_b16_decoder --workdir=runs/vitok_s_b16_decoder \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

Published, at 256 px, S-B/16: rFID 1.63 and PSNR 26.1 after the first stage, 0.50 and 24.36 after the second; S-L/16
0.46 and 24.74. What decides is E, the numbers a picture becomes: tokens times channels.

As published: sizes, SwiGLU, rotary places, losses and their weights, AdamW, batches and numbers of steps. Ours: the
warm-up of the first stage, and that the critic's warm-up is also the decoder's; norms and biases of the blocks; places
turn by row and column, for there is no time: pictures only, no video; the divergence, at 1e-3, is a mean over a
picture's numbers; details of StyleGAN's critic and its logistic loss; the schedule's end, clipping, and EMA in the
first stage. The small ones have no LPIPS, and a PatchGAN.
"""

from configs import common

FIRST = ((r"encoder/.*", r"\g<0>"), (r"decoder/.*", r"\g<0>"))  # what the second stage takes of it
SMALL = dict(channels=8, patch=4, encoder=(96, 2, 32), decoder=(96, 4, 32))
TINY = dict(channels=4, patch=4, encoder=(32, 1, 16), decoder=(32, 1, 16))
S, B, L = (768, 6, 64), (768, 12, 64), (1152, 24, 72)  # (width, depth, head_dim)


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        optimizer=dict(b2=0.99, weight_decay=1e-4, clip=1.0),
        task=task(32, SMALL, losses(32, SMALL)),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(16, TINY, losses(16, TINY))
    return config


def published(decoder, perceptual):
    model = dict(channels=16, patch=16, encoder=S, decoder=decoder, dtype="bfloat16", remat="full")
    config = common.published(
        total_steps=100_000,
        batch_size=1024,
        schedule=dict(peak_lr=4e-4, warmup=5000, end=0.01),
        optimizer=dict(b2=0.95, weight_decay=1e-4, clip=1.0),
        init_from=common.LPIPS if perceptual else (),
        task=task(256, model, losses(256, model, perceptual)),
    )
    return config


def second(config, first, **gan):
    """The stage that trains the decoder of the run `first` on, beside a critic. gan: as common.gan."""
    losses = {name: term for name, term in config.task.losses.items() if name != "kl"} | dict(gan=common.gan(**gan))
    config.task.losses = losses
    config.task.frozen = ("encoder",)
    tower = ((r"objective/.*", None),) if config.init_from else ()  # of LPIPS, which comes from where the first had it
    config.init_from = (dict(path=first, rules=FIRST + tower), *config.init_from)
    config.optimizer.apart = (r"^objective/gan/",)
    return config


def published_second(name, decoder, perceptual):
    config = second(published(decoder, perceptual), f"runs/vitok_{name}", weight=1.0, start=0, **common.STYLEGAN)
    config.batch_size = 256
    config.schedule.update(peak_lr=1e-4, warmup=25_000)
    config.optimizer.lr_factors = ((r"^objective/gan/", 0.2),)  # 2e-5
    return config


def task(size, model, losses):
    """size: pixels a side. model: what `vit` takes."""
    return common.tokenizer_task(
        vit(**model),
        losses,
        token_counts=((size // model["patch"]) ** 2,),
        samplers=(dict(title="mean"),),
    )


def vit(channels, patch, encoder, decoder, **trunk):
    """The model; channels: of a token. encoder, decoder: (width, depth, head_dim). trunk: fields of both."""
    trunk = dict(patch=patch, mlp="swiglu", positions="rotary") | trunk
    sizes = lambda part: dict(zip(("width", "depth", "head_dim"), part, strict=True)) | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.vit.ViT", channels=2 * channels, **sizes(encoder)),
        quantizer=dict(name="quantizers.gaussian.Gaussian"),
        decoder=dict(name="decoders.vit.ViT", **sizes(decoder)),
    )


def losses(size, model, perceptual=False):
    numbers = (size // model["patch"]) ** 2 * model["channels"]  # E
    return dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        kl=dict(fn=dict(name="losses.quantizer.aux", term="kl"), weight=1e-3 / numbers),
        perceptual=common.perceptual() if perceptual else common.OFF,
    )


VARIANTS = {
    "": small,
    "decoder": lambda: second(small(), "runs/vitok", weight=0.02, start=0, features=16, layers=2),
    "tiny": tiny,
    "tiny_decoder": lambda: second(tiny(), "runs/vitok_tiny", weight=0.02, start=0, features=4, layers=2),
}
for size, decoder in (("s_b16", B), ("s_l16", L)):
    for suffix, perceptual in (("", True), ("_off", False)):
        name, options = size + suffix, dict(decoder=decoder, perceptual=perceptual)
        VARIANTS[name] = lambda options=options: published(**options)
        VARIANTS[f"{name}_decoder"] = lambda name=name, options=options: published_second(name, **options)
