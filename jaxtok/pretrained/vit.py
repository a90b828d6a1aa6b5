"""DINOv2 (arXiv 2304.07193): a ViT that gives features of patches, and its published weights -> our tree.

The files are `dinov2_vit{s,b,l,g}14_pretrain.pth` of the official repository, or those of `facebook/dinov2-small`,
`-base`, `-large` and `-giant` on the hub. Not those "with registers", which are other weights.
"""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.nn.decoder_block import SelfAttention, Side, stack
from jaxtok.nn.interpolate import cubic
from jaxtok.nn.linear import Linear
from jaxtok.nn.mlp import FeedForward
from jaxtok.nn.norm import Norm
from jaxtok.nn.patch import patchify
from jaxtok.pretrained.convert import Report, convert, matching

LICENCE = "The weights of DINOv2 are under the Apache License 2.0."

EPS = 1e-6  # of every LayerNorm
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
BIASES = ("qkv", "out")


class ViT(nn.Module):
    """DINOv2's ViT: uint8 pictures [B H W 3] -> features of their patches, float32 [B h w D].

    Pictures are resized to squares and normalised here. The features are those after the last LayerNorm, without the
    class token; `layers` gives the tokens of earlier blocks. Widths and depths: small 384, 12; base 768, 12; large
    1024, 24; giant 1536, 40 with mlp="swiglu".

    Attributes:
      width, depth, head_dim: of the transformer.
      patch: side of a patch.
      mlp: "gelu", or "swiglu" in the giant.
      grid: rows and columns of the learned table of positions.
      size: side of the square that pictures are resized to, a multiple of the patch; with 518 the table fits as it is.
      dtype: of the computation; norms and the softmax are float32.
    """

    width: int
    depth: int
    head_dim: int = 64
    patch: int = 14
    mlp: str = "gelu"
    grid: tuple[int, int] = (37, 37)
    size: int = 518
    dtype: Any = jnp.float32

    def __call__(self, images):
        side = self.size // self.patch
        x, _ = self.tokens(resize(images, self.size))
        return x.reshape(len(x), side, side, self.width)

    def layers(self, pictures, blocks):
        """Floats [B H W 3] in [0, 1] -> float32 ([B h*w D], ...), patches' tokens after so many blocks, not normalised.

        0: as they enter the first. What lies beyond the range stays there, so that a gradient can pull it back.
        """
        if not all(0 <= i <= self.depth for i in blocks):
            raise ValueError(f"The tower has {self.depth} blocks; {tuple(blocks)} are not all among them.")
        _, seen = self.tokens(at_size(255 * pictures.astype(jnp.float32), self.size), shows=True)
        return tuple(seen[i][:, 1:].astype(jnp.float32) for i in blocks)

    @nn.compact
    def tokens(self, x, shows=False):
        """Float32 [B size size 3] in [0, 255] -> (features [B N D], and if `shows` tokens after 0, 1 ... blocks)."""
        normal = nn.initializers.normal(0.02)
        cls = self.param("cls_token", normal, (self.width,))
        table = self.param("pos_embed", normal, (1 + self.grid[0] * self.grid[1], self.width))
        x = (x / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        x = patchify(x, self.patch)
        x = x.reshape(*x.shape[:2], self.patch, self.patch, 3)  # [B N p p 3]
        x = Linear(self.width, inputs=3, dtype=self.dtype, name="patch_embed")(x)  # [B N D]
        side = self.size // self.patch
        x = x + positions(table[1:], self.grid, (side, side))
        x = jnp.concatenate([jnp.broadcast_to(cls + table[0], (len(x), 1, self.width)), x], 1).astype(self.dtype)
        first, fields = x, dict(head_dim=self.head_dim, mlp=self.mlp, dtype=self.dtype, shows=shows)
        x, seen = stack(self.depth, target=Block, name="blocks", **fields)(x, Side(), False)
        features = Norm(eps=EPS, name="norm")(x[:, 1:]).astype(jnp.float32)
        return features, (first, *seen) if shows else None


class Block(nn.Module):
    """Attention, then an MLP, each on normalised tokens, its output scaled channel by channel; for `stack`."""

    head_dim: int
    mlp: str
    dtype: Any
    shows: bool

    @nn.compact
    def __call__(self, x, side, train=False):
        scale = lambda name: self.param(name, nn.initializers.ones, x.shape[-1:]).astype(self.dtype)
        y = Norm(eps=EPS, name="norm1")(x)
        y, _ = SelfAttention(self.head_dim, None, EPS, BIASES, self.dtype, name="attn")(y, side)
        x = x + scale("scale1") * y
        y = FeedForward(self.mlp, None, True, self.dtype, name="mlp")(Norm(eps=EPS, name="norm2")(x))
        x = x + scale("scale2") * y
        return x, x if self.shows else None


def resize(images, size):
    """uint8 [B H W 3] -> float32 [B size size 3] in [0, 255]: bicubic, anti-aliased where it shrinks, as Pillow's.

    Raises ValueError for other types, whose range would be a guess.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"A tower takes uint8 pictures, as a batch holds them, not {images.dtype}.")
    return jnp.clip(at_size(images.astype(jnp.float32), size), 0, 255)


def at_size(x, size):
    """The same of floats, which may leave their range."""
    return x if x.shape[1:3] == (size, size) else jax.image.resize(x, (len(x), size, size, x.shape[3]), "cubic")


def positions(table, grid, wanted):
    """The table [h*w D] of a grid (h, w), at another grid: [h'*w' D]; itself at its own.

    As the official code does it: bicubic, a step of the new grid being h / (h' + 0.1) of the old one's. The hub's port
    leaves that tenth out, and its features differ a little where the grid is not the table's.
    """
    if tuple(grid) == tuple(wanted):
        return table
    rows, columns = (cubic(n, m, (m + 0.1) / n) for n, m in zip(grid, wanted, strict=True))
    y = jnp.einsum("hy,wx,yxd->hwd", rows, columns, table.reshape(*grid, -1))
    return y.reshape(-1, table.shape[-1])


# ---- published weights ----

# Linear kernels are [out in] there, [in out] here. Both the official names and, after a bar, the hub's.
_BLOCK = r"(?:blocks|encoder\.layer)\.(\d+)\."
_PATCH = r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\."
_OUT = _BLOCK + r"(?:attn\.proj|attention\.output\.dense)\."
_HUB = _BLOCK + r"attention\.attention\."
RULES = (
    (r"(?:embeddings\.)?cls_token", "cls_token", "1 1 d -> d"),
    (r"pos_embed|embeddings\.position_embeddings", "pos_embed", "1 n d -> n d"),
    (_PATCH + "weight", "patch_embed/kernel", "o c p q -> p q c o"),
    (_PATCH + "bias", "patch_embed/bias", "o -> o"),
    (_BLOCK + r"(norm[12])\.weight", r"blocks/\2/scale[\1]", "d -> d"),
    (_BLOCK + r"(norm[12])\.bias", r"blocks/\2/bias[\1]", "d -> d"),
    (_BLOCK + r"attn\.qkv\.weight", r"blocks/attn/qkv/kernel[\1]", "(t h d) i -> i h t d"),
    (_BLOCK + r"attn\.qkv\.bias", r"blocks/attn/qkv/bias[\1]", "(t h d) -> h t d"),
    (_HUB + r"query\.weight", r"blocks/attn/qkv/kernel[\1,:,:,0]", "(h d) i -> i h d"),
    (_HUB + r"key\.weight", r"blocks/attn/qkv/kernel[\1,:,:,1]", "(h d) i -> i h d"),
    (_HUB + r"value\.weight", r"blocks/attn/qkv/kernel[\1,:,:,2]", "(h d) i -> i h d"),
    (_HUB + r"query\.bias", r"blocks/attn/qkv/bias[\1,:,0]", "(h d) -> h d"),
    (_HUB + r"key\.bias", r"blocks/attn/qkv/bias[\1,:,1]", "(h d) -> h d"),
    (_HUB + r"value\.bias", r"blocks/attn/qkv/bias[\1,:,2]", "(h d) -> h d"),
    (_OUT + "weight", r"blocks/attn/out/kernel[\1]", "o (h d) -> h d o"),
    (_OUT + "bias", r"blocks/attn/out/bias[\1]", "o -> o"),
    (_BLOCK + r"(?:ls([12])\.gamma|layer_scale([12])\.lambda1)", r"blocks/scale\2\3[\1]", "d -> d"),
    (_BLOCK + r"mlp\.(fc1|fc2|gate|value)\.weight", r"blocks/mlp/\2/kernel[\1]", "o i -> i o"),
    (_BLOCK + r"mlp\.(fc1|fc2|gate|value)\.bias", r"blocks/mlp/\2/bias[\1]", "o -> o"),
    (_BLOCK + r"mlp\.(?:w3|weights_out)\.weight", r"blocks/mlp/out/kernel[\1]", "o i -> i o"),
    (_BLOCK + r"mlp\.(?:w3|weights_out)\.bias", r"blocks/mlp/out/bias[\1]", "o -> o"),
    (r"(?:layer)?norm\.weight", "norm/scale", "d -> d"),
    (r"(?:layer)?norm\.bias", "norm/bias", "d -> d"),
    (r"(?:embeddings\.)?mask_token", None, "of DINOv2's own training"),
)


def load(state_dict, published=None, shapes=None) -> tuple[dict, dict, Report]:
    """A published state dict {key: array} -> ({"tower": spec of the ViT}, its params, report).

    The sizes are those of the arrays: neither a config nor `shapes` is needed. Raises ValueError as `convert` does.
    """
    state_dict = halved(state_dict)
    fields = sizes(state_dict)
    image = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.uint8)
    like = jax.eval_shape(ViT(**fields).init, jax.random.key(0), image)["params"]
    params, report = convert(state_dict, RULES, like)
    return {"tower": dict(name="pretrained.vit.ViT", **fields)}, params, report


def halved(state_dict) -> dict:
    """The giant's gate and value, which are one matrix there, as two."""
    found = {}
    for key, array in state_dict.items():
        if m := re.fullmatch(r"(.*\.mlp\.)(?:w12|weights_in)(\..*)", key):
            gate, value = np.split(array, 2)
            found |= {f"{m[1]}gate{m[2]}": gate, f"{m[1]}value{m[2]}": value}
        else:
            found[key] = array
    return found


def sizes(state_dict) -> dict:
    """The fields of the ViT that these arrays are of. ValueError where they are no DINOv2's."""
    find = functools.partial(matching, state_dict)
    patch, table = find(_PATCH + "weight"), find(RULES[1][0])
    layers = [int(m[1]) for m, _ in find(_BLOCK + r"norm1\.weight")]
    if not (patch and table and layers) or find(r".*register_tokens"):
        raise ValueError(
            "These are no weights of DINOv2 (without registers): see the head of jaxtok/pretrained/vit.py."
        )
    width, _, side, _ = patch[0][1]
    grid = math.isqrt(table[0][1][1] - 1)
    mlp = "swiglu" if find(_BLOCK + r"mlp\.gate\.weight") else "gelu"
    return dict(width=width, depth=max(layers) + 1, patch=side, mlp=mlp, grid=(grid, grid), size=grid * side)
