"""One message = one Postgres transaction: inbox check, work, outbox rows. Then publish."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg

from shared import errors, tracing
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Completed, Envelope, Message, Rejected, State
from shared.contracts.inference import JobStarted, RunJob
from shared.contracts.registry import payload, type_of
from shared.contracts.subjects import aggregate_of, event_subject, run_job_subject
from shared.outbox import Outbox, OutboxRow, store

Handler = Callable[[Any, "Tx"], Awaitable[None]]
T = TypeVar("T")
Clock = Callable[[], datetime]
Observer = Callable[[Message], None]
"""Is told of each message that left with a transaction, once, after its commit."""


ROOM_TO_GROW = 256 * 1024
"""Bytes by which events about an aggregate may be larger than the first, such as by the outcome of
a job: what could be created can also be ended. A job's start, which may add models, takes no more
than half of them."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Tx:
    """What a handler works with: the connection of its transaction, the time, and `emit`."""

    def __init__(
        self,
        owner: str,
        connection: Any,
        now: datetime,
        cause: Envelope | None = None,
        *,
        max_payload: int,
    ) -> None:
        self.owner = owner
        self.conn = connection
        self.now = now
        self.cause = cause
        self._max_payload = max_payload
        self.after_commit: list[Callable[[], Awaitable[None]]] = []
        self._messages: list[Message] = []

    def emit(self, message: Message) -> None:
        """Adds an event (or work for a queue) to what leaves with this transaction."""
        self._messages.append(message)

    @property
    def emitted(self) -> list[Message]:
        return self._messages

    def rows(self) -> list[OutboxRow]:
        """The messages as they will be sent; the last event of a command carries its answer.
        Raises TooLarge for one that would never be sent, or that leaves its aggregate no room."""
        asked = self.cause is not None and self.cause.type.startswith(f"{self.owner}.")
        command = self.cause if asked else None
        messages = list(self._messages)
        if command and not any(not isinstance(m, RunJob) for m in messages):
            messages.append(Completed(command_type=command.type))
        last = max((i for i, m in enumerate(messages) if not isinstance(m, RunJob)), default=-1)
        return [
            self._row(message, answers=command.id if command and i == last else None)
            for i, message in enumerate(messages)
        ]

    def _row(self, message: Message, answers: str | None) -> OutboxRow:
        cause_id = self.cause.id if self.cause else None
        if isinstance(message, RunJob):
            subject, about = run_job_subject(message.endpoint_id), message.job_id
        else:
            subject = event_subject(message, owner=self.owner, command_id=cause_id)
            outcome = isinstance(message, Rejected | Completed)
            about = (cause_id or "") if outcome else aggregate_of(message)[1]
        framed = cloud.wrap(
            message,
            type=type_of(message, self.owner),
            source=self.owner,
            subject=about,
            now=self.now,
            cause=self.cause,
            traceparent=tracing.traceparent(),
            answers=answers,
        )
        body = cloud.encode(framed)
        spare = 0
        if isinstance(message, State) and message.version == 1:
            spare = ROOM_TO_GROW
        elif isinstance(message, JobStarted):
            spare = ROOM_TO_GROW // 2
        if not cloud.fits(body, self._max_payload, spare=spare):
            raise errors.TooLarge(len(body), self._max_payload)
        return OutboxRow(framed.id, subject, body, cause_id)


class UnitOfWork:
    def __init__(
        self,
        owner: str,
        pool: asyncpg.Pool[Any],
        outbox: Outbox,
        clock: Clock = utc_now,
        observe: Observer | None = None,
    ) -> None:
        self.owner = owner
        self.pool = pool
        self._outbox = outbox
        self._clock = clock
        self._observe = observe

    async def process(self, envelope: Envelope, handler: Handler) -> None:
        """Does the work of one message exactly once, however often it is delivered.

        Raises what the handler raises, except Rejected, which becomes the message's outcome."""
        message = payload(envelope)
        try:
            done = await self._transact(envelope, lambda tx: handler(message, tx))
        except errors.Rejected as refusal:
            outcome = Rejected(
                code=refusal.code, message=refusal.message, command_type=envelope.type
            )
            done = await self._transact(envelope, lambda tx: _emit(tx, outcome))
        if not done:
            await self._answer_again(envelope)

    async def run(self, work: Callable[[Tx], Awaitable[None]]) -> None:
        """A transaction that no message caused: a timer, a finished download, a dead worker."""
        await self._transact(None, work)

    async def read(self, work: Callable[[Tx], Awaitable[T]]) -> T:
        """As `run`, with what the work answers."""
        answers: list[T] = []

        async def keep(tx: Tx) -> None:
            answers.append(await work(tx))

        await self._transact(None, keep)
        return answers[0]

    async def refuse(self, envelope: Envelope, code: str, message: str) -> None:
        """Answers the caller of a command that can't be handled at all."""
        outcome = Rejected(code=code, message=message, command_type=envelope.type)
        await self._transact(envelope, lambda tx: _emit(tx, outcome))

    async def _transact(
        self, envelope: Envelope | None, work: Callable[[Tx], Awaitable[None]]
    ) -> bool:
        async with self.pool.acquire() as connection, connection.transaction():
            if envelope and not await _claim(connection, envelope):
                return False
            tx = Tx(
                self.owner,
                connection,
                self._clock(),
                envelope,
                max_payload=self._outbox.max_payload,
            )
            await work(tx)
            rows = await store(connection, tx.rows())
        if self._observe:
            for message in tx.emitted:
                self._observe(message)
        await self._outbox.publish(rows)
        for callback in tx.after_commit:
            await callback()
        return True

    async def _answer_again(self, envelope: Envelope) -> None:
        """A message that was done before: whoever waits for its answer gets the same one."""
        async with self.pool.acquire() as connection:
            records = await connection.fetch(
                """
                SELECT message_id, subject, body, command_id, id FROM outbox
                WHERE command_id = $1 AND subject LIKE 'evt.%' ORDER BY id
                """,
                envelope.id,
            )
        await self._outbox.publish([OutboxRow(**dict(record)) for record in records])


async def _claim(connection: Any, envelope: Envelope) -> bool:
    """True for the first who handles this message. A second one waits here for the first."""
    return bool(
        await connection.fetchval(
            """
            INSERT INTO inbox (message_id, type) VALUES ($1, $2)
            ON CONFLICT DO NOTHING RETURNING true
            """,
            envelope.id,
            envelope.type,
        )
    )


async def _emit(tx: Tx, message: Message) -> None:
    tx.emit(message)
