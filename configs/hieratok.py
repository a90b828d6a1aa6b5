"""HieraTok: a decoder that sees a grid of tokens at several scales, coarse before fine (arXiv 2509.23736).

    python -m jaxtok.train --config=configs/hieratok.py --workdir=runs/hieratok

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; base =
16 x 16 continuous tokens of 16 channels, and their means at 8, 4, 2 and 1, on your own pictures of 256 px, with LPIPS
(runs/lpips_vgg, see configs/llamagen_vq.py); base_off = without it:

    python -m jaxtok.train --config=configs/hieratok.py:base --workdir=runs/hieratok_base \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

Published, against the same tokenizer of one scale: rFID 1.47 -> 1.07, 1.38 times as fast to converge, gFID 16.4 ->
13.3.

There is no public code, and of the paper we have the abstract alone. From there: the token map at several scales in one
sequence, and attention that sees coarser scales and its own. Ours: the scales, that they are means of the finest, that
pixels come from the finest, sizes, losses and the optimizer's values. To compare with one scale, set
`--config.task.model.decoder.scales="(16,)"`. The small ones have no LPIPS and no critic. Evaluation also rebuilds
pictures from the coarse scales alone.
"""

from configs import common

SMALL = dict(channels=8, patch=4, scales=(1, 2, 4, 8), encoder=(128, 2, 32), decoder=(128, 3, 32))
TINY = dict(channels=4, patch=4, scales=(1, 2, 4), encoder=(32, 1, 16), decoder=(32, 1, 16))
BASE = dict(channels=16, patch=16, scales=(1, 2, 4, 8, 16), encoder=(768, 12, 64), decoder=(768, 12, 64))


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        optimizer=dict(b2=0.99, weight_decay=0.01, clip=1.0),
        task=task(SMALL, losses()),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(TINY, losses())
    return config


def published(perceptual):
    config = common.published(
        total_steps=250_000,
        batch_size=256,
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.01),
        optimizer=common.adversarial_adamw(b2=0.95, weight_decay=1e-4),
        init_from=common.LPIPS if perceptual else (),
        task=task(
            BASE | dict(dtype="bfloat16", remat="full"),
            losses(perceptual) | dict(gan=common.gan(weight=0.1, start=20_000)),
        ),
    )
    return config


def task(model, losses):
    """model: what `hieratok` takes."""
    *coarse, finest = model["scales"]
    samplers = (dict(title="all scales"), *(dict(title=f"means over {s} x {s}", scale=s) for s in coarse))
    return common.tokenizer_task(hieratok(**model), losses, token_counts=(finest**2,), samplers=samplers)


def hieratok(channels, patch, scales, encoder, decoder, **trunk):
    """The model; channels: of a token. encoder, decoder: (width, depth, head_dim). trunk: fields of both."""
    sizes = lambda part: dict(zip(("width", "depth", "head_dim"), part, strict=True)) | dict(patch=patch) | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.vit.ViT", channels=2 * channels, **sizes(encoder)),
        quantizer=dict(name="quantizers.gaussian.Gaussian"),
        decoder=dict(name="decoders.multiscale.MultiScale", scales=scales, **sizes(decoder)),
    )


def losses(perceptual=False):
    return dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        kl=dict(fn=dict(name="losses.quantizer.aux", term="kl"), weight=1e-6),
        perceptual=common.perceptual() if perceptual else common.OFF,
    )


VARIANTS = {"": small, "tiny": tiny, "base": lambda: published(True), "base_off": lambda: published(False)}
