from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.openapi.datastructures import ResponseSpec

from services.gateway import compat
from services.gateway.auth import EVERYONE, Person, person_of
from services.gateway.errors import ApiError
from services.gateway.projections import is_settled
from services.gateway.routes.answers import READ_ONE, WRITE, WRITE_ONE
from services.gateway.schemas import (
    Answer,
    CheckpointItem,
    Checkpoints,
    CheckpointType,
    CreateCheckpointBody,
    DeleteCheckpointsBody,
    ListedCheckpoints,
    NewCheckpoint,
    OneCheckpoint,
    UpdateCheckpointBody,
    UpdatedCheckpoint,
)
from services.gateway.state import Gateway, check_page
from services.gateway.views import checkpoint_item, checkpoint_view
from shared.contracts.envelope import Command, State
from shared.contracts.models import (
    CREATING,
    Checkpoint,
    CompleteCheckpoint,
    CreateCheckpoint,
    DeleteCheckpoints,
    PartTag,
    RenameCheckpoint,
    RetryCheckpoint,
    SetCheckpointStatus,
    UploadFile,
)

MAX_PARTS = 10_000
"""Of all files of one request together; S3 takes as many for one file."""
MAX_PARAMS = 64 * 1024

IN_PROGRESS = "Checkpoint creation in progress, please check later"


@get("/checkpoints", operation_id="ListCheckpoints", tags=["Checkpoints"], responses=READ_ONE)
async def list_checkpoints(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    page: int = 1,
    per_page: int = 10,
    username: str | None = None,
    types: list[CheckpointType] | None = None,
    status: list[str] | None = None,
    roles: list[str] | None = None,
) -> ListedCheckpoints:
    """The checkpoints that you may use, newest first; with `username` those that this user made,
    in the ESD profile those that this user may use."""
    check_page(page, per_page)
    person = await gateway.authorize(request, "checkpoint:list")
    user = person_of(gateway.directory, username) if username else None
    if username and user is None:
        raise ApiError(404, f'user: "{username}" not exist')
    esd_compat = gateway.settings.esd_compat
    checkpoints, total = await gateway.views.list_checkpoints(
        person,
        page=page,
        per_page=per_page,
        creator=None if esd_compat else username or None,
        user=user if esd_compat else None,
        types=list(types) if types else None,
        status=status,
        roles=roles,
    )
    items = [checkpoint_item(checkpoint) for checkpoint in checkpoints]
    return ListedCheckpoints(
        statusCode=200,
        data=Checkpoints(
            page=page,
            per_page=per_page,
            pages=-(-total // per_page),
            total=total,
            checkpoints=items,
        ),
        checkpoints=items if esd_compat else msgspec.UNSET,
    )


@get(
    "/checkpoints/{id:str}", operation_id="GetCheckpoint", tags=["Checkpoints"], responses=READ_ONE
)
async def get_checkpoint(
    request: Request[Any, Any, Any], gateway: Gateway, id: str
) -> Answer[CheckpointItem]:
    """One checkpoint: how far it is, and what was found out about its files."""
    person = await gateway.authorize(request, "checkpoint:list")
    checkpoint = await gateway.views.find_checkpoint(id)
    if checkpoint is None or not person.may_use_checkpoint(checkpoint):
        raise ApiError(404, f"checkpoint with id {id} not found")
    return Answer(200, checkpoint_item(checkpoint))


@post(
    "/checkpoints",
    operation_id="CreateCheckpoint",
    tags=["Checkpoints"],
    responses={
        **WRITE,
        202: ResponseSpec(Answer[OneCheckpoint], description="Being downloaded from its URLs"),
    },
)
async def create_checkpoint(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateCheckpointBody
) -> Response[Answer[NewCheckpoint]]:
    """With `filenames`: 201 and the presigned URLs to PUT the parts to; then PUT the ETags.
    With `urls`: 202, and Darkroom downloads them; follow its events or GET /checkpoints."""
    if bool(data.filenames) == bool(data.urls):
        raise ApiError(400, "give either filenames (to upload) or urls (to download from)")
    names = [file.filename for file in data.filenames]
    if len(set(names)) != len(names):
        raise ApiError(400, "filenames: each filename may appear once")
    if sum(file.parts_number for file in data.filenames) > MAX_PARTS:
        raise ApiError(400, f"filenames: at most {MAX_PARTS} parts in all; use larger parts")
    if len(msgspec.json.encode(data.params)) > MAX_PARAMS:
        raise ApiError(400, f"params: at most {MAX_PARAMS} bytes of JSON")
    message = data.params.get("message", "")
    if not isinstance(message, str):
        raise ApiError(400, "params.message: expected a string")
    compat.claim(request, _text(data.params.get("creator")))
    person = await gateway.authorize(request, "checkpoint:create")
    ticket = await gateway.ticket(request, person)
    more = {k: v for k, v in data.params.items() if k not in ("message", "creator", "created")}
    command = CreateCheckpoint(
        checkpoint_id=ticket.new_id(),
        checkpoint_type=data.checkpoint_type,
        creator=person.username,
        filenames=[
            UploadFile(filename=file.filename, parts_number=file.parts_number)
            for file in data.filenames
        ],
        urls=data.urls,
        message=message,
        params={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in more.items()},
        allowed_roles_or_users=data.allowed_roles_or_users or [EVERYONE],
    )
    await gateway.dispatcher.send(command, ticket)
    checkpoint = await _get(gateway, command.checkpoint_id)
    if data.urls:
        answer: Any = Answer(
            202, OneCheckpoint(checkpoint=checkpoint_view(checkpoint)), IN_PROGRESS
        )
        return Response(answer, status_code=202)
    urls = await _presign_parts(gateway, checkpoint)
    new = NewCheckpoint(checkpoint=checkpoint_view(checkpoint), s3PresignUrl=urls)
    return Response(Answer(201, new, "Created"), status_code=201)


async def _presign_parts(gateway: Gateway, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The URLs of ten thousand parts take seconds to sign: others get their turn in between."""
    urls: dict[str, list[str]] = {}
    for filename, upload in checkpoint.multipart_upload.items():
        urls[filename] = []
        for number in range(1, upload.parts_number + 1):
            if number % 50 == 0:
                await asyncio.sleep(0)
            urls[filename].append(
                gateway.objects.presign(
                    "PUT",
                    upload.bucket,
                    upload.key,
                    gateway.settings.upload_presign_seconds,
                    partNumber=number,
                    uploadId=upload.upload_id,
                )
            )
    return urls


@put(
    "/checkpoints/{id:str}",
    operation_id="UpdateCheckpoint",
    tags=["Checkpoints"],
    responses={
        **WRITE_ONE,
        202: ResponseSpec(UpdatedCheckpoint, description="Renamed, or being downloaded again"),
    },
)
async def update_checkpoint(
    request: Request[Any, Any, Any], gateway: Gateway, data: UpdateCheckpointBody, id: str
) -> Response[UpdatedCheckpoint]:
    """Completes an upload with the ETags of its parts, switches a checkpoint on or off, renames it,
    or downloads a failed one again.

    A completed upload is looked at before it is Active. If that takes longer than this waits, the
    answer says `Creating`: follow its events, or GET /checkpoints."""
    command = _update_command(id, data)
    existing = await gateway.views.find_checkpoint(id)
    compat.claim(request, existing.creator if existing else None, or_administrator=True)
    person = await gateway.authorize(request, "checkpoint:create")
    if existing is None:
        raise ApiError(404, f"checkpoint with id {id} not found")
    _check_owner(person, existing)
    ticket = await gateway.ticket(request, person)
    await gateway.dispatcher.send(command, ticket)
    if isinstance(command, CompleteCheckpoint):
        await _wait_until_looked_at(gateway, id)
    view = checkpoint_view(await _get(gateway, id))
    status = 202 if isinstance(command, RenameCheckpoint | RetryCheckpoint) else 200
    updated = UpdatedCheckpoint(
        statusCode=status,
        headers={
            "Access-Control-Allow-Headers": "Content-Type",
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Methods": "OPTIONS,POST,GET",
        },
        checkpoint=view,
        data=OneCheckpoint(checkpoint=view),
    )
    return Response(updated, status_code=status)


async def _wait_until_looked_at(gateway: Gateway, checkpoint_id: str) -> None:
    """For a while. Raises ApiError 400 if its files are of no use."""
    settled = gateway.projector.expect("checkpoint", checkpoint_id)
    state: State | None = await gateway.views.find_checkpoint(checkpoint_id)
    if state is None or is_settled(state):
        settled.cancel()
    else:
        state = await gateway.projector.wait_for(settled, gateway.settings.upload_check_timeout)
    if isinstance(state, Checkpoint) and not state.deleted and state.error:
        raise ApiError(400, state.error)


def _update_command(checkpoint_id: str, data: UpdateCheckpointBody) -> Command:
    if data.name is not None:
        if data.status or data.multi_parts_tags:
            raise ApiError(400, "name can't be changed together with anything else")
        return RenameCheckpoint(checkpoint_id=checkpoint_id, name=data.name)
    if data.status is None:
        raise ApiError(400, 'object has missing required properties (["status"])')
    if data.multi_parts_tags:
        if data.status != "Active":
            raise ApiError(400, "multi_parts_tags go with status Active")
        tags = {
            filename: [PartTag(ETag=part.ETag, PartNumber=part.PartNumber) for part in parts]
            for filename, parts in data.multi_parts_tags.items()
        }
        return CompleteCheckpoint(checkpoint_id=checkpoint_id, multi_parts_tags=tags)
    if data.status == CREATING:
        return RetryCheckpoint(checkpoint_id=checkpoint_id)
    return SetCheckpointStatus(checkpoint_id=checkpoint_id, status=data.status)


@delete("/checkpoints", operation_id="DeleteCheckpoints", tags=["Checkpoints"], responses=WRITE)
async def delete_checkpoints(
    request: Request[Any, Any, Any], gateway: Gateway, data: DeleteCheckpointsBody
) -> None:
    """Deletes checkpoints and their files. What does not exist is passed over."""
    found = [await gateway.views.find_checkpoint(id_) for id_ in data.checkpoint_id_list]
    compat.claim(request, next((c.creator for c in found if c), None), or_administrator=True)
    person = await gateway.authorize(request, "checkpoint:all")
    for checkpoint in found:
        _check_owner(person, checkpoint)
    # Only what was found and checked is passed on: what comes to be meanwhile was not.
    command = DeleteCheckpoints(checkpoint_ids=[c.checkpoint_id for c in found if c])
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))


def _check_owner(person: Person, checkpoint: Checkpoint | None) -> None:
    if checkpoint and not person.owns(checkpoint.creator):
        raise ApiError(403, f"checkpoint {checkpoint.checkpoint_id} belongs to somebody else")


async def _get(gateway: Gateway, checkpoint_id: str) -> Checkpoint:
    checkpoint = await gateway.views.find_checkpoint(checkpoint_id)
    if checkpoint is None:
        raise ApiError(404, f"checkpoint with id {checkpoint_id} not found")
    return checkpoint


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


ROUTES = [
    list_checkpoints,
    get_checkpoint,
    create_checkpoint,
    update_checkpoint,
    delete_checkpoints,
]
