"""A clean pickle as a safetensors file with the same tensors, bit for bit.

No tensor is built: the bytes of each lie in the ZIP as they are, and are copied behind a header.
"""

from __future__ import annotations

import asyncio
import json
import struct
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from msgspec.structs import replace

from services.models.inspection import RangeReader
from services.models.store.files import Digest, FileStore
from shared.contracts.models import CheckpointFile
from shared.weights.headers import BITS
from shared.weights.pickles import StoredTensor, read_pickle

BLOCK = 8 * 1024**2


def converted_name(filename: str) -> str:
    return PurePosixPath(filename).with_suffix(".safetensors").name


async def convert(files: FileStore, file: CheckpointFile) -> CheckpointFile | None:
    """Stores the safetensors file beside the pickle. None where it can't be copied together: in the
    older layout, or with tensors that do not lie in one piece."""
    loop = asyncio.get_running_loop()
    reader = RangeReader(files, file.key, file.size, loop, block=BLOCK, most_read=None)
    opened = cast(BinaryIO, reader)
    pickle = await asyncio.to_thread(read_pickle, opened)
    tensors = pickle.tensors
    if not tensors or pickle.prefix is None:
        return None
    if not all(tensor.is_contiguous for tensor in tensors.values()):
        return None
    filename = converted_name(file.filename)
    key = f"{file.key.rsplit('/', 1)[0]}/{filename}"
    digest = Digest()
    pieces = _pieces(opened, tensors, pickle.prefix)

    async def chunks() -> AsyncIterator[bytes]:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    size = await files.write(key, digest.over(chunks()))
    kind = replace(file.kind, format="safetensors") if file.kind else None
    return CheckpointFile(
        filename=filename, key=key, size=size, sha256=digest.hexdigest(), kind=kind
    )


def _pieces(opened: BinaryIO, tensors: dict[str, StoredTensor], prefix: str) -> Iterator[bytes]:
    yield _header(tensors)
    with zipfile.ZipFile(opened) as archive:
        for tensor in tensors.values():
            width = BITS[tensor.spec.dtype] // 8
            with archive.open(f"{prefix}data/{tensor.storage}") as storage:
                storage.seek(tensor.offset * width)
                left = tensor.spec.size
                while left:
                    piece = storage.read(min(left, BLOCK))
                    if not piece:
                        raise ValueError("a storage that is shorter than its tensor")
                    left -= len(piece)
                    yield piece


def _header(tensors: dict[str, StoredTensor]) -> bytes:
    """Padded with spaces to a multiple of eight, so that tensors lie where they can be mapped."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        spec = tensor.spec
        entries[name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (at, at + spec.size),
        }
        at += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
