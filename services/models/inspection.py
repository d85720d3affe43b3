"""What a file in the object store is, found out before anybody may use it.

Only its header is read, with ranged requests and within bounds: whatever a stranger wrote, it costs
no more than MOST_READ bytes and some seconds. Pickles are never unpickled.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections import OrderedDict
from typing import BinaryIO, cast

from services.models.domain import Harmful, Unfit, find_mismatch
from services.models.store.files import FileStore
from shared.contracts.models import CheckpointFile
from shared.errors import Retry
from shared.weights import BrokenFile, UnsafeFile
from shared.weights.headers import is_pickle, read_header
from shared.weights.kinds import Kind, describe
from shared.weights.onnx import check_onnx
from shared.weights.pickles import read_pickle

BLOCK = 1024**2
MOST_BLOCKS = 8
"""That are kept, of one file."""
MOST_READ = 256 * 1024**2
"""Bytes, of one file: headers have some megabytes at the most."""
MOST_AT_ONCE = 64 * 1024**2
PATIENCE = 60.0


async def look_at(files: FileStore, file: CheckpointFile, declared: str) -> Kind:
    """Raises Unfit for what is broken or not what it was declared as, Harmful for a pickle that
    would run something, and Retry while the object store is away."""
    loop = asyncio.get_running_loop()
    reader = RangeReader(files, file.key, file.size, loop)
    return await asyncio.to_thread(look_at_opened, cast(BinaryIO, reader), file, declared)


def look_at_opened(opened: BinaryIO, file: CheckpointFile, declared: str) -> Kind:
    """The same, of a file that can be read here."""
    try:
        kind = _kind_of(opened, file, declared)
    except BrokenFile as error:
        raise Unfit(f"{file.filename}: {error}") from error
    except UnsafeFile as error:
        raise Harmful(
            f"{file.filename} is a pickle that {error}; if you trust its author, convert it to"
            " .safetensors and upload that"
        ) from error
    mismatch = find_mismatch(declared, kind)
    if mismatch:
        raise Unfit(f"{file.filename}: {mismatch}")
    return kind


def _kind_of(opened: BinaryIO, file: CheckpointFile, declared: str) -> Kind:
    start = opened.read(9)
    if is_pickle(start):
        return describe(read_pickle(opened).header)
    if declared == "rembg" and start[8:9] != b"{":
        check_onnx(opened, file.size)
        return Kind("rembg", "an ONNX model", format="onnx")
    return describe(read_header(opened, file.size))


class RangeReader(io.RawIOBase):
    """An object as a file that can be read anywhere, from a thread of its own, with ranged requests
    of `block` bytes. Raises BrokenFile when more is read than any header needs: `most_read`."""

    def __init__(
        self,
        files: FileStore,
        key: str,
        size: int,
        loop: asyncio.AbstractEventLoop,
        *,
        block: int = BLOCK,
        most_read: int | None = MOST_READ,
    ) -> None:
        self._files = files
        self._key = key
        self._size = size
        self._loop = loop
        self._block_bytes = block
        self._most_read = most_read
        self._at = 0
        self._read = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = start + offset
        return self._at

    def read(self, count: int = -1) -> bytes:
        count = max(0, min(count if count >= 0 else self._size, self._size - self._at))
        if count > MOST_AT_ONCE:
            raise BrokenFile("its header is larger than any that is known")
        parts = []
        while count:
            number, within = divmod(self._at, self._block_bytes)
            block = self._block(number)
            parts.append(block[within : within + count])
            count -= len(parts[-1])
            self._at += len(parts[-1])
        return b"".join(parts)

    def readall(self) -> bytes:
        return self.read()

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * self._block_bytes
            end = min(start + self._block_bytes, self._size)
            self._read += end - start
            if self._most_read and self._read > self._most_read:
                raise BrokenFile("more of it would have to be read than of any file that is known")
            work = self._files.read_range(self._key, start, end)
            block = asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)
            if len(block) != end - start:
                raise Retry(f"{self._key} is shorter than {self._size} bytes")
            self._blocks[number] = block
            if len(self._blocks) > MOST_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]
