"""How much of its codebook a tokenizer uses, from the codes of many pictures."""

from collections.abc import Sequence

import numpy as np


def usage(indices: np.ndarray, vocabulary: int | Sequence[int]) -> dict:
    """What the codes of n pictures say of the codebook.

    Entropies are those of the counts (plug-in), so n samples show at most log2(n) bits: `shown` and `shown_position`
    are those ceilings. Codes of G groups [n N G] have G codebooks: shares and perplexities are means over groups, bits
    are sums over them, which is what a token says if its groups are independent, and otherwise more.

    Args:
      indices: int [n N], or [n N G].
      vocabulary: sizes; an int, or G of them.

    Returns dict with
      used: share of the vocabulary that occurs.
      perplexity: 2 to the entropy.
      bits, of_bits: entropy of a token over all positions, and log2 of the vocabulary.
      shown: the most `bits` that so many tokens can show; `shown_position`: so many pictures, at one position.
      positions: a dict a position, `bits` and `distinct`, the share of the pictures whose token there no sum of
        repetitions explains: number of different tokens / n.
      distinct_first: `distinct` of the first position.
    """
    sizes = np.atleast_1d(np.asarray(vocabulary, np.float64))  # [G]
    indices = np.asarray(indices)
    n = len(indices)
    indices = indices.reshape(n, -1, len(sizes))  # [n N G]
    groups = [_counts(one) for one in np.moveaxis(indices, 2, 0)]
    positions = [
        {"bits": sum(_bits(_counts(one)) for one in place.T), "distinct": len(np.unique(place, axis=0)) / n}
        for place in np.moveaxis(indices, 1, 0)
    ]
    return {
        "used": float(np.mean([len(counts) / size for counts, size in zip(groups, sizes, strict=True)])),
        "perplexity": float(np.mean([2 ** _bits(counts) for counts in groups])),
        "bits": sum(map(_bits, groups)),
        "of_bits": float(np.log2(sizes).sum()),
        "shown": float(np.log2(np.minimum(sizes, n * indices.shape[1])).sum()),
        "shown_position": float(np.log2(np.minimum(sizes, n)).sum()),
        "positions": positions,
        "distinct_first": positions[0]["distinct"],
    }


def _counts(codes: np.ndarray) -> np.ndarray:
    return np.unique(codes, return_counts=True)[1]


def _bits(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0


def bits_of(vocabulary: int | Sequence[int] | None) -> float | None:
    """What a token can say at most: log2 of its vocabulary, summed over groups. None for continuous tokens."""
    return None if vocabulary is None else float(np.log2(np.atleast_1d(vocabulary)).sum())
