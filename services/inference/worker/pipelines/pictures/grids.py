"""Several pictures as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, GROUND, LIGHT = "black", "white", (153, 153, 153)


def grid(pictures: Sequence[Image.Image], rows: int | None = None) -> Image.Image:
    """Row by row; as near to a square as can be, unless `rows` says how many."""
    count = len(pictures)
    rows = max(1, min(rows or round(math.sqrt(count)), count))
    columns = math.ceil(count / rows)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    whole = Image.new("RGB", (columns * width, rows * height), "black")
    for number, picture in enumerate(pictures):
        whole.paste(picture, (number % columns * width, number // columns * height))
    return whole


def labelled(
    picture: Image.Image,
    columns: Sequence[str],
    rows: Sequence[str],
    margin: int = 0,
) -> Image.Image:
    """A grid of `len(columns)` x `len(rows)` cells with a text above each column and to the left of
    each row; `margin` pixels between the cells."""
    cell_width, cell_height = picture.width // len(columns), picture.height // len(rows)
    size = max(10, (cell_width + cell_height) // 25)
    font = ImageFont.load_default(size)
    left = cell_width * 3 // 4 if any(rows) else 0
    top_texts = [_wrapped(text, font, cell_width - 8) for text in columns]
    left_texts = [_wrapped(text, font, left - 8) for text in rows]
    line = int(size * 1.3)
    top = max(len(lines) for lines in top_texts) * line + line if any(columns) else 0
    width = left + picture.width + margin * (len(columns) - 1)
    whole = Image.new("RGB", (width, top + picture.height + margin * (len(rows) - 1)), GROUND)
    draw = ImageDraw.Draw(whole)
    for column, lines in enumerate(top_texts):
        center = left + column * (cell_width + margin) + cell_width // 2
        _write(draw, font, lines, center, top // 2, line)
    for row, lines in enumerate(left_texts):
        center = top + row * (cell_height + margin) + cell_height // 2
        _write(draw, font, lines, left // 2, center, line)
    for row in range(len(rows)):
        for column in range(len(columns)):
            x, y = column * cell_width, row * cell_height
            cell = picture.crop((x, y, x + cell_width, y + cell_height))
            whole.paste(cell, (left + x + column * margin, top + y + row * margin))
    return whole


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(
    draw: ImageDraw.ImageDraw, font: Font, lines: Sequence[str], x: int, y: int, line: int
) -> None:
    top = y - line * (len(lines) - 1) // 2
    for number, text in enumerate(lines):
        draw.text((x, top + number * line), text, INK, font, anchor="mm")
