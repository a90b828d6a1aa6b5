"""Attention masks (bool [query, key], True = may attend) and token masks (bool [B N], True = kept)."""

import jax.numpy as jnp
import numpy as np


def prefix_causal(prefix, length):
    """The first `prefix` tokens see each other only; token i >= prefix sees all tokens up to itself.

    Returns a constant bool [length length]. The encoder's mask in FlexTok (arXiv 2502.13967): patches are the prefix.
    """
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    return (key < prefix) | (key <= query)  # [N N]


def keep_prefix(k, n):
    """Keeps the first k of n tokens: int k [B] -> bool [B n]."""
    return jnp.arange(n)[None, :] < jnp.asarray(k)[:, None]  # [B N]


def scale_causal(scales):
    """Grids of s x s tokens, s of `scales`, one behind the other: a token sees its own scale and those before it.

    Returns a constant bool [L L], L the sum of s^2 (HieraTok, arXiv 2509.23736; VAR, arXiv 2404.02905).
    """
    scale = np.repeat(np.arange(len(scales)), np.square(scales))  # [L]
    return scale[None, :] <= scale[:, None]
