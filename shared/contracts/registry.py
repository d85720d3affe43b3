"""Type name <-> struct, for every message there is. Golden files in tests/contracts prove each."""

from __future__ import annotations

import msgspec

from shared.contracts import endpoints, identity, inference, models
from shared.contracts.envelope import Command, Completed, DeadLetter, Envelope, Message, Rejected

OWNERS = (identity, models, endpoints, inference)

TYPES: dict[str, type[Message]] = {
    "identity.create_role.v1": identity.CreateRole,
    "identity.delete_roles.v1": identity.DeleteRoles,
    "identity.create_user.v1": identity.CreateUser,
    "identity.change_user.v1": identity.ChangeUser,
    "identity.delete_users.v1": identity.DeleteUsers,
    "identity.create_token.v1": identity.CreateToken,
    "identity.revoke_token.v1": identity.RevokeToken,
    "identity.resync.v1": identity.ResyncIdentity,
    "identity.role_created.v1": identity.RoleCreated,
    "identity.role_changed.v1": identity.RoleChanged,
    "identity.role_deleted.v1": identity.RoleDeleted,
    "identity.role_synced.v1": identity.RoleSynced,
    "identity.user_created.v1": identity.UserCreated,
    "identity.user_changed.v1": identity.UserChanged,
    "identity.user_deleted.v1": identity.UserDeleted,
    "identity.user_synced.v1": identity.UserSynced,
    "identity.credential_changed.v1": identity.CredentialChanged,
    "identity.credential_synced.v1": identity.CredentialSynced,
    "identity.token_created.v1": identity.TokenCreated,
    "identity.token_revoked.v1": identity.TokenRevoked,
    "identity.token_synced.v1": identity.TokenSynced,
    "models.create_checkpoint.v1": models.CreateCheckpoint,
    "models.complete_checkpoint.v1": models.CompleteCheckpoint,
    "models.retry_checkpoint.v1": models.RetryCheckpoint,
    "models.rename_checkpoint.v1": models.RenameCheckpoint,
    "models.set_checkpoint_status.v1": models.SetCheckpointStatus,
    "models.delete_checkpoints.v1": models.DeleteCheckpoints,
    "models.resync.v1": models.ResyncModels,
    "models.checkpoint_created.v1": models.CheckpointCreated,
    "models.checkpoint_uploaded.v1": models.CheckpointUploaded,
    "models.checkpoint_activated.v1": models.CheckpointActivated,
    "models.checkpoint_changed.v1": models.CheckpointChanged,
    "models.checkpoint_refused.v1": models.CheckpointRefused,
    "models.checkpoint_failed.v1": models.CheckpointFailed,
    "models.checkpoint_retried.v1": models.CheckpointRetried,
    "models.checkpoint_deleted.v1": models.CheckpointDeleted,
    "models.checkpoint_synced.v1": models.CheckpointSynced,
    "models.checkpoint_progress.v1": models.CheckpointProgress,
    "endpoints.create_endpoint.v1": endpoints.CreateEndpoint,
    "endpoints.delete_endpoints.v1": endpoints.DeleteEndpoints,
    "endpoints.report_instance.v1": endpoints.ReportInstance,
    "endpoints.instance_beat.v1": endpoints.InstanceBeat,
    "endpoints.resync.v1": endpoints.ResyncEndpoints,
    "endpoints.endpoint_created.v1": endpoints.EndpointCreated,
    "endpoints.endpoint_in_service.v1": endpoints.EndpointInService,
    "endpoints.endpoint_changed.v1": endpoints.EndpointChanged,
    "endpoints.endpoint_failed.v1": endpoints.EndpointFailed,
    "endpoints.endpoint_deleted.v1": endpoints.EndpointDeleted,
    "endpoints.endpoint_synced.v1": endpoints.EndpointSynced,
    "inference.create_job.v1": inference.CreateJob,
    "inference.start_job.v1": inference.StartJob,
    "inference.cancel_job.v1": inference.CancelJob,
    "inference.delete_jobs.v1": inference.DeleteJobs,
    "inference.report_job_started.v1": inference.ReportJobStarted,
    "inference.report_job_succeeded.v1": inference.ReportJobSucceeded,
    "inference.report_job_failed.v1": inference.ReportJobFailed,
    "inference.resync.v1": inference.ResyncInference,
    "inference.job_created.v1": inference.JobCreated,
    "inference.job_started.v1": inference.JobStarted,
    "inference.job_taken.v1": inference.JobTaken,
    "inference.job_moved.v1": inference.JobMoved,
    "inference.job_succeeded.v1": inference.JobSucceeded,
    "inference.job_failed.v1": inference.JobFailed,
    "inference.job_cancelled.v1": inference.JobCancelled,
    "inference.job_deleted.v1": inference.JobDeleted,
    "inference.job_synced.v1": inference.JobSynced,
    "inference.run_job.v1": inference.RunJob,
    "inference.job_progress.v1": inference.JobProgress,
    "inference.job_preview.v1": inference.JobPreview,
    **{f"{owner.OWNER}.rejected.v1": Rejected for owner in OWNERS},
    **{f"{owner.OWNER}.completed.v1": Completed for owner in OWNERS},
    "darkroom.dead_letter.v1": DeadLetter,
}

REJECTIONS: dict[str, str] = {
    code: text for owner in OWNERS for code, text in owner.REJECTIONS.items()
} | {"darkroom.too_large": "this makes a message of {size} bytes, the bus takes {most}; send less"}

_NAMES = {struct: name for name, struct in TYPES.items()}
_DECODERS: dict[str, msgspec.json.Decoder[Message]] = {
    name: msgspec.json.Decoder(struct) for name, struct in TYPES.items()
}


def type_of(message: Message | type[Message], owner: str = "") -> str:
    """`CreateCheckpoint(…)` -> `models.create_checkpoint.v1`; the outcomes need their owner."""
    struct = message if isinstance(message, type) else type(message)
    if struct in (Rejected, Completed):
        return f"{owner}.{struct.__name__.lower()}.v1"
    return _NAMES[struct]


def is_command(type_name: str) -> bool:
    return issubclass(TYPES[type_name], Command)


def payload(envelope: Envelope) -> Message:
    """Decodes `data` by `type`. Raises KeyError for an unknown type, msgspec
    errors for bad data."""
    return _DECODERS[envelope.type].decode(envelope.data)
