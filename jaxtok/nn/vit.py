"""What vision transformers of the usual form share (arXiv 2010.11929): pre-norm blocks with biases and exact GELU."""

import flax.linen as nn

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm
from jaxtok.nn.patch import patchify

# What these make belongs to the module that calls them and gives itself, whose fields say the sizes.


def embed(module, x):
    """Pictures [B H W C] -> patches [B P D], "patch_embed" of the module, kernel [p p C D]."""
    patches = patchify(x, module.patch)
    patches = patches.reshape(*patches.shape[:2], module.patch, module.patch, x.shape[-1])
    return Linear(module.width, inputs=3, dtype=module.dtype, name="patch_embed")(patches)


def trunk(module, x, mask=None, *, train):
    """Norm, blocks, norm: x [B N D] -> [B N D], "norm_pre", "blocks" and "norm_post" of the module.

    mask: bool [B 1 N] of what may be attended to, or None.
    """
    fields = dict(head_dim=module.head_dim, mlp="gelu", bias=("qkv", "out", "mlp"), dtype=module.dtype)
    blocks = stack(module.depth, remat=module.remat, name="blocks", **fields)
    x, _ = blocks(Norm(name="norm_pre")(x).astype(module.dtype), Side(mask=mask), train)
    return Norm(name="norm_post")(x)


def free(module, name, rows, width):
    """A learned table [rows width] of the module: places, tokens; normal, of deviation width^-0.5."""
    return module.param(name, nn.initializers.normal(width**-0.5), (rows, width))
