"""What an endpoint and its instances are, and what may be done with them.

    Creating ── first instance ready ──> InService <── ready again ── none ready ──> Updating
        └── MAX_CRASHES without one ready ──> Failed <── CRASHES_IN_SERVICE without one ready ──┘
    each of them ── delete ──> Deleting ── last worker gone ──> Deleted

`InService` holds as long as an instance is ready, or none is wanted because there is nothing to do:
the next job starts one. `current_instance_count` is the number of ready instances. `end_time` is
ESD's: when the deployment ended, well or not. A deleted endpoint is a tombstone.

An instance that is given up while it may have a job in hand keeps its row and has until `stop_by`
to finish; it counts no more. Reconciling knows four rules: a row without a living worker has ended;
a living worker without a row is stopped; an endpoint with fewer rows than wanted starts some; one
with more of them gives some up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import msgspec
from msgspec.structs import replace

from services.endpoints.autoscaling import LEAST, TARGETS, Limits
from shared.contracts import endpoints
from shared.errors import Rejected

CREATING, IN_SERVICE, UPDATING = "Creating", "InService", "Updating"
DELETING, DELETED, FAILED = "Deleting", "Deleted", "Failed"
"""Of an endpoint."""

STARTING, READY, STOPPING, BROKEN = "starting", "ready", "stopping", "failed"
"""Of an instance; all but the first are its own words."""

MAX_CRASHES = 5
CRASHES_IN_SERVICE = 25
"""One that has worked gets more than ten minutes: what it misses may come back."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LAST_WORDS = timedelta(seconds=5)
"""What a worker has to end by itself after it said that it failed."""
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
        used = sum(e.reserved_count for e in existing if self._means(e.instance_type, name))
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
    """`scaled_to`: instances that are wanted, since `scaled_at`. `crashes`: quick ones in a row,
    whether of one instance or of all that were started together; no worker is started before
    `retry_at`. Those four are nobody else's business: they change without a new version."""

    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    endpoint_status: str = CREATING
    autoscaling: bool
    min_instance_number: int
    max_instance_number: int
    current_instance_count: int = 0
    roles: list[str]
    creator: str
    start_time: datetime
    end_time: datetime | None = None
    error: str | None = None
    scaled_to: int
    scaled_at: datetime | None = None
    crashes: int = 0
    retry_at: datetime | None = None
    released: bool = False
    version: int = 1
    deleted: bool = False

    @property
    def ended(self) -> bool:
        return self.deleted or self.endpoint_status in (DELETING, FAILED)

    @property
    def wanted_count(self) -> int:
        """How many instances there should be."""
        return 0 if self.ended else self.scaled_to

    @property
    def reserved_count(self) -> int:
        """How many instances there may come to be, which is what a quota counts."""
        return 0 if self.ended else self.max_instance_number

    @property
    def scales(self) -> bool:
        return self.autoscaling and self.endpoint_status in (IN_SERVICE, UPDATING)

    def limits(self, *, out_after: timedelta, in_after: timedelta) -> Limits:
        return Limits(
            minimum=self.min_instance_number,
            maximum=self.max_instance_number,
            target=TARGETS[self.endpoint_type],
            out_after=out_after,
            in_after=in_after,
        )

    def scale(self, to: int, *, now: datetime) -> Endpoint:
        scaled = replace(self, scaled_to=to, scaled_at=now)
        return scaled.count_ready(self.current_instance_count, now=now)

    def count_ready(self, ready: int, *, now: datetime) -> Endpoint:
        status, end_time = self.endpoint_status, self.end_time
        if self.ended:
            return self
        asleep = self.scaled_to == 0 and status != CREATING
        if (ready or asleep) and status != IN_SERVICE:
            status, end_time = IN_SERVICE, end_time or now
        elif not ready and not asleep and status == IN_SERVICE:
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

    def note_crash(
        self,
        instance: Instance,
        reason: str,
        *,
        ready: int,
        recovered: bool = False,
        now: datetime,
    ) -> Endpoint:
        """The next start waits the longer, the more crashes there were; too many without an
        instance that is ready (`ready`: how many are) end the attempt. `recovered`: since the last
        crash an instance was started that goes on well."""
        if self.ended:
            return self
        if instance.ready_at and now - instance.ready_at >= SETTLED:
            return replace(self, crashes=0, retry_at=None)
        if self.retry_at and instance.started_at < self.retry_at:
            return self  # started together with one whose crash was counted
        crashes = 1 if recovered else self.crashes + 1
        most = MAX_CRASHES if self.endpoint_status == CREATING else CRASHES_IN_SERVICE
        if crashes >= most and not ready:
            return replace(
                self,
                endpoint_status=FAILED,
                current_instance_count=0,
                error=reason,
                end_time=now,
                crashes=crashes,
                version=self.version + 1,
            )
        pause = min(FIRST_PAUSE * 2 ** (crashes - 1), LONGEST_PAUSE)
        return replace(self, crashes=crashes, retry_at=now + timedelta(seconds=pause))

    def delete(self) -> Endpoint:
        """Its workers may finish what they have begun; nobody counts on them any more."""
        return replace(
            self,
            endpoint_status=DELETING,
            current_instance_count=0,
            version=self.version + 1,
        )

    def release(self) -> Endpoint:
        """Nothing is left of it."""
        return replace(
            self,
            endpoint_status=DELETED,
            deleted=True,
            released=True,
            version=self.version + 1,
        )


def bounds(
    endpoint_type: str, *, initial: int, autoscaling: bool, least: int | None, most: int | None
) -> tuple[int, int]:
    """The smallest and the largest number of instances."""
    if not autoscaling:
        return initial, initial
    most = max(initial, most or 0)
    least = LEAST[endpoint_type] if least is None else max(least, LEAST[endpoint_type])
    return min(least, most), most


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """`stop_by`: it was given up and may finish what it has begun until then."""

    instance_id: str
    endpoint_id: str
    status: str = STARTING
    device: str = ""
    started_at: datetime
    ready_at: datetime | None = None
    error: str | None = None
    stop_by: datetime | None = None

    def report(self, status: str, *, device: str, error: str | None, now: datetime) -> Instance:
        """One that has failed ends by itself, so that how it ends is seen, or is killed."""
        return replace(
            self,
            status=status,
            device=device or self.device,
            error=error,
            ready_at=self.ready_at or now if status == READY else self.ready_at,
            stop_by=self.stop_by or now + LAST_WORDS if status == BROKEN else self.stop_by,
        )


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a launcher observed of one worker. `crash` says how it ended, where that is known."""

    instance_id: str
    endpoint_id: str
    alive: bool
    crash: str | None = None


class Pulse(msgspec.Struct, frozen=True):
    """What a worker's words tell: for how long there was none, and how many jobs it has begun."""

    silent: timedelta = timedelta()
    jobs: int = 0


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long a worker may take to get ready, to finish its jobs when it is given up, to go when
    it has none, and to say nothing."""

    ready: timedelta
    drain: timedelta
    stop: timedelta
    silent: timedelta


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that is given up. `crash` is None when nobody is to blame (a restart, a stop)."""

    instance: Instance
    crash: str | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done so that what is observed becomes what is wanted. `stop`: instance id and
    the time that it has for it."""

    end: list[Ending]
    retire: list[Instance]
    stop: dict[str, timedelta]
    start: list[tuple[Endpoint, int]]
    release: list[Endpoint]


def make_plan(
    endpoints: Iterable[Endpoint],
    instances: Iterable[Instance],
    seen: Mapping[str, Seen],
    pulses: Mapping[str, Pulse],
    *,
    now: datetime,
    patience: Patience,
) -> Plan:
    """Compares wanted (`endpoints`, `instances`) with observed (`seen`, `pulses`, by instance)."""
    rows = {instance.instance_id: instance for instance in instances}
    alive = {s.instance_id: s.endpoint_id for s in seen.values() if s.alive}
    start, release, retire = [], [], []
    for endpoint in endpoints:
        mine = [row for row in rows.values() if row.endpoint_id == endpoint.endpoint_id]
        counting = [row for row in mine if row.stop_by is None or row.status == BROKEN]
        missing = endpoint.wanted_count - len(counting)
        # Those that are still finishing have their devices: together they stay within the quota.
        missing = min(missing, endpoint.max_instance_number - len(mine)) if missing > 0 else missing
        if missing > 0 and (endpoint.retry_at is None or endpoint.retry_at <= now):
            start.append((endpoint, missing))
        if missing < 0:
            retire += _least_needed(counting, pulses)[:-missing]
        gone = not mine and endpoint.endpoint_id not in alive.values()
        if gone and endpoint.endpoint_status == DELETING:
            release.append(endpoint)
    endings = (
        _ending(row, seen.get(id_), pulses.get(id_, Pulse()), now, patience)
        for id_, row in rows.items()
    )
    stop = {id_: _time_to_stop(rows.get(id_), now, patience) for id_ in alive}
    return Plan(
        end=[ending for ending in endings if ending],
        retire=retire,
        stop={id_: time for id_, time in stop.items() if time is not None},
        start=start,
        release=release,
    )


def _least_needed(instances: Iterable[Instance], pulses: Mapping[str, Pulse]) -> list[Instance]:
    """Those that are not ready first, then those with the fewest jobs, then the newest."""
    newest = sorted(instances, key=lambda instance: instance.started_at, reverse=True)

    def need(instance: Instance) -> tuple[bool, int]:
        return instance.status == READY, pulses.get(instance.instance_id, Pulse()).jobs

    return sorted(newest, key=need)


def _time_to_stop(instance: Instance | None, now: datetime, patience: Patience) -> timedelta | None:
    """None for a worker that goes on."""
    if instance is None:
        return patience.stop
    if instance.stop_by is None:
        return None
    if now >= instance.stop_by:
        return timedelta()
    return None if instance.status == BROKEN else patience.drain


def _ending(
    instance: Instance, seen: Seen | None, pulse: Pulse, now: datetime, patience: Patience
) -> Ending | None:
    if seen is None or not seen.alive:
        return Ending(instance=instance, crash=_crash(instance, seen.crash if seen else None))
    if instance.stop_by is not None or instance.status == BROKEN:
        return None  # it ends when it is gone
    if instance.status == STARTING and now - instance.started_at > patience.ready:
        seconds = patience.ready.total_seconds()
        return Ending(instance=instance, crash=f"the worker was not ready within {seconds:g} s")
    if instance.ready_at and pulse.silent > patience.silent:
        seconds = patience.silent.total_seconds()
        return Ending(instance=instance, crash=f"the worker said nothing for {seconds:g} s")
    return None


def _crash(instance: Instance, seen: str | None) -> str | None:
    """What a worker said last, and how it was seen to end."""
    if instance.status == BROKEN:
        return "; ".join(filter(None, [instance.error or "the worker failed", seen]))
    return None if instance.stop_by is not None or instance.status == STOPPING else seen


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
