"""What models does unasked: downloads, and the removal of bytes that nobody owns any more.

All of it is read from the tables, so that it goes on after a restart where it stood. Several
processes may run it side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Set
from datetime import timedelta
from functools import partial
from typing import TypeVar

from services.models import commands
from services.models.domain import Checkpoint
from services.models.downloads import Downloader, Interrupted, Unfit
from services.models.store.checkpoints import CheckpointStore
from services.models.store.files import FileStore
from shared.contracts.envelope import new_id
from shared.contracts.models import CheckpointFile
from shared.errors import Rejected, Retry
from shared.logs import get_logger
from shared.postgres import AWAY
from shared.service import Service
from shared.unit_of_work import Tx, UnitOfWork, utc_now

log = get_logger(__name__)

BATCH = 100
PAUSES = (1.0, 5.0)
"""Seconds before the second and third attempt at a URL."""
OBJECT_STORE_PAUSE = 5.0

T = TypeVar("T")


class Upkeep:
    def __init__(
        self,
        files: FileStore,
        downloader: Downloader,
        *,
        parallel: int,
        lease_seconds: float,
        expires_hours: float,
        sweep_seconds: float,
    ) -> None:
        self._files = files
        self._downloader = downloader
        self._parallel = parallel
        self._lease_seconds = lease_seconds
        self._expires_hours = expires_hours
        self._sweep_seconds = sweep_seconds
        self._holder = new_id()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._downloads_due = asyncio.Event()
        self._leftovers_due = asyncio.Event()
        self._work: UnitOfWork

    async def wake(self) -> None:
        """There is something new to download or to remove."""
        self._downloads_due.set()
        self._leftovers_due.set()

    async def run(self, service: Service) -> None:
        """Runs until cancelled."""
        self._work = service.work
        try:
            async with asyncio.TaskGroup() as group:
                for chore, due, seconds in (
                    (self._tend_downloads, self._downloads_due, self._lease_seconds / 6),
                    (self._remove_leftovers, self._leftovers_due, self._sweep_seconds),
                    (self._expire, asyncio.Event(), self._sweep_seconds),
                ):
                    group.create_task(_repeat(chore, due, seconds))
        finally:
            await self._cancel(set(self._running))

    async def _read(self, work: Callable[[CheckpointStore], Awaitable[T]]) -> T:
        """What a store's method answers, in a transaction of its own."""
        answers: list[T] = []

        async def in_transaction(tx: Tx) -> None:
            answers.append(await work(CheckpointStore(tx.conn)))

        await self._work.run(in_transaction)
        return answers[0]

    # Downloads.

    async def _tend_downloads(self) -> None:
        """Ends those that nobody wants any more and begins new ones."""
        mine = set(self._running)
        if mine:
            wanted = await self._read(
                lambda store: store.renew_leases(self._holder, mine, seconds=self._lease_seconds)
            )
            await self._cancel(mine - wanted)
        free = self._parallel - len(self._running)
        if free <= 0:
            return
        taken = await self._read(
            lambda store: store.lease_downloads(
                self._holder, seconds=self._lease_seconds, limit=free, running=self._running
            )
        )
        for checkpoint in taken:
            task = asyncio.create_task(self._download(checkpoint))
            self._running[checkpoint.checkpoint_id] = task

    async def _cancel(self, checkpoint_ids: Set[str]) -> None:
        tasks = [self._running[id_] for id_ in checkpoint_ids if id_ in self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _download(self, checkpoint: Checkpoint) -> None:
        pause = 0.0
        began = time.monotonic()
        try:
            outcome = await self._fetch_all(checkpoint)
            await self._until_postgres_is_back(outcome)
            seconds = round(time.monotonic() - began, 1)
            log.info("download_ended", checkpoint_id=checkpoint.checkpoint_id, seconds=seconds)
        except Retry as error:
            pause = OBJECT_STORE_PAUSE
            log.warning(
                "download_postponed", checkpoint_id=checkpoint.checkpoint_id, error=str(error)
            )
        except Exception:
            pause = OBJECT_STORE_PAUSE
            log.exception("download_not_ended", checkpoint_id=checkpoint.checkpoint_id)
        finally:
            await self._leave(checkpoint.checkpoint_id, pause)

    async def _fetch_all(self, checkpoint: Checkpoint) -> Callable[[Tx], Awaitable[None]]:
        """Returns what is to be written down: the files, or why there are none."""
        facts = checkpoint.checkpoint_id, self._holder
        try:
            await self._files.remove(checkpoint)  # what an attempt that died left behind
            files: list[CheckpointFile] = []
            for url in checkpoint.urls:
                files.append(await self._fetch(checkpoint, url, {f.filename for f in files}))
            return partial(commands.finish_download, *facts, files)
        except Unfit as error:
            return partial(commands.fail_download, *facts, str(error))
        except (Retry, *AWAY):
            raise
        except Exception:
            log.exception("download_failed", checkpoint_id=checkpoint.checkpoint_id)
            reason = "the download failed inside Darkroom; see its log"
            return partial(commands.fail_download, *facts, reason)

    async def _fetch(self, checkpoint: Checkpoint, url: str, others: Set[str]) -> CheckpointFile:
        for pause in (*PAUSES, None):
            try:
                return await self._fetch_once(checkpoint, url, others)
            except Interrupted as error:
                if pause is None:
                    raise Unfit(f"{error}, three times") from error
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _fetch_once(
        self, checkpoint: Checkpoint, url: str, others: Set[str]
    ) -> CheckpointFile:
        async with self._downloader.open(url) as source:
            if source.filename in others:
                raise Unfit(f"two of the URLs hold a file named {source.filename}")
            await self._claim(checkpoint, source.filename)
            key = self._files.key(checkpoint.type, checkpoint.checkpoint_id, source.filename)
            try:
                size = await self._files.write(key, source.chunks)
            except ValueError as error:
                raise Unfit(f"{source.filename} is empty") from error
        return CheckpointFile(filename=source.filename, key=key, size=size)

    async def _claim(self, checkpoint: Checkpoint, filename: str) -> None:
        try:
            await self._read(
                lambda store: store.claim_names(
                    checkpoint.type, [filename], checkpoint.checkpoint_id
                )
            )
        except Rejected as refusal:
            raise Unfit(refusal.message) from refusal

    async def _until_postgres_is_back(self, work: Callable[[Tx], Awaitable[None]]) -> None:
        """Gigabytes are not fetched again because the database restarts at the wrong moment."""
        while True:
            try:
                await self._work.run(work)
                return
            except AWAY as error:
                log.warning("waiting_for_postgres", error=repr(error))
                await asyncio.sleep(1)

    async def _leave(self, checkpoint_id: str, pause: float) -> None:
        """Lets go of a download, so that its leftovers can be removed or somebody tries again."""
        try:
            await self._read(
                lambda store: store.end_lease(self._holder, checkpoint_id, pause=pause)
            )
        except Exception as error:  # then the lease ends by itself
            log.warning("lease_not_ended", checkpoint_id=checkpoint_id, error=repr(error))
        finally:
            self._running.pop(checkpoint_id, None)
            await self.wake()

    # Leftovers.

    async def _remove_leftovers(self) -> None:
        while checkpoints := await self._read(lambda store: store.list_leftovers(BATCH)):
            for checkpoint in checkpoints:
                await self._files.remove(checkpoint)
                await self._read(
                    partial(_mark_bytes_deleted, checkpoint_id=checkpoint.checkpoint_id)
                )
                log.info("bytes_deleted", checkpoint_id=checkpoint.checkpoint_id)

    async def _expire(self) -> None:
        await self._work.run(partial(commands.expire_uploads, self._expires_hours))
        await self._abort_orphans()
        self._leftovers_due.set()

    async def _abort_orphans(self) -> None:
        """Uploads of commands that died between the object store and their commit, for good."""
        before = utc_now() - timedelta(hours=self._expires_hours)
        uploads = await self._files.list_uploads(before=before)
        if not uploads:
            return
        ids = {upload.checkpoint_id for upload in uploads}
        in_work = await self._read(lambda store: store.list_in_work(ids))
        for upload in uploads:
            if upload.checkpoint_id not in in_work:
                await self._files.abort(upload)
                log.info("orphan_upload_aborted", key=upload.key)


async def _mark_bytes_deleted(store: CheckpointStore, *, checkpoint_id: str) -> None:
    await store.mark_bytes_deleted(checkpoint_id)


async def _repeat(chore: Callable[[], Awaitable[None]], due: asyncio.Event, seconds: float) -> None:
    """Does a chore at once, then whenever it is due and at least every so many seconds."""
    while True:
        due.clear()
        try:
            await chore()
        except Exception as error:
            log.warning("chore_postponed", chore=chore.__name__, error=repr(error))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(due.wait(), seconds)
