"""Server-Sent Events: one hub per process, fed by the projector and by progress telemetry.

A frame's `id` is the event's place in the stream, so a client that comes back with `Last-Event-ID`
gets what it missed from the stream before it hears live events. Progress has no id: it is never
stored. Frames are made once and shared; a client that reads too slowly is cut off and comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy

from services.gateway.auth import Person
from services.gateway.projections import FINISHED, Event, Projector, read
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import Endpoint
from shared.contracts.envelope import Envelope, State
from shared.contracts.identity import Role, User
from shared.contracts.inference import Job, JobProgress
from shared.contracts.models import Checkpoint
from shared.contracts.registry import payload
from shared.contracts.subjects import EVENTS, job_events_subject
from shared.logs import get_logger

log = get_logger(__name__)

QUEUE = 1000
KEEP_ALIVE = 15.0
CLOSED = b""

Visible = Callable[[State], bool]


def visible_to(person: Person) -> Visible:
    """What a person may hear of is what the lists would show them."""

    def visible(state: State) -> bool:
        match state:
            case Job():
                return person.may("inference:list") and person.may_see_job(state)
            case Checkpoint():
                return person.may("checkpoint:list") and person.may_use_checkpoint(state)
            case Endpoint():
                return person.may("sagemaker_endpoint:list") and person.may_use_endpoint(state)
            case User():
                return person.may("user:list")
            case Role():
                return person.may("role:list")
        return False  # credentials and tokens are nobody's business

    return visible


class Frame(msgspec.Struct, frozen=True):
    seq: int
    data: bytes
    state: State | None = None


def frame_of(event: Event) -> Frame:
    body = msgspec.json.encode(_open(event.envelope))
    text = b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.envelope.type.encode(), body)
    return Frame(event.seq, text, event.state)


def _open(envelope: Envelope) -> Envelope:
    """As it goes out of the house: without the plumbing."""
    return msgspec.structs.replace(envelope, answers=None, traceparent=None)


class Listener:
    """One client. `job_id` narrows it to one job."""

    def __init__(self, visible: Visible, job_id: str | None) -> None:
        self.visible = visible
        self.job_id = job_id
        self.queue: asyncio.Queue[Frame] = asyncio.Queue(maxsize=QUEUE)
        self.cut_off = False

    def wants(self, state: State | None) -> bool:
        if state is None or (self.job_id and not _is_job(state, self.job_id)):
            return False
        return self.visible(state)

    def push(self, frame: Frame) -> None:
        try:
            self.queue.put_nowait(frame)
        except asyncio.QueueFull:
            self.cut_off = True


def _is_job(state: State, job_id: str) -> bool:
    return isinstance(state, Job) and state.job_id == job_id


class Hub:
    def __init__(self, projector: Projector, js: JetStreamContext) -> None:
        self._projector = projector
        self._js = js
        self._listeners: set[Listener] = set()
        self._running: dict[str, Job] = {}
        """Jobs whose progress may come: progress itself does not say whose it is."""
        projector.listeners.append(self._on_events)

    async def follow_progress(self, client: Client) -> None:
        await client.subscribe("progress.*", cb=self._on_progress)

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(job := event.message, Job):
                if job.deleted or job.status in FINISHED:
                    self._running.pop(job.job_id, None)
                else:
                    self._running[job.job_id] = job
            if not self._listeners or event.state is None:
                continue
            frame = frame_of(event)
            for listener in self._listeners:
                if listener.wants(event.state):
                    listener.push(frame)

    async def _on_progress(self, message: Msg) -> None:
        if not self._listeners:
            return
        try:
            envelope = cloud.decode(message.data)
            progress = payload(envelope)
        except (msgspec.MsgspecError, KeyError):
            return
        if not isinstance(progress, JobProgress):
            return
        body = msgspec.json.encode(progress)
        for listener in self._listeners:
            if listener.job_id == progress.job_id or (
                listener.job_id is None and listener.wants(self._running.get(progress.job_id))
            ):
                listener.push(Frame(0, b"event: progress\ndata: %s\n\n" % body))

    async def stream(
        self, visible: Visible, *, job_id: str | None, after: int | None
    ) -> AsyncIterator[bytes]:
        """Frames as bytes. With `job_id` it ends once that job has ended; `after` is the
        client's Last-Event-ID. One job is always told from its beginning."""
        listener = Listener(visible, job_id)
        self._listeners.add(listener)
        try:
            yield b"retry: 1000\n\n"
            seen = self._projector.seq
            if job_id or after is not None:
                async for frame in self._replay(job_id, (after or 0) + 1, seen):
                    if listener.wants(frame.state):
                        yield frame.data
                        if job_id and _is_last(frame.state):
                            return
            while not listener.cut_off:
                try:
                    frame = await asyncio.wait_for(listener.queue.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield b": keep-alive\n\n"
                    continue
                if 0 < frame.seq <= seen:
                    continue
                yield frame.data
                if job_id and _is_last(frame.state):
                    return
        finally:
            self._listeners.discard(listener)

    async def _replay(self, job_id: str | None, start: int, until: int) -> AsyncIterator[Frame]:
        """Stored events from `start` to `until`, both included."""
        if start > until:
            return
        queue: asyncio.Queue[Msg] = asyncio.Queue()
        subscription: Any = await self._js.subscribe(
            job_events_subject(job_id) if job_id else "evt.>",
            stream=EVENTS,
            ordered_consumer=True,
            cb=queue.put,
            config=ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start
            ),
        )
        try:
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), 2.0)
                except TimeoutError:
                    return
                metadata = message.metadata
                if metadata.sequence.stream > until:
                    return
                if event := read(message):
                    yield frame_of(event)
                if metadata.num_pending == 0:
                    return
        finally:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()


def _is_last(state: State | None) -> bool:
    return isinstance(state, Job) and (state.deleted or state.status in FINISHED)
