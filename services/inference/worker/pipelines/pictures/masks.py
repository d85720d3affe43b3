"""Masks of inpainting, as the webui treats them. White is what is painted anew."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from services.inference.worker.pipelines.pictures.fitting import fit

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


class Inpainting(msgspec.Struct, frozen=True, eq=False):
    """`whole`: what is painted anew, of the picture's size; `mask`: of the size that is rendered.
    `overlay_mask`: what of the picture is not laid over the result; `paste`: where in the whole
    picture the result belongs, if only a part of it was rendered."""

    whole: Image.Image
    mask: Image.Image
    overlay_mask: Image.Image
    paste: Box | None


def black_and_white(mask: Image.Image) -> Image.Image:
    """By its alpha, where it has one that says something, else by its brightness."""
    if mask.mode == "RGBA" and mask.getextrema()[-1] != (255, 255):
        return mask.split()[-1].point(lambda level: 255 if level > 128 else 0)
    return mask.convert("L")


def prepare(
    mask: Image.Image,
    size: tuple[int, int],
    *,
    invert: bool,
    blur: tuple[int, int],
    whole: bool,
    padding: int,
    resize_mode: int,
) -> Inpainting | None:
    """None if nothing is masked. `size`: (width, height) that is rendered. `whole`: the whole
    picture is rendered, and not only the part around the mask with `padding`."""
    mask = black_and_white(mask)
    if invert:
        mask = ImageOps.invert(mask)
    mask = _blurred(mask, *blur)
    if not whole:
        box = mask.getbbox()
        if box is None:
            return None
        box = _widened(_padded(box, padding, mask.size), size, mask.size)
        return Inpainting(mask, fit(mask.crop(box), *size, 2), mask, box)
    fitted = fit(mask, *size, resize_mode)
    doubled = np.clip(np.asarray(fitted, np.float32) * 2, 0, 255).astype(np.uint8)
    return Inpainting(mask, fitted, Image.fromarray(doubled), None)


def _blurred(mask: Image.Image, x: int, y: int) -> Image.Image:
    levels = np.asarray(mask)
    if x > 0:
        levels = cv2.GaussianBlur(levels, (2 * int(2.5 * x + 0.5) + 1, 1), x)
    if y > 0:
        levels = cv2.GaussianBlur(levels, (1, 2 * int(2.5 * y + 0.5) + 1), y)
    return Image.fromarray(levels)


def _padded(box: Box, padding: int, size: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    return (
        max(left - padding, 0),
        max(top - padding, 0),
        min(right + padding, size[0]),
        min(bottom + padding, size[1]),
    )


def _widened(box: Box, wanted: tuple[int, int], size: tuple[int, int]) -> Box:
    """As wide or as high as the ratio that is rendered needs, within the picture."""
    left, top, right, bottom = box
    ratio = wanted[0] / wanted[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _stretch(top, bottom, (right - left) / ratio, size[1])
    else:
        left, right = _stretch(left, right, (bottom - top) * ratio, size[0])
    return left, top, right, bottom


def _stretch(start: int, end: int, length: float, limit: int) -> tuple[int, int]:
    more = int(length - (end - start))
    start -= more // 2
    end += more - more // 2
    if end >= limit:
        start, end = start - (end - limit), limit
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)


def overlay_of(picture: Image.Image, inpainting: Inpainting) -> Image.Image:
    """What of a picture stays, transparent where it is painted anew."""
    kept = Image.new("RGBa", picture.size)
    kept.paste(
        picture.convert("RGBA").convert("RGBa"),
        mask=ImageOps.invert(inpainting.overlay_mask.convert("L").resize(picture.size)),
    )
    return kept.convert("RGBA")


def lay_over(result: Image.Image, overlay: Image.Image, paste: Box | None) -> Image.Image:
    """The result with what is kept of its picture on top."""
    if paste is not None:
        left, top, right, bottom = paste
        whole = Image.new("RGBA", overlay.size)
        whole.paste(fit(result, right - left, bottom - top, 1), (left, top))
        result = whole
    result = result.convert("RGBA")
    result.alpha_composite(overlay)
    return result.convert("RGB")


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What is masked, filled with the colors around it: blurred copies, ever sharper ones above."""
    kept = Image.new("RGBa", picture.size)
    kept.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    result = Image.new("RGBA", picture.size)
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(blurred)
    return result.convert("RGB")
