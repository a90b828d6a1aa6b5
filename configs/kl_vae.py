"""KL-VAE: latent diffusion's autoencoder, a grid of continuous tokens (Rombach et al., CVPR 2022, arXiv 2112.10752).

    python -m jaxtok.train --config=configs/kl_vae.py --workdir=runs/kl_vae

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; c4, c8,
c16 = the size of Stable Diffusion and FlexTok, 32 x 32 tokens of 4, 8 or 16 channels, on your own pictures of 256 px;
f16_c16 = one of 16 x 16 tokens, for configs/tokenbridge.py:

    python -m jaxtok.train --config=configs/kl_vae.py:c16 --workdir=runs/kl_vae_c16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

What differs from the paper. Its pixel loss has a perceptual one beside it (LPIPS) and, from step 50,001 of the public
code, an adversarial one; here it is alone, so the small and irregular comes out smooth. The published sizes have L1 and
that code's weight of the divergence, the small ones L2; optimizer values are ours.

A run of it can be the codec of another run, as in configs/flextok.py; the codec's scaling_factor is then 1 over the
`codes/std` of its log.
"""

from configs import common

F16 = dict(channels=(128, 128, 256, 256, 512), attention="last")  # LlamaGen's trunk


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        sharding=common.FSDP,
        batch_size=16,
        schedule=dict(peak_lr=3e-3, warmup=50, end=0.01),
        optimizer=dict(b2=0.99, weight_decay=0.01, clip=1.0),
        task=common.tokenizer_task(
            kl_vae(latent_channels=4, channels=(16, 32, 64), blocks=1, groups=8),
            losses=losses("l2", kl=1e-6),
            token_counts=(64,),
            samplers=(dict(title="mean"),),
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task.model = kl_vae(latent_channels=4, channels=(8, 16), blocks=1, groups=4)
    config.task.token_counts = (64,)
    return config


def published(latent_channels, side=32, **trunk):
    trunk = dict(channels=(128, 256, 512, 512), blocks=2, groups=32, dtype="bfloat16") | trunk
    config = common.published(
        sharding=common.FSDP,
        total_steps=250_000,
        batch_size=32,
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.01),
        optimizer=dict(b2=0.95, weight_decay=0.0, clip=1.0),
        task=common.tokenizer_task(
            kl_vae(latent_channels, **trunk),
            losses=losses("l1", kl=1e-6 / (256 * 256 * 3)),  # 1e-6 beside a sum over the picture's numbers
            token_counts=(side**2,),
            samplers=(dict(title="mean"),),
        ),
    )
    return config


def kl_vae(latent_channels, **trunk):
    """The model. trunk: fields of both trunks."""
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=2 * latent_channels, **trunk),
        quantizer=dict(name="quantizers.gaussian.Gaussian"),
        decoder=dict(name="decoders.cnn.CNN", **trunk),
    )


def losses(pixel, kl):
    """pixel: "l1" or "l2"; kl: the weight of the divergence, in nats a picture."""
    return dict(
        pixel=dict(fn=dict(name=f"losses.pixel.{pixel}")),
        kl=dict(fn=dict(name="losses.quantizer.aux", term="kl"), weight=kl),
    )


VARIANTS = {"": small, "tiny": tiny} | {f"c{n}": (lambda n=n: published(n)) for n in (4, 8, 16)}
VARIANTS |= {"f16_c16": lambda: published(16, side=16, **F16)}
