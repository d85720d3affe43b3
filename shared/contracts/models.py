"""models: the checkpoint registry."""

from __future__ import annotations

from datetime import datetime

import msgspec

from shared.contracts.envelope import Command, State

OWNER = "models"

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
    """`size` in bytes, 0 until it is known."""

    filename: str
    key: str
    size: int = 0


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
    """All parts are uploaded: put the files together and activate the checkpoint."""

    checkpoint_id: str
    multi_parts_tags: dict[str, list[PartTag]]


class RenameCheckpoint(Command, frozen=True, kw_only=True):
    checkpoint_id: str
    name: str


class SetCheckpointStatus(Command, frozen=True, kw_only=True):
    """Switches a complete checkpoint between `Active` and `Disabled`."""

    checkpoint_id: str
    status: str


class DeleteCheckpoints(Command, frozen=True, kw_only=True):
    checkpoint_ids: list[str]


class ResyncModels(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Checkpoint(State, frozen=True, kw_only=True):
    """`status`: Initial (being uploaded), Creating (being downloaded), Active, Disabled, Failed."""

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


class CheckpointActivated(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointChanged(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointFailed(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointDeleted(Checkpoint, frozen=True, kw_only=True): ...


class CheckpointSynced(Checkpoint, frozen=True, kw_only=True): ...
