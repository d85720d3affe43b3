"""What models does unasked: takes files in, removes bytes that nobody owns any more, and ends
uploads that nobody completes.

All of it is read from the tables, so that it goes on after a restart where it stood. Several
processes may run it side by side.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial

from services.models import commands
from services.models.domain import Checkpoint
from services.models.intake import Intake
from services.models.store.checkpoints import CheckpointStore
from services.models.store.contents import ContentStore
from services.models.store.files import FileStore
from shared.contracts.models import CheckpointProgress
from shared.logs import get_logger
from shared.service import Service
from shared.unit_of_work import UnitOfWork, utc_now
from shared.upkeep import repeat

log = get_logger(__name__)

BATCH = 100


class Wake:
    """Says that there is something new to take in or to remove."""

    def __init__(self) -> None:
        self.intake_due = asyncio.Event()
        self.leftovers_due = asyncio.Event()

    async def __call__(self) -> None:
        self.intake_due.set()
        self.leftovers_due.set()


class Upkeep:
    def __init__(
        self,
        files: FileStore,
        intake: Intake,
        wake: Wake,
        *,
        lease_seconds: float,
        expires_hours: float,
        sweep_seconds: float,
    ) -> None:
        self._files = files
        self._intake = intake
        self._wake = wake
        self._lease_seconds = lease_seconds
        self._expires_hours = expires_hours
        self._sweep_seconds = sweep_seconds
        self._work: UnitOfWork

    async def run(self, service: Service) -> None:
        """Runs until cancelled."""
        self._work = service.work

        async def tell(progress: CheckpointProgress) -> None:
            await service.tell(progress, progress.checkpoint_id)

        self._intake.use(service.work, tell)
        try:
            async with asyncio.TaskGroup() as group:
                for chore, due, seconds in (
                    (self._intake.tend, self._wake.intake_due, self._lease_seconds / 6),
                    (self._remove_leftovers, self._wake.leftovers_due, self._sweep_seconds),
                    (self._expire, asyncio.Event(), self._sweep_seconds),
                ):
                    group.create_task(repeat(chore, due, seconds))
        finally:
            await self._intake.stop()

    async def _remove_leftovers(self) -> None:
        while checkpoints := await self._work.read(
            lambda tx: CheckpointStore(tx.conn).list_leftovers(BATCH)
        ):
            for checkpoint in checkpoints:
                await self._remove_bytes(checkpoint)
        while keys := await self._work.read(lambda tx: ContentStore(tx.conn).list_doomed(BATCH)):
            for key in keys:
                await self._remove_object(key)

    async def _remove_bytes(self, checkpoint: Checkpoint) -> None:
        id_ = checkpoint.checkpoint_id
        kept = await self._work.read(lambda tx: ContentStore(tx.conn).release(checkpoint))
        await self._files.remove(checkpoint, keep=kept)
        await self._work.read(lambda tx: CheckpointStore(tx.conn).mark_bytes_deleted(id_))
        log.info("bytes_deleted", checkpoint_id=id_)

    async def _remove_object(self, key: str) -> None:
        await self._files.delete(key)
        await self._work.read(lambda tx: ContentStore(tx.conn).forget_doomed(key))
        log.info("object_deleted", key=key)

    async def _expire(self) -> None:
        await self._work.run(partial(commands.expire_uploads, self._expires_hours))
        await self._abort_orphans()
        self._wake.leftovers_due.set()

    async def _abort_orphans(self) -> None:
        """Uploads of commands that died between the object store and their commit, for good."""
        before = utc_now() - timedelta(hours=self._expires_hours)
        uploads = await self._files.list_uploads(before=before)
        if not uploads:
            return
        ids = {upload.checkpoint_id for upload in uploads}
        in_work = await self._work.read(lambda tx: CheckpointStore(tx.conn).list_in_work(ids))
        for upload in uploads:
            if upload.checkpoint_id not in in_work:
                await self._files.abort(upload)
                log.info("orphan_upload_aborted", key=upload.key)
