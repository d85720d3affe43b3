"""One job from the queue to its report: fetch, run, upload, report, and only then ack.

what happens                              what becomes of the job
a result                                  succeeded
JobFailure                                failed, with that reason
the engine dies or hangs, a bug           the next attempt, here or elsewhere
… for the third time                      failed, with the last cause
this worker dies                          the bus misses its heartbeat: the next attempt
this worker is told to stop               the next attempt
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from faststream.nats import NatsMessage

from services.inference.worker.cache import ModelCache
from services.inference.worker.engine import EngineDied, EngineProcess, JobFailure, Result
from services.inference.worker.fetching import get_params, put
from services.inference.worker.reports import Report, Reports
from services.inference.worker.settings import Settings
from shared import logs
from shared.bus import heartbeat
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Envelope
from shared.contracts.inference import (
    ReportJobFailed,
    ReportJobStarted,
    ReportJobSucceeded,
    RunJob,
)
from shared.contracts.registry import payload
from shared.contracts.subjects import JOB_HEARTBEAT
from shared.objects import Objects

log = logs.get_logger(__name__)

MAX_ATTEMPTS = 3
MAX_PARAMS = 64 * 1024**2
GRACE = 5.0
"""Seconds that the running job has to finish when the worker is told to stop."""
PAUSE = 0.5
"""Seconds before a job that took the engine with it is delivered again."""
REMEMBERED = 64


class Delivery(msgspec.Struct, frozen=True):
    """One delivery of one job. `attempt` counts deliveries, from 1."""

    message: NatsMessage
    envelope: Envelope
    job: RunJob
    attempt: int


class Jobs:
    """Does one job at a time. `broken` ends with the error that makes this worker useless."""

    def __init__(
        self,
        settings: Settings,
        reports: Reports,
        objects: Objects,
        cache: ModelCache,
        engine: EngineProcess,
    ) -> None:
        self._settings = settings
        self._reports = reports
        self._objects = objects
        self._cache = cache
        self._engine = engine
        self._current: asyncio.Task[None] | None = None
        self._stopping = False
        self._finished: dict[str, None] = {}
        self._causes: dict[str, str] = {}
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def receive(self, message: NatsMessage) -> None:
        if self._stopping:
            await message.nack()
            return
        self._current = asyncio.create_task(self._handle(message))
        await asyncio.wait({self._current})
        error = None if self._current.cancelled() else self._current.exception()
        if error is not None and not self.broken.done():
            self.broken.set_exception(error)

    async def stop(self) -> None:
        """Takes no more jobs; gives the one in hand some time, then back to the queue."""
        self._stopping = True
        if self._current and not self._current.done():
            await asyncio.wait({self._current}, timeout=GRACE)
            self._current.cancel()
            await asyncio.wait({self._current})

    async def _handle(self, message: NatsMessage) -> None:
        raw = message.raw_message
        try:
            envelope = cloud.decode(raw.data)
            job = payload(envelope)
            if not isinstance(job, RunJob):
                raise KeyError(envelope.type)
        except (msgspec.MsgspecError, KeyError) as error:
            log.error("no_job", error=repr(error))
            await message.reject()
            return
        attempt = raw.metadata.num_delivered
        logs.bind(envelope.correlation_id, job_id=job.job_id, attempt=attempt)
        await self._deliver(Delivery(message, envelope, job, attempt))
        if not self._engine.alive:
            await self._engine.start()

    async def _deliver(self, delivery: Delivery) -> None:
        again = False
        try:
            async with heartbeat(delivery.message, every=JOB_HEARTBEAT):
                again = not await self._finish(delivery)
                if not again:
                    _remember(self._finished, delivery.job.job_id, None)
                    await _ack(delivery.message)
        except asyncio.CancelledError:
            await delivery.message.nack()
            raise
        if again:
            await delivery.message.nack(delay=PAUSE)

    async def _finish(self, delivery: Delivery) -> bool:
        """True when the job needs no other attempt, and its end is reported."""
        job = delivery.job
        if job.job_id in self._finished:
            return True  # delivered again before the ack arrived
        if delivery.attempt > MAX_ATTEMPTS:
            cause = self._causes.get(job.job_id, "the worker itself was ended")
            await self._fail(delivery, _last_words(cause))
            return True
        try:
            await self._attempt(delivery)
            return True
        except JobFailure as failure:
            await self._fail(delivery, str(failure))
            return True
        except EngineDied as death:
            cause = str(death)
        except Exception as error:
            log.exception("job_interrupted")
            cause = f"{type(error).__name__}: {error}"
        _remember(self._causes, job.job_id, cause)
        if delivery.attempt < MAX_ATTEMPTS:
            return False
        await self._fail(delivery, _last_words(cause))
        return True

    async def _attempt(self, delivery: Delivery) -> None:
        job, began = delivery.job, time.monotonic()
        await self._report(delivery, ReportJobStarted(**self._about(delivery)))
        params = await get_params(self._objects, job.bucket, job.params_key, most=MAX_PARAMS)
        progress = self._reports.progress(job.job_id, delivery.attempt, delivery.envelope)
        async with self._cache.hold(job.models) as files:
            fetched = time.monotonic()
            result = await self._engine.run(
                job,
                params,
                files,
                progress.on_step,
                seconds=self._settings.job_seconds,
                correlation_id=delivery.envelope.correlation_id,
            )
        rendered = time.monotonic()
        image_names, info_name = await self._upload(job, result)
        uploaded = time.monotonic()
        report = ReportJobSucceeded(
            **self._about(delivery),
            image_names=image_names,
            info_name=info_name,
            seconds={
                "fetch": round(fetched - began, 3),
                **result.seconds,
                "upload": round(uploaded - rendered, 3),
            },
            warnings=result.warnings,
        )
        await self._report(delivery, report)
        log.info("job_done", images=len(image_names), seconds=round(uploaded - began, 3))

    async def _upload(self, job: RunJob, result: Result) -> tuple[list[str], str]:
        """The keys follow from the job's id: a second attempt writes over the first."""
        names = [f"image_{number}.png" for number in range(len(result.images))]
        for name, image in zip(names, result.images, strict=True):
            await put(self._objects, job.bucket, job.result_prefix + name, image, "image/png")
        info = f"{job.job_id}_param.json"
        key = job.result_prefix + info
        await put(self._objects, job.bucket, key, result.param_json, "application/json")
        return names, info

    async def _fail(self, delivery: Delivery, reason: str) -> None:
        log.info("job_failed")  # the reason may quote the params
        report = ReportJobFailed(**self._about(delivery), reason=reason[:2000])
        await self._report(delivery, report)

    async def _report(self, delivery: Delivery, report: Report) -> None:
        await self._reports.job(report, delivery.envelope)

    def _about(self, delivery: Delivery) -> dict[str, Any]:
        return {
            "job_id": delivery.job.job_id,
            "instance_id": self._settings.instance_id,
            "attempt": delivery.attempt,
        }


def _last_words(cause: str) -> str:
    return f"the engine died {MAX_ATTEMPTS} times on this job: {cause}"


def _remember(memory: dict[str, Any], job_id: str, what: object) -> None:
    memory[job_id] = what
    while len(memory) > REMEMBERED:
        del memory[next(iter(memory))]


async def _ack(message: NatsMessage) -> None:
    """If the bus does not hear it, it delivers the job again, and `_finished` knows."""
    for _ in range(3):
        try:
            await message.ack_sync()
            return
        except Exception as error:
            log.warning("ack_postponed", error=repr(error))
            await asyncio.sleep(0.5)
