"""What an endpoint and its instances are, and what may be done with them.

    Creating ── first instance ready ──> InService <── ready again ── none ready ──> Updating
        └── MAX_CRASHES without one ready ──> Failed

`InService` holds exactly as long as at least one instance is ready, so that no job is sent where
nobody works. `current_instance_count` is the number of ready instances. `end_time` is ESD's: when
the deployment ended, well or not. A deleted endpoint is a tombstone that says `Deleting`; what it
still holds (workers, its queue) is given back afterwards, and then it is `released`.

Reconciling knows three rules: a row without a living worker has ended; a living worker without a
row is stopped; an endpoint with fewer rows than wanted starts some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import msgspec
from msgspec.structs import replace

from shared.contracts import endpoints
from shared.errors import Rejected

CREATING, IN_SERVICE, UPDATING = "Creating", "InService", "Updating"
DELETING, FAILED = "Deleting", "Failed"
"""Of an endpoint."""

STARTING, READY, STOPPING, BROKEN = "starting", "ready", "stopping", "failed"
"""Of an instance; all but the first are its own words."""

MAX_CRASHES = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
SETTLED = timedelta(seconds=10)
"""A worker that dies sooner after it was ready counts as one that can't start."""


UNITS = {"MB": 1000**2, "GB": 1000**3, "MiB": 1024**2, "GiB": 1024**3}
MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)")


class NomadNeeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only Nomad must be told of a type: `driver` starts the worker (`docker` from its image,
    `raw_exec` and `exec` from what is installed on the node), `cpu` in MHz, `device` and
    `gpu_memory` of each GPU ("40 GiB"), `constraints` in Nomad's JSON."""

    driver: str = "docker"
    cpu: int = 1000
    datacenters: list[str] = msgspec.field(default_factory=lambda: ["*"])
    node_pool: str = ""
    device: str = "nvidia/gpu"
    gpu_memory: str = ""
    constraints: list[dict[str, str]] = []


class InstanceType(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`device` as torch calls it: cpu, cuda. `max`: how many may be wanted at a time. `gpus`: how
    many a worker sees, one if it has a cuda device; they are its own unless `share_gpus`.
    `memory`: a worker that takes more is killed ("16 GiB"). `image`: of its containers."""

    device: str
    max: int
    gpus: int = 0
    share_gpus: bool = False
    memory: str = ""
    image: str = ""
    nomad: NomadNeeds = NomadNeeds()

    def __post_init__(self) -> None:
        if self.max < 0 or self.gpus < 0:
            raise ValueError("max and gpus can't be negative")
        if self.gpus and not self._has_cuda:
            raise ValueError(f"a device {self.device} has no gpus")
        if self.memory and not MEMORY.fullmatch(self.memory):
            raise ValueError(f'memory is like "16 GiB", not "{self.memory}"')

    @property
    def _has_cuda(self) -> bool:
        return self.device.partition(":")[0] == "cuda"

    @property
    def gpu_count(self) -> int:
        return self.gpus or int(self._has_cuda)

    @property
    def memory_bytes(self) -> int:
        """0 for no limit."""
        if not (match := MEMORY.fullmatch(self.memory)):
            return 0
        return int(float(match[1]) * UNITS[match[2]])


class InstanceTypes(msgspec.Struct, frozen=True, kw_only=True):
    """What this deployment has. `aliases` are other names of `types`. A cloud's `ml.*` name that is
    in neither means the default one, if there is one, so that a client written for the cloud works
    here; its own word stays in the endpoint's state."""

    types: dict[str, InstanceType]
    aliases: dict[str, str] = {}
    default: str = ""

    def local_name(self, instance_type: str) -> str:
        """Raises Rejected for a type that this deployment does not have."""
        if instance_type in self.types:
            return instance_type
        if instance_type in self.aliases:
            return self.aliases[instance_type]
        if instance_type.startswith("ml.") and self.default:
            return self.default
        raise Rejected(
            "endpoints.unknown_instance_type",
            instance_type=instance_type,
            known=", ".join(sorted({*self.types, *self.aliases})),
        )

    def get(self, instance_type: str) -> InstanceType:
        return self.types[self.local_name(instance_type)]

    def check_quota(self, instance_type: str, wanted: int, existing: Iterable[Endpoint]) -> None:
        """All names of one local type share its quota. Raises Rejected if `wanted` is too many."""
        name = self.local_name(instance_type)
        allowed = self.types[name].max
        used = sum(e.wanted_count for e in existing if self._means(e.instance_type, name))
        if used + wanted > allowed:
            raise Rejected(
                "endpoints.quota",
                wanted=wanted,
                instance_type=instance_type,
                allowed=allowed,
                used=used,
            )

    def _means(self, instance_type: str, name: str) -> bool:
        try:
            return self.local_name(instance_type) == name
        except Rejected:
            return False  # made when the settings still had this type


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`crashes`: quick ones in a row; no worker is started before `retry_at`. Those two and
    `released` are nobody else's business: they change without a new version."""

    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    endpoint_status: str = CREATING
    autoscaling: bool
    max_instance_number: int
    current_instance_count: int = 0
    roles: list[str]
    creator: str
    start_time: datetime
    end_time: datetime | None = None
    error: str | None = None
    crashes: int = 0
    retry_at: datetime | None = None
    released: bool = False
    version: int = 1
    deleted: bool = False

    @property
    def wanted_count(self) -> int:
        """How many instances there should be."""
        if self.deleted or self.endpoint_status == FAILED:
            return 0
        return self.max_instance_number

    def count_ready(self, ready: int, *, now: datetime) -> Endpoint:
        status, end_time = self.endpoint_status, self.end_time
        if self.deleted or status == FAILED:
            return self
        if ready and status != IN_SERVICE:
            status, end_time = IN_SERVICE, end_time or now
        elif not ready and status == IN_SERVICE:
            status = UPDATING
        if (status, ready) == (self.endpoint_status, self.current_instance_count):
            return self
        return replace(
            self,
            endpoint_status=status,
            end_time=end_time,
            current_instance_count=ready,
            version=self.version + 1,
        )

    def note_crash(self, instance: Instance, reason: str, *, now: datetime) -> Endpoint:
        """The next start waits the longer, the more crashes there were; MAX_CRASHES without an
        instance that ever got ready end the attempt."""
        if instance.ready_at and now - instance.ready_at >= SETTLED:
            return replace(self, crashes=0, retry_at=None)
        crashes = self.crashes + 1
        if self.endpoint_status == CREATING and crashes >= MAX_CRASHES:
            return replace(
                self,
                endpoint_status=FAILED,
                error=reason,
                end_time=now,
                crashes=crashes,
                version=self.version + 1,
            )
        pause = min(FIRST_PAUSE * 2 ** (crashes - 1), LONGEST_PAUSE)
        return replace(self, crashes=crashes, retry_at=now + timedelta(seconds=pause))

    def delete(self) -> Endpoint:
        return replace(
            self,
            endpoint_status=DELETING,
            current_instance_count=0,
            deleted=True,
            version=self.version + 1,
        )

    def release(self) -> Endpoint:
        return replace(self, released=True)


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    instance_id: str
    endpoint_id: str
    status: str = STARTING
    device: str = ""
    started_at: datetime
    ready_at: datetime | None = None
    error: str | None = None

    def report(self, status: str, *, device: str, error: str | None, now: datetime) -> Instance:
        ready_at = self.ready_at or now if status == READY else self.ready_at
        return replace(
            self, status=status, device=device or self.device, error=error, ready_at=ready_at
        )


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a launcher observed of one worker. `crash` says how it ended, where that is known."""

    instance_id: str
    endpoint_id: str
    alive: bool
    crash: str | None = None


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that is given up. `crash` is None when nobody is to blame (a restart, a stop)."""

    instance: Instance
    crash: str | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done so that what is observed becomes what is wanted."""

    end: list[Ending]
    stop: list[str]
    start: list[tuple[Endpoint, int]]
    release: list[Endpoint]


def make_plan(
    endpoints: Iterable[Endpoint],
    instances: Iterable[Instance],
    seen: Mapping[str, Seen],
    *,
    now: datetime,
    ready_within: timedelta,
) -> Plan:
    """Compares wanted (`endpoints`, `instances`) with observed (`seen`, by instance id)."""
    rows = {instance.instance_id: instance for instance in instances}
    alive = {s.instance_id: s.endpoint_id for s in seen.values() if s.alive}
    start, release = [], []
    for endpoint in endpoints:
        missing = endpoint.wanted_count - sum(
            instance.endpoint_id == endpoint.endpoint_id for instance in rows.values()
        )
        if missing > 0 and (endpoint.retry_at is None or endpoint.retry_at <= now):
            start.append((endpoint, missing))
        if endpoint.deleted and endpoint.endpoint_id not in alive.values():
            release.append(endpoint)
    endings = (_ending(row, seen.get(id_), now, ready_within) for id_, row in rows.items())
    return Plan(
        end=[ending for ending in endings if ending],
        stop=[instance_id for instance_id in alive if instance_id not in rows],
        start=start,
        release=release,
    )


def _ending(
    instance: Instance, seen: Seen | None, now: datetime, ready_within: timedelta
) -> Ending | None:
    if instance.status == BROKEN:
        return Ending(instance=instance, crash=instance.error or "the worker failed")
    if seen is None or not seen.alive:
        asked = instance.status == STOPPING
        return Ending(instance=instance, crash=seen.crash if seen and not asked else None)
    if instance.status == STARTING and now - instance.started_at > ready_within:
        seconds = ready_within.total_seconds()
        return Ending(instance=instance, crash=f"the worker was not ready within {seconds:g} s")
    return None


def event_after(before: Endpoint, after: Endpoint) -> endpoints.Endpoint | None:
    """What the world is told of a change; None when nothing public did."""
    if after.version == before.version:
        return None
    if after.deleted:
        return endpoints.EndpointDeleted.of(after)
    if after.endpoint_status == FAILED:
        return endpoints.EndpointFailed.of(after)
    if after.endpoint_status == IN_SERVICE and before.endpoint_status != IN_SERVICE:
        return endpoints.EndpointInService.of(after)
    return endpoints.EndpointChanged.of(after)
