"""Pictures to patches and back."""

from einops import rearrange


def patchify(x, patch):
    """[B H W C] -> tokens [B (H/p W/p) (p p C)], rows first, channels fastest. ValueError if p does not divide."""
    height, width = x.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(
            f"A picture (or latent) of {height} x {width} does not divide into patches of {patch}: "
            f"resize it to multiples of {patch} in the data's transforms, or change the model's patch."
        )
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x, grid, patch):
    """The inverse of patchify: [B (h w) (p p C)] -> [B h*p w*p C] for grid (h, w)."""
    return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], w=grid[1], p=patch, q=patch)
