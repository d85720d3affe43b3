"""Messages leave through a table, in the transaction of the work that they speak of.

They are published right after the commit. What a crash or an unreachable bus left behind is sent
by the relay, which looks once a second; receivers are idempotent, so a second sending is harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import asyncpg
import msgspec
from nats.aio.client import Client

from shared.contracts import envelope as cloud
from shared.logs import get_logger

log = get_logger(__name__)

PUBLISH_TIMEOUT = 5.0


class OutboxRow(msgspec.Struct, frozen=True):
    message_id: str
    subject: str
    body: bytes
    command_id: str | None
    id: int = 0


async def store(connection: Any, rows: Sequence[OutboxRow]) -> list[OutboxRow]:
    """Adds the messages to the caller's transaction; returns them with their ids."""
    if not rows:
        return []
    ids = await connection.fetch(
        """
        INSERT INTO outbox (message_id, subject, body, command_id)
        SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::text[])
        RETURNING id
        """,
        [row.message_id for row in rows],
        [row.subject for row in rows],
        [row.body for row in rows],
        [row.command_id for row in rows],
    )
    return [
        msgspec.structs.replace(row, id=record["id"]) for row, record in zip(rows, ids, strict=True)
    ]


class Outbox:
    """Publishes stored rows in order and marks them sent once the stream has them."""

    def __init__(self, pool: asyncpg.Pool[Any], client: Client) -> None:
        self._pool = pool
        self._client = client
        self._js = client.jetstream()

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message that the bus takes."""
        return self._client.max_payload

    async def publish(self, rows: Sequence[OutboxRow]) -> None:
        """Stops at the first message that the stream does not take: the relay sends the rest, so
        the messages of one transaction arrive in their order. Never raises: they are safe."""
        sent = []
        try:
            for row in rows:
                await self._send(row)
                sent.append(row.id)
        except Exception as error:
            log.warning("publish_postponed", subject=row.subject, error=repr(error))
        if not sent:
            return
        try:
            await self._pool.execute(
                "UPDATE outbox SET sent_at = now() WHERE id = ANY($1::bigint[])", sent
            )
        except Exception as error:  # the relay sends them once more, which harms nobody
            log.warning("sending_not_noted", error=repr(error))

    async def relay(self, *, every: float = 1.0) -> None:
        """Runs until cancelled."""
        while True:
            try:
                while await self._relay_once():
                    pass
                await self._pool.execute(
                    "DELETE FROM outbox WHERE sent_at < now() - interval '1 hour'"
                )
            except Exception as error:
                log.warning("relay_postponed", error=repr(error))
            await asyncio.sleep(every)

    async def _relay_once(self, batch: int = 200) -> bool:
        async with self._pool.acquire() as connection, connection.transaction():
            records = await connection.fetch(
                """
                SELECT id, message_id, subject, body, command_id FROM outbox
                WHERE sent_at IS NULL AND created_at < now() - interval '1 second'
                ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED
                """,
                batch,
            )
            for record in records:
                row = OutboxRow(**dict(record))
                await self._send(row)
                await connection.execute("UPDATE outbox SET sent_at = now() WHERE id = $1", row.id)
            if records:
                log.info("relayed", messages=len(records))
            return len(records) == batch

    async def resend_events(self, seconds: float) -> None:
        """What was sent in the last seconds goes out once more: the bus was away, and may have lost
        what it had not yet synced. What it did not lose it recognises (`duplicate_window`). Only
        events: they are idempotent everywhere, work for a GPU is not."""
        records = await self._pool.fetch(
            """
            SELECT id, message_id, subject, body, command_id FROM outbox
            WHERE sent_at > now() - make_interval(secs => $1) AND subject LIKE 'evt.%'
            ORDER BY id
            """,
            seconds,
        )
        for record in records:
            await self._send(OutboxRow(**dict(record)))

    async def _send(self, row: OutboxRow) -> None:
        """Returns once the stream has it. What was stored when the bus took larger messages is
        passed over: it would stand in the way of all others for ever."""
        if not cloud.fits(row.body, self.max_payload):
            log.error("too_large_to_send", subject=row.subject, id=row.id, bytes=len(row.body))
            return
        await self._js.publish(
            row.subject,
            row.body,
            timeout=PUBLISH_TIMEOUT,
            headers={"Nats-Msg-Id": row.message_id},
        )
