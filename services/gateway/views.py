"""Reads: from the projection to the answer, in ESD's shapes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from services.gateway import schemas
from services.gateway.auth import EVERYONE, Person
from shared.contracts.endpoints import Endpoint, InstanceBeat
from shared.contracts.identity import Role, Token, User
from shared.contracts.inference import Job, UsedModel
from shared.contracts.models import Checkpoint, CheckpointFile
from shared.objects import Objects

MOST_FILES = 20
"""Of a checkpoint whose embeddings are found by the words of a prompt."""

_checkpoint = msgspec.json.Decoder(Checkpoint)
_endpoint = msgspec.json.Decoder(Endpoint)
_job = msgspec.json.Decoder(Job)


def time_text(time: datetime | None) -> str | None:
    """`2024-02-05 06:10:52.552528`, in UTC, as ESD writes times."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f") if time else None


class Views:
    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool

    async def _find(self, kind: str, id_: str) -> str | None:
        state: str | None = await self._pool.fetchval(
            """
            SELECT state::text FROM aggregates
            WHERE kind = $1 AND id = $2 AND NOT deleted
            """,
            kind,
            id_,
        )
        return state

    async def find_checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        state = await self._find("checkpoint", checkpoint_id)
        return _checkpoint.decode(state) if state else None

    async def find_endpoint(self, endpoint_id: str) -> Endpoint | None:
        state = await self._find("endpoint", endpoint_id)
        return _endpoint.decode(state) if state else None

    async def find_job(self, job_id: str) -> Job | None:
        state = await self._find("job", job_id)
        return _job.decode(state) if state else None

    async def find_checkpoint_by_name(
        self, type_: str, name: str, person: Person
    ) -> Checkpoint | None:
        """An active one that the person may use."""
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state FROM aggregates
            WHERE kind = 'checkpoint' AND NOT deleted AND state->>'status' = 'Active'
                AND state->>'type' = $1 AND state->'names' ? $2
            """,
            type_,
            name,
        )
        for row in rows:
            checkpoint = _checkpoint.decode(row["state"])
            if person.may_use_checkpoint(checkpoint):
                return checkpoint
        return None

    async def list_checkpoints_by_key(
        self, types: list[str], keys: list[str], person: Person
    ) -> list[Checkpoint]:
        """The active ones that the person may use and that have a file with one of the keys, see
        `checkpoint_keys` in migrations; the person's own first, then the newest."""
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state FROM aggregates
            WHERE kind = 'checkpoint' AND NOT deleted AND state->>'status' = 'Active'
                AND state->>'type' = ANY($1) AND checkpoint_keys(state) && $2
                AND ($3 OR state->>'creator' = $4 OR state->'allowed_roles_or_users' ?| $5)
            ORDER BY state->>'creator' = $4 DESC, state->>'created_at' DESC, id
            """,
            types,
            keys,
            *_rights(person),
        )
        return [_checkpoint.decode(row["state"]) for row in rows]

    async def list_embeddings_in(self, prompt: str, person: Person) -> list[Checkpoint]:
        """As `list_checkpoints_by_key`, the embeddings with a file whose name, without spaces, is a
        part of `prompt`, which has none and is in lower case. Not those of more than MOST_FILES:
        they go with the job whole, and what somebody else uploads must not make it too large."""
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state FROM aggregates
            WHERE kind = 'checkpoint' AND NOT deleted AND state->>'status' = 'Active'
                AND state->>'type' = 'embeddings'
                AND ($2 OR state->>'creator' = $3 OR state->'allowed_roles_or_users' ?| $4)
                AND jsonb_array_length(state->'files') <= $5
                AND EXISTS (
                    SELECT FROM unnest(checkpoint_keys(state)) AS keys (key)
                    WHERE strpos($1, regexp_replace(normalize(key), '[[:space:]]', '', 'g')) > 0
                )
            ORDER BY state->>'creator' = $3 DESC, state->>'created_at' DESC, id
            """,
            prompt,
            *_rights(person),
            MOST_FILES,
        )
        return [_checkpoint.decode(row["state"]) for row in rows]

    async def list_checkpoint_names(self, type_: str, person: Person, most: int) -> list[str]:
        """Of the active ones of a type that the person may use, the newest first."""
        rows = await self._pool.fetch(
            """
            SELECT jsonb_array_elements_text(state->'names') AS name FROM aggregates
            WHERE kind = 'checkpoint' AND NOT deleted AND state->>'status' = 'Active'
                AND state->>'type' = $1
                AND ($2 OR state->>'creator' = $3 OR state->'allowed_roles_or_users' ?| $4)
            ORDER BY state->>'created_at' DESC, id LIMIT $5
            """,
            type_,
            *_rights(person),
            most,
        )
        return [row["name"] for row in rows]

    async def list_checkpoints(
        self,
        person: Person,
        *,
        page: int,
        per_page: int,
        creator: str | None,
        user: Person | None,
        types: list[str] | None,
        status: list[str] | None,
        roles: list[str] | None,
    ) -> tuple[list[Checkpoint], int]:
        """One page of those that the person may use, and the `user` as well if there is one, newest
        first, and how many there are."""
        user = user or person
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state, count(*) OVER () AS total FROM aggregates
            WHERE kind = 'checkpoint' AND NOT deleted
                AND ($1 OR state->>'creator' = $2 OR state->'allowed_roles_or_users' ?| $3)
                AND ($4::text IS NULL OR state->>'creator' = $4)
                AND ($5::text[] IS NULL OR state->>'type' = ANY($5))
                AND ($6::text[] IS NULL OR state->>'status' = ANY($6))
                AND ($7::text[] IS NULL OR state->'allowed_roles_or_users' ?| $7)
                AND ($8 OR state->>'creator' = $9 OR state->'allowed_roles_or_users' ?| $10)
            ORDER BY state->>'created_at' DESC, id
            LIMIT $11 OFFSET $12
            """,
            *_rights(person),
            creator,
            types,
            status,
            roles,
            *_rights(user),
            per_page,
            (page - 1) * per_page,
        )
        if not rows and page > 1:  # the count comes with the rows, and there are none so far on
            _, total = await self.list_checkpoints(
                person,
                page=1,
                per_page=1,
                creator=creator,
                user=user,
                types=types,
                status=status,
                roles=roles,
            )
            return [], total
        total = rows[0]["total"] if rows else 0
        return [_checkpoint.decode(row["state"]) for row in rows], total

    async def list_endpoints(self) -> list[Endpoint]:
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state FROM aggregates
            WHERE kind = 'endpoint' AND NOT deleted ORDER BY state->>'start_time'
            """
        )
        return [_endpoint.decode(row["state"]) for row in rows]

    async def list_jobs(
        self,
        *,
        limit: int | None,
        offset: int,
        after: tuple[str, str] | None,
        owner: str | None,
        status: list[str] | None,
        task_type: list[str] | None,
        inference_type: str | None,
        endpoint_name: str | None,
    ) -> tuple[list[Job], int]:
        """Newest first, and how many there are. `limit`: None for all of them; `after`: the
        `place_of` the last one that is known."""
        created_at, job_id = after or (None, None)
        rows = await self._pool.fetch(
            """
            SELECT state::text AS state, count(*) OVER () AS total FROM aggregates
            WHERE kind = 'job' AND NOT deleted
                AND ($1::text IS NULL OR state->>'owner' = $1)
                AND ($2::text[] IS NULL OR state->>'status' = ANY($2))
                AND ($3::text[] IS NULL OR state->>'task_type' = ANY($3))
                AND ($4::text IS NULL OR state->>'inference_type' = $4)
                AND ($5::text IS NULL OR state->>'endpoint_name' = $5)
                AND ($6::text IS NULL OR state->>'created_at' < $6
                    OR state->>'created_at' = $6 AND id > $7)
            ORDER BY state->>'created_at' DESC, id
            LIMIT $8 OFFSET $9
            """,
            owner,
            status,
            task_type,
            inference_type,
            endpoint_name,
            created_at,
            job_id,
            limit,
            offset,
        )
        total = rows[0]["total"] if rows else 0
        if after or (offset and not rows):  # the count is of the rows that follow
            _, total = await self.list_jobs(
                limit=1,
                offset=0,
                after=None,
                owner=owner,
                status=status,
                task_type=task_type,
                inference_type=inference_type,
                endpoint_name=endpoint_name,
            )
        return [_job.decode(row["state"]) for row in rows], total


def place_of(job: Job) -> tuple[str, str]:
    """Where it stands among the jobs, however many come before it later."""
    return msgspec.to_builtins(job.created_at), job.job_id


def _rights(person: Person) -> tuple[bool, str, list[str]]:
    """`Person.may_use_checkpoint` for a query: whether all may be used, else whose, and what is
    allowed to which."""
    allowed = [EVERYONE, person.username, *person.roles]
    return person.is_administrator, person.username, allowed


def role_view(role: Role) -> schemas.RoleView:
    return schemas.RoleView(
        role_name=role.role_name, creator=role.creator, permissions=role.permissions
    )


def user_view(user: User, person: Person) -> schemas.UserView:
    """`person` is that user, with what the roles give."""
    return schemas.UserView(
        username=user.username,
        roles=user.roles,
        creator=user.creator,
        permissions=sorted(_without_included(person)),
    )


def _without_included(person: Person) -> list[str]:
    """`checkpoint:all` says it all: `checkpoint:list` beside it is left out."""
    return [
        p
        for p in person.permissions
        if p.endswith(":all") or f"{p.split(':')[0]}:all" not in person.permissions
    ]


def token_view(token: Token) -> schemas.TokenView:
    return schemas.TokenView(
        id=token.token_id,
        name=token.name,
        created=time_text(token.created_at) or "",
        expires=time_text(token.expires_at),
    )


def _checkpoint_params(checkpoint: Checkpoint) -> dict[str, Any]:
    given = {name: msgspec.json.decode(value) for name, value in checkpoint.params.items()}
    return {
        **given,
        "message": checkpoint.message,
        "creator": checkpoint.creator,
        "created": time_text(checkpoint.created_at),
    }


def _file_facts(file: CheckpointFile) -> dict[str, Any]:
    """All that was found out. `short_hash`: as the webui writes it."""
    if not file.sha256:
        return {}
    return {
        "size": file.size,
        "sha256": file.sha256,
        "short_hash": file.sha256[:10],
        **(msgspec.to_builtins(file.kind) if file.kind else {}),
    }


def checkpoint_view(checkpoint: Checkpoint) -> schemas.CheckpointView:
    uploads = {
        name: schemas.UploadView(upload_id=u.upload_id, bucket=u.bucket, key=u.key)
        for name, u in checkpoint.multipart_upload.items()
    }
    return schemas.CheckpointView(
        id=checkpoint.checkpoint_id,
        type=checkpoint.type,
        s3_location=checkpoint.s3_location,
        status=checkpoint.status,
        params={**_checkpoint_params(checkpoint), "multipart_upload": uploads},
    )


def checkpoint_item(checkpoint: Checkpoint) -> schemas.CheckpointItem:
    return schemas.CheckpointItem(
        id=checkpoint.checkpoint_id,
        s3Location=checkpoint.s3_location,
        type=checkpoint.type,
        status=checkpoint.status,
        name=checkpoint.names,
        created=checkpoint.created_at.timestamp(),
        allowed_roles_or_users=checkpoint.allowed_roles_or_users,
        params={
            **_checkpoint_params(checkpoint),
            "files": {file.filename: _file_facts(file) for file in checkpoint.files},
        },
        error=checkpoint.error,
    )


def endpoint_view(endpoint: Endpoint) -> schemas.EndpointView:
    return schemas.EndpointView(
        EndpointDeploymentJobId=endpoint.endpoint_id,
        autoscaling=endpoint.autoscaling,
        max_instance_number=str(endpoint.max_instance_number),
        startTime=time_text(endpoint.start_time) or "",
        status=None,
        instance_type=endpoint.instance_type,
        current_instance_count=str(endpoint.current_instance_count),
        endTime=time_text(endpoint.end_time),
        endpoint_status=endpoint.endpoint_status,
        endpoint_name=endpoint.endpoint_name,
        error=endpoint.error,
        endpoint_type=endpoint.endpoint_type,
        owner_group_or_role=endpoint.roles,
    )


def instance_view(beat: InstanceBeat) -> schemas.InstanceView:
    return schemas.InstanceView(
        instance_id=beat.instance_id,
        device=beat.device,
        device_name=beat.device_name,
        memory=beat.memory,
        memory_total=beat.memory_total,
        models=beat.models,
        jobs=beat.jobs,
    )


def models_view(models: list[UsedModel]) -> list[schemas.ModelView]:
    return [
        schemas.ModelView(id=model.checkpoint_id or model.type, name=[model.name], type=model.type)
        for model in models
    ]


def _used_models(models: list[UsedModel]) -> dict[str, list[schemas.UsedModelView]]:
    used: dict[str, list[schemas.UsedModelView]] = {}
    for model in models:
        folder = f"s3://{model.bucket}/{model.key.rsplit('/', 1)[0]}"
        used.setdefault(model.type, []).append(
            schemas.UsedModelView(
                s3=folder if model.checkpoint_id else "None",
                id=model.checkpoint_id or model.type,
                model_name=model.name,
                type=model.type,
            )
        )
    return used


def result_key(job: Job, name: str) -> str:
    return f"out/{job.job_id}/result/{name}"


def job_view(job: Job, objects: Objects, presign_seconds: int) -> schemas.InferenceView:
    """With presigned URLs for the params, the images and the info, good for `presign_seconds`."""

    def url(key: str) -> str:
        return objects.presign("GET", job.bucket, key, presign_seconds)

    succeeded = job.status == "succeed"
    images = [url(result_key(job, name)) for name in job.image_names] if succeeded else []
    info = [url(result_key(job, job.info_name))] if succeeded and job.info_name else []
    raw = {"status": job.status, "attempt": job.attempt, "reason": job.reason}
    return schemas.InferenceView(
        img_presigned_urls=images,
        output_presigned_urls=info,
        inference_info_name=f"/tmp/{job.info_name}" if job.info_name else None,  # noqa: S108
        startTime=time_text(job.started_at),
        taskType=job.task_type,
        completeTime=time_text(job.completed_at),
        params=schemas.InferenceParams(
            input_body_presign_url=url(job.params_key),
            used_models=_used_models(job.models),
            input_body_s3=f"s3://{job.bucket}/{job.params_key}",
            output_path=output_path(job),
            sagemaker_inference_instance_type=job.instance_type,
            sagemaker_inference_endpoint_id=job.endpoint_id,
            sagemaker_inference_endpoint_name=job.endpoint_name,
        ),
        InferenceJobId=job.job_id,
        status=job.status,
        inference_type=job.inference_type,
        createTime=time_text(job.created_at) or "",
        image_names=job.image_names,
        sagemakerRaw=msgspec.json.encode(raw).decode(),
        owner_group_or_role=[job.owner],
        error=job.reason,
        warnings=job.warnings,
        seconds=job.seconds,
    )


def output_path(job: Job) -> str:
    return f"s3://{job.bucket}/out/{job.job_id}/result/{job.job_id}_param.json"
