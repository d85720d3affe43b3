"""endpoints: pools of workers."""

from __future__ import annotations

from datetime import datetime

from shared.contracts.envelope import Command, Message, State

OWNER = "endpoints"

SERVING = ("InService", "Updating")
"""Takes jobs: some instance is ready, or is about to be again; the better first."""

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
    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    initial_instance_count: int
    autoscaling: bool
    roles: list[str]
    creator: str


class DeleteEndpoints(Command, frozen=True, kw_only=True):
    """Names that do not exist are ignored: deleting twice is no error."""

    endpoint_names: list[str]


class ReportInstance(Command, frozen=True, kw_only=True):
    """A worker says how it is. `status`: ready (engine loaded), stopping, failed (with `error`)."""

    endpoint_id: str
    instance_id: str
    status: str
    device: str = ""
    pid: int = 0
    error: str | None = None


class ResyncEndpoints(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Endpoint(State, frozen=True, kw_only=True):
    """`endpoint_status`: Creating, InService, Updating, Deleting, Failed (with `error`)."""

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


class EndpointCreated(Endpoint, frozen=True, kw_only=True): ...


class EndpointInService(Endpoint, frozen=True, kw_only=True): ...


class EndpointChanged(Endpoint, frozen=True, kw_only=True): ...


class EndpointFailed(Endpoint, frozen=True, kw_only=True): ...


class EndpointDeleted(Endpoint, frozen=True, kw_only=True): ...


class EndpointSynced(Endpoint, frozen=True, kw_only=True): ...


class InstanceSeen(Message, frozen=True, kw_only=True):
    """Telemetry on core NATS, never stored: a worker lives, and shows what it counts at
    `http://{address}/metrics`. Emitter: worker."""

    endpoint_id: str
    endpoint_name: str
    instance_id: str
    device: str
    address: str
