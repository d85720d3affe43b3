"""What the ledger does when other services speak: keeps what it must know of them, and lets go of
the queue of an endpoint that has ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from services.inference.commands import Wake
from services.inference.domain import Endpoint
from services.inference.store import CheckpointStore, EndpointStore
from shared.contracts import endpoints, models
from shared.unit_of_work import Tx

EmptyQueue = Callable[[str], Awaitable[None]]
"""Removes the waiting jobs of an endpoint from the bus."""


async def on_checkpoint_event(event: models.Checkpoint, tx: Tx) -> None:
    await CheckpointStore(tx.conn).merge([event])


async def on_endpoint_event(
    event: endpoints.Endpoint, tx: Tx, *, empty_queue: EmptyQueue, wake: Wake
) -> None:
    """What jobs an ended endpoint has left is looked after once this is known (`move_job`): that
    locks a job before an endpoint, as starting one does."""
    store = EndpointStore(tx.conn)
    await store.merge([event])
    (endpoint,) = await store.list_held([event.endpoint_id])

    async def after_commit() -> None:
        wake()
        if _has_no_workers(endpoint):
            await empty_queue(endpoint.endpoint_id)

    if endpoint.end is not None:
        tx.after_commit.append(after_commit)


def _has_no_workers(endpoint: Endpoint) -> bool:
    return endpoint.deleted or endpoint.endpoint_status == "Failed"
