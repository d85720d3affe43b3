"""The jobs that a worker has in hand: one when it has waited for it, more as long as no other
worker waits. The engine runs those together that fit; meanwhile the files of others are fetched.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import nats.errors
from faststream.nats import NatsMessage
from nats.aio.msg import Msg

from services.inference.worker.job import HeldJob, Tools
from shared import logs
from shared.contracts import envelope as cloud
from shared.contracts.inference import RunJob
from shared.contracts.registry import payload
from shared.contracts.subjects import JOBS, jobs_durable

log = logs.get_logger(__name__)

TOP_UP_EVERY = 0.1
LOOK_FOR_IDLE_EVERY = 1.0
ONE_NOW = b'{"batch":1,"no_wait":true}'
REMEMBERED = 64


class Hand:
    """`broken` ends with the error that makes this worker useless."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._held: dict[asyncio.Task[None], HeldJob] = {}
        self._stopping = False
        self._durable = jobs_durable(tools.settings.endpoint_id)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs in hand: those that wait, and those that have been begun."""
        begun = sum(held.begun for held in self._held.values())
        return len(self._held) - begun, begun

    async def receive(self, message: NatsMessage) -> None:
        """Returns when there is nothing in hand any more; until then it takes what is waiting."""
        if self._stopping:
            await message.raw_message.nak()
            return
        await self._take(message.raw_message)
        idle_looked_for = asyncio.get_running_loop().time()
        while self._held:
            done, _ = await asyncio.wait(
                self._held, timeout=TOP_UP_EVERY, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                self._put_down(task)
            while self._has_room() and (more := await self._fetch_now()):
                await self._take(more)
            now = asyncio.get_running_loop().time()
            if now - idle_looked_for > LOOK_FOR_IDLE_EVERY:
                idle_looked_for = now
                await self._share()
        if not self._tools.engine.alive and not self._stopping:
            await self._revive()

    @property
    def begun(self) -> list[str]:
        """The ids of the jobs that the engine works on."""
        return [held.job.job_id for held in self._held.values() if held.begun]

    async def stop(self) -> None:
        """Takes no more jobs; gives those that are begun some time, and all others back."""
        self._stopping = True
        for held in list(self._held.values()):
            if not held.begun:
                await held.give_back()
        if self._held:
            await asyncio.wait(self._held, timeout=self._tools.settings.drain_seconds)
        tasks = list(self._held)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _take(self, message: Msg) -> None:
        try:
            envelope = cloud.decode(message.data)
            job = payload(envelope)
            if not isinstance(job, RunJob):
                raise KeyError(envelope.type)
        except (msgspec.MsgspecError, KeyError) as error:
            log.error("no_job", error=repr(error))
            await message.term()
            return
        held = HeldJob(self._tools, message, envelope, job)
        self._held[asyncio.create_task(held.work())] = held

    def _put_down(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.broken.done():
            self.broken.set_exception(error)
        causes = self._tools.causes
        while len(causes) > REMEMBERED:
            del causes[next(iter(causes))]

    def _has_room(self) -> bool:
        return not self._stopping and len(self._held) < self._tools.settings.jobs_in_hand

    async def _fetch_now(self) -> Msg | None:
        """A job that waits although nobody else is there to take it; None if there is none."""
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS}.{self._durable}"
        try:
            # The old style has an inbox of its own: a job comes under the subject it was sent to.
            message = await self._tools.client.request(subject, ONE_NOW, timeout=1, old_style=True)
        except (nats.errors.Error, TimeoutError) as error:
            log.debug("no_more_jobs", error=repr(error))
            return None
        if message.headers and "Status" in message.headers:
            return None
        return message

    async def _share(self) -> None:
        """Gives jobs that have not been begun to workers that wait for one, the last ones first."""
        waiting = [held for held in self._held.values() if not held.begun]
        if not waiting:
            return
        with contextlib.suppress(Exception):
            info = await self._tools.js.consumer_info(JOBS, self._durable, timeout=1)
            for held in list(reversed(waiting))[: info.num_waiting or 0]:
                log.info("job_given_back", job_id=held.job.job_id)
                await held.give_back()

    async def _revive(self) -> None:
        try:
            await self._tools.engine.start()
        except Exception as error:
            if not self.broken.done():
                self.broken.set_exception(error)
