"""Follows the log of events and keeps what reads need: a table of aggregates, and in memory what
every request needs (users, roles, credentials, tokens).

Applying is idempotent: a state replaces another only with a higher version. So two replicas may
apply the same event, and a gap is closed by asking the owners for their state again (`resync`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy

from shared import tracing
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import Endpoint
from shared.contracts.envelope import Envelope, Message, Rejected, State
from shared.contracts.identity import Credential, Role, Token, User
from shared.contracts.inference import FINISHED, Job
from shared.contracts.models import CREATING, Checkpoint
from shared.contracts.registry import TYPES, payload
from shared.contracts.subjects import EVENTS, aggregate_of
from shared.logs import get_logger

log = get_logger(__name__)

BATCH = 256
KINDS: dict[str, type[State]] = {
    "role": Role,
    "user": User,
    "credential": Credential,
    "token": Token,
    "checkpoint": Checkpoint,
    "endpoint": Endpoint,
    "job": Job,
}


class Event(msgspec.Struct, frozen=True):
    """One applied message. `seq` is its place in the stream, and the id of its SSE frame."""

    seq: int
    envelope: Envelope
    message: Message

    @property
    def state(self) -> State | None:
        return self.message if isinstance(self.message, State) else None


class Directory:
    """Who may come in: small, asked on every request, so kept in memory."""

    def __init__(self) -> None:
        self.roles: dict[str, Role] = {}
        self.users: dict[str, User] = {}
        self.credentials: dict[str, Credential] = {}
        self.tokens: dict[str, Token] = {}
        self.tokens_by_hash: dict[str, Token] = {}
        self._versions: dict[tuple[str, str], int] = {}

    def apply(self, state: State) -> None:
        kind, id_ = aggregate_of(state)
        if self._versions.get((kind, id_), 0) >= state.version:
            return
        self._versions[kind, id_] = state.version
        match state:
            case Role():
                _put(self.roles, id_, state)
            case User():
                _put(self.users, id_, state)
            case Credential():
                _put(self.credentials, id_, state)
            case Token():
                _put(self.tokens, id_, state)
                _put(self.tokens_by_hash, state.token_hash, state)


def _put(table: dict[str, Any], key: str, state: State) -> None:
    if state.deleted:
        table.pop(key, None)
    else:
        table[key] = state


Listener = Callable[[list[Event]], None]


class Projector:
    """One per process. `listeners` hear of events once they are applied, in order."""

    def __init__(
        self,
        pool: asyncpg.Pool[Any],
        js: JetStreamContext,
        directory: Directory,
        resync: Callable[[], Awaitable[set[str]]],
        renew: asyncio.Event,
    ) -> None:
        """`resync` asks all owners for their state; it returns the ids of its commands. `renew` is
        set when the bus was away."""
        self._pool = pool
        self._js = js
        self._directory = directory
        self._resync = resync
        self._renew = renew
        self._queue: asyncio.Queue[tuple[int, Msg]] = asyncio.Queue(maxsize=4096)
        self._subscription: Any = None
        self._generation = 0
        """Of the subscription: what an earlier one has left in the queue is not looked at."""
        self.listeners: list[Listener] = []
        self.seq = 0
        self.highest = 0
        """What `seq` was before a rewind: so much was told to the listeners."""
        self.healthy = False
        self.complete = asyncio.Event()
        """Set for good once all that was there at the start is here."""
        self._goal: int | None = None
        self._awaited: set[str] = set()
        self._moved = asyncio.Event()
        self._waiting: dict[tuple[str, str], list[asyncio.Future[State]]] = defaultdict(list)
        self.listeners.append(self._wake_waiters)

    async def run(self) -> None:
        """Until cancelled."""
        await self._load()
        apply = asyncio.create_task(self._apply_for_ever())
        try:
            await self._follow()
        finally:
            apply.cancel()

    async def _load(self) -> None:
        self.seq = self.highest = await self._pool.fetchval(
            "SELECT coalesce((SELECT seq FROM position WHERE stream = $1), 0)", EVENTS
        )
        rows = await self._pool.fetch(
            """
            SELECT kind, state::text AS state FROM aggregates
            WHERE kind IN ('role', 'user', 'credential', 'token')
            """
        )
        for row in rows:
            self._directory.apply(msgspec.json.decode(row["state"], type=KINDS[row["kind"]]))

    async def _follow(self) -> None:
        """Keeps one ordered consumer going, and starts another when the server was away, which
        forgets such consumers, or when it has fallen silent."""
        stuck_at: int | None = None
        while True:
            try:
                info = await self._js.stream_info(EVENTS)
                last, first = info.state.last_seq, info.state.first_seq
                if self._subscription is None:
                    if last < self.seq or first > self.seq + 1:
                        log.warning("resync", seq=self.seq, first=first, last=last)
                        self._awaited = await self._resync()
                        start = 0 if last < self.seq else first - 1
                        await self._set_position(start)
                        self.seq = self.highest = start
                    self._renew.clear()
                    await self._subscribe()
                elif self._renew.is_set() or self._is_silent(last, stuck_at):
                    log.warning("consumer_renewed", seq=self.seq, last=last)
                    await self._unsubscribe()
                    continue
                stuck_at = self.seq if last > self.seq else None
                self.healthy = True
                self._goal = last if self._goal is None else self._goal
                self._check_complete()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._renew.wait(), 2)
            except Exception as error:
                self.healthy = False
                log.warning("waiting_for_events", error=repr(error))
                await asyncio.sleep(0.5)

    def _is_silent(self, last: int, stuck_at: int | None) -> bool:
        return last > self.seq and stuck_at == self.seq and self._queue.empty()

    def _check_complete(self) -> None:
        if self._goal is not None and self.seq >= self._goal and not self._awaited:
            self.complete.set()

    async def _subscribe(self) -> None:
        generation = self._generation

        async def receive(message: Msg) -> None:
            await self._queue.put((generation, message))

        self._subscription = await self._js.subscribe(
            "evt.>",
            stream=EVENTS,
            ordered_consumer=True,
            cb=receive,
            config=ConsumerConfig(
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=self.seq + 1
            ),
        )

    async def _unsubscribe(self) -> None:
        self._generation += 1
        subscription, self._subscription = self._subscription, None
        with contextlib.suppress(Exception):
            await subscription.unsubscribe()

    async def _apply_for_ever(self) -> None:
        while True:
            taken = [await self._queue.get()]
            while len(taken) < BATCH and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            generation = self._generation
            messages = [
                message
                for source, message in taken
                if source == generation and message.metadata.sequence.stream > self.seq
            ]
            if not messages:
                continue
            events = [event for event in map(read, messages) if event]
            last = max(m.metadata.sequence.stream for m in messages)
            began = time.time()
            known = await self._apply_until_done(events, last)
            if generation != self._generation:
                continue  # they come once more
            if known < self.seq:
                self._rewind(known)
                continue
            for event in events:
                if event.state:
                    self._directory.apply(event.state)
                self._awaited.discard(event.envelope.answers or "")
            self.seq = last
            self.highest = max(self.highest, last)
            self._check_complete()
            self._moved.set()
            self._moved.clear()
            _trace(events, began)
            for listener in self.listeners:
                listener(events)

    async def _apply_until_done(self, events: list[Event], last: int) -> int:
        while True:
            try:
                return await self._apply(events, last, after=self.seq)
            except Exception as error:
                self.healthy = False
                log.warning("projection_postponed", error=repr(error))
                await asyncio.sleep(0.5)

    def _rewind(self, known: int) -> None:
        """The database has forgotten (a crash, a failover) what it was told last: it is told once
        more."""
        log.warning("projection_rewound", seq=self.seq, known=known)
        self.seq = known
        self._generation += 1
        self._renew.set()

    async def catch_up(self, seconds: float = 2.0) -> bool:
        """Whether this process has applied, in time, what any replica had applied by now."""
        mine = self.seq
        there = await self._pool.fetchval("SELECT seq FROM position WHERE stream = $1", EVENTS) or 0
        if there < mine == self.seq:
            self._rewind(there)
        goal = max(there, self.highest)
        try:
            async with asyncio.timeout(seconds):
                while self.seq < goal:
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    async def _apply(self, events: list[Event], last: int, *, after: int) -> int:
        """Returns how far the table was before; if that is not `after` or more, nothing is done."""
        newest: dict[tuple[str, str], State] = {}
        for event in events:
            if event.state:
                key = aggregate_of(event.state)
                if key not in newest or newest[key].version < event.state.version:
                    newest[key] = event.state
        answers = [event for event in events if event.envelope.answers]
        # One statement, so one round trip and one transaction. The gateway's connections commit
        # without waiting for the disk: what a crash takes is applied again from the stream.
        known: int = await self._pool.fetchval(
            """
            WITH known AS (
                SELECT coalesce(max(seq), 0) AS seq FROM position WHERE stream = $8
            ), applied AS (
                INSERT INTO aggregates (kind, id, version, deleted, state)
                SELECT kind, id, version, deleted, state::jsonb
                FROM unnest($1::text[], $2::text[], $3::int[], $4::bool[], $5::text[])
                    AS new (kind, id, version, deleted, state)
                WHERE (SELECT seq FROM known) >= $10
                ORDER BY kind, id
                ON CONFLICT (kind, id) DO UPDATE SET
                    version = excluded.version, deleted = excluded.deleted,
                    state = excluded.state
                WHERE aggregates.version < excluded.version
            ), answered AS (
                UPDATE idempotency_keys SET answer = new.answer::jsonb
                FROM unnest($6::text[], $7::text[]) AS new (command_id, answer)
                WHERE idempotency_keys.command_id = new.command_id
                    AND (SELECT seq FROM known) >= $10
            ), moved AS (
                INSERT INTO position (stream, seq)
                SELECT $8, $9 WHERE (SELECT seq FROM known) >= $10
                ON CONFLICT (stream) DO UPDATE SET seq = greatest(position.seq, excluded.seq)
            )
            SELECT seq FROM known
            """,
            [kind for kind, _ in newest],
            [id_ for _, id_ in newest],
            [state.version for state in newest.values()],
            [state.deleted for state in newest.values()],
            [msgspec.json.encode(state).decode() for state in newest.values()],
            [event.envelope.answers for event in answers],
            [msgspec.json.encode(outcome_of(event)).decode() for event in answers],
            EVENTS,
            last,
            after,
        )
        return known

    async def _set_position(self, seq: int) -> None:
        await self._pool.execute(
            """
            INSERT INTO position (stream, seq) VALUES ($1, $2)
            ON CONFLICT (stream) DO UPDATE SET seq = excluded.seq
            """,
            EVENTS,
            seq,
        )

    def _wake_waiters(self, events: list[Event]) -> None:
        for event in events:
            if event.state and is_settled(event.state):
                for future in self._waiting.pop(aggregate_of(event.state), []):
                    if not future.done():
                        future.set_result(event.state)

    def expect(self, kind: str, id_: str) -> asyncio.Future[State]:
        """Done when the job or checkpoint is settled. Ask for it before looking at the table."""
        future: asyncio.Future[State] = asyncio.get_running_loop().create_future()
        self._waiting[kind, id_].append(future)
        future.add_done_callback(lambda _: self._forget_waiter((kind, id_), future))
        return future

    def _forget_waiter(self, about: tuple[str, str], future: asyncio.Future[State]) -> None:
        waiting = self._waiting.get(about, [])
        if future in waiting:
            waiting.remove(future)
        if not waiting:
            self._waiting.pop(about, None)

    async def wait_for(self, settled: asyncio.Future[State], seconds: float) -> State | None:
        """The settled state, or None if it takes longer."""
        try:
            return await asyncio.wait_for(settled, seconds)
        except TimeoutError:
            return None


def _trace(events: list[Event], began: float) -> None:
    """The end of the way that a message takes: from here on everybody sees what it says."""
    if not tracing.enabled():
        return
    for event in events:
        if event.envelope.traceparent:
            tracing.record(
                f"apply {event.envelope.type}",
                kind="consumer",
                parent=event.envelope.traceparent,
                began=began,
                ended=time.time(),
                attributes={"messaging.message.id": event.envelope.id},
            )


def is_settled(state: State) -> bool:
    """Whether what somebody may wait for has come: the end of a job, the verdict on a checkpoint's
    files."""
    match state:
        case Job():
            return state.deleted or state.status in FINISHED
        case Checkpoint():
            return state.deleted or state.status != CREATING
    return False


class Outcome(msgspec.Struct, frozen=True):
    """How a command ended; `code` only for a rejection."""

    code: str = ""
    message: str = ""


def outcome_of(event: Event) -> Outcome:
    if isinstance(event.message, Rejected):
        return Outcome(event.message.code, event.message.message)
    return Outcome()


def read(message: Msg) -> Event | None:
    """What an unknown or broken message says is nothing to a projection: logged and passed over."""
    try:
        envelope = cloud.decode(message.data)
        if envelope.type not in TYPES:
            return None
        return Event(message.metadata.sequence.stream, envelope, payload(envelope))
    except msgspec.MsgspecError as error:
        log.error("unreadable_event", subject=message.subject, error=str(error))
        return None
