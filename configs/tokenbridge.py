"""TokenBridge: a continuous autoencoder, quantized after its training (Wang et al., arXiv 2503.16430).

    python -m jaxtok.train --config=configs/kl_vae.py --workdir=runs/kl_vae
    python -m jaxtok.train --config=configs/tokenbridge.py --workdir=runs/tokenbridge
    python -m jaxtok.train --config=configs/tokenbridge.py:mar --workdir=runs/tokenbridge_mar
    python -m jaxtok.generate --checkpoint=runs/tokenbridge_mar --labels=all --out=samples.png

Every channel of every token of a KL-VAE goes to the nearest of 64 fixed levels. Nothing trains: the second line takes
the weights of the first and says what the rounding costs, in one step that changes nothing. Its workdir is a tokenizer
like any other. A token is C numbers of 64 values. The masked model of the third line takes the places of a picture in
any order, and at a place a small transformer draws the C numbers one after the other, each from those before it, so
that the 64^C codes of a token are never counted.

Variants: none = over the small VAE on the emoji of a pip package; tiny = seconds, over runs/kl_vae_tiny; f16_c16 = over
runs/kl_vae_f16_c16, 16 x 16 tokens of pictures of 256 px, as published:

    python -m jaxtok.train --config=configs/kl_vae.py:f16_c16 --workdir=runs/kl_vae_f16_c16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES
    python -m jaxtok.train --config=configs/tokenbridge.py:f16_c16 --workdir=runs/tokenbridge_f16_c16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

mar = the masked model over runs/tokenbridge, mar_tiny = over runs/tokenbridge_tiny; mar_l, mar_h = the published sizes,
over what python -m jaxtok.tokenize --checkpoint=runs/tokenbridge_f16_c16 --out=runs/codes_tokenbridge_f16_c16 writes.

Published: FID 1.76 (L, 486 M parameters) and 1.55 (H, 910 M), rFID about 0.53 (their README).

As published: levels, the nearest of them taken, 6 bits a channel. Their range is +-5 for the latents of MAR's VAE times
0.2325. Here it is a number of the config, 6, to be replaced by five times `codes/std` in the log of the VAE's run
(--config.task.model.quantizer.high, and low for minus that). In +-3 deviations all levels would be equally likely, but
the rounding of normal latents 8 dB worse. Of the masked models: sizes, the law of the masks, the head, AdamW at 4e-4
with 0.9 and 0.95 and decay 0.02, batch, epochs, and how it draws. What differs: the share of masked tokens is each
sample's own, not the batch's; tokens enter by a vector for each level of each channel, where theirs are the numbers
themselves through a matrix; attention weights and the head have no dropout; channels are predicted in their own order.
Theirs is one of frequencies that holds for MAR's VAE, and --config.task.model.head.order takes what
quantizers.post_training.channel_order finds for another.
"""

from configs import common, kl_vae

REACH = 6.0  # 5 deviations of a VAE's latents

EPOCH = 1_281_167 // 2048
SIZES = {  # (width, depth of encoder and decoder each, layers over the channels, epochs, guidance, temperature)
    "l": (1024, 16, 4, 400, 3.1, 0.96),
    "h": (1280, 20, 6, 800, 3.45, 0.91),
}


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def unchanged(variant):
    """A run over the weights of a run of configs/kl_vae.py, by its variant, in which nothing trains."""
    vae = kl_vae.get_config(variant)
    model = vae.task.model.to_dict()
    channels = model["encoder"]["out"] // 2  # a mean and a deviation each
    levels = dict(channels=channels, bits=6, low=-REACH, high=REACH)
    model["quantizer"] = dict(name="quantizers.post_training.GaussianLevels", **levels)
    losses = dict(pixel=dict(fn=dict(name="losses.pixel.l2")))
    titles = (dict(title="nearest levels"),)
    config = common.base()
    config.update(
        sharding=common.FSDP,
        total_steps=1,
        batch_size=16,
        schedule=dict(peak_lr=0.0),
        optimizer=dict(decay=()),  # there are no parameters that a rule could match
        init_from=(dict(path=f"runs/kl_vae{variant and '_'}{variant}"),),
        data=vae.data.to_dict(),
        task=common.tokenizer_task(model, losses, vae.task.token_counts, titles, frozen=("encoder", "decoder")),
    )
    return config


def mar(side, channels, width, buffer, depth, inner, head_dim):
    """The masked model of side x side tokens. depth, inner, head_dim: of the layers over the channels."""
    head = dict(depth=depth, inner=inner, block=dict(head_dim=head_dim))
    grid = dict(grid=(side, side), length=side**2, vocabulary=(64,) * channels)
    return grid | dict(name="generate.mar.MAR", width=width, buffer=buffer, head=head)


def published(width, depth, layers, epochs, guidance, temperature):
    model = mar(16, 16, width, buffer=64, depth=layers, inner=1024, head_dim=128)
    model |= dict(depth=depth, block=dict(head_dim=width // 16))
    config = common.large_generator("tokenbridge_f16_c16", peak_lr=4e-4, **model)
    config.update(
        total_steps=epochs * EPOCH,
        batch_size=2048,
        eval_every=10 * EPOCH,
        checkpoint=dict(keep_every=50 * EPOCH),
        schedule=dict(warmup=100 * EPOCH, end=0.0),
        optimizer=dict(weight_decay=0.02, clip=3.0),
    )
    guidance = dict(name="generate.sampling.linear", scale=guidance)
    config.task.samplers = (dict(title="its class", steps=256, guidance=guidance, temperature=temperature),)
    return config


VARIANTS = {
    "": lambda: unchanged(""),
    "tiny": lambda: common.tiny(unchanged("tiny")),
    "f16_c16": lambda: unchanged("f16_c16"),
    "mar": lambda: common.small_generator(
        "tokenbridge", **mar(8, 4, 128, buffer=8, depth=2, inner=64, head_dim=32), depth=2
    ),
    "mar_tiny": lambda: common.tiny_generator(
        "tokenbridge_tiny", **mar(8, 4, 32, buffer=2, depth=1, inner=16, head_dim=16), depth=1
    ),
}
VARIANTS |= {f"mar_{key}": lambda size=size: published(*size) for key, size in SIZES.items()}
