"""What every config starts from."""

from ml_collections import ConfigDict

# Where the parameters lie on the mesh, first match wins: tensor parallelism for stacks of transformer blocks, and
# everything else (its optimizer state and EMA too) split along its largest axis over `fsdp`.
SHARDING = (
    (r"blocks(/block)?/attn/qkv/kernel$", (None, "fsdp", "tensor", None, None)),  # [L D h 3 d]
    (r"blocks(/block)?/attn/out/kernel$", (None, "tensor", None, "fsdp")),  # [L h d D]
    (r"blocks(/block)?/mlp/(gate|value|fc1)/kernel$", (None, "fsdp", "tensor")),  # [L D H]
    (r"blocks(/block)?/mlp/(out|fc2)/kernel$", (None, "tensor", "fsdp")),  # [L H D]
    (r".*", "fsdp"),
)

FSDP = ((r".*", "fsdp"),)  # of convolutional models, where there is nothing to split over `tensor`

LEVELS = (8, 8, 8, 5, 5, 5)  # FlexTok's digits: 64,000 codes

FLIP = dict(name="data.transforms.flip")
SHIFT = dict(name="data.transforms.shift", pixels=1)


def base():
    """The keys that every run has; docs/design.md explains each."""
    return ConfigDict(
        dict(
            seed=0,
            total_steps=0,
            batch_size=0,  # over all devices
            accumulate=1,  # gradient steps of batch_size / accumulate pictures
            ema=0.999,
            log_every=50,
            eval_every=0,  # 0: at the end only
            init_from=(),  # (dict(path="a workdir", rules=...), ...): parameters to start from, see docs/design.md
            tensorboard=False,  # needs the extra of that name
            checkpoint=dict(every=1000, keep_last=3, keep_every=0),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            sharding=SHARDING,
            schedule=dict(),  # optim.schedule
            optimizer=dict(),  # optim.adamw
            data=dict(),
            task=dict(),
        )
    )


def tokenizer_task(model, losses, token_counts, samplers, frozen=()):
    """A TokenizerTask (jaxtok/tasks says what each is)."""
    fields = dict(model=model, losses=losses, token_counts=token_counts, samplers=samplers, frozen=frozen)
    return dict(name="tasks.TokenizerTask", **fields)


def generator_task(model, tokenizer, samplers, decoder=None, **fields):
    """A GeneratorTask over the codes of a tokenizer, a workdir (jaxtok/tasks says what each is)."""
    fields |= dict(model=model, tokenizer=tokenizer, samplers=samplers, decoder=decoder or {})
    return dict(name="tasks.GeneratorTask", **fields)


def small_generator(tokenizer, classes=10, grid=None, **model):
    """The small run of a generator over the codes of a tokenizer's run, made on the fly of the emoji.

    tokenizer: its workdir below runs. grid: see GeneratorTask. model: fields, of generate.ar.AR where it has no name.
    """
    model = dict(name="generate.ar.AR", width=128, depth=4, block=dict(head_dim=32), classes=classes) | model
    config = small(
        total_steps=2000,
        batch_size=64,
        schedule=dict(peak_lr=2e-3, warmup=50, end=0.01),
        optimizer=dict(b2=0.98, weight_decay=0.05, clip=1.0),
        task=generator_task(model, f"runs/{tokenizer}", (dict(title="its class", guidance=1.5),)),
    )
    if grid:
        config.task.grid = grid
    return config


def tiny_generator(tokenizer, grid=None, **model):
    """The same in seconds, on drawn shapes."""
    return tiny(small_generator(tokenizer, 40, grid, **dict(width=32, depth=2, block=dict(head_dim=16)) | model))


def large_generator(tokenizer, peak_lr, grid=None, **model):
    """A published size, of 1,000 classes, over the codes that jaxtok.tokenize wrote to runs/codes_TOKENIZER."""
    config = small_generator(tokenizer, 1000, grid, dtype="bfloat16", remat="full", **model)
    epoch = 1_281_167 // 256
    config.update(
        total_steps=400 * epoch,
        batch_size=256,
        ema=0.9999,
        eval_every=10 * epoch,
        checkpoint=dict(every=1000, keep_every=50 * epoch),
        schedule=dict(peak_lr=peak_lr, warmup=5 * epoch, end=0.01),
        optimizer=dict(b2=0.95, weight_decay=0.05, clip=1.0),
        data=codes(f"runs/codes_{tokenizer}", batch_size=256),
    )
    return config


def gpts(name, small, tiny, large, sizes, peak_lr, **model):
    """{"ar", "ar_tiny", "ar_SIZE" ...}: GPTs of LlamaGen's kind over runs/NAME, runs/NAME_tiny and what is published.

    small, tiny: the vocabularies of the first two, on 8 x 8 tokens. large: (VARIANT, vocabulary, tokens a side) of the
    tokenizer runs/NAME_VARIANT. sizes: {SIZE: its fields}. model: fields of all.
    """
    variant, vocabulary, side = large

    def fields(side, vocabulary):
        grid = dict(grid=(side, side), length=side**2, vocabulary=vocabulary)
        return grid | dict(position="rotary_2d", class_token=True) | model

    def published(size):
        size = fields(side, vocabulary) | dict(block=dict(norm="rms")) | size
        return large_generator(f"{name}_{variant}", peak_lr, **size)

    return {
        "ar": lambda: small_generator(name, **fields(8, small)),
        "ar_tiny": lambda: tiny_generator(f"{name}_tiny", **fields(8, tiny)),
    } | {f"ar_{key}": lambda size=size: published(size) for key, size in sizes.items()}


CNN = dict(sharding=FSDP, batch_size=16, schedule=dict(peak_lr=2e-3, warmup=50, end=0.01))  # keys of `small`


def small(**keys):
    """A run of minutes on the emoji; keys: all in which it differs from a transformer's."""
    config = base()
    config.update(
        total_steps=2500,
        batch_size=32,
        ema=0.995,
        schedule=dict(peak_lr=1e-3, warmup=100, end=0.01),
        data=emoji(),
    )
    config.update(keys)
    return config


def published(**keys):
    """A run of published size on your own pictures, cropped at random; keys: all that it shares with no other."""
    config = base()
    config.update(
        ema=0.9999,
        eval_every=10_000,
        checkpoint=dict(every=1000, keep_every=50_000),
        data=folder(crop="data.transforms.random_crop", batch_size=32),
    )
    config.update(keys)
    return config


def in_stages(**runs):
    """One recipe of runs that share their data, name = config: the first, and of each the keys in which it differs."""
    first = next(iter(runs.values())).to_dict()
    changes = {name: {k: v for k, v in run.to_dict().items() if v != first[k]} for name, run in runs.items()}
    return ConfigDict(first | dict(stages=tuple(dict(name=name) | keys for name, keys in changes.items())))


def codes(path, batch_size=64):
    """The data of a generator: what python -m jaxtok.tokenize --out=PATH wrote."""
    source = dict(name="data.sources.Tokenized")
    return dict(
        train=dict(source=source | dict(path=f"{path}/train")),
        eval=dict(source=source | dict(path=f"{path}/eval"), batch_size=batch_size),
    )


# Of losses that compare pictures.

OFF = dict(fn=dict(name="losses.alignment.off"), weight=0.0)
LPIPS = (dict(path="runs/lpips_vgg", rules=((r".*", r"objective/perceptual/tower/\g<0>"),)),)  # an init_from


def perceptual(low=-1.0, weight=1.0):
    """The term "perceptual", LPIPS on VGG; its weights come by LPIPS. low: of the codec's range, which ends at 1."""
    tower = dict(name="pretrained.perceptual.LPIPS", net="vgg", precision="default")
    return dict(fn=dict(name="losses.perceptual.Perceptual", tower=tower, low=low), weight=weight)


def vqgan_losses(codebook, commitment, gan, perceptual):
    """L2, the two terms of a quantizer by their weights, LPIPS (`perceptual` above, or OFF), and a critic."""
    aux = lambda term, weight: dict(fn=dict(name="losses.quantizer.aux", term=term), weight=weight)
    return dict(
        pixel=dict(fn=dict(name="losses.pixel.l2")),
        codebook=aux("codebook", codebook),
        commitment=aux("commitment", commitment),
        perceptual=perceptual,
        gan=gan,
    )


def gan(weight, start, critic="PatchGAN", lecam=0.0, term=None, **fields):
    """The term "gan": a critic of losses.critics with its fields, both networks from step `start` on.

    term: more fields of losses.adversarial.Adversarial.
    """
    critic = dict(name=f"losses.critics.{critic}", **fields)
    term = dict(name="losses.adversarial.Adversarial", critic=critic, weight=weight, lecam=lecam, **term or {})
    return dict(fn=term, start=start)


# Through what a critic sees: policy -> (name of the term, fields of losses.critics.Projected, init_from).
EYES = {
    "require": (
        "gan",
        dict(tower=dict(name="pretrained.vit.ViT", width=384, depth=12, size=224, dtype="bfloat16")),
        dict(path="runs/dinov2_s", rules=((r".*", r"objective/gan/critic/tower/\g<0>"),)),
    ),
    "standin": (
        "gan_standin",
        dict(tower=dict(name="pretrained.standin.PatchTokens", width=128, depth=2, patch=8, size=32), blocks=(0, 1)),
        dict(
            path="runs/flextok",
            rules=(
                (r"encoder/((?:patch_embed|blocks)/.*)", r"objective/gan_standin/critic/tower/\1"),
                (r".*", None),
            ),
        ),
    ),
}


def dino_gan(policy, weight, start, term=None, **options):
    """({the term: a critic that looks through DINOv2-S at pictures that DiffAugment changed}, an init_from).

    policy: "require" runs/dinov2_s; "standin": what runs/flextok sees, and the term is called so; "off": a PatchGAN.
    """
    term = term or {}
    if policy == "off":
        return dict(gan=gan(weight, start, term=term, **options)), ()
    name, fields, source = EYES[policy]
    term = term | dict(augment=dict(name="losses.augment.diffaugment"))
    return {name: gan(weight, start, "Projected", term=term, **options, **fields)}, (source,)


# StyleGAN's critic, as `gan(..., **STYLEGAN)`: with the logistic loss.
STYLEGAN = dict(
    critic="StyleGAN",
    term=dict(
        critic_loss=dict(name="losses.adversarial.softplus_critic"),
        generator_loss=dict(name="losses.adversarial.softplus_generator"),
    ),
)


def adversarial_adamw(**fields):
    """Options of optim.adamw where there is a term "gan": either network is clipped by its own norm."""
    return dict(clip=1.0, apart=(r"^objective/gan",)) | fields


def emoji():
    """The data of a small run: the emoji of a pip package, 32 px."""
    source = dict(name="data.sources.Emoji", size=32)
    return dict(
        train=dict(source=source | dict(split="train"), transforms=(FLIP, SHIFT)),
        eval=dict(source=source | dict(split="test"), batch_size=64),
    )


def folder(crop, batch_size):
    """The data of a published size: a folder of the user's pictures, cut to 256 px; crop: how they are in training."""
    source = dict(name="data.sources.Folder", path="images")
    centre = dict(name="data.transforms.resize_crop", size=256)
    return dict(
        train=dict(source=source | dict(split="train"), transforms=(dict(name=crop, size=256), FLIP)),
        eval=dict(source=source | dict(split="test"), transforms=(centre,), batch_size=batch_size),
        workers=8,
    )


def tiny(config):
    """Makes a small run one of seconds, for tests: six steps on drawn shapes of 16 px; the model is its own affair."""
    shapes = dict(name="data.sources.Shapes", size=16)
    config.update(
        total_steps=6,
        batch_size=16,
        log_every=2,
        checkpoint=dict(every=3),
        schedule=dict(warmup=2),
    )
    config.data = dict(
        train=dict(source=shapes | dict(split="train", n=64), transforms=(FLIP,)),
        eval=dict(source=shapes | dict(split="test", n=12), batch_size=8),
    )
    return config


def choose(variant, variants):
    """The config of a variant. ValueError lists those there are."""
    if variant not in variants:
        raise ValueError(f'There is no variant "{variant}"; there are {", ".join(repr(name) for name in variants)}.')
    return variants[variant]()
