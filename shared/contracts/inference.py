"""inference: the job ledger, and what travels between it and the workers."""

from __future__ import annotations

from datetime import datetime

import msgspec

from shared.contracts.endpoints import Endpoint
from shared.contracts.envelope import Command, Message, State
from shared.contracts.models import Checkpoint

OWNER = "inference"

CREATED = "created"
FINISHED = ("succeed", "failed")
"""The statuses that a job ends with."""

REJECTIONS = {
    "inference.not_found": "inference with id {job_id} not found",
    "inference.exists": "inference {job_id} was created before with other parameters",
    "inference.not_startable": "inference {job_id} is {status}; only a created one can be started",
    "inference.not_cancellable": (
        "inference {job_id} is {status}; only one that has not ended can be cancelled"
    ),
    "inference.no_endpoint": 'no available {inference_type} endpoints for user "{username}"',
    "inference.params_missing": (
        "no params at api_params_s3_upload_url yet; PUT them there before starting {job_id}"
    ),
    "inference.checkpoint_gone": "checkpoint with name {name}, type {type} is not found",
}


class UsedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a job names. `checkpoint_id` is None for VAE `Automatic` and `None`.
    `from_params`: the job's params name it, its `models` did not; it was found as it started."""

    type: str
    name: str
    checkpoint_id: str | None = None
    bucket: str = ""
    key: str = ""
    size: int = 0
    sha256: str = ""
    from_params: bool = False

    @property
    def content(self) -> str:
        """Equal for files with the same bytes, whatever they are called: the SHA-256, or where the
        registry has none, the place in the store."""
        return self.sha256.lower() or f"{self.bucket}/{self.key}"


class CreateJob(Command, frozen=True, kw_only=True):
    """`checkpoints` holds the state that the names in `models` were resolved to, as the caller saw
    it: the ledger merges it by version, so a job may name what was activated a moment ago."""

    job_id: str
    owner: str
    inference_type: str
    task_type: str
    models: list[UsedModel]
    checkpoints: list[Checkpoint] = []
    params_key: str
    bucket: str


class StartJob(Command, frozen=True, kw_only=True):
    """`endpoints`: those in service that the user may use, as the caller saw them. `roles` and
    `administrator` say the same of endpoints that come later: the job may move to one of those when
    its own ends.

    `params_at`: when the params came that the caller has read; None if it has not, or there are
    none, which the ledger looks for then. `models`: what those params name beside the job's own,
    and `checkpoints` their states, as in CreateJob."""

    job_id: str
    username: str
    endpoints: list[Endpoint]
    roles: list[str] = []
    administrator: bool = False
    params_at: datetime | None = None
    models: list[UsedModel] = []
    checkpoints: list[Checkpoint] = []


class CancelJob(Command, frozen=True, kw_only=True):
    """Ends a job that has not ended. `username`: who cancels it, an administrator perhaps. To
    cancel twice is no error. A worker that still does it may report as ever: its report changes
    nothing, and what it has uploaded is removed then."""

    job_id: str
    username: str


class DeleteJobs(Command, frozen=True, kw_only=True):
    """Ids that do not exist are ignored: deleting twice is no error."""

    job_ids: list[str]


class ReportJobStarted(Command, frozen=True, kw_only=True):
    """A worker has taken the job. `attempt` counts deliveries, from 1. `seconds`: the stages that
    lie behind it (fetch, line)."""

    job_id: str
    instance_id: str
    attempt: int
    seconds: dict[str, float] = {}
    endpoint_id: str = ""


class ReportJobSucceeded(Command, frozen=True, kw_only=True):
    """The images lie in S3 under `out/{job_id}/result/`. `seconds`: stage name -> duration."""

    job_id: str
    instance_id: str
    attempt: int
    image_names: list[str]
    info_name: str
    seconds: dict[str, float] = {}
    warnings: list[str] = []
    endpoint_id: str = ""


class ReportJobFailed(Command, frozen=True, kw_only=True):
    job_id: str
    instance_id: str
    attempt: int
    reason: str
    endpoint_id: str = ""


class ResyncInference(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Job(State, frozen=True, kw_only=True):
    """`status`: created, inprogress, succeed, failed (with `reason`). ESD's own spelling.
    `cancelled`: it failed because somebody wanted it no more. `params_at`: when its params came;
    `taken_at`, `instance_id`: when the last attempt began, and the worker; `seconds`: stage name ->
    duration, of the last attempt, as far as it has come."""

    job_id: str
    owner: str
    inference_type: str
    task_type: str
    status: str
    models: list[UsedModel]
    bucket: str
    params_key: str
    endpoint_id: str | None
    endpoint_name: str | None
    instance_type: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
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


class JobCreated(Job, frozen=True, kw_only=True): ...


class JobStarted(Job, frozen=True, kw_only=True): ...


class JobTaken(Job, frozen=True, kw_only=True): ...


class JobMoved(Job, frozen=True, kw_only=True):
    """Its endpoint has ended before it was done; another one has it now."""


class JobSucceeded(Job, frozen=True, kw_only=True): ...


class JobFailed(Job, frozen=True, kw_only=True): ...


class JobCancelled(Job, frozen=True, kw_only=True): ...


class JobDeleted(Job, frozen=True, kw_only=True): ...


class JobSynced(Job, frozen=True, kw_only=True): ...


class RunJob(Message, frozen=True, kw_only=True):
    """Work for one worker, on the work queue of the endpoint. `version`: of the job as this was
    said; what a later one says of it holds. Emitter: inference."""

    job_id: str
    endpoint_id: str
    task_type: str
    models: list[UsedModel]
    bucket: str
    params_key: str
    result_prefix: str
    version: int = 0


class JobProgress(Message, frozen=True, kw_only=True):
    """Telemetry on core NATS, never stored. `step` of `steps`; `eta_seconds` from the mean step."""

    job_id: str
    step: int
    steps: int
    attempt: int = 1
    eta_seconds: float | None = None


class JobPreview(Message, frozen=True, kw_only=True):
    """Telemetry as progress is, on its subject: how the picture looks after `step` of `steps`.
    `image`: a small picture, its bytes in base64; `media_type` says of which kind (image/jpeg)."""

    job_id: str
    attempt: int
    step: int
    steps: int
    media_type: str
    image: str
