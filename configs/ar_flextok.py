"""FlexTok's second stage: a class-conditional GPT over its codes (Bachmann et al., ICML 2025, arXiv 2502.13967).

    python -m jaxtok.train    --config=configs/flextok.py --workdir=runs/flextok
    python -m jaxtok.tokenize --checkpoint=runs/flextok --out=runs/codes --passes=8
    python -m jaxtok.train    --config=configs/ar_flextok.py --workdir=runs/ar
    python -m jaxtok.generate --checkpoint=runs/ar --labels=all --guidance=1.5 --out=samples.png

Variants: none = a small one over the codes of the default run of configs/flextok.py; tiny = seconds, for tests, over
runs/flextok_tiny; 49M, 85M, 201M, 393M, 679M, 1.33B = the published sizes, over the codes that runs/d18_d28 gives of
ImageNet's 1000 classes. Codes come from disk; with a source of pictures they are made on the fly:

    python -m jaxtok.train --config=configs/ar_flextok.py:201M --workdir=runs/ar_201M --config.mesh.fsdp=8

What differs from the paper. The small one predicts a code digit by digit (the six numbers that FSQ made it of), not as
one of 64,000: its 3,689 pictures show too few codes twice. The published sizes are as published: widths, depths, one
softmax over all codes, learned positions, the class added to the start. Reported by others who trained them: AdamW with
b2 0.95 and weight decay 0.05, clipping at 1, cosine to 1 % of the peak, 300 epochs of which 30 warm up, peak 1.2e-3 at
49M, dropout 0.1, 10 % of the classes dropped. Ours: batch size, EMA, and the peak of the larger ones.
"""

from configs import common
from configs.common import LEVELS

# Name -> (depth, width); head_dim 64, no biases, SwiGLU. The names count the blocks alone: 12 width^2 depth with
# classes, and 16 width^2 depth with text, for the cross-attention.
SIZES = {
    "49M": (10, 640),
    "85M": (12, 768),
    "201M": (16, 1024),
    "393M": (20, 1280),
    "679M": (24, 1536),
    "1.33B": (30, 1920),
}
TEXT_SIZES = {"113M": (12, 768), "382M": (18, 1152), "1.15B": (26, 1664), "3.06B": (36, 2304)}  # no variants yet
SAMPLERS = tuple(dict(title=f"its class,\n{k} of 16 tokens", tokens=k, guidance=1.5) for k in (1, 4, 16))
IMAGENET = 1_281_167  # training pictures


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    config = common.base()
    config.update(
        total_steps=2000,
        batch_size=64,
        ema=0.995,
        schedule=dict(peak_lr=2e-3, warmup=50, end=0.01),
        optimizer=dict(b2=0.98, weight_decay=0.02, clip=1.0),
        data=common.codes("runs/codes"),
        task=common.generator_task(
            gpt(width=192, depth=4, length=16, classes=10, levels=LEVELS, block=dict(head_dim=32)),
            tokenizer="runs/flextok",
            samplers=SAMPLERS,
            decoder=dict(steps=1),
        ),
    )
    return config


def tiny():
    config = common.tiny(small())
    config.task.tokenizer = "runs/flextok_tiny"
    config.task.model = gpt(width=32, depth=2, length=8, classes=40, levels=LEVELS, block=dict(head_dim=16))
    config.task.samplers = (dict(title="its class,\n4 tokens", tokens=4, guidance=1.5),)
    return config


def published(depth, width):
    config, batch = common.base(), 1024
    epoch = IMAGENET // batch
    config.update(
        total_steps=300 * epoch,
        batch_size=batch,
        ema=0.9999,
        eval_every=10 * epoch,
        checkpoint=dict(every=1000, keep_every=30 * epoch),
        schedule=dict(peak_lr=1.2e-3 * 640 / width, warmup=30 * epoch, end=0.01),
        optimizer=dict(b2=0.95, weight_decay=0.05, clip=1.0),
        data=common.codes("runs/codes_d18_d28"),
        task=common.generator_task(
            gpt(width, depth, length=256, classes=1000, dtype="bfloat16", remat="full"),
            tokenizer="runs/d18_d28",
            samplers=tuple(dict(title=f"its class,\n{k} tokens", tokens=k, guidance=1.5) for k in (4, 32, 256)),
            decoder=dict(steps=20, guidance=7.5),
        ),
    )
    return config


def gpt(width, depth, length, classes, **fields):
    """The model over the first `length` codes."""
    fields |= dict(width=width, depth=depth, length=length, classes=classes, vocabulary=64_000)
    return dict(name="generate.ar.AR", **fields)


VARIANTS = {"": small, "tiny": tiny} | {name: lambda size=size: published(*size) for name, size in SIZES.items()}
