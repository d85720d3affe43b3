"""Model files on local disk, fetched from S3 once for all workers of a machine.

    <cache>/<checkpoint id>/<file name>    a whole file, never changed once it is there
    <cache>/.locks, .parts                 one lock per file, and downloads in progress

A worker that downloads a file has its lock alone; who uses the file shares it. What is in use is
not evicted; of the rest, what was used longest ago goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from services.inference.worker.engine import JobFailure
from services.inference.worker.fetching import get, patiently
from shared.contracts.inference import UsedModel
from shared.errors import Retry
from shared.logs import get_logger
from shared.objects import Objects

log = get_logger(__name__)

CHUNK = 4 * 1024 * 1024


class ModelCache:
    def __init__(self, objects: Objects, folder: Path, limit: int) -> None:
        self._objects = objects
        self._folder = folder
        self._limit = limit

    @contextlib.asynccontextmanager
    async def hold(self, models: Iterable[UsedModel]) -> AsyncIterator[dict[str, Path]]:
        """The files of a job, kept in place while it runs, each under its name and under the id
        of its checkpoint; where two have the same name or id, the first.

        Raises JobFailure for a file that is not in the store, or is not what was registered."""
        files: dict[str, Path] = {}
        with contextlib.ExitStack() as locks:
            for model in models:
                if model.checkpoint_id:
                    path = await self._fetch(model, locks)
                    files.setdefault(model.name, path)
                    files.setdefault(model.checkpoint_id, path)
            yield files

    async def _fetch(self, model: UsedModel, locks: contextlib.ExitStack) -> Path:
        path = self._path(model)
        while True:
            lock = locks.enter_context(self._open_lock(path))
            await _lock(lock, fcntl.LOCK_SH)
            if await asyncio.to_thread(_is_whole, path, model.size):
                return path
            lock.close()
            with self._open_lock(path) as alone:
                await _lock(alone, fcntl.LOCK_EX)
                if not await asyncio.to_thread(_is_whole, path, model.size):
                    await patiently(lambda: self._download(model, path))

    async def _download(self, model: UsedModel, path: Path) -> None:
        part = self._folder / ".parts" / self._token(path)
        response = await get(self._objects, model.bucket, model.key, f'model "{model.name}"')
        size = response["ContentLength"]
        if model.size and size != model.size:
            raise JobFailure(
                f'model "{model.name}" has {size} bytes in the store, {model.size} were registered'
            )
        await asyncio.to_thread(self._make_room, size)
        with await asyncio.to_thread(_open_part, part) as file:
            async with response["Body"]:
                while chunk := await response["Body"].read(CHUNK):
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(_finish, file)
        if part.stat().st_size != size:
            raise Retry(f"only {part.stat().st_size} of {size} bytes came")
        await asyncio.to_thread(_put_in_place, part, path)
        log.info("model_fetched", checkpoint_id=model.checkpoint_id, bytes=size)

    def _path(self, model: UsedModel) -> Path:
        folder, name = model.checkpoint_id or "", PurePosixPath(model.key).name
        if not name or name == ".." or folder.startswith(".") or "/" in folder:
            raise JobFailure(f'model "{model.name}" has no usable place: {model.key}')
        return self._folder / folder / name

    def _token(self, path: Path) -> str:
        relative = path.relative_to(self._folder).as_posix()
        return hashlib.sha256(relative.encode()).hexdigest()[:32]

    def _open_lock(self, path: Path) -> BinaryIO:
        lock = self._folder / ".locks" / self._token(path)
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("ab")

    def _make_room(self, needed: int) -> None:
        """Evicts until `needed` more bytes stay under the limit, or nothing is left to evict."""
        files = []
        for path in self._folder.glob("[!.]*/*"):
            with contextlib.suppress(FileNotFoundError):  # evicted by another worker
                stat = path.stat()
                files.append((stat.st_atime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + needed <= self._limit:
                return
            with self._open_lock(path) as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                total -= size
                log.info("model_evicted", checkpoint_id=path.parent.name, bytes=size)
        if total + needed > self._limit:
            log.warning("cache_over_limit", bytes=total + needed, limit=self._limit)


async def _lock(file: BinaryIO, kind: int) -> None:
    """Waits without a thread that could not be cancelled."""
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            await asyncio.sleep(0.2)


def _is_whole(path: Path, size: int) -> bool:
    """Marks the file as used, by its access time: engines know a file that they have loaded by its
    time of change."""
    try:
        stat = path.stat()
        if size and stat.st_size != size:
            return False
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return True
    except FileNotFoundError:
        return False


def _open_part(part: Path) -> Any:
    part.parent.mkdir(parents=True, exist_ok=True)
    return part.open("wb")


def _finish(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(part: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
