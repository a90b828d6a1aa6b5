"""How close pictures are to the originals: PSNR and SSIM, and what JPEG and WebP reach at how many bytes."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.B
K1, K2 = 0.01, 0.03


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each picture, in dB, over all its pixels and channels; infinite for equal pictures.

    Args:
      a, b: [B H W C], uint8, or floats in [0, 1]: values outside are clipped, as a screen would.

    Returns:
      float32 [B].

    Raises:
      ValueError for other or unequal shapes, TypeError for other dtypes.
    """
    a, b = _pair(a, b)
    return -10 * jnp.log10(jnp.mean((a - b) ** 2, axis=(1, 2, 3)))  # [B]


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of each picture (Wang, Bovik, Sheikh, Simoncelli 2004): 1 for equal pictures.

    Local means, variances and the covariance are weighted by an 11x11 Gaussian window of sigma 1.5 that sums to 1
    (population statistics, no sample correction); C1 = 0.01^2, C2 = 0.03^2 for a data range of 1. Only windows inside
    the picture count; the map is averaged over positions and channels. No conversion to grey.

    Args:
      a, b: [B H W C] with H, W >= 11, uint8, or floats in [0, 1]: values outside are clipped, as a screen would.

    Returns:
      float32 [B].

    Raises:
      ValueError for other or unequal shapes, TypeError for other dtypes.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim needs pictures of at least {WINDOW}x{WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}")
    mean_a, mean_b = _blur(a), _blur(b)  # [B H-10 W-10 C]
    # Second moments about the picture's middle grey: in float32 the differences below then lose less.
    low_a, low_b = a - 0.5, b - 0.5
    var_a = _blur(low_a**2) - (mean_a - 0.5) ** 2
    var_b = _blur(low_b**2) - (mean_b - 0.5) ** 2
    covariance = _blur(low_a * low_b) - (mean_a - 0.5) * (mean_b - 0.5)
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_a + var_b + K2**2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))  # [B]


def jpeg_webp(
    images: np.ndarray,
    qualities: Sequence[int] = (0, 10, 50),
    scales: Sequence[float] = (1,),
    scores: Mapping[str, Callable] = MappingProxyType({"psnr": psnr, "ssim": ssim}),
) -> list[dict]:
    """What JPEG and WebP reach on these pictures: the yardstick beside a tokenizer's bytes.

    Args:
      images: uint8 [N H W 3].
      qualities: Pillow's quality setting, 0 to 100. JPEG gets tables fitted to the picture (`optimize`), or a fixed 400
        bytes would count against it; the rest are Pillow's defaults (colour at half resolution).
      scales: 1/2 stores pictures of half the height and width (Lanczos), drawn large again for the score (bicubic).
      scores: name -> f(originals, decoded), both uint8 [N H W 3], -> [N].

    Returns:
      One row a format, quality and scale, ready for a table: `codec` (their names), `bytes` a picture (the mean size of
      the whole file, headers included), and each score, a mean over the pictures.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"jpeg_webp takes uint8 pictures [N H W 3], got {images.dtype} {images.shape}")
    rows = []
    for codec, quality, scale in itertools.product(("JPEG", "WebP"), qualities, scales):
        pairs = [_encode(picture, codec, quality, scale) for picture in images]
        size = sum(size for size, _ in pairs) / len(pairs)
        decoded = np.stack([picture for _, picture in pairs])
        means = {name: float(jnp.mean(score(images, decoded))) for name, score in scores.items()}
        rows.append({"codec": f"{codec} q{quality}" + f" at {scale:g}" * (scale != 1), "bytes": size, **means})
    return rows


def _encode(picture: np.ndarray, codec: str, quality: int, scale: float) -> tuple[int, np.ndarray]:
    """Bytes of the file, and the picture as it comes back."""
    height, width, _ = picture.shape
    buffer, image = io.BytesIO(), Image.fromarray(picture)
    if scale != 1:
        small = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(small, Image.Resampling.LANCZOS)
    image.save(buffer, format=codec, quality=quality, optimize=True)
    back = Image.open(buffer).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return len(buffer.getvalue()), np.asarray(back)


def _pair(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both sets of pictures as float32 in [0, 1], or the error that says why not."""
    if jnp.shape(a) != jnp.shape(b) or jnp.ndim(a) != 4:
        raise ValueError(f"pictures to compare are two [B H W C] of one shape, got {jnp.shape(a)} and {jnp.shape(b)}")
    return _unit(a), _unit(b)


def _unit(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 255
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"pictures are uint8 in [0, 255] or floats in [0, 1], got {x.dtype}")
    return jnp.clip(x.astype(jnp.float32), 0, 1)


def _blur(x: jax.Array) -> jax.Array:
    """[B H W C] -> [B H-10 W-10 C]: the Gaussian mean at every window inside the picture.

    A sum of shifted pictures, not a convolution: those run in bfloat16 on a TPU unless told otherwise.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SIGMA**2))
    window = (window / window.sum()).tolist()
    h, w = x.shape[1] - WINDOW + 1, x.shape[2] - WINDOW + 1
    x = sum(weight * x[:, i : i + h] for i, weight in enumerate(window))
    return sum(weight * x[:, :, i : i + w] for i, weight in enumerate(window))
