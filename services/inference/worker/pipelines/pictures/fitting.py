"""The webui's resize modes."""

from __future__ import annotations

from PIL import Image, ImageOps


def fit(picture: Image.Image, width: int, height: int, resize_mode: int) -> Image.Image:
    """`resize_mode` of the webui: 0 stretch, 1 crop to the ratio, 2 fill up to the ratio."""
    size = (width, height)
    if picture.size == size:
        return picture
    if resize_mode == 1:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if resize_mode == 2:
        inner_width = min(width, max(1, picture.width * height // picture.height))
        inner_height = min(height, max(1, picture.height * width // picture.width))
        inner = picture.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
        # The webui draws the outermost rows or columns out to the border.
        filled = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (width - inner.width) // 2, (height - inner.height) // 2
        right, bottom = left + inner.width, top + inner.height
        if top > 0:
            filled.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            rest = height - bottom
            below = inner.resize((width, rest), box=(0, inner.height, width, inner.height))
            filled.paste(below, (0, bottom))
        if left > 0:
            filled.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            rest = width - right
            beside = inner.resize((rest, height), box=(inner.width, 0, inner.width, height))
            filled.paste(beside, (right, 0))
        filled.paste(inner, (left, top))
        return filled
    return picture.resize(size, Image.Resampling.LANCZOS)
