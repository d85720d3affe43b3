"""One function per command: load, decide, save, emit. Workers follow: see reactions.py."""

from __future__ import annotations

from datetime import timedelta

from services.endpoints.domain import Endpoint, InstanceTypes, bounds, event_after
from services.endpoints.store import EndpointStore, InstanceStore
from shared.contracts import endpoints
from shared.errors import Rejected
from shared.unit_of_work import Tx


async def create_endpoint(cmd: endpoints.CreateEndpoint, tx: Tx, *, types: InstanceTypes) -> None:
    store = EndpointStore(tx.conn)
    await store.lock_names()
    if await store.list_named([cmd.endpoint_name]):
        raise Rejected("endpoints.name_taken", endpoint_name=cmd.endpoint_name)
    least, most = bounds(
        cmd.endpoint_type,
        initial=cmd.initial_instance_count,
        autoscaling=cmd.autoscaling,
        least=cmd.min_instance_number,
        most=cmd.max_instance_number,
    )
    types.check_quota(cmd.instance_type, most, await store.list_unreleased())
    endpoint = Endpoint(
        endpoint_id=cmd.endpoint_id,
        endpoint_name=cmd.endpoint_name,
        endpoint_type=cmd.endpoint_type,
        instance_type=cmd.instance_type,
        autoscaling=cmd.autoscaling,
        min_instance_number=least,
        max_instance_number=most,
        scaled_to=cmd.initial_instance_count,
        roles=cmd.roles,
        creator=cmd.creator,
        start_time=tx.now,
    )
    await store.save(endpoint)
    tx.emit(endpoints.EndpointCreated.of(endpoint))


async def delete_endpoints(cmd: endpoints.DeleteEndpoints, tx: Tx, *, drain: timedelta) -> None:
    """The name is free at once. Workers have `drain` to finish the jobs that they have begun; they
    and the queue are given back by the reconciler."""
    store, instances = EndpointStore(tx.conn), InstanceStore(tx.conn)
    for endpoint in await store.list_named(cmd.endpoint_names):
        deleting = endpoint.delete()
        await instances.retire_all_of(endpoint.endpoint_id, tx.now + drain)
        await store.save(deleting)
        tx.emit(endpoints.EndpointChanged.of(deleting))


async def report_instance(cmd: endpoints.ReportInstance, tx: Tx) -> None:
    """What a worker says of itself once it was given up changes nothing: it is being stopped."""
    store, instances = EndpointStore(tx.conn), InstanceStore(tx.conn)
    endpoint = await store.find(cmd.endpoint_id)
    instance = await instances.find(cmd.instance_id)
    if endpoint is None or instance is None or instance.endpoint_id != cmd.endpoint_id:
        return
    await instances.save(
        instance.report(cmd.status, device=cmd.device, error=cmd.error, now=tx.now)
    )
    changed = endpoint.count_ready(await instances.count_ready(cmd.endpoint_id), now=tx.now)
    if event := event_after(endpoint, changed):
        await store.save(changed)
        tx.emit(event)


async def resync(_: endpoints.ResyncEndpoints, tx: Tx) -> None:
    for endpoint in await EndpointStore(tx.conn).list_all():
        tx.emit(endpoints.EndpointSynced.of(endpoint))
