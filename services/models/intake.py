"""Files on their way in: fetched by URL or uploaded, hashed as they pass, and looked at before
their checkpoint is Active.

Which checkpoints are due is read from the tables, so that work goes on after a restart; several
processes may run side by side, and each checkpoint is one process's, by a lease.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence, Set
from functools import partial
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from services.models import commands
from services.models.conversion import convert, converted_name
from services.models.domain import Checkpoint, Harmful, Unfit
from services.models.downloads import Downloader, Interrupted
from services.models.inspection import look_at
from services.models.store.checkpoints import CheckpointStore
from services.models.store.files import Digest, FileStore
from services.models.unpacking import unpack
from shared.contracts.envelope import new_id
from shared.contracts.models import CheckpointFile, CheckpointProgress
from shared.errors import Rejected, Retry
from shared.logs import get_logger
from shared.postgres import AWAY
from shared.unit_of_work import Tx, UnitOfWork

log = get_logger(__name__)

PAUSES = (1.0, 5.0)
"""Seconds before the second and third attempt at a URL, each from its beginning."""
OBJECT_STORE_PAUSE = 5.0
PROGRESS_SECONDS = 0.5

T = TypeVar("T")
Outcome = Callable[[Tx], Awaitable[None]]
Tell = Callable[[CheckpointProgress], Awaitable[None]]


class Found(msgspec.Struct, frozen=True):
    """A file that was taken in, and the key of the one that it stands for, if it was converted."""

    file: CheckpointFile
    replaced: str | None = None


class Intake:
    def __init__(
        self,
        files: FileStore,
        downloader: Downloader,
        *,
        parallel: int,
        lease_seconds: float,
        convert_pickles: bool,
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        """`parallel`: checkpoints, and files, at the same time. `on_end` is called when this
        process has let go of a checkpoint."""
        self._files = files
        self._downloader = downloader
        self._parallel = parallel
        self._lease_seconds = lease_seconds
        self._convert_pickles = convert_pickles
        self._on_end = on_end
        self._holder = new_id()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._work: UnitOfWork
        self._tell: Tell

    def use(self, work: UnitOfWork, tell: Tell) -> None:
        self._work, self._tell = work, tell
        self._free = asyncio.Semaphore(self._parallel)

    async def tend(self) -> None:
        """Lets go of checkpoints that nobody wants any more and takes on new ones."""
        mine = set(self._running)
        if mine:
            wanted = await self._work.read(
                lambda tx: CheckpointStore(tx.conn).renew_leases(
                    self._holder, mine, seconds=self._lease_seconds
                )
            )
            await self._cancel(mine - wanted)
        free = self._parallel - len(self._running)
        if free <= 0:
            return
        taken = await self._work.read(
            lambda tx: CheckpointStore(tx.conn).lease_intake(
                self._holder, seconds=self._lease_seconds, limit=free, running=self._running
            )
        )
        for checkpoint in taken:
            task = asyncio.create_task(self._take_in(checkpoint))
            self._running[checkpoint.checkpoint_id] = task

    async def stop(self) -> None:
        await self._cancel(set(self._running))

    async def _cancel(self, checkpoint_ids: Set[str]) -> None:
        tasks = [self._running[id_] for id_ in checkpoint_ids if id_ in self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_in(self, checkpoint: Checkpoint) -> None:
        pause = 0.0
        began = time.monotonic()
        about = {"checkpoint_id": checkpoint.checkpoint_id}
        try:
            outcome = await self._outcome_of(checkpoint)
            await self._until_postgres_is_back(outcome)
            log.info("intake_ended", **about, seconds=round(time.monotonic() - began, 1))
        except Retry as error:
            pause = OBJECT_STORE_PAUSE
            log.warning("intake_postponed", **about, error=str(error))
        except Exception:
            pause = OBJECT_STORE_PAUSE
            log.exception("intake_not_ended", **about)
        finally:
            await self._let_go(checkpoint.checkpoint_id, pause)

    async def _outcome_of(self, checkpoint: Checkpoint) -> Outcome:
        """What is to be written down."""
        about = checkpoint.checkpoint_id, self._holder
        files: list[CheckpointFile] = []
        try:
            files = await self._fetch_all(checkpoint) if checkpoint.urls else checkpoint.files
            files = await _all(self._hash(checkpoint, file) for file in files)
            packed, files = files, await self._unpack_all(checkpoint, files)
            names = {file.filename for file in files}
            found = await _all(self._look_at(checkpoint, file, names) for file in files)
            replaced = [one.replaced for one in found if one.replaced]
            replaced += {file.key for file in packed} - {file.key for file in files}
            return partial(commands.accept, *about, [one.file for one in found], replaced)
        except Harmful as error:
            return partial(commands.refuse, *about, files, str(error))
        except Unfit as error:
            return partial(commands.fail, *about, str(error))
        except (Retry, *AWAY):
            raise
        except Exception:
            log.exception("intake_failed", checkpoint_id=checkpoint.checkpoint_id)
            reason = "it could not be taken in because of a fault of Darkroom's; see its log"
            return partial(commands.fail, *about, reason)

    # By URL.

    async def _fetch_all(self, checkpoint: Checkpoint) -> list[CheckpointFile]:
        await self._files.remove(checkpoint)  # what an attempt that died left behind
        names: set[str] = set()
        return await _all(self._fetch(checkpoint, url, names) for url in checkpoint.urls)

    async def _fetch(self, checkpoint: Checkpoint, url: str, names: set[str]) -> CheckpointFile:
        async with self._free:
            for pause in (*PAUSES, None):
                try:
                    return await self._fetch_once(checkpoint, url, names)
                except Interrupted as error:
                    if pause is None:
                        raise Unfit(f"{error}, {len(PAUSES) + 1} times") from error
                    await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _fetch_once(
        self, checkpoint: Checkpoint, url: str, names: set[str]
    ) -> CheckpointFile:
        async with self._downloader.open(url) as source:
            if source.filename in names:
                raise Unfit(f"two of the URLs hold a file named {source.filename}")
            names.add(source.filename)
            try:
                await self._claim(checkpoint, source.filename)
                key = self._files.key(checkpoint.type, checkpoint.checkpoint_id, source.filename)
                digest = Digest()
                told = self._telling(
                    checkpoint, source.filename, "download", source.total, source.chunks
                )
                size = await self._files.write(key, digest.over(told))
            except ValueError as error:
                raise Unfit(f"{source.filename} is empty") from error
            except BaseException:
                names.discard(source.filename)
                raise
        return CheckpointFile(
            filename=source.filename, key=key, size=size, sha256=digest.hexdigest()
        )

    async def _claim(self, checkpoint: Checkpoint, filename: str) -> None:
        try:
            await self._work.read(
                lambda tx: CheckpointStore(tx.conn).claim_names(
                    checkpoint.type, [filename], checkpoint.checkpoint_id
                )
            )
        except Rejected as refusal:
            raise Unfit(refusal.message) from refusal

    # What is there.

    async def _hash(self, checkpoint: Checkpoint, file: CheckpointFile) -> CheckpointFile:
        """The one pass over what a client uploaded."""
        if file.sha256:
            return file
        async with self._free:
            digest = Digest()
            chunks = self._files.read(file.key, file.size)
            told = self._telling(checkpoint, file.filename, "check", file.size, chunks)
            async for _ in digest.over(told):
                pass
        if digest.size != file.size:
            raise Retry(f"only {digest.size} of {file.size} bytes of {file.key} came")
        return replace(file, sha256=digest.hexdigest())

    async def _unpack_all(
        self, checkpoint: Checkpoint, files: Sequence[CheckpointFile]
    ) -> list[CheckpointFile]:
        """With the files that lie in an archive in place of the archive."""
        names: set[str] = set()
        unpacked = []
        for file in files:
            async with self._free:
                found = await unpack(self._files, file, partial(self._claim, checkpoint)) or [file]
            for one in found:
                if one.filename in names:
                    raise Unfit(f"two of the files are named {one.filename}")
                names.add(one.filename)
            if found != [file]:
                log.info(
                    "archive_unpacked", checkpoint_id=checkpoint.checkpoint_id, files=len(found)
                )
            unpacked += found
        return unpacked

    async def _look_at(
        self, checkpoint: Checkpoint, file: CheckpointFile, names: set[str]
    ) -> Found:
        """`names`: of all files of the checkpoint. One that would get the name of another by its
        conversion stays what it is."""
        kind = await look_at(self._files, file, checkpoint.type)
        looked_at = replace(file, kind=kind)
        if not self._convert_pickles or kind.format != "pickle":
            return Found(looked_at)
        name = converted_name(file.filename)
        if name in names:
            return Found(looked_at)
        names.add(name)
        async with self._free:
            converted = await convert(self._files, looked_at)
        if converted is None:
            return Found(looked_at)
        try:
            await self._claim(checkpoint, converted.filename)
        except Unfit:  # somebody has that name: then it stays what it is
            await self._files.delete(converted.key)
            return Found(looked_at)
        log.info("pickle_converted", checkpoint_id=checkpoint.checkpoint_id)
        return Found(converted, replaced=file.key)

    async def _telling(
        self,
        checkpoint: Checkpoint,
        filename: str,
        stage: str,
        total: int | None,
        chunks: AsyncIterator[bytes],
    ) -> AsyncIterator[bytes]:
        """The chunks, while their progress is told now and then, and at the end."""
        size, due = 0, 0.0

        async def tell() -> None:
            percent = round(100 * size / total, 1) if total else None
            await self._tell(
                CheckpointProgress(
                    checkpoint_id=checkpoint.checkpoint_id,
                    filename=filename,
                    stage=stage,
                    bytes=size,
                    total=total,
                    percent=percent,
                )
            )

        async for chunk in chunks:
            size += len(chunk)
            if time.monotonic() >= due:
                due = time.monotonic() + PROGRESS_SECONDS
                await tell()
            yield chunk
        await tell()

    # The end.

    async def _until_postgres_is_back(self, work: Outcome) -> None:
        """Gigabytes are not fetched again because the database restarts at the wrong moment."""
        while True:
            try:
                await self._work.run(work)
                return
            except AWAY as error:
                log.warning("waiting_for_postgres", error=repr(error))
                await asyncio.sleep(1)

    async def _let_go(self, checkpoint_id: str, pause: float) -> None:
        """So that its leftovers can be removed or somebody tries again."""
        try:
            await self._work.read(
                lambda tx: CheckpointStore(tx.conn).end_lease(
                    self._holder, checkpoint_id, pause=pause
                )
            )
        except Exception as error:  # then the lease ends by itself
            log.warning("lease_not_ended", checkpoint_id=checkpoint_id, error=repr(error))
        finally:
            self._running.pop(checkpoint_id, None)
            await self._on_end()


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """What all of them answer, at the same time; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
