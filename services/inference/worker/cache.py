"""Model files on local disk, fetched from S3 once for all workers of a machine.

    <cache>/<SHA-256>.safetensors    a whole file, never changed once it is there
    <cache>/key-<SHA-256>.ckpt       one that the registry has not hashed: by its bucket and key
    <cache>/.parts/<the same name>   a download in progress

A file is called by what is in it, so whatever names and checkpoints it has, it lies on the disk
once, and an engine loads it once. It keeps the suffix of its key, for libraries that go by it.

The kernel's locks on these files tell what is done with them, and end with their process. Who uses
a file shares its lock, so a file that can be locked alone may be evicted; what was used longest ago
goes first. Who downloads a file has the lock of its part, so a part that can be locked was left by
the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from services.inference.worker.engine import JobFailure
from services.inference.worker.fetching import StoredFile, fetch_file, find_file, in_thread
from services.inference.worker.hashes import Hashes
from shared.contracts.inference import UsedModel
from shared.errors import Retry
from shared.logs import get_logger
from shared.objects import Objects

log = get_logger(__name__)

SHA256 = re.compile(r"[0-9a-f]{64}")
SUFFIX = re.compile(r"\.[a-z0-9]{1,16}")
OURS = re.compile(rf"(key-)?{SHA256.pattern}({SUFFIX.pattern})?")
"""What has another name in the folder is not removed."""

POLL = 0.1
"""Seconds between two looks at a lock: waiting in a thread could not be cancelled."""

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_PAUSE = 5.0
"""Seconds before a job goes back to the queue because others fill the disk."""


class ModelCache:
    def __init__(self, objects: Objects, folder: Path, limit: int) -> None:
        """`limit`: bytes that may lie in `folder`. Clears away what the dead have left there."""
        self._objects = objects
        self._folder = folder
        self._parts = folder / ".parts"
        self._limit = limit
        self._hashes = Hashes(folder)
        self._turn = asyncio.Lock()
        self._parts.mkdir(parents=True, exist_ok=True)
        for part in self._parts.iterdir():
            _remove_unlocked(part)

    @contextlib.asynccontextmanager
    async def hold(self, models: Iterable[UsedModel]) -> AsyncIterator[dict[str, Path]]:
        """The files of a job by their `content`, kept in place while it runs.

        Raises JobFailure for a file that is not in the store, is not what was registered, or for
        which the disk is too small; Retry while the files of other jobs fill the disk."""
        files: dict[str, Path] = {}
        with contextlib.ExitStack() as locks:
            for model in models:
                if model.checkpoint_id:
                    path = self._path(model)
                    if not await _use(path, model.size, locks):
                        await self._fetch(model, path, locks, held=files.values())
                    files[model.content] = path
            yield files

    def _path(self, model: UsedModel) -> Path:
        """Made of nothing that could lead out of the folder."""
        name = model.sha256.lower()
        if not name:
            name = "key-" + hashlib.sha256(f"{model.bucket}/{model.key}".encode()).hexdigest()
        elif not SHA256.fullmatch(name):
            raise JobFailure(f'model "{model.name}" was registered with a SHA-256 that is none')
        suffix = PurePosixPath(model.key).suffix.lower()
        return self._folder / (name + suffix if SUFFIX.fullmatch(suffix) else name)

    async def _fetch(
        self,
        model: UsedModel,
        path: Path,
        locks: contextlib.ExitStack,
        held: Collection[Path],
    ) -> None:
        """In the order of the jobs, one file at a time: it has streams enough."""
        part = self._parts / path.name
        async with self._turn:
            while not await _use(path, model.size, locks):
                with _open_part(part) as file, contextlib.ExitStack() as undo:
                    if not _lock(file, fcntl.LOCK_EX) or not _lies_at(part, file):
                        await asyncio.sleep(POLL)  # somebody else fetches it, or just has
                        continue
                    undo.callback(part.unlink, missing_ok=True)
                    if not await _use(path, model.size, locks):
                        sha256 = await self._download(model, file.fileno(), {part, *held})
                        await in_thread(_put_in_place, file.fileno(), part, path)
                        undo.pop_all()
                        await asyncio.to_thread(self._hashes.keep, path, sha256)

    async def _download(self, model: UsedModel, fd: int, own: Collection[Path]) -> str:
        """The SHA-256 of what lies at `fd` afterwards. `own`: what this job has locked."""
        began = time.monotonic()
        what = f'model "{model.name}"'
        stored = await find_file(self._objects, model.bucket, model.key, what)
        if model.size and stored.size != model.size:
            raise JobFailure(
                f"{what} has {stored.size} bytes in the store, {model.size} were registered"
            )
        try:
            sha256 = await self._fill(stored, fd)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if await asyncio.to_thread(self._others_use_some, own):
                await asyncio.sleep(FULL_PAUSE)
                raise Retry(f"the files of other jobs leave no room for {what}") from error
            raise JobFailure(
                f"{what} has {stored.size} bytes, and the worker's disk has no room for them"
            ) from error
        if model.sha256 and sha256 != model.sha256.lower():
            raise JobFailure(
                f"{what} is not what was registered: the file in the store has the SHA-256"
                f" {sha256}, registered was {model.sha256}"
            )
        seconds = round(time.monotonic() - began, 3)
        log.info(
            "model_fetched",
            checkpoint_id=model.checkpoint_id,
            sha256=sha256,
            bytes=stored.size,
            seconds=seconds,
        )
        return sha256

    async def _fill(self, stored: StoredFile, fd: int) -> str:
        os.ftruncate(fd, stored.size)  # so that others count it when they make room
        await asyncio.to_thread(self._make_room)
        try:
            await in_thread(_reserve, fd, stored.size)
            return await fetch_file(self._objects, stored, fd)
        except OSError as error:
            if error.errno not in FULL:
                raise
        log.warning("disk_full", bytes=stored.size)
        await asyncio.to_thread(self._make_room, stored.size)
        await in_thread(_reserve, fd, stored.size)
        return await fetch_file(self._objects, stored, fd)

    def _make_room(self, at_least: int = 0) -> None:
        """Evicts until the rest is under the limit, and `at_least` bytes are gone. What is in use
        stays."""
        kept = self._kept()
        total = sum(size for _, size, _ in kept)
        most = min(self._limit, total - at_least)
        for _, size, path in kept:
            if total <= most:
                return
            if self._evict(path):
                total -= size
                log.info("model_evicted", file=path.name, bytes=size)
        if total > self._limit:
            log.warning("cache_over_limit", bytes=total, limit=self._limit)

    def _evict(self, path: Path) -> bool:
        """False if the file is in use. An engine that has mapped it can go on: its blocks are free
        when the engine lets go of them."""
        return _remove_unlocked(path, first=self._hashes.forget)

    def _others_use_some(self, own: Collection[Path]) -> bool:
        return any(_is_locked(path) for _, _, path in self._kept() if path not in own)

    def _kept(self) -> list[tuple[int, int, Path]]:
        """Time of use, bytes and path of files and parts, what was used longest ago first."""
        found = []
        for path in (*self._folder.iterdir(), *self._parts.iterdir()):
            if OURS.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # evicted by another worker
                    stat = path.stat()
                    found.append((stat.st_atime_ns, stat.st_size, path))
        return sorted(found)


async def _use(path: Path, size: int, locks: contextlib.ExitStack) -> bool:
    """Keeps a file in place until `locks` are closed; False if it is not there, or not whole.

    Marks it as used by its time of access: engines know a file that they have loaded by its time
    of change."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
        except FileNotFoundError:
            return False
        while not _lock(file, fcntl.LOCK_SH):  # it is being put in place, or evicted
            await asyncio.sleep(POLL)
        stat = os.fstat(file.fileno())
        if not _lies_at(path, file) or (size and stat.st_size != size):
            return False
        os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
        locks.push(opened.pop_all())
        return True


def _lock(file: BinaryIO, kind: int) -> bool:
    """False if others have a lock that does not go with it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lies_at(path: Path, file: BinaryIO) -> bool:
    """Whether it is this file that has the name now: only then its lock means something."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_unlocked(path: Path, first: Callable[[Path], None] = lambda path: None) -> bool:
    """False if the file is in use."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if not _lock(file, fcntl.LOCK_EX):
            return False
        if _lies_at(path, file):
            first(path)
            path.unlink()
    return True


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return not _lock(file, fcntl.LOCK_EX)
    return False


def _open_part(part: Path) -> BinaryIO:
    return open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)


def _reserve(fd: int, size: int) -> None:
    """Raises OSError if the disk has no room: before the download and not in its middle."""
    if size and sys.platform == "linux":
        os.posix_fallocate(fd, 0, size)


def _put_in_place(fd: int, part: Path, path: Path) -> None:
    os.fsync(fd)
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
