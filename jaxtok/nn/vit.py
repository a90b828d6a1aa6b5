"""What vision transformers of the usual form share (arXiv 2010.11929): pre-norm blocks with biases and exact GELU."""

import flax.linen as nn

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm
from jaxtok.nn.patch import patchify


def embed(x, patch, width, dtype):
    """Pictures [B H W C] -> patches [B P width], in the calling module as "patch_embed", kernel [p p C width]."""
    patches = patchify(x, patch)
    patches = patches.reshape(*patches.shape[:2], patch, patch, x.shape[-1])
    return Linear(width, inputs=3, dtype=dtype, name="patch_embed")(patches)


def trunk(x, mask=None, *, depth, head_dim, dtype, remat, train):
    """Norm, blocks, norm: x [B N D] -> [B N D], in the calling module as "norm_pre", "blocks" and "norm_post".

    mask: bool [B 1 N] of what may be attended to, or None.
    """
    blocks = stack(
        depth, remat=remat, head_dim=head_dim, mlp="gelu", bias=("qkv", "out", "mlp"), dtype=dtype, name="blocks"
    )
    x, _ = blocks(Norm(name="norm_pre")(x).astype(dtype), Side(mask=mask), train)
    return Norm(name="norm_post")(x)


def free(module, name, rows, width):
    """A learned table [rows width] of the module: places, tokens; normal, of deviation width^-0.5."""
    return module.param(name, nn.initializers.normal(width**-0.5), (rows, width))
