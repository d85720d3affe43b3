"""Tables of measurements against a peer, and what a process takes of memory meanwhile."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil


class Row(NamedTuple):
    what: str
    darkroom: str
    peer: str
    ratio: str


def print_table(title: str, peer: str, rows: list[Row]) -> None:
    table = [Row("", "Darkroom", peer, "ratio"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    print(f"\n{title}")
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Memory:
    """Resident, in bytes."""

    def __init__(self, before: int) -> None:
        self.before = self.peak = before

    def __str__(self) -> str:
        before, peak = self.before / 1e6, self.peak / 1e6
        return f"{before:.0f} / {peak:.0f} MB, raised by {peak - before:.0f} MB"


@contextmanager
def watched(process: psutil.Process, *, every: float) -> Iterator[Memory]:
    """`every`: seconds between two looks."""
    memory, ended = Memory(process.memory_info().rss), threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            memory.peak = max(memory.peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()
