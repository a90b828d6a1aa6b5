"""ViT-VQGAN, the tokenizer of Parti: a grid of codes by transformers (arXiv 2110.04627; Yu et al., arXiv 2206.10789).

    python -m jaxtok.train --config=configs/parti.py --workdir=runs/parti
    python -m jaxtok.train --config=configs/parti.py:decoder --workdir=runs/parti_decoder

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; decoder = a larger decoder for the
codes of runs/parti, whose encoder and codebook stay as they are; tiny, tiny_decoder = seconds, for tests; f8,
f8_decoder = the published stages, 32 x 32 tokens of 8,192 codes, on your own pictures of 256 px, with LPIPS
(runs/lpips_vgg, see configs/llamagen_vq.py), f8_off, f8_off_decoder = without it:

    python -m jaxtok.train --config=configs/parti.py:f8 --workdir=runs/parti_f8 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES
    python -m jaxtok.train --config=configs/parti.py:f8_decoder --workdir=runs/parti_f8_decoder \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

As published: transformers on either side, and codes of few channels, compared at length 1. The sizes of encoder, codes
and both decoders, the two stages, and L2, LPIPS and StyleGAN's critic are as others report them. They also report, of
the first stage, a logit-Laplace loss beside L2 and a sigmoid behind the decoder: neither is here. The critic's logistic
loss is StyleGAN2's; the weights of losses, of which the critic's is fixed, and the optimizer's values are ours. The
text-to-image model over these codes is not here. The small ones have no LPIPS and no critic.
"""

from configs import common

FIRST = ((r"(?:encoder|quantizer)/.*", r"\g<0>"), (r".*", None))  # what the second stage takes of it
SMALL = dict(codes=512, channels=8, patch=4, encoder=(128, 3, 32), decoder=(128, 3, 32))
TINY = dict(codes=64, channels=4, patch=4, encoder=(32, 1, 16), decoder=(32, 1, 16))
F8 = dict(codes=8192, channels=32, patch=8, encoder=(512, 8, 64), decoder=(512, 8, 64), dtype="bfloat16", remat="full")


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        optimizer=dict(b2=0.99, weight_decay=0.01, clip=1.0),
        task=task(32, SMALL, pictures() | codes()),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(16, TINY, pictures() | codes())
    return config


def published(perceptual):
    config = common.published(
        total_steps=500_000,
        batch_size=256,
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.01),
        optimizer=common.adversarial_adamw(b2=0.99, weight_decay=1e-4),
        init_from=common.LPIPS if perceptual else (),
        task=task(256, F8, pictures(perceptual, gan=20_000) | codes()),
    )
    return config


def second(config, size, model, decoder, losses, first):
    """The stage that trains a decoder, (width, depth, head_dim), for the codes of the run `first`."""
    config.task = task(size, model | dict(decoder=decoder), losses, frozen=("encoder", "quantizer"))
    config.init_from = (dict(path=first, rules=FIRST), *config.init_from)
    return config


def task(size, model, losses, frozen=()):
    """size: pixels a side. model: what `vit` takes."""
    return common.tokenizer_task(
        vit(**model),
        losses,
        token_counts=((size // model["patch"]) ** 2,),
        samplers=(dict(title="one pass"),),
        frozen=frozen,
    )


def vit(codes, channels, patch, encoder, decoder, **trunk):
    """The model; channels: of a code. encoder, decoder: (width, depth, head_dim). trunk: fields of both."""
    sizes = lambda part: dict(zip(("width", "depth", "head_dim"), part, strict=True)) | dict(patch=patch) | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.vit.ViT", channels=channels, **sizes(encoder)),
        quantizer=dict(name="quantizers.vq.VQ", size=codes, normalize="both"),
        decoder=dict(name="decoders.vit.ViT", **sizes(decoder)),
    )


def pictures(perceptual=False, gan=None):
    """Losses of pictures. gan: the step from which a critic counts, or None."""
    losses = dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        perceptual=common.perceptual(weight=0.1) if perceptual else common.OFF,
    )
    return losses if gan is None else losses | dict(gan=common.gan(weight=0.1, start=gan, **common.STYLEGAN))


def codes():
    """Losses of the quantizer."""
    aux = lambda term, weight: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=weight)
    return dict(codebook=aux("codebook", 1.0), commitment=aux("commitment", 0.25))


def f8_decoder(perceptual):
    first = f"runs/parti_f8{'' if perceptual else '_off'}"
    return second(published(perceptual), 256, F8, (1280, 32, 80), pictures(perceptual, gan=0), first)


VARIANTS = {
    "": small,
    "decoder": lambda: second(small(), 32, SMALL, (192, 6, 32), pictures(), "runs/parti"),
    "tiny": tiny,
    "tiny_decoder": lambda: second(tiny(), 16, TINY, (64, 2, 16), pictures(), "runs/parti_tiny"),
    "f8": lambda: published(True),
    "f8_off": lambda: published(False),
    "f8_decoder": lambda: f8_decoder(True),
    "f8_off_decoder": lambda: f8_decoder(False),
}
