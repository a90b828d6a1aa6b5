"""FQGAN: every place has a code in each of two or three books, which must not say the same (arXiv 2411.16681).

    python -m jaxtok.train --config=configs/fqgan.py --workdir=runs/fqgan

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; dual,
triple = 16 x 16 places, two or three books of 16,384 codes, on your own pictures of 256 px, with LPIPS (runs/lpips_vgg,
see configs/llamagen_vq.py) and DINOv2 as teacher (runs/dinov2_l; of triple, runs/dinov2_s and runs/dinov2_b); dual_f8,
triple_f8 = 32 x 32 places; dual_off ... = without LPIPS and teacher:

    python -m jaxtok.pretrained.convert dinov2_vitl14_pretrain.pth --kind=vit --out=runs/dinov2_l
    python -m jaxtok.train --config=configs/fqgan.py:dual --workdir=runs/fqgan_dual \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

A GPT over the codes of dual, whose last layers predict those of a place in turn:

    python -m jaxtok.train --config=configs/fqgan.py:ar --workdir=runs/fqgan_ar
    python -m jaxtok.generate --checkpoint=runs/fqgan_ar --labels=all --out=samples.png

ar = over runs/fqgan, ar_tiny = over runs/fqgan_tiny, ar_b, ar_l = the published widths and depths over the codes of
runs/fqgan_dual.

Published (README): rFID 0.94 and PSNR 22.02 of dual, 0.76 and 22.73 of triple; at f8 0.32 and 0.24; gFID 3.38 (B), 3.08
(L). Their code and weights are under CC BY-NC 4.0; what is here is our own, and they cannot be loaded.

As published: LlamaGen's trunks, the branches, quantizers, losses and their weights, a critic from step 20,001, Adam at
2e-4, 40 epochs of ImageNet in batches of 256. What differs: the teachers. Theirs are the class tokens of CLIP-L/14 in
dual, of DINOv2-S and CLIP-B/16 in triple; here they are means over DINOv2's patches, L in dual, S and B in triple. EMA,
clipping and crops are ours, and the rate falls. How the GPT trains is ours. The small ones have no LPIPS and no critic,
and predict the picture's class, which their data know exactly.
"""

from configs import common

BRANCHES = ("visual", "semantic")
CHANNELS = {"": (128, 128, 256, 256, 512), "_f8": (128, 256, 256, 512)}  # LlamaGen's
GPTS = {"b": dict(depth=24, width=1024, head_depth=3), "l": dict(depth=36, width=1280, head_depth=4)}
TEACHERS = {  # (name, width, depth) by branch
    "dual": {"semantic": ("l", 1024, 24)},
    "triple": {"semantic_mid": ("s", 384, 12), "semantic_high": ("b", 768, 12)},
}


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def small():
    return common.small(
        **common.CNN,
        optimizer=dict(b2=0.95, clip=1.0),
        task=task(
            fqgan(
                BRANCHES,
                256,
                8,
                dict(channels=(16, 32, 64), blocks=1, groups=8),
                dict(depth=1, between=32, head_dim=32),
            ),
            losses() | dict(semantic_class=prediction(1, 8, dict(width=64, depth=1, head_dim=16), classes=10)),
            places=64,
        ),
    )


def tiny():
    config = common.tiny(small())
    config.task = task(
        fqgan(BRANCHES, 32, 4, dict(channels=(8, 16), blocks=1, groups=4), dict(depth=1, between=8, head_dim=8)),
        losses() | dict(semantic_class=prediction(1, 4, dict(width=16, depth=1, head_dim=8), classes=40)),
        places=64,
    )
    return config


def published(which, size, towers):
    trunk = dict(channels=CHANNELS[size], blocks=2, dtype="bfloat16")
    terms, init_from = {}, list(common.LPIPS if towers else ())
    for i, (branch, (name, width, depth)) in enumerate(TEACHERS[which].items(), 1):
        terms[branch] = common.OFF
        if towers:
            tower = dict(name="pretrained.vit.ViT", width=width, depth=depth, size=224, dtype="bfloat16")
            head = dict(width=width, depth=3, head_dim=width // 8, dtype="bfloat16")
            terms[branch] = prediction(i, 8, head, tower=tower)
            rules = ((r".*", rf"objective/{branch}/tower/\g<0>"),)
            init_from.append(dict(path=f"runs/dinov2_{name}", rules=rules))
    gan = common.gan(weight=0.5, start=20_000)
    config = common.published(
        sharding=common.FSDP,
        total_steps=200_000,
        batch_size=256,
        schedule=dict(peak_lr=2e-4, end=0.1),
        optimizer=common.adversarial_adamw(b2=0.95),
        init_from=tuple(init_from),
        task=task(
            fqgan(("visual", *TEACHERS[which]), 16384, 8, trunk, dict(depth=6, between=256)),
            losses(common.perceptual() if towers else common.OFF) | terms | dict(gan=gan),
            places=(256 >> len(trunk["channels"]) - 1) ** 2,
        ),
    )
    return config


def task(model, losses, places):
    return common.tokenizer_task(model, losses, token_counts=(places,), samplers=(dict(title="one pass"),))


def fqgan(branches, codes, channels, trunk, branch):
    """The model. codes, channels: of each book. trunk: fields of both trunks. branch: fields of encoders.factorized."""
    trunk = dict(attention="last") | trunk
    shared = {name: trunk[name] for name in ("groups", "dtype") if name in trunk}
    book = dict(name="quantizers.vq.VQ", size=codes, normalize="both", temperature=0.01)
    return dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(
            name="encoders.factorized.Factorized",
            trunk=dict(name="nn.conv.ConvEncoder", out=0, **trunk),
            branches=branches,
            channels=channels,
            **shared,
            **branch,
        ),
        quantizer=dict(name="quantizers.product.Product", books={name: book for name in branches}),
        decoder=dict(name="decoders.cnn.CNN", first=branch["between"], **trunk),
    )


def losses(perceptual=common.OFF):
    """Of pictures and of all books."""
    weights = dict(codebook=1.0, commitment=0.25, sample_entropy=0.03, batch_entropy=-0.03, overlap=0.1)
    aux = lambda term, weight: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=weight)
    pictures = dict(pixel=dict(fn=dict(name="losses.pixel.l2")), perceptual=perceptual)
    return pictures | {term: aux(term, weight) for term, weight in weights.items()}


def prediction(book, channels, head, **target):
    """The term by which the i-th book, of so many channels a code, names what the teacher sees. head: its fields."""
    fields = dict(channels=(book * channels, (book + 1) * channels), **target)
    head = dict(name="losses.contrastive.FeatureHead", **head)
    return dict(fn=dict(name="losses.contrastive.Prediction", head=head, **fields), weight=0.5)


VARIANTS = {"": small, "tiny": tiny}
VARIANTS |= {
    which + size + suffix: lambda which=which, size=size, towers=towers: published(which, size, towers)
    for which in TEACHERS
    for size in CHANNELS
    for suffix, towers in (("", True), ("_off", False))
}
VARIANTS |= common.gpts("fqgan", (256, 256), (32, 32), ("dual", (16384, 16384), 16), GPTS, peak_lr=3e-4, head_depth=1)
