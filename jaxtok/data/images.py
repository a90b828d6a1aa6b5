"""What every source of pictures needs: bytes to RGB pixels, and a stable way to hold pictures out."""

import hashlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class BadRecord(ValueError):
    """A record that cannot be read; the message names it and says why. The pipeline skips and counts these."""


def decode_image(file, name):
    """Decodes an encoded picture to RGB uint8 [H W 3].

    The orientation noted by a camera (EXIF) is applied, transparency is laid on white, 16-bit grey is cut to 8 bits.

    Args:
      file: a path, or the encoded bytes.
      name: what to call the picture in an error.

    Raises:
      BadRecord: the file is missing, truncated, no picture, or has pixels of no known range (32-bit, float).
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            return to_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:
        raise BadRecord(f"{name}: no picture of a known format") from error
    except Exception as error:  # Pillow's plugins raise nearly every type on broken input
        raise BadRecord(f"{name}: {error or type(error).__name__}") from error


def to_rgb(picture):
    """A Pillow picture of any mode as RGB uint8 [H W 3]; transparency is laid on white."""
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)  # [H W 3]
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode!r} have no known range; save 8 or 16 bits a channel instead")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))  # [H W 3], a copy: writable


def stable_fraction(text):
    """A number in [0, 1) that depends on `text` alone: the same on every machine, in every version, in any order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
