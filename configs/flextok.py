"""FlexTok: images as 1D token sequences of flexible length (Bachmann et al., ICML 2025, arXiv 2502.13967).

    python -m jaxtok.train --config=configs/flextok.py --workdir=runs/flextok

Variants: none = a small one on the emoji of a pip package, ten minutes on two CPU cores; tiny = seconds, for tests;
d12_d12, d18_d18, d18_d28 = the published models on your own pictures, on the latents of a frozen VAE, which is a run of
configs/kl_vae.py:c16 or a converted one, aligned to DINOv2-L (REPA; dinov2_vitl14_pretrain.pth, Apache-2.0):

    python -m jaxtok.train --config=configs/kl_vae.py:c16 --workdir=runs/vae_c16 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES
    python -m jaxtok.pretrained.convert dinov2_vitl14_pretrain.pth --kind=vit --out=runs/dinov2_l
    python -m jaxtok.train --config=configs/flextok.py:d18_d28 --workdir=runs/d18_d28 \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES --config.mesh.fsdp=8

d12_d12_standin ... align to what the default run (runs/flextok) sees instead, d12_d12_off ... to nothing.

What differs from the paper. The small ones predict x0 (a head of that width cannot span a patch's velocity, which holds
the noise), draw most times near to noise, keep all tokens in half of the samples, and normalise the latents over the
batch, without which they drift into a corner of the quantizer (docs/flextok.md has the figures). The published sizes
have the published architecture (jaxtok.load reads its weights into the same modules), quantizer, nested dropout and
velocity. Published: 20 steps guided at 7.5 in evaluation. Reported by others who ran the models: times by mode
sampling at scale 0.25, numbers of tokens by powers of two. Ours: optimizer, learning rate and warm-up, batch, EMA,
number of steps, and how often the condition is dropped.
"""

from configs import common
from configs.common import LEVELS

# A run of configs/kl_vae.py as the codec; its quantizer has no parameters.
VAE_AS_CODEC = (
    (r"(?:encoder|decoder)/((?:post_)?quant_conv/.*)", r"codec/\1"),
    (r"((?:encoder|decoder)/.*)", r"codec/\1"),
)

# Whom the decoder's second block is aligned to: (name of the loss, tower, init_from).
TEACHERS = {
    "require": (
        "repa",
        dict(name="pretrained.vit.ViT", width=1024, depth=24, dtype="bfloat16"),
        dict(path="runs/dinov2_l", rules=((r".*", r"objective/repa/tower/\g<0>"),)),
    ),
    "standin": (
        "repa_standin",
        dict(name="pretrained.standin.PatchTokens", width=128, depth=2, patch=8, size=32),
        dict(
            path="runs/flextok",
            rules=((r"encoder/((?:patch_embed|blocks)/.*)", r"objective/repa_standin/tower/\1"), (r".*", None)),
        ),
    ),
}


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    config = common.base()
    config.update(
        total_steps=3600,
        batch_size=64,
        ema=0.995,
        schedule=dict(peak_lr=2.5e-3, warmup=100, end=0.01),
        optimizer=dict(b2=0.99, weight_decay=0.05, clip=1.0),
        data=common.emoji(),
        task=common.tokenizer_task(
            flextok((32, 32, 3), patch=8, registers=16, encoder=(128, 2), decoder=(128, 4), small=True, unroll=4),
            losses=dict(flow=dict(fn=dict(name="losses.flow.flow_matching"))),
            token_counts=(1, 2, 4, 8, 16),
            samplers=(dict(title="one step", steps=1), dict(title="10 steps", steps=10)),
        ),
    )
    return config


def tiny():
    config = common.tiny(small())
    config.task.model = flextok(
        (16, 16, 3), patch=4, registers=8, encoder=(64, 1), decoder=(64, 2), small=True, head_dim=32
    )
    config.task.token_counts = (1, 4, 8)
    config.task.samplers = (dict(title="one step", steps=1), dict(title="2 steps, guided", steps=2, guidance=1.5))
    return config


def published(encoder, decoder, teacher):
    losses = dict(flow=dict(fn=dict(name="losses.flow.flow_matching")))
    init_from = [dict(path="runs/vae_c16", rules=VAE_AS_CODEC)]
    if teacher == "off":
        losses["repa"] = dict(fn=dict(name="losses.alignment.off"), weight=0.0)
    else:
        name, tower, source = TEACHERS[teacher]
        losses[name] = dict(fn=dict(name="losses.alignment.Alignment", tower=tower, dtype="bfloat16"), weight=1.0)
        init_from.append(source)
    config = common.base()
    config.update(
        total_steps=250_000,
        batch_size=256,
        ema=0.9999,
        init_from=tuple(init_from),
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        schedule=dict(peak_lr=1e-4, warmup=5000, end=0.01),
        optimizer=dict(b2=0.95, weight_decay=0.05, clip=1.0),
        data=common.folder(crop="data.transforms.resize_crop", batch_size=256),
        task=common.tokenizer_task(
            flextok(
                (32, 32, 16),
                patch=2,
                registers=256,
                encoder=encoder,
                decoder=decoder,
                codec="codecs.vae.VAE",
                grid=(16, 16),
                dtype="bfloat16",
                remat="full",
            ),
            losses=losses,
            token_counts=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            samplers=(dict(title="20 steps, guided", steps=20, guidance=7.5),),
            frozen=("codec",),
        ),
    )
    config.task.model.decoder.tap = 1
    return config


def flextok(shape, patch, registers, encoder, decoder, codec="codecs.identity.Identity", small=False, **trunk):
    """The model. encoder, decoder: (width, depth). codec: its name. small: what a small run needs, as the docstring on
    top says; else the paper's. trunk: options of both transformers."""
    if small:
        flow = dict(prediction="x0", time=dict(name="nn.flow.shifted_time", shift=16.0))
    else:
        flow = dict(prediction="velocity", time=dict(name="nn.flow.mode_time", scale=0.25))
    trunk |= dict(patch=patch, registers=registers)
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name=codec),
        encoder=dict(
            name="encoders.latent1d.Latent1D",
            width=encoder[0],
            depth=encoder[1],
            channels=len(LEVELS),
            batch_norm=small,
            **trunk,
        ),
        quantizer=dict(name="quantizers.fsq.FSQ", levels=LEVELS),
        decoder=dict(
            name="decoders.flow.FlowDecoder",
            width=decoder[0],
            depth=decoder[1],
            shape=shape,
            null_rate=0.1,
            **flow,
            **trunk,
        ),
        nested_dropout=dict(name="nn.nested_dropout.NestedDropout", law="pow2", full=0.5 if small else 0.0),
    )


SIZES = {  # (width, depth) of encoder and decoder
    "d12_d12": ((768, 12), (768, 12)),
    "d18_d18": ((1152, 18), (1152, 18)),
    "d18_d28": ((1152, 18), (1792, 28)),
}
VARIANTS = {"": small, "tiny": tiny} | {
    name + suffix: lambda sizes=sizes, teacher=teacher: published(*sizes, teacher)
    for name, sizes in SIZES.items()
    for suffix, teacher in (("", "require"), ("_standin", "standin"), ("_off", "off"))
}
