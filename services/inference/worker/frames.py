"""What the worker and its engine process say to each other over two pipes.

A frame is a number of parts, their lengths, then the parts: a JSON head, and bytes that it speaks
of (params, images). Nothing is pickled: params come from outside. Frames of several jobs mix: each
names its job.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from shared.contracts.inference import RunJob

MOST_BYTES = 2 * 1024**3
"""A longer frame is a broken one."""

# To the engine


class Run(msgspec.Struct, frozen=True, tag=True):
    """`files`: `content` of a model -> path. `alone`: nothing may run beside it. `may_go`: it may
    be begun without asking. Part: the params."""

    job: RunJob
    files: dict[str, str]
    alone: bool
    may_go: bool


class Go(msgspec.Struct, frozen=True, tag=True):
    """What said that it is about to be begun may begin."""

    job_id: str


class Cancel(msgspec.Struct, frozen=True, tag=True):
    job_id: str


class Recall(msgspec.Struct, frozen=True, tag=True):
    """Take it out of the line, if it has not been begun."""

    job_id: str


class Look(msgspec.Struct, frozen=True, tag=True):
    """Say how you are."""


# From the engine


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is loaded."""


class Planning(msgspec.Struct, frozen=True, tag=True):
    """Its params and files are looked at. An engine that dies before Planned has died of it."""

    job_id: str


class Planned(msgspec.Struct, frozen=True, tag=True):
    """It waits for its turn, or is unfit."""

    job_id: str


class Begun(msgspec.Struct, frozen=True, tag=True):
    """It is its turn; it waits for Go."""

    job_id: str


class Step(msgspec.Struct, frozen=True, tag=True):
    job_id: str
    step: int
    steps: int


class Preview(msgspec.Struct, frozen=True, tag=True):
    """Part: the picture."""

    job_id: str
    media_type: str


class Image(msgspec.Struct, frozen=True):
    name: str
    media_type: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """Parts: the param JSON, then the images."""

    job_id: str
    images: list[Image]
    seconds: dict[str, float]
    warnings: list[str]


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """The job can't be done by any engine; `reason` is for its owner."""

    job_id: str
    reason: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """It was cancelled or recalled."""

    job_id: str


class Well(msgspec.Struct, frozen=True, tag=True):
    """The answer to Look."""

    device_name: str
    memory: int
    memory_total: int
    models: list[str]


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The engine failed in a way that nobody planned, and ends."""

    cause: str


Request = Run | Go | Cancel | Recall | Look
JobAnswer = Planning | Planned | Begun | Step | Preview | Done | Unfit | Gone
Answer = Ready | Well | Broken | JobAnswer

encode = msgspec.json.Encoder().encode
decode_request: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
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
