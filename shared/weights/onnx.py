"""ONNX models, as far as it takes to tell one from something else.

A model is a protobuf message; its outermost fields are walked without reading what is in them.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from typing import BinaryIO

from shared.weights import BrokenFile

_IR_VERSION, _GRAPH = 1, 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
MOST_FIELDS = 10_000


def check_onnx(file: BinaryIO, size: int) -> None:
    """Raises BrokenFile for what is no complete ONNX model of `size` bytes."""
    at, seen = 0, set()
    for _ in range(MOST_FIELDS):
        if at == size:
            break
        key, at = _varint(file, at)
        field, wire = key >> 3, key & 7
        seen.add(field)
        if wire == _VARINT:
            _, at = _varint(file, at)
        elif wire == _BYTES:
            length, at = _varint(file, at)
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise BrokenFile("it is no ONNX model")
        if at > size:
            raise BrokenFile("it is no ONNX model, or was cut off on the way; upload it again")
    if at != size or not {_IR_VERSION, _GRAPH} <= seen:
        raise BrokenFile("it is no ONNX model")


def _varint(file: BinaryIO, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place behind it."""
    file.seek(at)
    data = file.read(10)
    value = 0
    for number, byte in enumerate(data):
        value |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return value, at + number + 1
    raise BrokenFile("it is no ONNX model")
