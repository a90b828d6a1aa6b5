"""What vision transformers of the usual form share (arXiv 2010.11929): pre-norm blocks with biases and exact GELU."""

import flax.linen as nn

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.linear import Linear
from jaxtok.nn.norm import Norm
from jaxtok.nn.patch import patchify
from jaxtok.nn.rotary import rotary_2d

# What these make belongs to the module that calls them and gives itself, whose fields say the sizes.


def embed(module, x):
    """Pictures [B H W C] -> patches [B P D], "patch_embed" of the module, kernel [p p C D]."""
    patches = patchify(x, module.patch)
    patches = patches.reshape(*patches.shape[:2], module.patch, module.patch, x.shape[-1])
    return Linear(module.width, inputs=3, dtype=module.dtype, name="patch_embed")(patches)


def place(module, x, grid):
    """Tells tokens x [B h*w D] their places in a grid (h, w): (x, what `trunk` takes as rotary).

    As `module.positions` says: "learned" adds a table, "pos_embed" of the module, and so all grids are of one size;
    "rotary" turns queries and keys by row and column instead, whatever the grid.
    """
    if module.positions not in ("learned", "rotary"):
        raise ValueError(f'{type(module).__name__}.positions is "learned" or "rotary", not "{module.positions}".')
    if module.positions == "rotary":
        return x, rotary_2d(*grid, module.head_dim)
    return x + free(module, "pos_embed", x.shape[1], module.width), None


def trunk(module, x, mask=None, *, rotary=None, mlp="gelu", train):
    """Norm, blocks, norm: x [B N D] -> [B N D], "norm_pre", "blocks" and "norm_post" of the module.

    mask: bool [B 1 N] of what may be attended to, or [N N] of who may attend to whom, or None. rotary: tables of
    nn.rotary, or None. mlp: see nn.mlp.FeedForward.
    """
    fields = dict(head_dim=module.head_dim, mlp=mlp, bias=("qkv", "out", "mlp"), dtype=module.dtype)
    blocks = stack(module.depth, remat=module.remat, name="blocks", **fields)
    x, _ = blocks(Norm(name="norm_pre")(x).astype(module.dtype), Side(mask=mask, rotary=rotary), train)
    return Norm(name="norm_post")(x)


def free(module, name, rows, width):
    """A learned table [rows width] of the module: places, tokens; normal, of deviation width^-0.5."""
    return module.param(name, nn.initializers.normal(width**-0.5), (rows, width))


def free_prefix(module, name, rows, width):
    """The first `rows` of such a table, which has as many as there were when it was made. ValueError for more."""
    if not module.has_variable("params", name):
        return free(module, name, rows, width)
    table = module.get_variable("params", name)
    if rows > len(table):
        raise ValueError(f"{type(module).__name__}.{name} has places for at most {len(table)} tokens, got {rows}.")
    return table[:rows]


def read(module, context):
    """A text as tokens of the module and which of them count: ([B T D], bool [B T]); "text_embed" and "text_pos" of it.

    context: {"tokens" [B T C], "mask" bool [B T]}. ValueError without one.
    """
    if context is None:
        raise ValueError(
            f"{type(module).__name__} reads a text, for its field `text` is set, and none was given: pass `context`, "
            "as a Tokenizer with a `text_tower` does."
        )
    text = Linear(module.width, dtype=module.dtype, name="text_embed")(context["tokens"])
    return text + free_prefix(module, "text_pos", text.shape[1], module.width), context["mask"]
