"""Wires a worker and runs it until it is told to stop, or can't go on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from pathlib import Path
from typing import Any

import uvloop
from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, NatsMessage, PullSub
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from services.inference.worker.cache import ModelCache
from services.inference.worker.engine import EngineDied, EngineProcess
from services.inference.worker.hand import Hand
from services.inference.worker.job import Tools
from services.inference.worker.metrics import worker_sampler
from services.inference.worker.reports import Reports
from services.inference.worker.settings import Settings
from shared import logs, tracing
from shared.bus import make_broker, wait_for_consumer
from shared.contracts.subjects import BEAT, JOBS, jobs_durable
from shared.health import Check
from shared.metrics import Sampler
from shared.objects import Objects
from shared.service import HealthServer
from shared.settings import ObjectSettings

log = logs.get_logger(__name__)

PULL_SECONDS = 3.0
"""A pull that a restart of the bus has swallowed is noticed after this long."""


class EndpointGone(Exception):
    """The queue of this worker's endpoint was removed."""


def build(settings: Settings, object_settings: ObjectSettings) -> Worker:
    return Worker(settings, object_settings)


class Worker:
    def __init__(self, settings: Settings, object_settings: ObjectSettings) -> None:
        self._settings = settings
        self._durable = jobs_durable(settings.endpoint_id)
        self._objects = Objects(object_settings)
        cache = Path(settings.cache).absolute()
        self._cache = ModelCache(self._objects, cache, settings.cache_bytes)
        self._engine = EngineProcess(
            settings.engine, settings.device, cache, settings.engine_options
        )
        self._checks: dict[str, Check] = {"starting": _starting}
        self._samplers: list[Sampler] = []
        self._health = HealthServer(settings, self._checks, self._samplers)

    def run(self) -> int:
        """The exit code: 0 when stopped or when the endpoint is gone, 1 when the engine is."""
        settings = self._settings
        logs.configure("worker", settings.log_level)
        tracing.configure(
            "worker", settings.otlp_url, **{"service.instance.id": settings.instance_id}
        )
        code = uvloop.run(self.serve())
        tracing.close()
        return code

    async def serve(self) -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self._health.serving(), self._objects.open():
            try:
                return await self._serve(stop)
            finally:
                await self._engine.kill()

    async def _serve(self, stop: asyncio.Event) -> int:
        broker = make_broker(self._settings)
        stopped = asyncio.create_task(stop.wait())
        starting = asyncio.create_task(self._start(broker))
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # nothing is in hand yet
            await asyncio.wait({starting})
            await broker.stop()
            return 0
        client = broker.config.connection_state.connection
        js = client.jetstream()
        reports = Reports(self._settings, client, js)
        if death := starting.result():
            return await self._give_up(death, reports, broker)
        hand = Hand(
            Tools(
                self._settings,
                client,
                js,
                reports,
                self._objects,
                self._cache,
                self._engine,
                {},
            )
        )
        self._pull(broker, hand)
        await broker.start()
        self._set_checks(client, js)
        self._samplers.append(
            worker_sampler(self._settings.device, lambda: self._engine.well, lambda: hand.counts)
        )
        watching = asyncio.create_task(self._watch(client, js, reports))
        beating = asyncio.create_task(self._beat(reports, hand))
        log.info("ready", endpoint_id=self._settings.endpoint_id, device=self._settings.device)
        ends: list[asyncio.Future[Any]] = [stopped, watching, hand.broken]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reports.instance("stopping"), 1)
        await hand.stop()
        beating.cancel()
        for task in (watching, hand.broken):
            if task.done() and (error := task.exception()):
                return await self._give_up(error, reports, broker)
        watching.cancel()
        await broker.stop()
        return 0

    async def _start(self, broker: NatsBroker) -> EngineDied | None:
        """Loads the engine while it waits for the bus. Returns why there is none."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._connect(broker))
            loading = group.create_task(self._load())
        return loading.result()

    async def _load(self) -> EngineDied | None:
        try:
            await self._engine.start()
        except EngineDied as death:
            return death
        return None

    async def _connect(self, broker: NatsBroker) -> None:
        await broker.connect()
        js = broker.config.connection_state.connection.jetstream()
        await wait_for_consumer(js, JOBS, self._durable)

    def _pull(self, broker: NatsBroker, hand: Hand) -> None:
        broker.subscriber(
            subject=self._durable,
            durable=self._durable,
            stream=JStream(JOBS, declare=False),
            pull_sub=PullSub(batch_size=1, timeout=PULL_SECONDS),
            max_workers=1,
            inbox_prefix=f"_INBOX_{self._settings.nats_user}.".encode(),
            ack_policy=AckPolicy.MANUAL,
            decoder=_as_it_is,
        )(hand.receive)

    async def _watch(self, client: Any, js: JetStreamContext, reports: Reports) -> None:
        """Says again that this worker is ready when the bus was away. Raises EndpointGone when
        there is no queue any more: a pull from nothing would spin."""
        reported, missing, second = -1, 0, 0
        while missing < 2:
            if client.is_connected and client.stats["reconnects"] != reported:
                reported = client.stats["reconnects"]
                await reports.instance("ready")
            await asyncio.sleep(1)
            second += 1
            if second % 5 == 0 or missing:
                missing = missing + 1 if await self._is_gone(js) else 0
        raise EndpointGone(self._settings.endpoint_id)

    async def _beat(self, reports: Reports, hand: Hand) -> None:
        """Says how this worker is, also while it finishes its jobs."""
        while True:
            with contextlib.suppress(EngineDied):  # whoever has the job knows it
                await self._engine.look()
            await reports.beat(self._engine.well, hand.begun, address=self._address())
            await asyncio.sleep(BEAT)

    def _address(self) -> str:
        """Where others reach `/metrics`; empty while nobody does."""
        settings = self._settings
        if settings.http_address or self._health.port is None:
            return settings.http_address
        anywhere = settings.http_host in ("0.0.0.0", "::")  # noqa: S104
        host = socket.gethostname() if anywhere else settings.http_host
        return f"{host}:{self._health.port}"

    async def _is_gone(self, js: JetStreamContext) -> bool:
        try:
            await js.consumer_info(JOBS, self._durable, timeout=2)
        except NotFoundError:
            return True
        except Exception as error:
            log.debug("queue_not_seen", error=repr(error))
        return False

    async def _give_up(self, error: BaseException, reports: Reports, broker: NatsBroker) -> int:
        if isinstance(error, EndpointGone):
            log.info("endpoint_gone", endpoint_id=self._settings.endpoint_id)
        else:
            log.error("worker_broken", error=repr(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reports.instance("failed", str(error)[:2000]), 5)
        await broker.stop()
        return 0 if isinstance(error, EndpointGone) else 1

    def _set_checks(self, client: Any, js: JetStreamContext) -> None:
        async def check_nats() -> None:
            await js.consumer_info(JOBS, self._durable)
            if not client.is_connected:
                raise ConnectionError("not connected")

        del self._checks["starting"]
        self._checks |= {
            "nats": check_nats,
            "s3": self._objects.check,
            "engine": self._engine.check,
        }


async def _starting() -> None:
    raise RuntimeError("waiting for NATS, the queue of the endpoint, or the engine")


async def _as_it_is(message: NatsMessage) -> NatsMessage:
    return message
