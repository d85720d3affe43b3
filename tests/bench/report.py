"""Tables of measurements against a peer."""

from __future__ import annotations

import socket
from typing import NamedTuple


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
