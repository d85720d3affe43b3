"""Server-Sent Events: one hub per process, fed by the projector and by the telemetry of workers.

A frame's `id` is the event's place in the stream, so a client that comes back with `Last-Event-ID`
gets what it missed from the stream before it hears live events. Progress and previews have no id:
they are never stored. Frames are made once and shared; a client that reads too slowly is cut off
and comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from services.gateway.auth import Person
from services.gateway.projections import Event, Projector, is_settled, read
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import Endpoint
from shared.contracts.envelope import Envelope, State
from shared.contracts.identity import Credential, Role, Token, User
from shared.contracts.inference import FINISHED, Job, JobPreview, JobProgress
from shared.contracts.models import Checkpoint, CheckpointProgress
from shared.contracts.registry import payload
from shared.contracts.subjects import EVENTS, aggregate_of, job_events_subject
from shared.logs import get_logger

log = get_logger(__name__)

QUEUE = 1000
PREVIEWS_UNTIL = 10
"""A client for which so many frames wait gets no previews: they are large, and soon out of date."""
KEEP_ALIVE = 15.0
REPLAY_AHEAD = 64
PATIENCE = 5.0
"""Seconds to wait for a stored event before the client is sent away to come back."""

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


class _Interrupted(Exception): ...


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

    def __init__(self, person: Person, job_id: str | None) -> None:
        self.person = person
        self.job_id = job_id
        self.visible = visible_to(person)
        self.queue: asyncio.Queue[Frame | None] = asyncio.Queue(maxsize=QUEUE)

    def wants(self, state: State | None) -> bool:
        if state is None or (self.job_id and not _is_job(state, self.job_id)):
            return False
        return self.visible(state)

    def is_judged_anew_by(self, state: State | None) -> bool:
        """Whether this may have changed who the client is and what they may see."""
        match state:
            case Role():
                return state.role_name in self.person.roles
            case User() | Credential():
                return state.username == self.person.username
            case Token():
                return state.deleted and state.username == self.person.username
        return False

    def push(self, frame: Frame | None) -> bool:
        """None is the end. False if the client is too slow."""
        try:
            self.queue.put_nowait(frame)
            return True
        except asyncio.QueueFull:
            return False

    def cut_off(self) -> None:
        """The client comes back, and gets then what it has missed and may see."""
        while not self.queue.empty():
            self.queue.get_nowait()
        self.push(None)


def _is_job(state: State, job_id: str) -> bool:
    return isinstance(state, Job) and state.job_id == job_id


class Hub:
    def __init__(self, projector: Projector, js: JetStreamContext) -> None:
        self._projector = projector
        self._js = js
        self._listeners: set[Listener] = set()
        self._running: dict[str, State] = {}
        """Jobs and checkpoints whose telemetry may come: it does not say itself whose it is."""
        self._told = 0
        projector.listeners.append(self._on_events)

    @property
    def count(self) -> int:
        """Clients that follow events."""
        return len(self._listeners)

    async def follow_progress(self, client: Client) -> None:
        await client.subscribe("progress.*", cb=self._on_telemetry)

    def _on_events(self, events: list[Event]) -> None:
        if self._projector.highest < self._told:
            self._told = 0  # the log was made anew
        for event in events:
            if event.seq <= self._told:
                continue  # applied once more
            self._told = event.seq
            if isinstance(state := event.message, Job | Checkpoint):
                _, id_ = aggregate_of(state)
                if is_settled(state):
                    self._running.pop(id_, None)
                else:
                    self._running[id_] = state
            if not self._listeners or event.state is None:
                continue
            frame = frame_of(event)
            for listener in list(self._listeners):
                judged = listener.is_judged_anew_by(event.state)
                if judged or (listener.wants(event.state) and not listener.push(frame)):
                    self._cut_off(listener)

    def _cut_off(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        listener.cut_off()

    async def _on_telemetry(self, message: Msg) -> None:
        if not self._listeners:
            return
        try:
            telemetry = payload(cloud.decode(message.data))
        except (msgspec.MsgspecError, KeyError):
            return
        if isinstance(telemetry, CheckpointProgress):
            about = telemetry.checkpoint_id
        elif isinstance(telemetry, JobProgress | JobPreview):
            about = telemetry.job_id
        else:
            return
        preview = isinstance(telemetry, JobPreview)
        name = b"preview" if preview else b"progress"
        frame = Frame(0, b"event: %s\ndata: %s\n\n" % (name, msgspec.json.encode(telemetry)))
        for listener in list(self._listeners):
            wanted = listener.job_id == about or (
                listener.job_id is None and listener.wants(self._running.get(about))
            )
            if not wanted or (preview and listener.queue.qsize() >= PREVIEWS_UNTIL):
                continue
            if not listener.push(frame):
                self._cut_off(listener)

    async def find_end(self, job_id: str) -> int:
        """The id of the last stored event of a job; 0 if none is stored any more."""
        try:
            subject = job_events_subject(job_id)
            return (await self._js.get_last_msg(EVENTS, subject, direct=True)).seq or 0
        except NotFoundError:
            return 0

    async def stream(
        self, person: Person, *, job: Job | None = None, after: int | None
    ) -> AsyncIterator[bytes]:
        """Frames as bytes. With `job` it ends once that job has ended; `after` is the client's
        Last-Event-ID. One job is always told from its beginning."""
        job_id = job.job_id if job else None
        listener = Listener(person, job_id)
        self._listeners.add(listener)
        seen = self._projector.highest  # what comes later is pushed
        try:
            yield b"retry: 1000\n\n"
            if job_id or after is not None:
                async for frame in self._replay(job_id, (after or 0) + 1, seen):
                    if listener.wants(frame.state):
                        yield frame.data
                        if job_id and _is_last(frame.state):
                            return
            if job and _is_last(job):
                return  # and its end is not stored any more, or known to the client
            while True:
                try:
                    pushed = await asyncio.wait_for(listener.queue.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield b": keep-alive\n\n"
                    continue
                if pushed is None:
                    return
                yield pushed.data
                if job_id and _is_last(pushed.state):
                    return
        except _Interrupted:
            return  # without a gap: the client comes back for the rest
        finally:
            self._listeners.discard(listener)

    async def _replay(self, job_id: str | None, start: int, until: int) -> AsyncIterator[Frame]:
        """Stored events from `start` to `until`, both included. Raises _Interrupted when the bus
        goes away meanwhile."""
        if start > until:
            return
        queue: asyncio.Queue[Msg] = asyncio.Queue(REPLAY_AHEAD)  # the server waits for us
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
            info = await subscription.consumer_info()
            if not info.num_pending and not info.delivered.consumer_seq:
                return
            while True:
                message = await asyncio.wait_for(queue.get(), PATIENCE)
                metadata = message.metadata
                if metadata.sequence.stream > until:
                    return
                if event := read(message):
                    yield frame_of(event)
                if metadata.num_pending == 0:
                    return
        except (TimeoutError, nats.errors.Error) as error:
            log.warning("replay_interrupted", error=repr(error))
            raise _Interrupted from error
        finally:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()


def _is_last(state: State | None) -> bool:
    return isinstance(state, Job) and (state.deleted or state.status in FINISHED)
