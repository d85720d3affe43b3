"""What endpoints does unasked: it compares the workers that are wanted with those that live, at
start, after each command, when a worker comes or goes and once a second, and makes the second like
the first. It scales endpoints by their queues. What it remembers it could do without, so it may be
killed at any point."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta
from functools import partial

from nats.js.errors import NotFoundError

from services.endpoints.autoscaling import Calm, decide
from services.endpoints.domain import (
    FAILED,
    SETTLED,
    Ending,
    Endpoint,
    Instance,
    InstanceTypes,
    Patience,
    Plan,
    Pulse,
    event_after,
    make_plan,
)
from services.endpoints.launchers import Launcher, LaunchFailed, NoRoomYet, stop_all
from services.endpoints.store import EndpointStore, InstanceStore, Lead
from shared.contracts.endpoints import InstanceBeat
from shared.contracts.envelope import Message, new_id
from shared.contracts.subjects import JOBS, beat_subject, jobs_consumer, jobs_durable
from shared.errors import Rejected
from shared.logs import get_logger
from shared.service import Service
from shared.unit_of_work import Tx, utc_now

log = get_logger(__name__)

EVERY = 1.0
QUEUE_CHECK = 30.0
"""Seconds after which a queue is looked at again: without it workers spin and no job arrives."""
LAST_STOP = 8.0
"""Seconds that workers have to finish when this service stops."""


async def _change(before: Endpoint, after: Endpoint, tx: Tx) -> None:
    await EndpointStore(tx.conn).save(after)
    if event := event_after(before, after):
        tx.emit(event)


async def add_instance(instance: Instance, tx: Tx) -> None:
    """The row comes before the process. Raises Rejected when no more are wanted by now."""
    endpoints, instances = EndpointStore(tx.conn), InstanceStore(tx.conn)
    endpoint = await endpoints.find(instance.endpoint_id)
    if endpoint is None or await instances.count(endpoint.endpoint_id) >= endpoint.wanted_count:
        raise Rejected("endpoints.not_found", endpoint_name=instance.endpoint_id)
    await instances.save(instance)


async def end_instance(ending: Ending, tx: Tx) -> None:
    endpoints, instances = EndpointStore(tx.conn), InstanceStore(tx.conn)
    endpoint = await endpoints.find(ending.instance.endpoint_id)
    if endpoint is None or not await instances.remove(ending.instance.instance_id):
        return
    ready = await instances.count_ready(endpoint.endpoint_id)
    changed = endpoint
    if ending.crash:
        changed = endpoint.note_crash(
            ending.instance,
            ending.crash,
            ready=ready,
            recovered=endpoint.retry_at is not None
            and await instances.has_settled(
                endpoint.endpoint_id, endpoint.retry_at, tx.now - SETTLED
            ),
            now=tx.now,
        )
    if changed.endpoint_status == FAILED:
        await instances.remove_all_of(endpoint.endpoint_id)
    changed = changed.count_ready(ready, now=tx.now)
    await _change(endpoint, changed, tx)


async def retire_instance(instance: Instance, drain: timedelta, tx: Tx) -> None:
    """Unless by now it is needed after all."""
    endpoints, instances = EndpointStore(tx.conn), InstanceStore(tx.conn)
    endpoint = await endpoints.find(instance.endpoint_id)
    if endpoint is None or await instances.count(endpoint.endpoint_id) <= endpoint.wanted_count:
        return
    await instances.retire(instance.instance_id, tx.now + drain)
    changed = endpoint.count_ready(await instances.count_ready(endpoint.endpoint_id), now=tx.now)
    await _change(endpoint, changed, tx)


async def scale_endpoint(endpoint_id: str, to: int, seen: datetime | None, tx: Tx) -> None:
    """`seen`: since when the number of instances was wanted that was decided upon."""
    store = EndpointStore(tx.conn)
    endpoint = await store.find(endpoint_id)
    if endpoint is None or not endpoint.scales or endpoint.scaled_at != seen:
        return
    await _change(endpoint, endpoint.scale(to, now=tx.now), tx)


async def release_endpoint(endpoint_id: str, tx: Tx) -> None:
    store = EndpointStore(tx.conn)
    endpoint = await store.find(endpoint_id)
    if endpoint and not endpoint.released:
        await _change(endpoint, endpoint.release(), tx)


class Pulses:
    """What workers say of themselves, and for how long they have said nothing: a bus that is away
    is nobody's silence."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[float, InstanceBeat]] = {}
        self._connections: int | None = None
        self._listening_since = 0.0

    def hear(self, message: Message) -> None:
        if isinstance(message, InstanceBeat):
            heard = asyncio.get_running_loop().time()
            self._beats[message.instance_id] = (heard, message)

    def look(
        self, instances: list[Instance], connections: int | None, now: datetime
    ) -> dict[str, Pulse]:
        clock = asyncio.get_running_loop().time()
        if connections is None or connections != self._connections:
            self._connections, self._listening_since = connections, clock
        rows = {instance.instance_id: instance for instance in instances}
        self._beats = {id_: beat for id_, beat in self._beats.items() if id_ in rows}
        return {id_: self._pulse(row, clock, now) for id_, row in rows.items()}

    def _pulse(self, instance: Instance, clock: float, now: datetime) -> Pulse:
        heard, beat = self._beats.get(instance.instance_id, (0.0, None))
        silent = timedelta(seconds=clock - max(heard, self._listening_since))
        since_ready = now - (instance.ready_at or now)
        return Pulse(min(silent, since_ready), len(beat.jobs) if beat else 0)


class Reconciler:
    def __init__(
        self,
        launcher: Launcher,
        types: InstanceTypes,
        *,
        patience: Patience,
        out_after: timedelta,
        in_after: timedelta,
    ) -> None:
        """`out_after`, `in_after`: the cool-downs of autoscaling."""
        self._launcher = launcher
        self._types = types
        self._patience = patience
        self._out_after = out_after
        self._in_after = in_after
        self._pulses = Pulses()
        self._calm: dict[str, Calm | None] = {}
        self._service: Service | None = None
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._stopping = False
        self._queues_seen: dict[str, float] = {}

    def wake(self) -> None:
        self._wake.set()

    async def run(self, service: Service) -> None:
        """Until cancelled. What goes wrong in one pass is tried again in the next. Of several
        services one reconciles; the others wait for it to be gone."""
        lead = Lead(service.pool)
        try:
            await self._wait_for(lead)
            await self._lead(lead, service)
        finally:
            await lead.give_up()

    async def _lead(self, lead: Lead, service: Service) -> None:
        await self._launcher.open(self.wake)
        await service.hear(beat_subject("*"), self._pulses.hear)
        self._service = service
        while True:
            try:
                async with self._one_at_a_time:
                    if await lead.take():
                        await self._reconcile(service)
            except Exception as error:
                log.warning("reconcile_postponed", error=repr(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), EVERY)
            self._wake.clear()

    async def stop(self) -> None:
        """Workers that go with this service stay wanted, so the next start brings them back. First
        the rows: nobody should send them another job."""
        self._stopping = True
        async with self._one_at_a_time:
            service = self._service
            if service is None:
                return
            if not self._launcher.workers_outlive_service:
                try:
                    async with asyncio.timeout(3):
                        for instance in await InstanceStore(service.pool).list_all():
                            await self._end(service, Ending(instance=instance, crash=None))
                except Exception as error:  # Postgres may be stopping too; the next start sees it
                    log.warning("stop_not_recorded", error=repr(error))
                await stop_all(self._launcher, within=LAST_STOP)
            await self._launcher.close()

    async def _wait_for(self, lead: Lead) -> None:
        waiting = False
        while True:
            try:
                if await lead.take():
                    return
                if not waiting:
                    log.info("waiting_for_lead")
                waiting = True
            except Exception as error:
                log.warning("lead_postponed", error=repr(error))
            await asyncio.sleep(EVERY)

    async def _reconcile(self, service: Service) -> None:
        if self._stopping:
            return
        seen = await self._launcher.observe()  # before the rows, which may be newer than that
        endpoints = await EndpointStore(service.pool).list_unreleased()
        instances = await InstanceStore(service.pool).list_all()
        now = utc_now()
        plan = make_plan(
            endpoints,
            instances,
            seen,
            self._pulses.look(instances, service.connections, now),
            now=now,
            patience=self._patience,
        )
        for ending in plan.end:
            await self._end(service, ending)
        for instance in plan.retire:
            await self._retire(service, instance)
        for instance_id, worker in seen.items():
            if not worker.alive:
                await self._launcher.forget(instance_id)
        for instance_id, within in plan.stop.items():
            await self._launcher.stop(instance_id, within=within.total_seconds())
        await self._follow(service, endpoints, plan)
        if plan.end or plan.retire:
            self.wake()  # what ended is replaced in the next pass, which sees the new rows

    async def _follow(self, service: Service, endpoints: list[Endpoint], plan: Plan) -> None:
        """One endpoint's trouble does not hold up the others."""
        missing = {endpoint.endpoint_id: count for endpoint, count in plan.start}
        for endpoint in endpoints:
            if self._stopping:
                return
            try:
                if endpoint in plan.release:
                    await self._release(service, endpoint)
                elif not endpoint.ended:
                    await self._open_queue(service, endpoint.endpoint_id)
                    for _ in range(missing.get(endpoint.endpoint_id, 0)):
                        if not await self._start(service, endpoint):
                            break
                    await self._scale(service, endpoint)
            except Exception as error:
                log.warning(
                    "endpoint_postponed", endpoint_id=endpoint.endpoint_id, error=repr(error)
                )

    async def _open_queue(self, service: Service, endpoint_id: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._queues_seen.get(endpoint_id, -QUEUE_CHECK) >= QUEUE_CHECK:
            await service.js.add_consumer(JOBS, jobs_consumer(endpoint_id))
            self._queues_seen[endpoint_id] = now

    async def _scale(self, service: Service, endpoint: Endpoint) -> None:
        if not endpoint.scales:
            return
        queue = await service.js.consumer_info(JOBS, jobs_durable(endpoint.endpoint_id))
        decision = decide(
            endpoint.limits(out_after=self._out_after, in_after=self._in_after),
            wanted=endpoint.scaled_to,
            backlog=(queue.num_pending or 0) + (queue.num_ack_pending or 0),
            changed_at=endpoint.scaled_at,
            calm=self._calm.get(endpoint.endpoint_id),
            now=utc_now(),
        )
        self._calm[endpoint.endpoint_id] = decision.calm
        if decision.wanted != endpoint.scaled_to:
            await service.work.run(
                partial(scale_endpoint, endpoint.endpoint_id, decision.wanted, endpoint.scaled_at)
            )
            log.info(
                "endpoint_scaled",
                endpoint_id=endpoint.endpoint_id,
                instances=decision.wanted,
                before=endpoint.scaled_to,
                waiting=queue.num_pending,
                in_hand=queue.num_ack_pending,
            )
            self.wake()

    async def _start(self, service: Service, endpoint: Endpoint) -> bool:
        """False when there is no point in starting the next one now."""
        instance = Instance(
            instance_id=new_id(), endpoint_id=endpoint.endpoint_id, started_at=utc_now()
        )
        try:
            await service.work.run(partial(add_instance, instance))
        except Rejected:
            return False
        try:
            type_ = self._types.get(endpoint.instance_type)
            await self._launcher.start(instance.instance_id, endpoint, type_)
        except (LaunchFailed, Rejected) as error:
            await self._end(service, Ending(instance=instance, crash=str(error)))
            return False
        except NoRoomYet as error:
            await self._end(service, Ending(instance=instance, crash=None))
            log.info("no_room_yet", endpoint_id=endpoint.endpoint_id, reason=str(error))
            return False
        log.info(
            "instance_started",
            endpoint_id=endpoint.endpoint_id,
            instance_id=instance.instance_id,
            device=type_.device,
        )
        return True

    async def _end(self, service: Service, ending: Ending) -> None:
        await service.work.run(partial(end_instance, ending))
        log.info(
            "instance_ended",
            endpoint_id=ending.instance.endpoint_id,
            instance_id=ending.instance.instance_id,
            crash=ending.crash,
        )

    async def _retire(self, service: Service, instance: Instance) -> None:
        await service.work.run(partial(retire_instance, instance, self._patience.drain))
        log.info(
            "instance_retired",
            endpoint_id=instance.endpoint_id,
            instance_id=instance.instance_id,
        )

    async def _release(self, service: Service, endpoint: Endpoint) -> None:
        with contextlib.suppress(NotFoundError):
            await service.js.delete_consumer(JOBS, jobs_durable(endpoint.endpoint_id))
        await service.work.run(partial(release_endpoint, endpoint.endpoint_id))
        self._queues_seen.pop(endpoint.endpoint_id, None)
        self._calm.pop(endpoint.endpoint_id, None)
        log.info("endpoint_released", endpoint_id=endpoint.endpoint_id)
