"""Transforms of one example: factories of functions `f(example, rng) -> example`.

Pictures stay uint8 [H W 3]; the codec normalises on the device. A transform that moves pixels across the borders of
patches drops `patch_labels`, for they would no longer be exact. No transform changes its input.
"""

from pathlib import Path

import numpy as np
from PIL import Image

METHODS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's numbers


def resize_crop(size, method="bilinear"):
    """Short side to `size`, then the centre: image uint8 [size size 3]. The default is FlexTok's (antialiased).

    Rounding as in torchvision's Resize and CenterCrop: long side down, corner of the crop to the nearest, half to even.
    """
    resample = resampling(method)

    def transform(example, rng):
        del rng
        h, w, _ = example["image"].shape
        if h == w == size:
            return example
        short = min(h, w)
        new_h, new_w = size * h // short, size * w // short
        picture = Image.fromarray(example["image"]).resize((new_w, new_h), resample)
        top, left = round((new_h - size) / 2), round((new_w - size) / 2)
        return without_patches(example, np.asarray(picture.crop((left, top, left + size, top + size))))

    return transform


def random_crop(size, scale=(0.8, 1.0), method="bilinear"):
    """A random square whose side is `scale` of the short side, anywhere in the picture, resized to [size size 3]."""
    resample = resampling(method)
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"random_crop: scale must be two numbers with 0 < low <= high <= 1, got {scale}.")

    def transform(example, rng):
        h, w, _ = example["image"].shape
        side = min(h, w) * rng.uniform(low, high)
        left, top = rng.uniform(0, w - side), rng.uniform(0, h - side)
        picture = Image.fromarray(example["image"])
        picture = picture.resize((size, size), resample, box=(left, top, left + side, top + side))
        return without_patches(example, np.asarray(picture))

    return transform


def flip(p=0.5):
    """Left and right exchanged with probability `p`; `patch_labels` with them."""
    if not 0 <= p <= 1:
        raise ValueError(f"flip: p must be a probability, got {p}.")

    def transform(example, rng):
        if rng.random() >= p:
            return example
        return example | {k: example[k][:, ::-1] for k in ("image", "patch_labels") if k in example}

    return transform


def shift(pixels, mode="edge"):
    """Moves the picture by up to `pixels` in each direction, every whole step equally likely.

    What comes in repeats the border (`mode="edge"`) or mirrors the picture at it (`mode="reflect"`).
    """
    if mode not in ("edge", "reflect"):
        raise ValueError(f"shift: mode must be 'edge' or 'reflect', got {mode!r}.")
    if pixels < 0:
        raise ValueError(f"shift: pixels must not be negative, got {pixels}.")

    def source_index(length, offset):
        index = np.arange(offset, length + offset)
        if mode == "reflect":
            index = (length - 1) - np.abs((length - 1) - np.abs(index))
        return index

    def transform(example, rng):
        image = example["image"]
        h, w, _ = image.shape
        if pixels >= min(h, w):
            raise ValueError(f"shift: {pixels} pixels is too much for a picture of {h} x {w}.")
        dy, dx = rng.integers(-pixels, pixels + 1, size=2)
        image = image.take(source_index(h, dy), axis=0, mode="clip").take(source_index(w, dx), axis=1, mode="clip")
        return without_patches(example, image)

    return transform


def caption_bytes(length):
    """Adds `text`, int32 [length]: the caption's UTF-8 bytes, each plus 1, then zeros: `encoders.text` reads it.

    A longer caption ends with the last character that fits whole.
    """
    if length < 1:
        raise ValueError(f"caption_bytes: length must be at least 1, got {length}.")

    def transform(example, rng):
        del rng
        read = caption_of(example).encode("utf-8", "replace")[:length].decode("utf-8", "ignore").encode()
        return with_text(example, np.frombuffer(read, np.uint8).astype(np.int32) + 1, length)

    return transform


def caption_words(tokenizer, length):
    """Adds `text`, int32 [length]: the caption's ids by a tokenizer.json, then zeros, for a tower of `pretrained`.

    tokenizer: the path of that file, which belongs to the tower's weights: MiniLM's, T5's, CLIP's. It says which tokens
    begin and end a text; a longer caption loses its last words, not these. Padding it asks for is left out.

    FileNotFoundError where there is none, ValueError where it is no such file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError('caption_words needs the library tokenizers: pip install "jaxtok[text]".') from None
    if not Path(tokenizer).is_file():
        raise FileNotFoundError(
            f"caption_words: there is no {tokenizer}. It is the tokenizer.json that stands beside the weights of the "
            "tower (docs/pretrained.md): set `tokenizer` to its path."
        )
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"caption_words: {tokenizer} is no tokenizer.json ({error}).") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def transform(example, rng):
        del rng
        return with_text(example, tokenizer.encode(caption_of(example)).ids, length)

    return transform


def caption_of(example):
    if "caption" not in example:
        raise ValueError(f"There is no caption to make a text of; this example has {', '.join(sorted(example))}.")
    return example["caption"]


def with_text(example, ids, length):
    text = np.zeros(length, np.int32)
    text[: len(ids)] = ids
    return example | {"text": text}


def resampling(method):
    if method not in METHODS:
        raise ValueError(f"Unknown resampling method {method!r}: choose one of {', '.join(METHODS)}.")
    return METHODS[method]


def without_patches(example, image):
    return {k: v for k, v in example.items() if k != "patch_labels"} | {"image": image}
