"""Sends commands and waits for the events that answer them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from typing import Any

import asyncpg
import msgspec
from nats.aio.client import Client
from nats.js import JetStreamContext

from services.gateway.errors import ApiError, Unanswered, Unavailable, rejection
from services.gateway.metrics import COMMAND
from services.gateway.projections import Event, Outcome, outcome_of
from shared import tracing
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Command
from shared.contracts.registry import type_of
from shared.contracts.subjects import command_subject
from shared.errors import TooLarge

PATIENCE = 2.0
"""Seconds to wait for the stream to say that it has a command, before it is sent once more."""
NAMESPACE = uuid.UUID("8f0d6f0e-6f0b-4f43-9d7c-2f5f6a3c9e11")


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """One request's wish to change something.

    `command_id` follows from the user, the route and the client's Idempotency-Key where there is
    one, else it is random; what the request creates takes its id from it (`new_id`), so that a
    repetition creates nothing new."""

    command_id: str
    actor: str
    correlation_id: str
    body_sha256: str = ""
    repeatable: bool = False
    traceparent: str | None = None

    def new_id(self) -> str:
        return str(uuid.uuid5(uuid.UUID(self.command_id), "new"))


def make_ticket(
    *,
    actor: str,
    correlation_id: str,
    route: str,
    key: str | None,
    body: bytes,
    traceparent: str | None = None,
) -> Ticket:
    if not key:
        return Ticket(
            command_id=cloud.new_id(),
            actor=actor,
            correlation_id=correlation_id,
            traceparent=traceparent,
        )
    if len(key) > 200:
        raise ApiError(400, "Idempotency-Key is longer than 200 characters; use a shorter one")
    return Ticket(
        command_id=str(uuid.uuid5(NAMESPACE, f"{actor}\n{route}\n{key}")),
        actor=actor,
        correlation_id=correlation_id,
        body_sha256=hashlib.sha256(body).hexdigest(),
        repeatable=True,
        traceparent=traceparent,
    )


class Dispatcher:
    def __init__(
        self, client: Client, js: JetStreamContext, pool: asyncpg.Pool[Any], timeout: float
    ) -> None:
        self._client = client
        self._js = js
        self._pool = pool
        self._timeout = timeout
        self._waiting: dict[str, list[asyncio.Future[Outcome]]] = {}
        """By command id: with one Idempotency-Key several requests may wait for one answer."""

    def on_events(self, events: list[Event]) -> None:
        """A listener of the projector: what is answered here is already visible to reads."""
        for event in events:
            for future in self._waiting.get(event.envelope.answers or "", ()):
                if not future.done():
                    future.set_result(outcome_of(event))

    async def send(self, command: Command, ticket: Ticket, *, step: str = "") -> None:
        """Returns when the command is done and visible.

        `step` names a further command of the same request. Raises ApiError: the rejection, or
        Unavailable when the bus does not take the command, or Unanswered."""
        id_ = str(uuid.uuid5(uuid.UUID(ticket.command_id), step)) if step else ticket.command_id
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(id_, []).append(future)
        try:
            known = await self._recall(id_, ticket) if ticket.repeatable else None
            outcome = known or await self._measure(command, ticket, id_, future)
        finally:
            self._waiting[id_].remove(future)
            if not self._waiting[id_]:
                del self._waiting[id_]
        if outcome.code:
            raise rejection(outcome.code, outcome.message)

    async def _measure(
        self, command: Command, ticket: Ticket, id_: str, future: asyncio.Future[Outcome]
    ) -> Outcome:
        name, began, how = type_of(command), time.perf_counter(), "unanswered"
        attributes = {
            "messaging.system": "nats",
            "messaging.message.id": id_,
            "darkroom.job_id": getattr(command, "job_id", None),
        }
        try:
            with tracing.span(f"send {name}", kind="producer", attributes=attributes):
                outcome = await self._publish_and_wait(command, ticket, id_, future)
            how = "rejected" if outcome.code else "done"
            return outcome
        finally:
            COMMAND.labels(name, how).observe(time.perf_counter() - began)

    async def _publish_and_wait(
        self, command: Command, ticket: Ticket, id_: str, future: asyncio.Future[Outcome]
    ) -> Outcome:
        acks: list[asyncio.Future[Any]] = []
        try:
            for _ in range(max(1, round(self._timeout / PATIENCE))):
                # Once more, if a server took it along into its death. With its id it is one.
                acks.append(await self.publish(command, ticket, id_))
                await asyncio.wait(
                    {future, acks[-1]}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
                )
                if future.done() or acks[-1].done():
                    break
            if not future.done() and (not acks[-1].done() or acks[-1].exception()):
                raise Unavailable("the bus")
            return await asyncio.wait_for(asyncio.shield(future), self._timeout)
        except TimeoutError:
            raise Unanswered(self._timeout) from None
        finally:
            for ack in acks:
                ack.cancel()  # nats-py keeps a place for each one that is never done

    async def publish(self, command: Command, ticket: Ticket, id_: str) -> asyncio.Future[Any]:
        """Hands the command to the stream; the returned future is done when it is stored. Raises
        ApiError for one that the bus would never take."""
        if not self._client.is_connected:
            raise Unavailable("the bus")
        type_name = type_of(command)
        framed = cloud.wrap(
            command,
            id=id_,
            type=type_name,
            source="gateway",
            subject=ticket.actor,
            correlation_id=ticket.correlation_id,
            actor=ticket.actor,
            traceparent=tracing.traceparent() or ticket.traceparent,
        )
        body = cloud.encode(framed)
        if not cloud.fits(body, self._client.max_payload):
            refusal = TooLarge(len(body), self._client.max_payload)
            raise rejection(refusal.code, refusal.message)
        return await self._js.publish_async(
            command_subject(type_name), body, headers={"Nats-Msg-Id": id_}
        )

    async def _recall(self, id_: str, ticket: Ticket) -> Outcome | None:
        """The answer that a request with this Idempotency-Key got before. The key is on disk before
        its command is sent, as other writes of the gateway need not be."""
        row = await self._pool.fetchrow(
            """
            INSERT INTO idempotency_keys (command_id, body_sha256) VALUES ($1, $2)
            ON CONFLICT (command_id) DO UPDATE SET command_id = excluded.command_id
            RETURNING body_sha256, answer::text AS answer,
                set_config('synchronous_commit', 'on', true)
            """,
            id_,
            ticket.body_sha256,
        )
        assert row is not None
        if row["body_sha256"] != ticket.body_sha256:
            raise ApiError(
                400, "this Idempotency-Key was used with another body; use a new key for it"
            )
        return msgspec.json.decode(row["answer"], type=Outcome) if row["answer"] else None

    async def forget_old_keys(self) -> None:
        """Runs until cancelled: keys are kept for two days."""
        while True:
            with contextlib.suppress(*_AWAY):
                await self._pool.execute(
                    "DELETE FROM idempotency_keys WHERE created_at < now() - interval '2 days'"
                )
            await asyncio.sleep(3600)


_AWAY = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
