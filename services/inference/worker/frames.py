"""What the worker and its engine process say to each other over two pipes.

A frame is a number of parts, their lengths, then the parts: a JSON head, and bytes that it speaks
of (params, images). Nothing is pickled: params come from outside.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from shared.contracts.inference import RunJob

MOST_BYTES = 2 * 1024**3
"""A longer frame is a broken one."""


class Run(msgspec.Struct, frozen=True, tag=True):
    """To the engine. `files`: name or checkpoint id -> path. Part: the params."""

    job: RunJob
    files: dict[str, str]
    correlation_id: str | None


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded."""


class Step(msgspec.Struct, frozen=True, tag=True):
    step: int
    steps: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Parts: the param JSON, then the images as PNG."""

    seconds: dict[str, float]
    warnings: list[str]


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """The job can't be done by any engine; `reason` is for its owner."""

    reason: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The engine failed in a way that nobody planned, and ends."""

    cause: str


Answer = Ready | Step | Done | Unfit | Broken

encode = msgspec.json.Encoder().encode
decode_run = msgspec.json.Decoder(Run).decode
decode_answer: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)

COUNT = struct.Struct(">I")
LENGTH = struct.Struct(">Q")


def pack(head: msgspec.Struct, parts: Sequence[bytes] = ()) -> list[bytes]:
    """The frame in pieces, to be written one after the other."""
    whole = [encode(head), *parts]
    lengths = b"".join(LENGTH.pack(len(part)) for part in whole)
    return [COUNT.pack(len(whole)) + lengths, *whole]


def part_lengths(table: bytes) -> list[int]:
    """Raises ValueError for what can't be a frame."""
    lengths = [length for (length,) in LENGTH.iter_unpack(table)]
    if not lengths or sum(lengths) > MOST_BYTES:
        raise ValueError(f"no frame: {len(lengths)} parts, {sum(lengths)} bytes")
    return lengths
