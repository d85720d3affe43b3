"""models: the checkpoint registry."""

from __future__ import annotations

from datetime import datetime

import msgspec

from shared.contracts.envelope import Command, Message, State
from shared.weights.kinds import Kind

OWNER = "models"

CREATING = "Creating"
"""The status of a checkpoint that is being downloaded or looked at."""

REJECTIONS = {
    "models.name_taken": "{name} already exists, please use another or rename/delete exists",
    "models.invalid": "{field} is not valid: {detail}",
    "models.not_found": "checkpoint with id {checkpoint_id} not found",
    "models.not_uploading": (
        "checkpoint {checkpoint_id} is {status}; only one in Initial can be completed"
    ),
    "models.unknown_file": "{filename} is no file of checkpoint {checkpoint_id}; it has: {known}",
    "models.missing_file": "multi_parts_tags has no entry for {filename}",
    "models.part_mismatch": "the parts of {filename} do not match what was uploaded: {detail}",
    "models.refused": "checkpoint {checkpoint_id} was refused and stays Disabled: {reason}",
    "models.not_retriable": "checkpoint {checkpoint_id} can't be downloaded again: {detail}",
    "models.not_complete": (
        "checkpoint {checkpoint_id} is {status}; this needs one that is Active or Disabled"
    ),
    "models.not_renamable": (
        "checkpoint {checkpoint_id} has {count} files; only one with a single file can be renamed"
    ),
}


class UploadFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file that the client will upload in `parts_number` parts."""

    filename: str
    parts_number: int = 1


class PartTag(msgspec.Struct, frozen=True, kw_only=True):
    """What S3 answered to the upload of one part; named as S3 and ESD name it."""

    ETag: str
    PartNumber: int


class MultipartUpload(msgspec.Struct, frozen=True, kw_only=True):
    upload_id: str
    bucket: str
    key: str
    parts_number: int = 1


class CheckpointFile(msgspec.Struct, frozen=True, kw_only=True):
    """`size` in bytes, 0 until it is known; so are `sha256` and `kind`, which are found out before
    the checkpoint is Active. Files of the same content have the same `key`."""

    filename: str
    key: str
    size: int = 0
    sha256: str = ""
    kind: Kind | None = None


class CreateCheckpoint(Command, frozen=True, kw_only=True):
    """Either `filenames` (the client uploads by presigned parts) or `urls` (we download)."""

    checkpoint_id: str
    checkpoint_type: str
    creator: str
    filenames: list[UploadFile] = []
    urls: list[str] = []
    message: str = ""
    params: dict[str, msgspec.Raw] = {}
    allowed_roles_or_users: list[str] = []


class CompleteCheckpoint(Command, frozen=True, kw_only=True):
    """All parts are uploaded: put the files together. Then they are looked at, unasked."""

    checkpoint_id: str
    multi_parts_tags: dict[str, list[PartTag]]


class RenameCheckpoint(Command, frozen=True, kw_only=True):
    checkpoint_id: str
    name: str


class RetryCheckpoint(Command, frozen=True, kw_only=True):
    """Downloads a Failed checkpoint from its URLs once more."""

    checkpoint_id: str


class SetCheckpointStatus(Command, frozen=True, kw_only=True):
    """Switches a complete checkpoint between `Active` and `Disabled`."""

    checkpoint_id: str
    status: str


class DeleteCheckpoints(Command, frozen=True, kw_only=True):
    checkpoint_ids: list[str]


class ResyncModels(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Checkpoint(State, frozen=True, kw_only=True):
    """`status`: Initial (being uploaded), Creating (being downloaded or looked at), Active,
    Disabled (switched off, or refused with an `error`), Failed (with an `error`, and nothing is
    left of its files)."""

    checkpoint_id: str
    type: str
    names: list[str]
    status: str
    s3_location: str
    bucket: str
    files: list[CheckpointFile]
    multipart_upload: dict[str, MultipartUpload]
    creator: str
    message: str
    params: dict[str, msgspec.Raw]
    allowed_roles_or_users: list[str]
    created_at: datetime
    error: str | None = None


class CheckpointCreated(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointUploaded(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointActivated(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointChanged(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointRefused(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointFailed(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointRetried(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointDeleted(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointSynced(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointProgress(Message, frozen=True, kw_only=True):
    """Telemetry on core NATS, never stored: how far the download of a file (`stage` is download),
    or the look at one that was uploaded (check), has come. `total` and `percent` are None where the
    server does not tell how large the file is."""

    checkpoint_id: str
    filename: str
    stage: str
    bytes: int
    total: int | None = None
    percent: float | None = None
