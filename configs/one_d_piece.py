"""One-D-Piece: TiTok's row of codes in the order of their worth: any first n make a picture (arXiv 2501.10064).

    python -m jaxtok.train --config=configs/one_d_piece.py --workdir=runs/one_d_piece

While it trains, the decoder sees the first n tokens only, n uniform in 1 ... N; encoder and codebook are TiTok's. A
token that is dropped is no key of the decoder's attention, which is the same as cutting the row behind the n-th.

Variants: none = a small one on the emoji of a pip package, minutes on two CPU cores; tiny = seconds, for tests; s, b, l
= the published sizes, 256 tokens of 4,096 codes, on your own pictures of 256 px, in the two stages of
configs/titok.py:l32 (runs/vqgan as there):

    python -m jaxtok.train --config=configs/one_d_piece.py:l --workdir=runs/one_d_piece_l \\
        --config.data.train.source.path=IMAGES --config.data.eval.source.path=IMAGES

Published weights in the same modules (rFID at 256 tokens by their README: S 1.48, B 1.11, L 1.08):
`python -m jaxtok.pretrained.convert REPOSITORY --kind=one_d_piece`.

What differs: from TiTok's recipes, what configs/titok.py says; batches are not accumulated. The published sizes draw
one n for a batch, as published, the small ones one for each picture, and a quarter of their pictures keep all tokens:
the later ones are seldom seen otherwise, and so few steps then leave them unused.
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
    return common.in_stages(**{name: ordered(run, **PUBLISHED) for name, run in runs.items()})


SMALL = dict(law="uniform", full=0.25)
PUBLISHED = dict(law="uniform_batch")
SIZES = ("s", "b", "l")
VARIANTS = {"": lambda: ordered(titok.small(), **SMALL), "tiny": lambda: ordered(titok.tiny(), **SMALL)} | {
    size: lambda size=size: two_stages(size) for size in SIZES
}
