"""Headers of safetensors files.

The format: eight bytes (little endian) tell the length of a JSON object, which tells of each tensor
its dtype, shape and place in the bytes that follow. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from typing import BinaryIO

import msgspec

from shared.weights import BrokenFile

MAX_HEADER = 32 * 1024**2
"""Bytes. The largest that are met, with the notes of a long training, have some five million."""
MAX_TENSORS = 200_000
MAX_NAME = 500
"""Characters, of a tensor: three times as many as the longest that are met."""

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}
"""Of one number, by the format's names of types."""


class TensorSpec(msgspec.Struct, frozen=True):
    """`dtype`: by the safetensors name, such as F16."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * BITS[self.dtype] // 8


class Header(msgspec.Struct, frozen=True):
    """`metadata`: what the author of the file wrote down. `format`: safetensors or pickle."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str] = {}
    format: str = "safetensors"

    @property
    def parameters(self) -> int:
        """How many numbers there are in all tensors."""
        return sum(spec.count for spec in self.tensors.values())


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def is_pickle(start: bytes) -> bool:
    """By its first nine bytes: a ZIP of pickles, or a bare one, as torch has written them. A
    safetensors file may begin alike: there it is the length of the JSON object that follows."""
    return start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80")


def read_header(file: BinaryIO, size: int) -> Header:
    """Of a safetensors file of `size` bytes; reads no more of it than its header. Raises BrokenFile
    unless each tensor has its own bytes and each byte belongs to a tensor."""
    file.seek(0)
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise BrokenFile(f"it is no safetensors file ({size} bytes)")
    if length > MAX_HEADER:
        raise BrokenFile(f"its header is larger than {MAX_HEADER} bytes")
    text = file.read(length)
    tensors, metadata, end = _parse(text)
    if 8 + length + end != size:
        raise BrokenFile(
            f"it has {size} bytes where its header tells of {8 + length + end}; it was cut off or"
            " changed on the way, upload it again"
        )
    return Header(tensors, metadata)


def check_names(names: Collection[str]) -> None:
    """Raises BrokenFile for more tensors, or longer names, than a model has."""
    if len(names) > MAX_TENSORS:
        raise BrokenFile(f"it has more than {MAX_TENSORS} tensors")
    longest = max(names, key=len, default="")
    if len(longest) > MAX_NAME:
        raise BrokenFile(
            f"the name of a tensor, {longest[:60]!r}…, has {len(longest)} characters, allowed are"
            f" {MAX_NAME}"
        )


def _parse(text: bytes) -> tuple[dict[str, TensorSpec], dict[str, str], int]:
    """Tensors, metadata, and the bytes that all tensors take together."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        notes = raw.pop("__metadata__", None)
        metadata = msgspec.json.decode(notes, type=dict[str, str]) if notes else {}
        check_names(raw)
        entries = {
            name: msgspec.json.decode(entry, type=_Entry, strict=True)
            for name, entry in raw.items()
        }
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenFile(f"its header can't be read: {error}") from None
    tensors: dict[str, TensorSpec] = {}
    places = []
    for name, entry in entries.items():
        where = f"the tensor {name[:100]!r} in its header"
        if entry.dtype not in BITS:
            raise BrokenFile(f"{where} is of an unknown type, {entry.dtype[:20]!r}")
        if any(side < 0 for side in entry.shape) or len(entry.shape) > 16:
            raise BrokenFile(f"{where} has an impossible shape")
        spec = TensorSpec(entry.dtype, tuple(entry.shape))
        begin, end = entry.data_offsets
        if not 0 <= begin <= end or end - begin != spec.size:
            raise BrokenFile(f"{where} has {end - begin} bytes where its shape needs {spec.size}")
        tensors[name] = spec
        places.append((begin, end))
    at = 0
    for begin, end in sorted(places):
        if begin != at:
            what = "share bytes" if begin < at else "leave a gap"
            raise BrokenFile(f"the tensors in its header {what} at {min(begin, at)}")
        at = end
    return tensors, metadata, at
