"""Everything that was loaded and may be used again: what was used longest ago goes first."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Known(NamedTuple):
    """A thing that somebody has, the shelf or a job. Its `size` counts if it tells no tensors."""

    thing: weakref.ref[Any]
    size: int
    tensors: Callable[[Any], Iterable[Tensor]] | None


class Shelf:
    """Keeps things up to a number of bytes; tensors that several of them have count once.

    What a running job has loaded is in nobody's way: it is found here and counted as long as it
    lives, and given up last, since that gives nothing back. So the shelf may hold more than its
    budget while jobs need more. Jobs may ask in several threads."""

    def __init__(self, budget: int, release: Callable[[], None] = lambda: None) -> None:
        """`release`: called after things were given up, so that memory goes back where it came
        from."""
        self.budget = budget
        self._release = release
        self._kept: OrderedDict[object, Any] = OrderedDict()
        self._known: dict[object, _Known] = {}
        self._turn = threading.RLock()

    def get(
        self,
        key: object,
        size: int,
        load: Callable[[], T],
        tensors: Callable[[T], Iterable[Tensor]] | None = None,
    ) -> T:
        """`size`: what it will take at most, in bytes. `tensors`: those that it has, which tell
        what it takes in truth. Raises what `load` raises."""
        with self._turn:
            thing: T | None = self._find(key)
            if thing is None:
                self._make_room(size)
                thing = load()
                self._known[key] = _Known(weakref.ref(thing), size, tensors)
            self._kept[key] = thing
            self._kept.move_to_end(key)
            return thing

    def __contains__(self, key: object) -> bool:
        with self._turn:
            return self._find(key) is not None

    @property
    def size(self) -> int:
        """Bytes."""
        with self._turn:
            self._known = {key: one for key, one in self._known.items() if one.thing() is not None}
            places: dict[int, int] = {}
            total = 0
            for thing, size, tensors in self._known.values():
                if tensors is None:
                    total += size
                    continue
                for tensor in tensors(thing()):
                    place = tensor.data_ptr()
                    places[place] = max(places.get(place, 0), tensor.nbytes)
            return total + sum(places.values())

    def clear(self) -> None:
        """Gives everything up, after a device had not enough memory."""
        with self._turn:
            self._kept.clear()
        self._release()

    def _find(self, key: object) -> Any:
        known = self._known.get(key)
        return known.thing() if known else None

    def _make_room(self, size: int) -> None:
        in_use: list[tuple[object, Any]] = []
        given_up = False
        while self._kept and self.size + size > self.budget:
            key, thing = self._kept.popitem(last=False)
            del thing
            if self._find(key) is not None:
                gc.collect()  # it may only be in a circle
            if (thing := self._find(key)) is not None:
                in_use.append((key, thing))
            del thing
            given_up = True
        for key, thing in in_use:
            self._kept[key] = thing
        if given_up:
            self._release()
