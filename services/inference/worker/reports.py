"""What a worker says on the bus: how its job goes, and how it is itself."""

from __future__ import annotations

import asyncio
import base64
import os
import time
import uuid
from typing import Any

from nats.js import JetStreamContext

from services.inference.worker.frames import Well
from services.inference.worker.settings import Settings
from shared import tracing
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import InstanceBeat, ReportInstance
from shared.contracts.envelope import Command, Envelope
from shared.contracts.inference import (
    JobPreview,
    JobProgress,
    ReportJobFailed,
    ReportJobStarted,
    ReportJobSucceeded,
)
from shared.contracts.registry import type_of
from shared.contracts.subjects import beat_subject, command_subject, progress_subject
from shared.errors import TooLarge
from shared.logs import get_logger

log = get_logger(__name__)

Report = ReportJobStarted | ReportJobSucceeded | ReportJobFailed

REPORTS = uuid.UUID("5c1c7a52-4bb9-4f0f-9d9a-3a1f7c1d2e60")
"""Namespace of their ids: a report that is sent again has the id that it had before."""

PROGRESS_PAUSE = 0.1


class Reports:
    def __init__(self, settings: Settings, client: Any, js: JetStreamContext) -> None:
        self._settings = settings
        self._client = client
        self._js = js
        self._source = f"worker/{settings.instance_id}"

    async def job(self, report: Report, cause: Envelope) -> None:
        """Returns once the stream has the report, however long that takes. A success that makes too
        large a report is a failure with that reason."""
        name = type_of(report)
        id_ = str(uuid.uuid5(REPORTS, f"{report.job_id}/{report.attempt}/{name}"))
        try:
            await self._send(report, name, id_, report.job_id, cause)
        except TooLarge as error:
            if not isinstance(report, ReportJobSucceeded):
                raise
            failed = ReportJobFailed(
                job_id=report.job_id,
                instance_id=report.instance_id,
                attempt=report.attempt,
                reason=f"its result can't be reported: {error.message}",
                endpoint_id=report.endpoint_id,
            )
            await self.job(failed, cause)

    async def instance(self, status: str, error: str | None = None) -> None:
        """Returns once the stream has the report, however long that takes."""
        report = ReportInstance(
            endpoint_id=self._settings.endpoint_id,
            instance_id=self._settings.instance_id,
            status=status,
            device=self._settings.device,
            pid=os.getpid(),
            error=error,
        )
        await self._send(report, type_of(report), cloud.new_id(), report.endpoint_id, None)

    async def beat(self, well: Well | None, jobs: list[str], *, address: str) -> None:
        """That this worker lives, and how; one that is not heard is not missed."""
        if not self._client.is_connected:
            return
        known = well or Well("", 0, 0, [])
        beat = InstanceBeat(
            endpoint_id=self._settings.endpoint_id,
            instance_id=self._settings.instance_id,
            device=self._settings.device,
            device_name=known.device_name,
            memory=known.memory,
            memory_total=known.memory_total,
            models=known.models,
            jobs=jobs,
            endpoint_name=self._settings.endpoint_name or self._settings.endpoint_id,
            address=address,
        )
        framed = cloud.wrap(beat, type=type_of(beat), source=self._source, subject=beat.instance_id)
        try:
            await self._client.publish(beat_subject(beat.instance_id), cloud.encode(framed))
        except Exception as error:
            log.debug("beat_lost", error=repr(error))

    def progress(self, job_id: str, attempt: int, cause: Envelope) -> Progress:
        return Progress(self._client, self._source, job_id, attempt, cause)

    async def _send(
        self, message: Command, name: str, id_: str, subject: str, cause: Envelope | None
    ) -> None:
        """Raises TooLarge."""
        framed = cloud.wrap(
            message,
            type=name,
            source=self._source,
            subject=subject,
            id=id_,
            cause=cause,
            traceparent=tracing.traceparent(),
        )
        body, pause = cloud.encode(framed), 0.1
        if not cloud.fits(body, self._client.max_payload):
            raise TooLarge(len(body), self._client.max_payload)
        while True:
            try:
                await self._js.publish(
                    command_subject(name), body, timeout=2, headers={"Nats-Msg-Id": id_}
                )
                return
            except Exception as error:
                log.warning("report_postponed", type=name, error=repr(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)


class Progress:
    """Steps and previews of one attempt as they happen, at most ten steps a second; lost ones are
    not missed."""

    def __init__(
        self, client: Any, source: str, job_id: str, attempt: int, cause: Envelope
    ) -> None:
        self._client = client
        self._source = source
        self._job_id = job_id
        self._attempt = attempt
        self._cause = cause
        self._first: tuple[int, float] | None = None
        self._last_sent = 0.0
        self._step = self._steps = 0

    async def on_preview(self, media_type: str, picture: bytes) -> None:
        await self._send(
            JobPreview(
                job_id=self._job_id,
                attempt=self._attempt,
                step=self._step,
                steps=self._steps,
                media_type=media_type,
                image=base64.b64encode(picture).decode(),
            )
        )

    async def on_step(self, step: int, steps: int) -> None:
        self._step, self._steps = step, steps
        now = time.monotonic()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        if step < steps and now - self._last_sent < PROGRESS_PAUSE:
            return
        self._last_sent = now
        done, since = step - self._first[0], now - self._first[1]
        report = JobProgress(
            job_id=self._job_id,
            step=step,
            steps=steps,
            attempt=self._attempt,
            eta_seconds=round(since / done * (steps - step), 2) if done else None,
        )
        await self._send(report)

    async def _send(self, report: JobProgress | JobPreview) -> None:
        if not self._client.is_connected:
            return  # it would be kept, and told when it is of no use any more
        framed = cloud.wrap(
            report,
            type=type_of(report),
            source=self._source,
            subject=self._job_id,
            cause=self._cause,
        )
        try:
            await self._client.publish(progress_subject(self._job_id), cloud.encode(framed))
        except Exception as error:
            log.debug("progress_lost", error=repr(error))
