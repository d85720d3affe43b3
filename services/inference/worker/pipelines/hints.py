"""Preprocessors of ControlNet that need no weights: from a picture to the hint that a ControlNet
was trained on. They are those of the webui's extension, with its thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""(height, width, 3)"""

RESOLUTION = 512
"""Of the shorter side, unless a unit says otherwise."""
MOST_BLUR = 64.0
"""The extension's own most: the work grows with it, and there is little left to see."""
MOST_SIDE = 8192
"""Of the longer side, whatever the shorter one would make of it."""


class Hint(msgspec.Struct, frozen=True):
    """`a`, `b`: the usual thresholds. `resizes`: works on the picture at `processor_res`."""

    make: Callable[[Pixels, float, float], Pixels]
    a: float = 0.0
    b: float = 0.0
    resizes: bool = True


def _none(pixels: Pixels, a: float, b: float) -> Pixels:
    return pixels


def _canny(pixels: Pixels, low: float, high: float) -> Pixels:
    return _three(cv2.Canny(pixels, low, high))


def _invert(pixels: Pixels, a: float, b: float) -> Pixels:
    return 255 - pixels


def _threshold(pixels: Pixels, level: float, b: float) -> Pixels:
    return _three(np.where(pixels.min(axis=2) > level, 255, 0).astype(np.uint8))


def _xdog(pixels: Pixels, level: float, b: float) -> Pixels:
    """Extended difference of Gaussians: where a fine blur is darker than a coarse one."""
    wide = pixels.astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(wide, (0, 0), sigma) for sigma in (0.5, 5.0))
    difference = (255 - np.min(coarse - fine, axis=2)).clip(0, 255).astype(np.uint8)
    lines = 2 * (255 - difference.astype(np.int32)) > level
    return _three(np.where(lines, 255, 0).astype(np.uint8))


def _lines(pixels: Pixels, a: float, b: float) -> Pixels:
    wide = pixels.astype(np.float32)
    intensity = np.min(cv2.GaussianBlur(wide, (0, 0), 6.0) - wide, axis=2).clip(0, 255)
    strong = intensity[intensity > 8]
    intensity = intensity / max(16.0, float(np.median(strong)) if strong.size else 16.0) * 127
    return _three(intensity.clip(0, 255).astype(np.uint8))


def _blur(pixels: Pixels, sigma: float, b: float) -> Pixels:
    return _pixels(cv2.GaussianBlur(pixels, (0, 0), min(max(sigma, 0.01), MOST_BLUR)))


def _tile(pixels: Pixels, factor: float, b: float) -> Pixels:
    if factor < 1.1:
        return pixels
    height, width = (max(1, int(side / factor)) for side in pixels.shape[:2])
    return _pixels(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))


def _luminance(pixels: Pixels, gamma: float, b: float) -> Pixels:
    return _grey(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[..., 0], gamma)


def _intensity(pixels: Pixels, gamma: float, b: float) -> Pixels:
    return _grey(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 2], gamma)


def _grey(levels: Any, gamma: float) -> Pixels:
    return _three(((levels / 255.0) ** gamma * 255).clip(0, 255).astype(np.uint8))


def _shuffle(pixels: Pixels, a: float, b: float) -> Pixels:
    """The picture with its parts flowed into each other; always in the same way."""
    height, width = pixels.shape[:2]
    random = np.random.default_rng(0)

    def flow(most: int) -> NDArray[np.float32]:
        coarse = random.uniform(size=(height // 256 + 2, width // 256 + 2)).astype(np.float32)
        smooth = cv2.resize(coarse, (width + 512, height + 512), interpolation=cv2.INTER_CUBIC)[
            256 : 256 + height, 256 : 256 + width
        ]
        smooth = smooth - smooth.min()
        return np.asarray(smooth / max(float(smooth.max()), 1e-6) * (most - 1), np.float32)

    return _pixels(cv2.remap(pixels, flow(width), flow(height), cv2.INTER_LINEAR))


def _three(levels: Any) -> Pixels:
    return _pixels(np.repeat(np.asarray(levels)[..., None], 3, axis=2))


def _pixels(array: Any) -> Pixels:
    return np.ascontiguousarray(array, dtype=np.uint8)


_TILE = Hint(_tile, 1.0, resizes=False)
HINTS: dict[str, Hint] = {
    "none": Hint(_none, resizes=False),
    "canny": Hint(_canny, 100, 200),
    "invert": Hint(_invert),
    "invert (from white bg & black line)": Hint(_invert),
    "threshold": Hint(_threshold, 127),
    "scribble_xdog": Hint(_xdog, 32),
    "lineart_standard": Hint(_lines),
    "lineart_standard (from white bg & black line)": Hint(_lines),
    "blur_gaussian": Hint(_blur, 9),
    "tile_resample": _TILE,
    "tile": _TILE,
    "shuffle": Hint(_shuffle),
    "recolor_luminance": Hint(_luminance, 1.0),
    "recolor_intensity": Hint(_intensity, 1.0),
    "inpaint": Hint(_none, resizes=False),
    "inpaint_global_harmonious": Hint(_none, resizes=False),
    "inpaint_only": Hint(_none, resizes=False),
}
"""By the extension's names of modules."""
MASKED = ("inpaint", "inpaint_global_harmonious", "inpaint_only")
"""What these hints show is -1 where the picture is masked."""
KEEPING = "inpaint_only"
"""Of the result, it leaves only what is masked."""
RECOLORING = ("recolor_luminance", "recolor_intensity")
"""Of the result, they leave only the colors."""
SEAM = 7
"""Pixels over which what is kept and what is painted anew pass into each other."""


def make(picture: Image.Image, module: str, resolution: int, a: float, b: float) -> Pixels:
    """`a`, `b`: thresholds; below 0 for the usual ones."""
    hint = HINTS[module]
    pixels = np.asarray(picture.convert("RGB"))
    if hint.resizes:
        pixels = _at_resolution(pixels, resolution)
    return hint.make(pixels, hint.a if a < 0 else a, hint.b if b < 0 else b)


def _at_resolution(pixels: Pixels, resolution: int) -> Pixels:
    factor = min(resolution / min(pixels.shape[:2]), MOST_SIDE / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
    return _pixels(cv2.resize(pixels, size, interpolation=_interpolation(factor)))


def _interpolation(factor: float) -> int:
    return cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA


def keep(result: Pixels, hint: Pixels, masked: NDArray[np.bool_]) -> Pixels:
    """The result where it is masked, else the hint."""
    wide = cv2.dilate(masked.astype(np.float32), np.ones((SEAM, SEAM), np.uint8))
    share = cv2.blur(wide, (SEAM, SEAM))[..., None]
    return _pixels((share * result + (1 - share) * hint).round())


def recolor(result: Pixels, hint: Pixels, module: str) -> Pixels:
    """The colors of the result, as light as the hint."""
    if module == "recolor_luminance":
        there, back, light = cv2.COLOR_RGB2LAB, cv2.COLOR_LAB2RGB, 0
    else:
        there, back, light = cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB, 2
    parts = cv2.cvtColor(result, there)
    parts[..., light] = hint[..., 0]
    return _pixels(cv2.cvtColor(parts, back))


def perfect_resolution(picture: Image.Image, width: int, height: int, resize_mode: int) -> int:
    """The one at which a hint needs no more resizing."""
    factors = (height / picture.height, width / picture.width)
    factor = min(factors) if resize_mode == 2 else max(factors)
    return max(64, round(factor * min(picture.size)))


def fit_hint(hint: Pixels, width: int, height: int, resize_mode: int) -> Pixels:
    """0 stretch, 1 crop, 2 fill up with the color of the border."""
    rows, columns = hint.shape[:2]
    if (rows, columns) == (height, width):
        return hint
    if resize_mode == 0:
        return _scaled(hint, width, height)
    factors = (height / rows, width / columns)
    factor = max(factors) if resize_mode == 1 else min(factors)
    if resize_mode == 1:
        hint = _without_margins(hint, width, height, factor)
        rows, columns = hint.shape[:2]
    scaled = _scaled(hint, max(1, round(columns * factor)), max(1, round(rows * factor)))
    rows, columns = scaled.shape[:2]
    if resize_mode == 1:
        top, left = max(0, (rows - height) // 2), max(0, (columns - width) // 2)
        return _pixels(scaled[top : top + height, left : left + width])
    border = np.concatenate([hint[0], hint[-1], hint[:, 0], hint[:, -1]])
    whole = np.tile(np.median(border, axis=0).astype(np.uint8), (height, width, 1))
    top, left = max(0, (height - rows) // 2), max(0, (width - columns) // 2)
    whole[top : top + rows, left : left + columns] = scaled[:height, :width]
    return whole


def _without_margins(hint: Pixels, width: int, height: int, factor: float) -> Pixels:
    """Without the most of what will be cut off once it is enlarged: of a picture that is a thousand
    times as wide as high that would be a lot."""
    rows, columns = hint.shape[:2]
    above = max(0, int((rows - height / factor) / 2) - 1)
    beside = max(0, int((columns - width / factor) / 2) - 1)
    return hint[above : rows - above, beside : columns - beside]


def _scaled(hint: Pixels, width: int, height: int) -> Pixels:
    factor = max(width / hint.shape[1], height / hint.shape[0])
    scaled = cv2.resize(hint, (width, height), interpolation=_interpolation(factor))
    if set(np.unique(hint)) <= {0, 255}:  # lines stay lines
        scaled = np.where(scaled > 127, 255, 0)
    return _pixels(scaled)
