"""The host of a back service: opens what it needs, receives, relays, answers health, stops well.

A service's `app.py` builds one and runs it. Nothing is opened before `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import nats.errors
import uvicorn
import uvloop
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.js import JetStreamContext

from shared import logs, metrics, tracing
from shared.attempts import Attempts
from shared.bus import Handlers, Receiver, hear, make_broker, pull, wait_for_consumer
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Message
from shared.contracts.registry import type_of
from shared.contracts.subjects import COMMANDS, EVENTS, progress_subject
from shared.health import Check, Page, health_app
from shared.metrics import Sampler
from shared.outbox import Outbox
from shared.postgres import connect_pool
from shared.settings import BusSettings, ServiceSettings
from shared.unit_of_work import Observer, UnitOfWork

log = logs.get_logger(__name__)

PARALLEL = 8
"""Messages that one process handles at a time."""
UNSYNCED = 5.0
"""Seconds before its death of which the bus may have forgotten what it took; it syncs every one."""


class HealthServer:
    """Serves health and metrics while everything else is still waiting for its servers."""

    def __init__(
        self,
        settings: BusSettings,
        checks: dict[str, Check],
        samplers: Sequence[Sampler] = (),
        *,
        pages: Mapping[str, Page] | None = None,
        port: int | None = None,
    ) -> None:
        """`port`: another than that of the settings."""
        self._server = uvicorn.Server(
            uvicorn.Config(
                health_app(checks, samplers, pages),
                host=settings.http_host,
                port=settings.http_port if port is None else port,
                log_config=None,
                access_log=False,
                lifespan="off",
            )
        )

    @property
    def port(self) -> int | None:
        """The one it listens on, which may have been chosen by the system; None before it does."""
        if not self._server.started:
            return None
        number: int = self._server.servers[0].sockets[0].getsockname()[1]
        return number

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._server._serve())
        try:
            yield
        finally:
            self._server.should_exit = True
            await task


class Service:
    def __init__(
        self,
        name: str,
        settings: ServiceSettings,
        *,
        commands: Handlers,
        reactions: Handlers | None = None,
        checks: dict[str, Check] | None = None,
        background: Callable[[Service], Awaitable[None]] | None = None,
        on_stop: Callable[[], Awaitable[None]] | None = None,
        resources: Sequence[AbstractAsyncContextManager[object]] = (),
        observe: Observer | None = None,
        sample: Callable[[Service], Sequence[Sampler]] | None = None,
    ) -> None:
        """`resources` are open while messages are handled. `background` runs beside the receivers
        until the process stops (timers, launchers). `observe` is told what was emitted, `sample`
        makes the samplers of what only this service can look up."""
        self.name = name
        self.settings = settings
        self._commands = commands
        self._reactions = reactions or {}
        self._background = background
        self._on_stop = on_stop
        self._resources = resources
        self._observe = observe
        self._sample = sample
        self.samplers: list[Sampler] = []
        self.checks: dict[str, Check] = {"starting": _starting, **(checks or {})}
        self.pool: asyncpg.Pool[Any]
        self.js: JetStreamContext
        self.work: UnitOfWork
        self._client: Client

    def run(self) -> None:
        logs.configure(self.name, self.settings.log_level)
        tracing.configure(self.name, self.settings.otlp_url)
        uvloop.run(self.serve())
        tracing.close()

    async def serve(self) -> None:
        """Runs until SIGTERM or SIGINT; then lets what is in hand finish."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with HealthServer(self.settings, self.checks, self.samplers).serving():
            main = asyncio.create_task(self._serve(stop))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({main, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            stopped.cancel()
            while not main.done():
                if not hasattr(self, "work"):
                    main.cancel()  # still waiting for its servers: nothing is in hand
                await asyncio.wait({main}, timeout=1)  # a library may swallow the first
            with contextlib.suppress(asyncio.CancelledError):
                await main

    async def _serve(self, stop: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for resource in self._resources:
                await stack.enter_async_context(resource)
            await self._serve_bus(stop)

    async def _serve_bus(self, stop: asyncio.Event) -> None:
        self.pool = await connect_pool(self.settings.postgres_url)
        broker = make_broker(self.settings, metrics.message_middleware(self.name))
        await broker.connect()
        client = self._client = broker.config.connection_state.connection
        self.js = client.jetstream()
        await self._wait_for_schema()
        await wait_for_consumer(self.js, COMMANDS, self.name)
        if self._reactions:
            await wait_for_consumer(self.js, EVENTS, self.name)
        outbox = Outbox(self.pool, client)
        self.work = UnitOfWork(self.name, self.pool, outbox, observe=self._observe)
        self._subscribe(broker)
        tasks = [asyncio.create_task(outbox.relay())]
        tasks.append(asyncio.create_task(self._watch_reconnects(client, outbox)))
        if self._background:
            tasks.append(asyncio.create_task(_logged(self._background(self))))
        await broker.start()
        self._set_checks(client)
        self._set_samplers()
        log.info("ready", service=self.name)
        try:
            await stop.wait()
        finally:
            log.info("stopping", service=self.name)
            if self._on_stop:
                await self._on_stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await broker.stop()
            await self.pool.close()

    async def tell(self, message: Message, about: str) -> None:
        """Telemetry: who listens hears it, nobody keeps it."""
        if not self._client.is_connected:
            return  # it would be kept, and told when it is of no use any more
        framed = cloud.wrap(message, type=type_of(message), source=self.name, subject=about)
        try:
            await self._client.publish(progress_subject(about), cloud.encode(framed))
        except nats.errors.Error as error:
            log.debug("telemetry_lost", error=repr(error))

    async def hear(self, subject: str, listener: Callable[[Message], None]) -> None:
        """From now on `listener` is told the telemetry of others."""
        await hear(self._client, subject, listener)

    @property
    def connections(self) -> int | None:
        """How often the bus was found again; None while it is away."""
        return self._client.stats["reconnects"] if self._client.is_connected else None

    def _subscribe(self, broker: NatsBroker) -> None:
        attempts = Attempts(self.pool)
        for stream, handlers in ((COMMANDS, self._commands), (EVENTS, self._reactions)):
            if handlers:
                receiver = Receiver(self.name, self._client, self.work, attempts, handlers)
                pull(
                    broker,
                    stream=stream,
                    durable=self.name,
                    user=self.settings.nats_user,
                    handler=receiver.receive,
                    parallel=PARALLEL,
                )

    def _set_checks(self, client: Any) -> None:
        async def check_nats() -> None:
            await self.js.consumer_info(COMMANDS, self.name)
            if not client.is_connected:
                raise nats.errors.ConnectionClosedError

        async def check_postgres() -> None:
            await self.pool.fetchval("SELECT 1")

        del self.checks["starting"]
        self.checks |= {"nats": check_nats, "postgres": check_postgres}

    def _set_samplers(self) -> None:
        consumers = [(COMMANDS, self.name)]
        if self._reactions:
            consumers.append((EVENTS, self.name))
        self.samplers.append(metrics.outbox_sampler(self.name, self.pool))
        self.samplers.append(metrics.consumers_sampler(self.js, consumers))
        if self._sample:
            self.samplers.extend(self._sample(self))

    async def _wait_for_schema(self) -> None:
        """A service may start before its migrations have run."""
        while not await self.pool.fetchval("SELECT to_regclass('migrations') IS NOT NULL"):
            log.warning("waiting_for_migrations", service=self.name)
            await asyncio.sleep(0.5)

    async def _watch_reconnects(self, client: Any, outbox: Outbox) -> None:
        """After a lost connection, closes the window in which the bus may have lost events."""
        loop = asyncio.get_running_loop()
        seen, connected = client.stats["reconnects"], loop.time()
        while True:
            await asyncio.sleep(1)
            if not client.is_connected:
                continue
            if (reconnects := client.stats["reconnects"]) != seen:
                try:
                    await outbox.resend_events(loop.time() - connected + UNSYNCED)
                except Exception as error:
                    log.warning("resending_postponed", error=repr(error))
                    continue
            seen, connected = reconnects, loop.time()


async def _starting() -> None:
    raise RuntimeError("waiting for NATS, Postgres or migrations")


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("background_failed")
        raise SystemExit(1) from None
