"""One-D-Piece: TiTok's row of codes in the order of their worth: any first n make a picture (arXiv 2501.10064).

    python -m jaxtok.train --config=configs/one_d_piece.py --workdir=runs/one_d_piece

While it trains, the decoder sees the first n tokens only, n uniform in 1 ... N; encoder and codebook are TiTok's. A
token that is dropped is no key of the decoder's attention, which is the same as cutting the row behind the n-th.

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; s, b, l
= the published sizes, 256 tokens of 4,096 codes, on your own pictures of 256 px, in the two stages of
configs/titok.py:l32 (runs/vqgan as there):

    python -m jaxtok.train --config=configs/one_d_piece.py:l --workdir=runs/one_d_piece_l \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

masked, masked_tiny, masked_s, masked_b, masked_l = generators over all the tokens, as those of configs/titok.py.

Published weights in the same modules (rFID at 256 tokens by their README: S 1.48, B 1.11, L 1.08; gFID 2.67, 2.70,
2.35): `python -m jaxtok.pretrained.convert REPOSITORY --kind=one_d_piece`.

Batches are theirs if they had eight GPUs, as TiTok had: four times as many pictures in the first stage as there and
twice as many in the second. What differs: from TiTok's recipes, what configs/titok.py says. How the B model draws is
not published: as L's. The published sizes draw one n for a batch, as published, the small ones one for each picture,
and a quarter of their pictures keep all tokens: the later ones are seldom seen otherwise, and so few steps then leave
them unused.
"""

from configs import common, titok


def get_config(variant=""):
    return common.choose(variant, VARIANTS)


def ordered(config, **law):
    """A run of configs/titok.py with tail drop, of which evaluation says what 1, 2, 4 ... tokens are worth."""
    n = config.task.model.encoder.tokens
    config.task.model.nested_dropout = dict(name="nn.nested_dropout.NestedDropout", **law)
    config.task.token_counts = tuple(2**i for i in range(n.bit_length()))  # n is a power of two
    return config


def two_stages(size):
    runs = dict(codes=titok.codes_stage(size, 256), pixels=titok.pixels_stage(size, 256))
    for run, batch in zip(runs.values(), (1024, 512), strict=True):
        ordered(run, **PUBLISHED).batch_size = batch
    return common.in_stages(**runs)


SMALL = dict(law="uniform", full=0.25)
PUBLISHED = dict(law="uniform_batch")
SIZES = ("s", "b", "l")
VARIANTS = {"": lambda: ordered(titok.small(), **SMALL), "tiny": lambda: ordered(titok.tiny(), **SMALL)} | {
    size: lambda size=size: two_stages(size) for size in SIZES
}
VARIANTS |= {
    "masked": lambda: common.small_generator("one_d_piece", name=titok.MASKED, vocabulary=512, length=16),
    "masked_tiny": lambda: common.tiny_generator("one_d_piece_tiny", name=titok.MASKED, vocabulary=64, length=8),
}
VARIANTS |= {
    f"masked_{size}": lambda size=size, scale=scale: titok.masked(
        f"one_d_piece_{size}", 256, titok.VIT, steps=16, temperature=3.0, guidance=titok.bending(scale)
    )
    for size, scale in (("s", 12.5), ("b", 5.5), ("l", 5.5))
}
