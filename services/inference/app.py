"""Wires the ledger: the only place that knows all of its parts."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from services.inference import metrics
from services.inference.commands import remove_leftovers
from services.inference.settings import Settings
from services.inference.subscribers import commands_with, reactions_with
from shared.contracts.subjects import JOBS, run_job_subject
from shared.logs import get_logger
from shared.objects import Objects
from shared.service import Service
from shared.settings import ObjectSettings

log = get_logger(__name__)


def build(settings: Settings, object_settings: ObjectSettings) -> Service:
    objects = Objects(object_settings)
    left = asyncio.Event()

    async def empty_queue(endpoint_id: str) -> None:
        try:
            await service.js.purge_stream(JOBS, subject=run_job_subject(endpoint_id))
        except Exception as error:  # its jobs have failed already; a worker would do them in vain
            log.warning("queue_not_emptied", endpoint_id=endpoint_id, error=repr(error))

    async def remove_what_was_left(service: Service) -> None:
        while True:
            left.clear()
            try:
                await service.work.run(partial(remove_leftovers, objects=objects))
            except Exception as error:
                log.warning("leftovers_postponed", error=repr(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(left.wait(), settings.leftovers_seconds)

    service = Service(
        "inference",
        settings,
        commands=commands_with(objects, left.set),
        reactions=reactions_with(empty_queue),
        checks={"s3": objects.check},
        background=remove_what_was_left,
        resources=[objects.open()],
        observe=metrics.observe,
        sample=lambda service: [metrics.queues_sampler(service.pool)],
    )
    return service
