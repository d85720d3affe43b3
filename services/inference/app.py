"""Wires the ledger: the only place that knows all of its parts."""

from __future__ import annotations

import asyncio
from functools import partial

from services.inference import metrics
from services.inference.commands import move_job, remove_leftovers
from services.inference.settings import Settings
from services.inference.store import JobStore
from services.inference.subscribers import commands_with, reactions_with
from shared.contracts.subjects import JOBS, run_job_subject
from shared.logs import get_logger
from shared.objects import Objects
from shared.service import Service
from shared.settings import ObjectSettings
from shared.upkeep import repeat

log = get_logger(__name__)


def build(settings: Settings, object_settings: ObjectSettings) -> Service:
    objects = Objects(object_settings)
    left = asyncio.Event()
    ended = asyncio.Event()

    async def empty_queue(endpoint_id: str) -> None:
        try:
            await service.js.purge_stream(JOBS, subject=run_job_subject(endpoint_id))
        except Exception as error:  # its jobs are elsewhere; a worker would see that
            log.warning("queue_not_emptied", endpoint_id=endpoint_id, error=repr(error))

    async def remove_what_was_left() -> None:
        await service.work.run(partial(remove_leftovers, objects=objects))

    async def move_what_was_left() -> None:
        while job_ids := await JobStore(service.pool).list_left():
            for job_id in job_ids:
                await service.work.run(partial(move_job, job_id))

    async def look_after(_: Service) -> None:
        async with asyncio.TaskGroup() as group:
            every = settings.leftovers_seconds
            group.create_task(repeat(remove_what_was_left, left, every))
            group.create_task(repeat(move_what_was_left, ended, every))

    service = Service(
        "inference",
        settings,
        commands=commands_with(objects, left.set),
        reactions=reactions_with(empty_queue, ended.set),
        checks={"s3": objects.check},
        background=look_after,
        resources=[objects.open()],
        observe=metrics.observe,
        sample=lambda service: [metrics.queues_sampler(service.pool)],
    )
    return service
