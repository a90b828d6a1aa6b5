"""Rate and distortion: what JPEG and WebP make of the bytes that a tokenizer spends."""

import numpy as np

from jaxtok.eval.reconstruction import jpeg_webp

QUALITIES = (0, 5, 15, 35, 65, 90)
LOWER = ("lpips",)  # scores of which less is better
SCALES = (1, 1 / 2, 1 / 4, 1 / 8)  # few bytes are spent best on a small picture, drawn large again


def codec_rows(images: np.ndarray, scores=None) -> dict[str, list[dict]]:
    """ "JPEG" and "WebP" -> their rows of `jpeg_webp`, over qualities and down-scaled pictures.

    Args:
      images: uint8 [N H W 3].
      scores: of `jpeg_webp`.
    """
    scales = [scale for scale in SCALES if min(images.shape[1:3]) * scale >= 2]
    rows = jpeg_webp(images, QUALITIES, scales, **({} if scores is None else {"scores": scores}))
    return {codec: [row for row in rows if row["codec"].startswith(codec)] for codec in ("JPEG", "WebP")}


def front(rows: list[dict], score: str = "psnr") -> list[dict]:
    """The rows that no row of as few bytes beats in a score, from few bytes to many: a codec at its best."""
    sign, best = (-1 if score in LOWER else 1), []
    for row in sorted(rows, key=lambda row: (row["bytes"], -sign * row[score])):
        if not best or sign * row[score] > sign * best[-1][score]:
            best.append(row)
    return best


def best_within(curve: list[dict], size: float) -> dict | None:
    """The best row of a curve with at most `size` bytes a picture; None if even its smallest file has more."""
    return next((row for row in reversed(curve) if row["bytes"] <= size), None)


def bytes_for(curve: list[dict], psnr: float) -> float | None:
    """The fewest bytes at which a curve reaches a PSNR; None if it does not."""
    return next((row["bytes"] for row in curve if row["psnr"] >= psnr), None)


def table(points: list[dict], curves: dict[str, list[dict]]) -> list[dict]:
    """A row a token count, ready to print: the tokenizer's PSNR, the codecs' at as many bytes, theirs at its PSNR.

    Args:
      points: of the tokenizer: `tokens`, `bytes`, `psnr` each.
      curves: codec -> its `front` in PSNR.
    """
    rows = []
    for point in points:
        row = {"tokens": point["tokens"], "bytes": f"{point['bytes']:.1f}", "PSNR": f"{point['psnr']:.2f}"}
        for codec, curve in curves.items():
            there = best_within(curve, point["bytes"])
            row[f"{codec}, no more bytes"] = f"{there['psnr']:.2f}" if there else f"from {curve[0]['bytes']:.0f} on"
            needed = bytes_for(curve, point["psnr"])
            row[f"{codec} bytes, same PSNR"] = f"{needed:.0f}" if needed else "never"
        rows.append(row)
    return rows
