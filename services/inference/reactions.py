"""What the ledger does when other services speak: keeps what it must know of them, and ends the
jobs of an endpoint that has ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from services.inference.store import CheckpointStore, EndpointStore, JobStore
from shared.contracts import endpoints, inference, models
from shared.logs import get_logger
from shared.unit_of_work import Tx

log = get_logger(__name__)

EmptyQueue = Callable[[str], Awaitable[None]]
"""Removes the waiting jobs of an endpoint from the bus."""


async def on_checkpoint_event(event: models.Checkpoint, tx: Tx) -> None:
    await CheckpointStore(tx.conn).merge([event])


async def on_endpoint_event(event: endpoints.Endpoint, tx: Tx, *, empty_queue: EmptyQueue) -> None:
    """Its jobs fail at once when an endpoint ends; a worker that still finishes one is ignored."""
    store, jobs = EndpointStore(tx.conn), JobStore(tx.conn)
    await store.merge([event])
    (endpoint,) = await store.list_held([event.endpoint_id])
    if endpoint.end is None:
        return
    for job in await jobs.list_unfinished(endpoint.endpoint_id):
        failed = job.fail(endpoint.end, now=tx.now)
        await jobs.save(failed)
        tx.emit(inference.JobFailed.of(failed))
        log.info("job_failed_with_endpoint", job_id=job.job_id, reason=endpoint.end)
    tx.after_commit.append(partial(empty_queue, endpoint.endpoint_id))
