"""One-D-Piece (arXiv 2501.10064) -> a Tokenizer of ours: a TiTok of two stages whose first tokens alone make a picture.

The keys of encoder, quantizer and decoder are those of the public code; those of the pixel decoder are taken to be
those of TiTok's second stage. No checkpoint has been seen.
"""

from jaxtok.pretrained import titok
from jaxtok.pretrained.convert import Report

LICENCE = "One-D-Piece: the code is under Apache-2.0."


def load(state_dict, published, shapes) -> tuple[dict, dict, Report]:
    """As `titok.load`; the task drops tails, one length a batch, and rebuilds pictures from 1, 2, 4 ... tokens."""
    config, params, report = titok.load(state_dict, published, shapes)
    task = config["task"]
    n = task["model"]["encoder"]["tokens"]
    dropout = dict(name="nn.nested_dropout.NestedDropout", law="uniform_batch")
    counts = tuple(sorted({2**i for i in range(n.bit_length())} | {n}))
    task |= dict(model=task["model"] | dict(nested_dropout=dropout), token_counts=counts)
    return {"task": task}, params, report
