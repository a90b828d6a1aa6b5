"""How much of a vocabulary a batch of codes uses."""

import jax.numpy as jnp


def usage(indices):
    """int [...] -> (perplexity, distinct), float32 scalars: exp of the entropy of the codes seen, and how many differ.

    By sorting, so the memory is that of the codes and not of the vocabulary. Both are bounded by the number of codes.
    """
    codes = jnp.sort(indices.reshape(-1))
    count = jnp.searchsorted(codes, codes, side="right") - jnp.searchsorted(codes, codes, side="left")
    return jnp.exp(-jnp.log(count / codes.size).mean()), (1.0 / count).sum()
