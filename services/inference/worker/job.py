"""One job from the queue to its report: look, fetch, run, upload, report, and only then ack.

what happens                              what becomes of the job
a result                                  succeeded
JobFailure, or it takes too long          failed, with that reason
the engine dies or hangs, a bug           the next attempt, here or elsewhere, and alone
… for the third time                      failed, with the last cause
this worker dies                          the bus misses its heartbeat: the next attempt
this worker is told to stop               the next attempt
cancelled, deleted                        the engine lets go of it; the ledger has ended it already
moved to another endpoint                 the engine lets go of it; a worker there has it

Only what was begun is an attempt: a job that waited beside one that killed the engine has lost
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from services.inference.domain import bounded
from services.inference.worker import metrics
from services.inference.worker.cache import ModelCache
from services.inference.worker.engine import (
    EngineDied,
    EngineProcess,
    Following,
    JobFailure,
    JobGone,
    Result,
)
from services.inference.worker.fetching import get_params, put
from services.inference.worker.reports import Progress, Report, Reports
from services.inference.worker.settings import Settings
from shared import logs, tracing
from shared.bus import heartbeat
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Envelope
from shared.contracts.inference import (
    FINISHED,
    Job,
    ReportJobFailed,
    ReportJobStarted,
    ReportJobSucceeded,
    RunJob,
)
from shared.contracts.registry import payload
from shared.contracts.subjects import EVENTS, JOB_HEARTBEAT, job_events_subject
from shared.objects import MAX_PARAMS, Objects

log = logs.get_logger(__name__)

MAX_ATTEMPTS = 3
PAUSE = 0.5
"""Seconds before a job that took the engine with it is delivered again."""
LOOK_EVERY = 10.0
"""Seconds after which a job's fate is looked up again, should its event have been missed."""


class Tools(msgspec.Struct, frozen=True):
    """What all jobs of a worker share. `causes`: why the last attempt at a job failed here."""

    settings: Settings
    client: Client
    js: JetStreamContext
    reports: Reports
    objects: Objects
    cache: ModelCache
    engine: EngineProcess
    causes: dict[str, str]


class HeldJob:
    """One delivery of one job, in hand. `begun`: the engine works on it, or has done so.
    `unwanted`: the ledger has ended the job, or given it to another endpoint."""

    def __init__(self, tools: Tools, message: Msg, envelope: Envelope, job: RunJob) -> None:
        self.tools = tools
        self._message = message
        self._envelope = envelope
        self.job = job
        self.begun = False
        self.attempt = 0
        self._given_back = False
        self.unwanted = asyncio.Event()

    async def work(self) -> None:
        """Returns when nobody needs to do anything for this delivery any more. Cancelled, the job
        goes back to the queue."""
        logs.bind(self._envelope.correlation_id, job_id=self.job.job_id)
        again = False
        try:
            async with heartbeat(self._message, every=JOB_HEARTBEAT), self._fate():
                with self._traced():
                    again = not await self._finish()
                if not again:
                    await self._ack()
        except asyncio.CancelledError:
            await self._message.nak()
            raise
        if again:
            await self._message.nak(delay=0 if self._given_back else PAUSE)

    def _traced(self) -> AbstractContextManager[Any]:
        settings = self.tools.settings
        return tracing.span(
            "run job",
            kind="consumer",
            parent=self._envelope.traceparent,
            attributes={
                "darkroom.job_id": self.job.job_id,
                "darkroom.task_type": self.job.task_type,
                "darkroom.endpoint": settings.endpoint_name or settings.endpoint_id,
                "darkroom.correlation_id": self._envelope.correlation_id,
            },
        )

    async def give_back(self) -> None:
        """To the queue, for a worker that has nothing to do; unless it has been begun."""
        self._given_back = True
        await self.tools.engine.recall(self.job.job_id)

    @contextlib.asynccontextmanager
    async def _fate(self) -> AsyncIterator[None]:
        """Hears of the end that others make to the job, and of the attempts before this one."""

        async def on_event(message: Msg) -> None:
            await self._consider(message.data)

        subject = job_events_subject(self.job.job_id)
        subscription = await self.tools.client.subscribe(subject, cb=on_event)
        looking = asyncio.create_task(self._look_again(subject))
        try:
            await self._look(subject)
            yield
        finally:
            looking.cancel()
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()

    async def _look_again(self, subject: str) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self._look(subject)

    async def _look(self, subject: str) -> None:
        """At the last event there is. A bus that does not answer has nothing new to say."""
        try:
            last = await self.tools.js.get_last_msg(EVENTS, subject, direct=True)
        except NotFoundError:
            return
        except Exception as error:
            log.warning("fate_unknown", error=repr(error))
            return
        await self._consider(last.data or b"")

    async def _consider(self, data: bytes) -> None:
        try:
            job = payload(cloud.decode(data))
        except (msgspec.MsgspecError, KeyError):
            return
        if not isinstance(job, Job):
            return
        self.attempt = max(self.attempt, job.attempt)
        moved = job.version > self.job.version and job.endpoint_id != self.job.endpoint_id
        over = job.deleted or job.status in FINISHED
        if (over or moved) and not self.unwanted.is_set():
            log.info("job_unwanted", status=job.status, cancelled=job.cancelled, moved=moved)
            self.unwanted.set()
            await self.tools.engine.cancel(self.job.job_id)

    async def _finish(self) -> bool:
        """True when the job needs no other attempt, and its end is reported."""
        if self.unwanted.is_set():
            return True
        if self.attempt >= MAX_ATTEMPTS:
            cause = self.tools.causes.get(self.job.job_id, "the worker itself was ended")
            await self._fail(_last_words(cause))
            return True
        try:
            await self._attempt()
            return True
        except JobGone:
            return self.unwanted.is_set()  # else given back
        except JobFailure as failure:
            await self._fail(str(failure))
            return True
        except EngineDied as death:
            cause = str(death)
        except Exception as error:
            log.exception("job_interrupted")
            cause = f"{type(error).__name__}: {error}"
        if self.unwanted.is_set():
            return True
        if not self.begun:
            return False
        metrics.INTERRUPTED.inc()
        self.tools.causes[self.job.job_id] = cause
        if self.attempt < MAX_ATTEMPTS:
            return False
        await self._fail(_last_words(cause))
        return True

    async def _attempt(self) -> None:
        tools, job, came = self.tools, self.job, time.monotonic()
        params = await get_params(tools.objects, job.bucket, job.params_key, most=MAX_PARAMS)
        async with tools.cache.hold(job.models) as files:
            if self._given_back or self.unwanted.is_set():
                raise JobGone(job.job_id)
            fetched = time.monotonic()
            tracing.record_stages({"fetch": fetched - came})
            following = _Reporting(self, {"fetch": round(fetched - came, 3)})
            result = await tools.engine.run(
                job,
                params,
                files,
                following,
                seconds=tools.settings.job_seconds,
                alone=self.attempt > 0,
            )
        rendered = time.monotonic()
        tracing.record_stages(result.seconds)
        with tracing.span("upload", attributes={"darkroom.images": len(result.images)}):
            image_names, info_name = await self._upload(result)
        uploaded = time.monotonic()
        report = ReportJobSucceeded(
            **self.about(),
            image_names=image_names,
            info_name=info_name,
            seconds={
                **following.seconds,
                **result.seconds,
                "upload": round(uploaded - rendered, 3),
            },
            warnings=bounded(result.warnings),
        )
        metrics.IMAGES.inc(len(image_names))
        await self.report(report)
        log.info("job_done", images=len(image_names), seconds=round(uploaded - came, 3))

    async def _upload(self, result: Result) -> tuple[list[str], str]:
        """The keys follow from the job's id: a second attempt writes over the first."""
        objects, job = self.tools.objects, self.job
        info = f"{job.job_id}_param.json"
        async with asyncio.TaskGroup() as group:
            for image in result.images:
                key = job.result_prefix + image.name
                group.create_task(put(objects, job.bucket, key, image.data, image.media_type))
            key = job.result_prefix + info
            group.create_task(put(objects, job.bucket, key, result.param_json, "application/json"))
        return [image.name for image in result.images], info

    async def _fail(self, reason: str) -> None:
        log.info("job_failed")  # the reason may quote the params
        await self.report(ReportJobFailed(**self.about(), reason=reason[:2000]))

    async def report(self, report: Report) -> None:
        with tracing.span("report"):
            await self.tools.reports.job(report, self._envelope)

    def progress(self) -> Progress:
        return self.tools.reports.progress(self.job.job_id, self.attempt, self._envelope)

    def about(self) -> dict[str, Any]:
        return {
            "job_id": self.job.job_id,
            "instance_id": self.tools.settings.instance_id,
            "attempt": self.attempt,
            "endpoint_id": self.job.endpoint_id,
        }

    async def _ack(self) -> None:
        """If the bus does not hear it, it delivers the job again, and its last event tells that it
        has ended."""
        for _ in range(3):
            try:
                await self._message.ack_sync()
                return
            except Exception as error:
                log.warning("ack_postponed", error=repr(error))
                await asyncio.sleep(0.5)


class _Reporting(Following):
    """Tells the bus what the engine tells of a job. `seconds`: the stages that lie behind it."""

    def __init__(self, held: HeldJob, seconds: dict[str, float]) -> None:
        self._held = held
        self._progress: Progress | None = None
        self._came = time.monotonic()
        self.seconds = seconds

    async def on_begun(self) -> None:
        """From here on it is an attempt, and the ledger knows, whatever the job does to us."""
        held = self._held
        if held.unwanted.is_set():  # since it was handed to the engine
            await held.tools.engine.cancel(held.job.job_id)
            return
        held.attempt += 1
        held.begun = True
        waited = time.monotonic() - self._came
        self.seconds["line"] = round(waited, 3)
        tracing.record_stages({"line": waited})
        self._progress = held.progress()
        logs.bind(None, attempt=held.attempt)
        await held.report(ReportJobStarted(**held.about(), seconds=self.seconds))

    async def on_step(self, step: int, steps: int) -> None:
        metrics.STEPS.inc()
        if self._progress:
            await self._progress.on_step(step, steps)

    async def on_preview(self, media_type: str, picture: bytes) -> None:
        if self._progress:
            await self._progress.on_preview(media_type, picture)


def _last_words(cause: str) -> str:
    return f"the engine died {MAX_ATTEMPTS} times on this job: {cause}"
