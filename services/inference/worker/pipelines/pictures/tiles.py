"""A picture cut into tiles that overlap, and put together again: as the webui's grids of "SD
upscale" do, to the pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image


class TileGrid(msgspec.Struct, frozen=True):
    """Where tiles of (`width`, `height`) lie in a picture: each of `lefts` with each of `tops`.
    `overlap`: how much of a tile is blended into the one to the left of it, and above it."""

    size: tuple[int, int]
    width: int
    height: int
    overlap: int
    lefts: list[int]
    tops: list[int]

    @property
    def count(self) -> int:
        return len(self.lefts) * len(self.tops)

    def split(self, picture: Image.Image) -> list[Image.Image]:
        """Row by row."""
        return [
            picture.crop((left, top, left + self.width, top + self.height))
            for top in self.tops
            for left in self.lefts
        ]

    def combine(self, tiles: Sequence[Image.Image]) -> Image.Image:
        """Rows first, then all of them: where four tiles meet, two blends of two."""
        columns = len(self.lefts)
        ramp = _ramp(self.width, self.overlap)
        beside = Image.fromarray(np.tile(ramp, (self.height, 1)))
        ramp = _ramp(self.height, self.overlap)
        below = Image.fromarray(np.tile(ramp[:, None], (1, self.size[0])))
        whole = Image.new("RGB", self.size)
        for number, top in enumerate(self.tops):
            row = Image.new("RGB", (self.size[0], self.height))
            for column, left in enumerate(self.lefts):
                tile = tiles[number * columns + column]
                row.paste(tile, (left, 0), beside if column else None)
            whole.paste(row, (0, top), below if number else None)
        return whole


def tile_grid(size: tuple[int, int], width: int, height: int, overlap: int) -> TileGrid:
    """As few tiles as cover a picture of a `size` that is at least that of a tile, at even
    distances, with at least `overlap` pixels of each in the next."""
    return TileGrid(
        size,
        width,
        height,
        overlap,
        _starts(size[0], width, overlap),
        _starts(size[1], height, overlap),
    )


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    count = math.ceil((length - overlap) / (tile - overlap))
    distance = (length - tile) / (count - 1) if count > 1 else 0
    return [min(int(number * distance), length - tile) for number in range(count)]


def _ramp(length: int, overlap: int) -> NDArray[np.uint8]:
    """From nothing up to all within the overlap, 0 to 255."""
    levels = np.full(length, 255, np.uint8)
    if overlap:
        levels[:overlap] = np.arange(overlap, dtype=np.float32) * 255 / overlap
    return levels
