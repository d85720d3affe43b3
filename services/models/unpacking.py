"""Archives named like a model file: ESD's webui uploads each checkpoint as a tar, called what the
file in it is called, with the path of the file in its webui and sometimes a config beside it.

Only the headers of the members are read, and within bounds; their bytes are copied from object to
object. Nothing is written to a disk, so a path leads nowhere; what has one that tries to is refused
all the same.
"""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import PurePosixPath
from typing import BinaryIO, cast

import msgspec

from services.models.domain import Unfit, find_fault
from services.models.inspection import RangeReader
from services.models.store.files import Digest, FileStore
from shared.contracts.models import CheckpointFile
from shared.webui.titles import SUFFIXES
from shared.weights import BrokenFile

MOST_MEMBERS = 100
HEADER = 512
BLOCK = 16 * 1024
MOST_READ = 4 * 1024**2
"""Bytes that all headers of an archive may take, and what is read at once."""
LONGEST_HEADER = 8 * 1024
"""Bytes, twice as many as the longest path takes: tarfile looks through a header in time that grows
with the square of it, and holds up everybody meanwhile."""
CONFIG_SUFFIXES = (".yaml", ".yml")
"""Left out: what a model is, its tensors say."""


class _Headers:
    """An archive as tarfile reads it. Raises ReadError for a header that is too long."""

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        self.seek, self.tell = opened.seek, opened.tell

    def read(self, count: int) -> bytes:
        if count > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count} bytes, allowed are {LONGEST_HEADER}")
        return self._opened.read(count)


class Member(msgspec.Struct, frozen=True):
    """A file in an archive: `size` bytes from `offset` on."""

    filename: str
    offset: int
    size: int


async def unpack(
    files: FileStore,
    file: CheckpointFile,
    claim: Callable[[str], Awaitable[None]],
) -> list[CheckpointFile]:
    """The model files in an archive, each stored beside it as an object of its own; none if the
    file is no archive. `claim` is called with each name before its bytes are copied.

    Raises Unfit for an archive with anything but model files and their configs: links, devices,
    sparse files, paths that lead out of it, more than MOST_MEMBERS members; Retry while the object
    store is away."""
    loop = asyncio.get_running_loop()
    reader = RangeReader(files, file.key, file.size, loop, block=BLOCK, most_read=MOST_READ)
    try:
        members = await asyncio.to_thread(_list_members, cast(BinaryIO, reader), file)
    except BrokenFile as error:
        raise Unfit(f"{file.filename}: {error}") from error
    unpacked = []
    for number, member in enumerate(members):
        await claim(member.filename)
        digest = Digest()
        folder, _ = file.key.rsplit("/", 1)
        key = f"{folder}/unpacked-{number}-{file.sha256[:16]}{_suffix(member.filename)}"
        chunks = files.read(file.key, member.size, start=member.offset)
        size = await files.write(key, digest.over(chunks))
        unpacked.append(
            CheckpointFile(filename=member.filename, key=key, size=size, sha256=digest.hexdigest())
        )
    return unpacked


def _list_members(opened: BinaryIO, file: CheckpointFile) -> list[Member]:
    """Empty if it is no archive."""
    try:
        first = tarfile.TarInfo.frombuf(opened.read(HEADER), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return []
    opened.seek(0)
    members: list[Member] = []
    about = f"{file.filename} is a tar archive"
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Headers(opened)), mode="r:") as archive:
            at = -1
            for number, info in enumerate(archive):
                if number >= MOST_MEMBERS:
                    raise Unfit(f"{about} of more than {MOST_MEMBERS} members")
                if info.offset <= at:
                    raise Unfit(f"{about} that is damaged: a member of a negative size")
                at = info.offset
                member = _member(info, about)
                if member is None:
                    continue
                if member.offset + member.size > file.size:
                    raise Unfit(f"{about} that ends in the middle of {member.filename}")
                if any(other.filename == member.filename for other in members):
                    raise Unfit(f"{about} with two files named {member.filename}")
                members.append(member)
            opened.seek(archive.offset)
            if any(opened.read(HEADER)):  # tarfile takes a header that it can't read for the end
                raise Unfit(f"{about} that is damaged at byte {archive.offset}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise Unfit(f"{about} that is damaged: {error}") from error
    if not members:
        raise Unfit(f"{about} without a model file in it (its first member: {first.name[:80]!r})")
    return members


def _member(info: tarfile.TarInfo, about: str) -> Member | None:
    """None for what is left out: folders and configs. Raises Unfit."""
    path = PurePosixPath(info.name.replace("\\", "/"))
    shown = repr(info.name[:80])
    if path.is_absolute() or ".." in path.parts:
        raise Unfit(f"{about} with a path that leads out of it: {shown}")
    if info.isdir():
        return None
    if not info.isreg() or info.issparse():
        raise Unfit(f"{about} with a member that is no plain file: {shown}")
    fault = find_fault(path.name)
    if fault:
        raise Unfit(f"{about} with a file that has no usable name, {shown}: {fault}")
    suffix = _suffix(path.name)
    if suffix in CONFIG_SUFFIXES:
        return None
    if suffix not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise Unfit(f"{about} with {shown}, which is no model file ({allowed})")
    if info.size <= 0:
        raise Unfit(f"{about} with an empty file: {shown}")
    return Member(path.name, info.offset_data, info.size)


def _suffix(filename: str) -> str:
    return PurePosixPath(filename).suffix.lower()
