"""What an inference job is, what may be done with it, and which endpoint gets it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

import msgspec
from msgspec.structs import replace

from shared.contracts.endpoints import SERVING
from shared.contracts.inference import CREATED, UsedModel
from shared.contracts.models import CheckpointFile
from shared.errors import Rejected

INPROGRESS, SUCCEED, FAILED = "inprogress", "succeed", "failed"

START_SECONDS = 30.0
"""What an endpoint is thought to need for its first instance when it has none."""


MOST_WARNINGS, LONGEST_WARNING = 100, 300
"""Of a job, and characters of each: its state is in every event about it."""


def bounded(warnings: list[str]) -> list[str]:
    """As many as a job keeps, each as long as it may be; the last of them says how many more there
    are."""
    kept = [
        text if len(text) <= LONGEST_WARNING else text[: LONGEST_WARNING - 1] + "…"
        for text in warnings[:MOST_WARNINGS]
    ]
    if len(warnings) > MOST_WARNINGS:
        kept[-1] = f"… and {len(warnings) - MOST_WARNINGS + 1} more"
    return kept


class Starter(msgspec.Struct, frozen=True, kw_only=True):
    """Who started a job, and with which rights."""

    username: str
    roles: list[str] = []
    administrator: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    job_id: str
    owner: str
    inference_type: str
    task_type: str
    models: list[UsedModel]
    bucket: str
    params_key: str
    created_at: datetime
    status: str = CREATED
    endpoint_id: str | None = None
    endpoint_name: str | None = None
    instance_type: str | None = None
    starter: Starter | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempt: int = 0
    image_names: list[str] = []
    info_name: str | None = None
    reason: str | None = None
    seconds: dict[str, float] = {}
    warnings: list[str] = []
    cancelled: bool = False
    params_at: datetime | None = None
    taken_at: datetime | None = None
    instance_id: str | None = None
    version: int = 1
    deleted: bool = False

    @property
    def running(self) -> bool:
        """Whether a report of a worker still counts: a job has one visible result."""
        return self.status == INPROGRESS and not self.deleted

    @property
    def unwanted(self) -> list[str]:
        """The prefixes in S3 that nobody looks at any more, each with its `/`: the results of a
        cancelled job, everything of a deleted one."""
        results, params = f"out/{self.job_id}/", self.params_key.rpartition("/")[0] + "/"
        if self.deleted:
            return [results, params]
        return [results] if self.cancelled else []

    def check_startable(self) -> None:
        if self.deleted:
            raise Rejected("inference.not_found", job_id=self.job_id)
        if self.status != CREATED:
            raise Rejected("inference.not_startable", job_id=self.job_id, status=self.status)

    def check_cancellable(self) -> None:
        if self.deleted:
            raise Rejected("inference.not_found", job_id=self.job_id)
        if self.status not in (CREATED, INPROGRESS) and not self.cancelled:
            raise Rejected("inference.not_cancellable", job_id=self.job_id, status=self.status)

    def name_more(self, models: Iterable[UsedModel]) -> Job:
        """With those that its params name as well."""
        return replace(self, models=[*self.models, *models])

    def start(
        self, endpoint: Endpoint, starter: Starter, *, params_at: datetime, now: datetime
    ) -> Job:
        return replace(
            self,
            status=INPROGRESS,
            params_at=params_at,
            starter=starter,
            endpoint_id=endpoint.endpoint_id,
            endpoint_name=endpoint.endpoint_name,
            instance_type=endpoint.instance_type,
            started_at=now,
            version=self.version + 1,
        )

    def move(self, endpoint: Endpoint) -> Job:
        """To the queue of another endpoint; its attempts count on."""
        return replace(
            self,
            endpoint_id=endpoint.endpoint_id,
            endpoint_name=endpoint.endpoint_name,
            instance_type=endpoint.instance_type,
            version=self.version + 1,
        )

    def take(
        self, attempt: int, *, instance_id: str, seconds: dict[str, float], now: datetime
    ) -> Job:
        return replace(
            self,
            attempt=attempt,
            instance_id=instance_id,
            seconds=seconds,
            taken_at=now,
            version=self.version + 1,
        )

    def succeed(
        self,
        *,
        attempt: int,
        image_names: list[str],
        info_name: str,
        seconds: dict[str, float],
        warnings: list[str],
        now: datetime,
    ) -> Job:
        return replace(
            self,
            status=SUCCEED,
            completed_at=now,
            attempt=max(self.attempt, attempt),
            image_names=image_names,
            info_name=info_name,
            seconds=seconds,
            warnings=bounded(warnings),
            version=self.version + 1,
        )

    def fail(self, reason: str, *, now: datetime, attempt: int = 0) -> Job:
        return replace(
            self,
            status=FAILED,
            reason=reason,
            started_at=self.started_at or now,
            completed_at=now,
            attempt=max(self.attempt, attempt),
            version=self.version + 1,
        )

    def cancel(self, username: str, *, now: datetime) -> Job:
        """ESD's clients know no status for it: it has failed."""
        return replace(self.fail(f'cancelled by "{username}"', now=now), cancelled=True)

    def delete(self) -> Job:
        return replace(self, deleted=True, version=self.version + 1)

    def is_as(self, other: Job) -> bool:
        """Whether both were asked for with the same words, whatever their params may name."""
        same = ("owner", "inference_type", "task_type", "named_models", "bucket", "params_key")
        return all(getattr(self, name) == getattr(other, name) for name in same)

    @property
    def named_models(self) -> list[UsedModel]:
        """Those that it was created with."""
        return [model for model in self.models if not model.from_params]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger knows of a checkpoint."""

    checkpoint_id: str
    type: str
    status: str
    bucket: str
    files: list[CheckpointFile]
    version: int
    deleted: bool

    def locate(self, model: UsedModel) -> UsedModel | None:
        """The model with the place where its file lies now; None if it can't be used any more."""
        if self.deleted or self.status != "Active":
            return None
        files = [file for file in self.files if file.filename == model.name]
        if not files and len(self.files) == 1:
            files = self.files  # renamed since the job was created
        if not files:
            return None
        file = files[0]
        return replace(model, bucket=self.bucket, key=file.key, size=file.size, sha256=file.sha256)


def locate_models(
    models: Iterable[UsedModel], checkpoints: Mapping[str, Checkpoint]
) -> list[UsedModel]:
    """Every model with the place of its file. Raises Rejected for one that is gone."""
    located = []
    for model in models:
        if model.checkpoint_id is None:
            located.append(model)
            continue
        checkpoint = checkpoints.get(model.checkpoint_id)
        found = checkpoint.locate(model) if checkpoint else None
        if found is None:
            raise Rejected("inference.checkpoint_gone", name=model.name, type=model.type)
        located.append(found)
    return located


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger knows of an endpoint."""

    endpoint_id: str
    endpoint_name: str
    endpoint_type: str
    instance_type: str
    endpoint_status: str
    current_instance_count: int
    error: str | None
    roles: list[str] = []
    creator: str = ""
    version: int
    deleted: bool

    def serves(self, inference_type: str) -> bool:
        return (
            not self.deleted
            and self.endpoint_status in SERVING
            and self.endpoint_type == inference_type
        )

    def may_be_used_by(self, starter: Starter) -> bool:
        return (
            starter.administrator
            or starter.username == self.creator
            or not set(starter.roles).isdisjoint(self.roles)
        )

    @property
    def end(self) -> str | None:
        """Why its jobs can't be done any more; None while they can."""
        if self.deleted or self.endpoint_status in ("Deleting", "Deleted"):
            return f'endpoint "{self.endpoint_name}" was deleted'
        if self.endpoint_status == "Failed":
            cause = f": {self.error}" if self.error else ""
            return f'endpoint "{self.endpoint_name}" failed{cause}'
        return None

    def has_left(self, job: Job) -> bool:
        """Whether none of its workers does the job any more: while it is being deleted they finish
        what they have begun."""
        finishing = self.endpoint_status == "Deleting" and not self.deleted
        return self.end is not None and not (finishing and job.attempt)


def choose_endpoint(
    endpoints: Iterable[Endpoint],
    inference_type: str,
    starter: Starter,
    unfinished: Mapping[str, int],
    paces: Mapping[str, float],
) -> Endpoint | None:
    """The one with the shortest expected wait, then the fastest, then by name.

    `unfinished`: jobs that an endpoint has; `paces`: seconds of one instance that a job takes on
    it, where that has been measured."""
    usual = sum(paces.values()) / len(paces) if paces else 1.0

    def preference(endpoint: Endpoint) -> tuple[int, float, float, str]:
        pace = paces.get(endpoint.endpoint_id, usual)
        ready = endpoint.current_instance_count
        wait = unfinished.get(endpoint.endpoint_id, 0) * pace / max(1, ready)
        return (
            SERVING.index(endpoint.endpoint_status),
            wait if ready else wait + START_SECONDS,
            pace,
            endpoint.endpoint_name,
        )

    usable = (
        endpoint
        for endpoint in endpoints
        if endpoint.serves(inference_type) and endpoint.may_be_used_by(starter)
    )
    return min(usable, key=preference, default=None)


def busy_seconds(
    job: Job, *, last_end: datetime | None, busy: int, worked: float, now: datetime
) -> float:
    """Seconds of one instance that a job took which ends `now`. Jobs that wait are done without a
    pause, so that is the time since the one before, times the instances that were `busy`; it is not
    more than the time in the hands of its worker, `worked`, in which several may have been."""
    began = max(filter(None, (job.started_at, last_end)), default=now)
    return min(max(0.0, (now - began).total_seconds()) * busy, worked)
