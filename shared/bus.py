"""FastStream on JetStream, with the delivery rules that its defaults do not have.

- A handler that fails is tried again after a growing pause, never terminated by one exception.
- After MAX_ATTEMPTS the message goes to the DEAD stream with its reason, and the caller is told.
  A message that kills its process ends there as well, and takes no other with it (attempts.py).
- What is no valid message goes to DEAD at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import nats.errors
from faststream import AckPolicy
from faststream.exceptions import NackMessage
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from faststream.security import SASLPlaintext
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from shared import logs, metrics, tracing
from shared.attempts import Attempts
from shared.contracts import envelope as cloud
from shared.contracts.envelope import DeadLetter, Envelope, Message
from shared.contracts.registry import TYPES, payload
from shared.contracts.subjects import ACK_WAIT, dead_subject
from shared.errors import Retry
from shared.postgres import AWAY
from shared.settings import BusSettings
from shared.unit_of_work import Handler, UnitOfWork

log = logs.get_logger(__name__)

MAX_ATTEMPTS = 6
PAUSES = (0.2, 1.0, 3.0, 8.0, 20.0)
"""Seconds before the second, third … attempt."""
DEAD_PART = 10_000
"""Bytes that are kept of a dead message which is too large to be kept whole."""
PULL_SECONDS = 3.0
"""A pull that a restart of the bus has swallowed is noticed after this long."""

T = TypeVar("T")
Handlers = Mapping[type[Message], Handler]


def connect_options(settings: BusSettings) -> dict[str, Any]:
    """Reconnects for ever, and uses the inbox that this user alone may read."""

    async def on_error(error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            log.warning("slow_consumer", error=str(error))
        else:
            log.warning("nats_error", error=repr(error))

    return {
        "name": settings.nats_user,
        "inbox_prefix": f"_INBOX_{settings.nats_user}".encode(),
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "ping_interval": 5,
        "connect_timeout": 5,
        "error_cb": on_error,
    }


async def connect(
    settings: BusSettings, on_reconnect: Callable[[], Awaitable[None]] | None = None
) -> Client:
    """A plain connection. Waits for the server as long as it takes."""
    return await nats.connect(
        settings.nats_servers,
        user=settings.nats_user,
        password=settings.nats_password,
        reconnected_cb=on_reconnect,
        **connect_options(settings),
    )


async def hear(client: Client, subject: str, listener: Callable[[Message], None]) -> None:
    """From now on `listener` is told the telemetry of a subject; what can't be read is dropped."""

    async def receive(message: Msg) -> None:
        try:
            told = payload(cloud.decode(message.data))
        except (msgspec.MsgspecError, KeyError) as error:
            log.debug("telemetry_misread", error=repr(error))
            return
        listener(told)

    await client.subscribe(subject, cb=receive)


def make_broker(settings: BusSettings, *middlewares: Any) -> NatsBroker:
    return NatsBroker(
        settings.nats_servers,
        security=SASLPlaintext(settings.nats_user, settings.nats_password),
        apply_types=False,
        logger=None,
        middlewares=middlewares,
        **connect_options(settings),
    )


async def wait_for_consumer(js: JetStreamContext, stream: str, durable: str) -> None:
    """Returns once the consumer exists: a service may start before the streams are declared."""
    while True:
        try:
            await js.consumer_info(stream, durable, timeout=2)
            return
        except (NotFoundError, nats.errors.Error, TimeoutError) as error:
            log.warning("waiting_for_consumer", stream=stream, durable=durable, error=repr(error))
            await asyncio.sleep(0.5)


def pull(
    broker: NatsBroker,
    *,
    stream: str,
    durable: str,
    user: str,
    handler: Callable[[NatsMessage], Any],
    parallel: int,
) -> None:
    """Binds `handler` to a durable pull consumer that exists; never creates or changes one.

    A fetch that was under way when NATS went down waits out its timeout: keep it short.

    Fetches one message at a time: nats-py 2.16 keeps a lone message of a larger batch back until
    the fetch times out. `parallel` handlers run at once all the same."""
    broker.subscriber(
        subject=durable,
        durable=durable,
        stream=JStream(stream, declare=False),
        pull_sub=PullSub(batch_size=1, timeout=3.0),
        max_workers=parallel,
        inbox_prefix=f"_INBOX_{user}.".encode(),
        ack_policy=AckPolicy.NACK_ON_ERROR,
        decoder=_as_it_is,
    )(handler)


async def _as_it_is(message: NatsMessage) -> NatsMessage:
    return message


class Receiver:
    """Turns what a consumer delivers into units of work, by the table type -> handler."""

    def __init__(
        self,
        service: str,
        client: Client,
        work: UnitOfWork,
        attempts: Attempts,
        handlers: Handlers,
    ) -> None:
        self._service = service
        self._client = client
        self._js = client.jetstream()
        self._work = work
        self._attempts = attempts
        self._handlers = handlers

    async def receive(self, message: NatsMessage) -> None:
        async with heartbeat(message, every=ACK_WAIT / 3):
            await self._receive(message.raw_message)

    async def _receive(self, raw: Msg) -> None:
        deliveries = raw.metadata.num_delivered
        try:
            envelope = cloud.decode(raw.data)
        except msgspec.MsgspecError as error:
            await self._bury(raw, f"no envelope: {error}", deliveries)
            return
        logs.bind(envelope.correlation_id, type=envelope.type, message_id=envelope.id)
        handler = self._handlers.get(TYPES.get(envelope.type, Message))
        if handler is None:
            if envelope.type.split(".")[0] == self._service:
                await self._give_up(envelope, raw, f"unknown type {envelope.type}", deliveries)
            return  # a foreign event that this service does not care about
        with tracing.span(
            f"handle {envelope.type}",
            kind="consumer",
            parent=envelope.traceparent,
            attributes={
                "messaging.system": "nats",
                "messaging.message.id": envelope.id,
                "darkroom.correlation_id": envelope.correlation_id,
                "darkroom.delivery": deliveries,
            },
        ):
            await self._handle(envelope, raw, handler, deliveries)

    async def _handle(
        self, envelope: Envelope, raw: Msg, handler: Handler, deliveries: int
    ) -> None:
        if deliveries == 1:
            async with self._attempts.turn(alone=False):
                await self._try(envelope, raw, handler, attempt=1)
            return
        suspect = await _outlast_postgres(lambda: self._attempts.is_suspect(envelope.id))
        async with self._attempts.turn(alone=suspect):
            attempt = await _outlast_postgres(lambda: self._attempts.begin_again(envelope.id))
            await self._try(envelope, raw, handler, attempt)
        await self._attempts.forget(envelope.id)

    async def _try(self, envelope: Envelope, raw: Msg, handler: Handler, attempt: int) -> None:
        """Raises NackMessage for another try."""
        if attempt > MAX_ATTEMPTS:
            await self._give_up(envelope, raw, "its handler died every time", attempt - 1)
            return
        try:
            await _outlast_postgres(lambda: self._work.process(envelope, handler))
        except msgspec.MsgspecError as error:
            await self._give_up(envelope, raw, f"bad payload: {error}", attempt)
        except Exception as error:
            if not isinstance(error, Retry):
                log.exception("handler_failed", attempt=attempt)
            if attempt >= MAX_ATTEMPTS:
                await self._give_up(envelope, raw, repr(error), attempt)
            else:
                await self._attempts.end(envelope.id, attempt)
                raise NackMessage(delay=PAUSES[min(attempt, len(PAUSES)) - 1]) from error

    async def _give_up(self, envelope: Envelope, raw: Msg, reason: str, attempts: int) -> None:
        await self._bury(raw, reason, attempts)
        if envelope.type.split(".")[0] == self._service:
            told = "the command failed inside Darkroom; see its log"
            await _outlast_postgres(lambda: self._work.refuse(envelope, "darkroom.failed", told))

    async def _bury(self, raw: Msg, reason: str, attempts: int) -> None:
        """Raises (so that the message is kept) when the DEAD stream does not take it."""
        log.error("dead_letter", reason=reason, attempts=attempts)
        metrics.DEAD_LETTERS.labels(self._service).inc()
        letter = self._dead_letter(raw.data, reason, attempts)
        if not cloud.fits(letter, self._client.max_payload):
            part, size = raw.data[:DEAD_PART], len(raw.data)
            letter = self._dead_letter(
                msgspec.json.encode(part.decode(errors="replace")),
                f"{reason[:DEAD_PART]} (of its {size} bytes the first {len(part)} are here)",
                attempts,
            )
        origin = raw.metadata
        await self._js.publish(
            dead_subject(self._service),
            letter,
            timeout=5,
            headers={"Nats-Msg-Id": f"{self._service}/{origin.stream}/{origin.sequence.stream}"},
        )

    def _dead_letter(self, message: bytes, reason: str, attempts: int) -> bytes:
        try:
            whole = msgspec.Raw(msgspec.json.encode(msgspec.json.decode(message)))
        except msgspec.DecodeError:
            whole = msgspec.Raw(msgspec.json.encode(message.decode(errors="replace")))
        letter = cloud.wrap(
            DeadLetter(reason=reason, attempts=attempts, envelope=whole),
            type="darkroom.dead_letter.v1",
            source=self._service,
            subject=self._service,
        )
        return cloud.encode(letter)


async def _outlast_postgres(work: Callable[[], Awaitable[T]]) -> T:
    """An unreachable database is nobody's fault: the message waits here until it is back, which
    does not count as an attempt."""
    while True:
        try:
            return await work()
        except AWAY as error:
            log.warning("waiting_for_postgres", error=repr(error))
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def heartbeat(message: NatsMessage | Msg, *, every: float) -> AsyncIterator[None]:
    """Keeps a message ours while its work goes on, so that the wait for an ack can be short."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(every)
            try:
                await message.in_progress()
            except Exception as error:
                log.warning("heartbeat_missed", error=repr(error))

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
