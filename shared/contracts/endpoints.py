"""endpoints: pools of workers."""

from __future__ import annotations

from datetime import datetime

from shared.contracts.envelope import Command, Message, State

OWNER = "endpoints"

SERVING = ("InService", "Updating")
"""Takes jobs: some instance is ready, or one is started for the next job, or is about to be ready;
the better first."""

REJECTIONS = {
    "endpoints.name_taken": 'Cannot create already existing model "{endpoint_name}"',
    "endpoints.not_found": 'endpoint "{endpoint_name}" not found',
    "endpoints.unknown_instance_type": (
        "ResourceLimitExceeded: instance type {instance_type} is unknown here; known: {known}"
    ),
    "endpoints.quota": (
        "ResourceLimitExceeded: {wanted} instances of {instance_type} wanted, "
        "{allowed} allowed, {used} in use"
    ),
}


class CreateEndpoint(Command, frozen=True, kw_only=True):
    """`autoscaling`: between `min_instance_number` (0 for Async, 1 for Real-time if it is not said)
    and `max_instance_number` (`initial_instance_count` if it is not said). Without it the count
    stays as it is."""

    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    initial_instance_count: int
    autoscaling: bool
    roles: list[str]
    creator: str
    min_instance_number: int | None = None
    max_instance_number: int | None = None


class DeleteEndpoints(Command, frozen=True, kw_only=True):
    """Names that do not exist are ignored: deleting twice is no error. The name is free at once;
    the endpoint is `Deleting` until its workers have finished what they have begun."""

    endpoint_names: list[str]


class ReportInstance(Command, frozen=True, kw_only=True):
    """A worker says how it is. `status`: ready (engine loaded), stopping, failed (with `error`)."""

    endpoint_id: str
    instance_id: str
    status: str
    device: str = ""
    pid: int = 0
    error: str | None = None


class InstanceBeat(Message, frozen=True, kw_only=True):
    """Telemetry on core NATS, never stored: a worker lives, and how. `memory`: bytes that are taken
    of its device, of `memory_total`; on a CPU by its engine, of the machine's. `models`: names of
    what is loaded. `jobs`: ids of what it has begun. What it counts is at
    `http://{address}/metrics`. Emitter: worker."""

    endpoint_id: str
    instance_id: str
    device: str
    device_name: str = ""
    memory: int = 0
    memory_total: int = 0
    models: list[str] = []
    jobs: list[str] = []
    endpoint_name: str = ""
    address: str = ""


class ResyncEndpoints(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Endpoint(State, frozen=True, kw_only=True):
    """`endpoint_status`: Creating, InService, Updating, Deleting, Deleted, Failed (with `error`).
    `current_instance_count`: of instances that are ready for a job."""

    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    endpoint_status: str
    autoscaling: bool
    max_instance_number: int
    current_instance_count: int
    roles: list[str]
    creator: str
    start_time: datetime
    end_time: datetime | None
    error: str | None = None
    min_instance_number: int = 1


class EndpointCreated(Endpoint, frozen=True, kw_only=True): ...


class EndpointInService(Endpoint, frozen=True, kw_only=True): ...


class EndpointChanged(Endpoint, frozen=True, kw_only=True): ...


class EndpointFailed(Endpoint, frozen=True, kw_only=True): ...


class EndpointDeleted(Endpoint, frozen=True, kw_only=True): ...


class EndpointSynced(Endpoint, frozen=True, kw_only=True): ...
