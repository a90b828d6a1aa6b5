"""RobustTok: a decoder that has seen codes near to the right ones forgives a generator's mistakes (arXiv 2503.08354).

    python -m jaxtok.train --config=configs/robusttok.py --workdir=runs/robusttok
    python -m jaxtok.evaluate --checkpoint=runs/robusttok --perturbed

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; base =
256 tokens of 4,096 codes, on your own pictures of 256 px, with LPIPS (runs/lpips_vgg, see configs/llamagen_vq.py) and
a critic that looks through DINOv2-S; base_standin = a critic that looks through what runs/flextok sees instead;
base_off = without LPIPS, and a PatchGAN:

    python -m jaxtok.pretrained.convert dinov2_vits14_pretrain.pth --kind=vit --out=runs/dinov2_s
    python -m jaxtok.train --config=configs/robusttok.py:base --workdir=runs/robusttok_base \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

In training, all tokens of some pictures become one of their nearest codes. The second command rebuilds held-out
pictures from codes perturbed so and measures how far they fall, by the distance of the paper's pFID on a grid of ours
(docs/grid.md); it goes by the extractor's name.

Published (README): rFID 1.02 and pFID 2.28, against 0.91 and 6.98 of a plain VQ of 4,096 codes. Their code and weights
are for research only; what is here is our own, and they cannot be loaded.

As published: sizes, quantizer, MSE and LPIPS at 1, and the perturbation: a tenth of the pictures, 100 neighbours, all
tokens, annealed to half of both between the epochs 40 and 120 of 200. From epoch 56 a critic on a frozen ViT that is
shown pictures changed by DiffAugment, a hinge loss, LeCAM at 0.001, and an adaptive weight at 0.5, measured at the
linear layer that makes the pixels. What differs: their encoder and decoder begin as DINOv2-B, with a class feature of
it as a further target, at a rate of 3e-5; here both begin at random, at a rate of ours. The critic's heads and the
blocks that they look at are ours, after StyleGAN-T (arXiv 2301.09515), and behind the pixels stands a 3x3. Neighbours
are those of the code, as the paper says, and not those of the latent. There is no drop path (theirs: 0.1), latents have
places of their own (theirs: those of the patches, and two vectors that tell latents from patches), and the critic's
matrices do not decay (theirs: 5e-4). The small ones have no LPIPS and no critic.
"""

from configs import common

SMALL = dict(size=32, patch=8, tokens=32, channels=8, codes=512, sizes=(128, 3), head_dim=32)
TINY = dict(size=16, patch=4, tokens=8, channels=8, codes=64, sizes=(64, 1), head_dim=32)
BASE = dict(size=256, patch=16, tokens=256, channels=64, codes=4096, sizes=(768, 12), dtype="bfloat16", remat="full")


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        total_steps=3000,
        optimizer=dict(b2=0.99, weight_decay=0.01, clip=1.0),
        task=task(SMALL, dict(alpha=1.0, beta=0.5, delta=16), losses()),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(TINY, dict(alpha=1.0, beta=0.5, delta=8, schedule=(2, 4, 0.5)), losses())
    return config


def published(perceptual, critic):
    """critic: the policy of common.dino_gan."""
    steps = 1250  # of an epoch
    adaptive = dict(adaptive="decoder/head/kernel", lecam_of="logits")
    gan, init_from = common.dino_gan(critic, weight=0.5, start=56 * steps, lecam=0.001, term=adaptive)
    config = common.published(
        total_steps=200 * steps,
        batch_size=1024,
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.01),
        optimizer=common.adversarial_adamw(b2=0.95),
        init_from=(common.LPIPS if perceptual else ()) + init_from,
        task=task(
            BASE,
            dict(alpha=1.0, beta=0.1, delta=100, schedule=(40 * steps, 120 * steps, 0.5)),
            losses(perceptual) | gan,
        ),
    )
    return config


def task(model, perturbation, losses):
    """model: what `robusttok` takes. perturbation: fields of quantizers.perturb.Perturbed."""
    return common.tokenizer_task(
        robusttok(**model, perturbation=perturbation),
        losses,
        token_counts=(model["tokens"],),
        samplers=(dict(title="one pass"),),
    )


def robusttok(size, patch, tokens, channels, codes, sizes, perturbation, **trunk):
    """The model. size: pixels a side. sizes: (width, depth) of either transformer. trunk: more fields of both."""
    trunk |= dict(width=sizes[0], depth=sizes[1], patch=patch)
    vq = dict(name="quantizers.vq.VQ", size=codes, normalize="both")
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.vit.Latents", tokens=tokens, channels=channels, **trunk),
        quantizer=dict(name="quantizers.perturb.Perturbed", quantizer=vq, **perturbation),
        decoder=dict(name="decoders.vit.MaskTokens", shape=(size, size, 3), **trunk),
    )


def losses(perceptual=False):
    aux = lambda term, weight: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=weight)
    return dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        perceptual=common.perceptual() if perceptual else common.OFF,
        codebook=aux("codebook", 1.0),
        commitment=aux("commitment", 0.25),
    )


VARIANTS = {
    "": small,
    "tiny": tiny,
    "base": lambda: published(True, "require"),
    "base_standin": lambda: published(True, "standin"),
    "base_off": lambda: published(False, "off"),
}
