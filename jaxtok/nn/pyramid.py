"""A grid of tokens at several scales: means over ever smaller squares (HieraTok, arXiv 2509.23736)."""

import jax.numpy as jnp
from einops import rearrange, reduce, repeat


def pool(z, scales):
    """z [B n n D] -> [B L D]: its means over s x s equal squares for each s of `scales`, rows first, one behind the
    other.

    ValueError where the grid is not square, or s does not divide its side.
    """
    return jnp.concatenate([rearrange(means(z, s), "b h w d -> b (h w) d") for s in scales], 1)


def means(z, scale):
    """z [B n n D] -> [B s s D], the mean of each of s x s equal squares."""
    height, width = z.shape[1:3]
    if height != width or scale < 1 or height % scale:
        raise ValueError(
            f"A grid of {height} x {width} tokens has no means over {scale} x {scale} equal squares: give scales that "
            "divide the side of a square grid."
        )
    return reduce(z, "b (h i) (w j) d -> b h w d", "mean", h=scale, w=scale)


def coarsen(z, scale):
    """z [B n n D] with the mean of its square, of s x s, in the place of every token."""
    side = z.shape[1] // scale
    return repeat(means(z, scale), "b h w d -> b (h i) (w j) d", i=side, j=side)
