"""Everything that was loaded and may be used again: what was used longest ago goes first."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Shelf:
    """Keeps things up to a number of bytes. What a running job uses it holds itself: taking it from
    the shelf does not take it from the job."""

    def __init__(self, budget: int, release: Callable[[], None] = lambda: None) -> None:
        """`release`: called after things were given up, so that a device can give memory back."""
        self._budget = budget
        self._release = release
        self._things: OrderedDict[object, tuple[Any, int]] = OrderedDict()

    def get(self, key: object, size: int, load: Callable[[], T]) -> T:
        """`size`: what it will take, in bytes. Raises what `load` raises."""
        if key not in self._things:
            self._make_room(size)
            self._things[key] = (load(), size)
        self._things.move_to_end(key)
        thing: T = self._things[key][0]
        return thing

    def __contains__(self, key: object) -> bool:
        return key in self._things

    @property
    def size(self) -> int:
        return sum(size for _, size in self._things.values())

    def clear(self) -> None:
        """Gives everything up, after a device had not enough memory."""
        self._things.clear()
        self._release()

    def _make_room(self, size: int) -> None:
        given_up = False
        while self._things and self.size + size > self._budget:
            self._things.popitem(last=False)
            given_up = True
        if given_up:
            self._release()


def memory_of(device: torch.device) -> int:
    """Bytes in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
