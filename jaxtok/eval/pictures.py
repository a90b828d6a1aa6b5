"""Pictures of pictures: the grid one looks at to see what a tokenizer keeps."""

import os
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 96  # pixels: the least width and height at which a small picture can be judged by eye
GAP, FONT_SIZE = 6, 15
PAGE = (235, 235, 235)  # light grey: a white picture still shows where it ends


def grid(columns: Mapping[str, np.ndarray], path: str | os.PathLike | BinaryIO, scale: int | None = None) -> None:
    """Writes a PNG with one column a title and one row a picture, pixels as squares.

    Args:
      columns: title -> uint8 [N H W 3], all of one shape. A title may have several lines; its column makes room for it.
      path: the PNG to write, whose folder must exist, or an open file.
      scale: every pixel becomes a square of this many. Default: the least that makes a cell 96 pixels wide and high.

    Raises:
      ValueError if there is no column, or one is not of the first's shape or not uint8 [N H W 3].
    """
    if not columns:
        raise ValueError(f"no pictures to draw in {path}: columns is empty")
    columns = {title: np.asarray(pictures) for title, pictures in columns.items()}
    shape = next(iter(columns.values())).shape
    for title, pictures in columns.items():
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.shape != shape:
            raise ValueError(
                f"column {title!r} is {pictures.dtype} {pictures.shape}; all columns are uint8 [N H W 3] of one shape, "
                f"the first column's is {shape}"
            )
    n, h, w, _ = shape
    scale = scale or max(1, -(-CELL // min(h, w)))
    font = ImageFont.load_default(FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = {title: ruler.multiline_textbbox((0, 0), title, font=font) for title in columns}  # left, top, right, bottom
    widths = {title: max(w * scale, round(box[2])) for title, box in boxes.items()}
    header = round(max(box[3] for box in boxes.values())) + 2 * GAP
    sheet = Image.new("RGB", (GAP + sum(widths.values()) + GAP * len(columns), header + n * (h * scale + GAP)), PAGE)
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for title, pictures in columns.items():
        middle = left + widths[title] / 2
        draw.multiline_text((middle, header - GAP), title, fill="black", font=font, anchor="md", align="center")
        for row, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((w * scale, h * scale), Image.Resampling.NEAREST)
            sheet.paste(cell, (round(middle - w * scale / 2), header + row * (h * scale + GAP)))
        left += widths[title] + GAP
    sheet.save(path, format="PNG")
