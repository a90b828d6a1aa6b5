"""TokenBridge: a continuous autoencoder, quantized after its training (Wang et al., arXiv 2503.16430).

    python -m jaxtok.train --config=configs/kl_vae.py --workdir=runs/kl_vae
    python -m jaxtok.train --config=configs/tokenbridge.py --workdir=runs/tokenbridge
    python -m jaxtok.train --config=configs/tokenbridge.py:ar --workdir=runs/tokenbridge_ar
    python -m jaxtok.generate --checkpoint=runs/tokenbridge_ar --labels=all --out=samples.png

Every channel of every token of a KL-VAE goes to the nearest of 64 fixed levels. Nothing trains: the second line takes
the weights of the first and says what the rounding costs, in one step that changes nothing. Its workdir is a tokenizer
like any other. A token is C numbers of 64 values, and the GPT of the third line predicts them one after the other, each
from those before it, so that the 64^C codes of a token are never counted.

Variants: none = over the small VAE on the emoji of a pip package; tiny = seconds, over runs/kl_vae_tiny; f8_c16 = over
runs/kl_vae_c16, pictures of 256 px:

    python -m jaxtok.train --config=configs/tokenbridge.py:f8_c16 --workdir=runs/tokenbridge_f8_c16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

ar = the GPT over runs/tokenbridge, ar_tiny = over runs/tokenbridge_tiny; ar_b, ar_l, ar_h = the published widths and
depths, over the codes of runs/tokenbridge_f8_c16.

Published: FID 1.76 (L, 486 M parameters) and 1.55 (H, 910 M), rFID about 0.53 (their README).

As published: levels, the nearest of them taken, 6 bits a channel. Their range is +-5 for the latents of MAR's VAE times
0.2325. Here it is a number of the config, 6, to be replaced by five times `codes/std` in the log of the VAE's run
(--config.task.model.quantizer.high, and low for minus that). In +-3 deviations all levels would be equally likely, but
the rounding of normal latents 8 dB worse. What differs: the generator is a GPT in raster order, theirs a masked model
(MAR) in random order, and how it trains is that of our other GPTs; the channels of a token are predicted in their own
order by one layer each, not in that of their frequencies (quantizers.post_training.channel_order) by a transformer; the
large VAE has 32 x 32 tokens, theirs 16 x 16.
"""

from configs import common

GPTS = {"b": (24, 768), "l": (32, 1024), "h": (40, 1280)}  # (depth, width): encoder and decoder of MAR together


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    config = unchanged("runs/kl_vae", 64, reach=6.0, latent_channels=4, channels=(16, 32, 64), blocks=1, groups=8)
    config.data = common.emoji()
    return config


def tiny():
    return common.tiny(
        unchanged("runs/kl_vae_tiny", 64, reach=6.0, latent_channels=4, channels=(8, 16), blocks=1, groups=4)
    )


def large():
    trunk = dict(channels=(128, 256, 512, 512), blocks=2, groups=32, dtype="bfloat16")
    config = unchanged("runs/kl_vae_c16", 1024, reach=6.0, latent_channels=16, **trunk)
    config.data = common.folder(crop="data.transforms.random_crop", batch_size=32)
    return config


def unchanged(vae, tokens, reach, latent_channels, **trunk):
    """A run over the weights of a run of configs/kl_vae.py, in which nothing trains.

    reach: 5 deviations of its latents. trunk: fields of both trunks, as there.
    """
    model = dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=2 * latent_channels, **trunk),
        quantizer=dict(
            name="quantizers.post_training.GaussianLevels", channels=latent_channels, bits=6, low=-reach, high=reach
        ),
        decoder=dict(name="decoders.cnn.CNN", **trunk),
    )
    losses = dict(pixel=dict(fn=dict(name="losses.pixel.l2")))
    config = common.base()
    config.update(
        sharding=common.FSDP,
        total_steps=1,
        batch_size=16,
        schedule=dict(peak_lr=0.0),
        optimizer=dict(decay=()),  # there are no parameters that a rule could match
        init_from=(dict(path=vae),),
        task=common.tokenizer_task(model, losses, (tokens,), (dict(title="nearest levels"),), ("encoder", "decoder")),
    )
    return config


VARIANTS = {
    "": small,
    "tiny": tiny,
    "f8_c16": large,
}
VARIANTS |= common.gpts("tokenbridge", (64,) * 4, (64,) * 4, ("f8_c16", (64,) * 16, 32), GPTS, peak_lr=1e-4)
