from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any, Literal

from litestar import Request, Response, delete, get, post, put
from litestar.openapi.datastructures import ResponseSpec

from services.gateway import compat
from services.gateway.auth import Person, person_of
from services.gateway.dispatch import Ticket
from services.gateway.errors import ApiError, rejection
from services.gateway.resolution import FoundFile, NamedByParams, find_file, resolve
from services.gateway.routes.answers import READ, READ_ONE, WRITE, WRITE_ONE
from services.gateway.schemas import (
    Answer,
    CreatedInference,
    CreateInferenceBody,
    DeleteInferencesBody,
    Inferences,
    InferenceType,
    InferenceView,
    NewInference,
    StartedInference,
    StartedInferenceView,
    TaskType,
)
from services.gateway.state import Gateway, check_page
from services.gateway.views import job_view, models_view, output_path, place_of
from shared.contracts.endpoints import SERVING, Endpoint
from shared.contracts.inference import (
    CREATED,
    FINISHED,
    CancelJob,
    CreateJob,
    DeleteJobs,
    Job,
    StartJob,
    UsedModel,
)
from shared.errors import Rejected
from shared.objects import StoredParams, params_key
from shared.webui.body_names import PAINTING

NOT_CHECKPOINTS = {"VAE": ("Automatic", "None")}
"""Names that stand for a choice, not for a file."""

Status = Literal["created", "inprogress", "succeed", "failed"]


@get("/inferences", operation_id="ListInferenceJobs", tags=["Inferences"], responses=READ)
async def list_inferences(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    page: int = 1,
    per_page: int = 10,
    username: str | None = None,
    status: list[Status] | None = None,
    task_type: list[TaskType] | None = None,
    inference_type: InferenceType | None = None,
    endpoint_name: str | None = None,
    type: TaskType | None = None,
    limit: int | None = None,
    exclusive_start_key: str | None = None,
) -> Answer[Inferences]:
    """Your jobs, newest first; whoever manages users sees everybody's. Later clients of ESD ask for
    one `type`, for at most `limit`, and go on after `exclusive_start_key`, which is the
    `last_evaluated_key` of the answer before; in the ESD profile who asks for no page gets all."""
    whole = gateway.settings.esd_compat and compat.asks_for_all(request)
    if limit is not None and not whole:
        per_page = limit
    check_page(page, per_page)
    after = _place(exclusive_start_key) if exclusive_start_key else None
    compat.claim(request, username, or_administrator=True)
    person = await gateway.authorize(request, "inference:list")
    if username and not person.owns(username):
        raise ApiError(403, f'the jobs of "{username}" are not yours to list')
    types: list[str] = [*(task_type or []), *([type] if type else [])]
    jobs, total = await gateway.views.list_jobs(
        limit=None if whole else per_page,
        offset=(page - 1) * per_page,
        after=after,
        owner=username or (None if person.is_administrator else person.username),
        status=list(status) if status else None,
        task_type=types or None,
        inference_type=inference_type,
        endpoint_name=endpoint_name,
    )
    if whole:
        per_page = max(1, total)
    more = len(jobs) == per_page and not whole
    return Answer(
        200,
        Inferences(
            page=page,
            per_page=per_page,
            pages=-(-total // per_page),
            total=total,
            inferences=await _list_views(gateway, jobs),
            last_evaluated_key="/".join(place_of(jobs[-1])) if more else None,
        ),
    )


def _place(key: str) -> tuple[str, str]:
    created_at, _, job_id = key.partition("/")
    if not job_id:
        raise ApiError(400, "exclusive_start_key: send the last_evaluated_key of an answer")
    return created_at, job_id


async def _list_views(gateway: Gateway, jobs: list[Job]) -> list[InferenceView]:
    """The URLs of a long list take a while to sign: others get their turn in between."""
    views = []
    for number, job in enumerate(jobs, 1):
        if number % 20 == 0:
            await asyncio.sleep(0)
        views.append(_view(gateway, job))
    return views


@post(
    "/inferences",
    operation_id="CreateInferenceJob",
    tags=["Inferences"],
    responses={
        **WRITE_ONE,
        200: ResponseSpec(Answer[InferenceView], description="payload_string: the finished job"),
        202: ResponseSpec(Answer[StartedInference], description="payload_string: started"),
    },
)
async def create_inference(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateInferenceBody
) -> Response[Answer[CreatedInference]]:
    """Creates a job. PUT its params to `api_params_s3_upload_url`, then start it."""
    compat.claim(request, data.user_id or None)
    person = await gateway.authorize(request, "inference:create")
    if data.user_id and data.user_id != person.username and not gateway.settings.esd_compat:
        raise ApiError(403, f'user_id: you are "{person.username}", not "{data.user_id}"')
    if data.payload_string is not None and not gateway.settings.esd_compat:
        raise ApiError(
            400, "payload_string: PUT the params to api_params_s3_upload_url, then start the job"
        )
    if gateway.settings.esd_compat:
        await _check_startable(gateway, person, data)
    # ESD looks at `models` for paintings only: what its clients name for others may be anything.
    strict = data.task_type in PAINTING or not gateway.settings.esd_compat
    models, files = await _find_models(gateway, person, data.models, strict=strict)
    named = None
    if data.payload_string is not None:
        params = StoredParams(data.payload_string.encode(), datetime.now(UTC))
        named = await resolve(
            data.task_type, params, files, person, gateway.views, gateway.settings.webui
        )
    ticket = await gateway.ticket(request, person)
    job_id = ticket.new_id()
    command = CreateJob(
        job_id=job_id,
        owner=person.username,
        inference_type=data.inference_type,
        task_type=data.task_type,
        models=models,
        checkpoints=[file.checkpoint for file in files],
        params_key=params_key(data.task_type, job_id),
        bucket=gateway.objects.settings.s3_jobs_bucket,
    )
    await gateway.dispatcher.send(command, ticket)
    if data.payload_string is not None and named is not None:
        return await _start_inline(gateway, person, ticket, command, data.payload_string, named)
    upload_url = gateway.objects.presign(
        "PUT", command.bucket, command.params_key, gateway.settings.upload_presign_seconds
    )
    inference = NewInference(
        id=job_id,
        type=data.task_type,
        api_params_s3_location=f"s3://{command.bucket}/{command.params_key}",
        api_params_s3_upload_url=upload_url,
        models=models_view(models),
    )
    return Response(Answer(201, CreatedInference(inference=inference), "Created"), status_code=201)


async def _check_startable(gateway: Gateway, person: Person, data: CreateInferenceBody) -> None:
    """ESD profile: what ESD refuses when a job is created, and not when it is started. Raises
    ApiError 400."""
    if data.payload_string is not None:
        try:
            json.loads(data.payload_string)
        except (ValueError, RecursionError):
            raise ApiError(400, "payload_string must be valid json string") from None
    if not await _list_usable_endpoints(gateway, person, data.inference_type):
        refused = Rejected(
            "inference.no_endpoint", inference_type=data.inference_type, username=person.username
        )
        raise rejection(refused.code, refused.message)


async def _find_models(
    gateway: Gateway, person: Person, names: dict[str, list[str]], *, strict: bool
) -> tuple[list[UsedModel], list[FoundFile]]:
    """What names mean among what the person may use: every model, and the files of those that have
    one. Raises ApiError 404 for what is not found, if `strict`; else it is left out."""
    models, files = [], []
    for type_, wanted in names.items():
        for name in wanted:
            if name in NOT_CHECKPOINTS.get(type_, ()):
                models.append(UsedModel(type=type_, name=name))
                continue
            checkpoint = await gateway.views.find_checkpoint_by_name(type_, name, person)
            file = find_file(checkpoint, name) if checkpoint else None
            if file is not None:
                models.append(file.used())
                files.append(file)
            elif strict:
                raise _no_checkpoint(name, type_)
    return models, files


async def _start_inline(
    gateway: Gateway,
    person: Person,
    ticket: Ticket,
    command: CreateJob,
    params: str,
    named: NamedByParams,
) -> Response[Any]:
    """ESD profile: the params came with the request."""
    await gateway.objects.client.put_object(
        Bucket=command.bucket, Key=command.params_key, Body=params.encode()
    )
    return await _start(gateway, person, await _get(gateway, command.job_id), ticket, named)


@put(
    "/inferences/{id:str}/start",
    operation_id="StartInferences",
    tags=["Inferences"],
    responses={
        **WRITE_ONE,
        202: ResponseSpec(Answer[StartedInference], description="Started; it is still running"),
    },
)
async def start_inference(
    request: Request[Any, Any, Any], gateway: Gateway, id: str
) -> Response[Answer[InferenceView]]:
    """Starts a job whose params are uploaded. Async: 202. Real-time: 200 with the finished job,
    or 202 when it takes longer than the gateway waits. Models that only the params name are found
    among what the job's owner may use; 404 names what is not, and what is close to it."""
    person, job = await _authorized(request, gateway, id, "inference:create")
    named = await _named_by_params(gateway, person, job)
    return await _start(gateway, person, job, await gateway.ticket(request, person), named)


async def _listed(gateway: Gateway, owner: Person, job: Job) -> list[FoundFile]:
    """The files that the job was created with, which may be out of its owner's reach by now."""
    files = []
    for model in job.models:
        if model.checkpoint_id:
            checkpoint = await gateway.views.find_checkpoint(model.checkpoint_id)
            usable = checkpoint is not None and owner.may_use_checkpoint(checkpoint)
            file = find_file(checkpoint, model.name) if checkpoint and usable else None
            if file is None:
                raise _no_checkpoint(model.name, model.type)
            files.append(file)
    return files


async def _named_by_params(gateway: Gateway, person: Person, job: Job) -> NamedByParams:
    """Of a job that is about to be started. Raises ApiError for what its owner can't use."""
    owner = _owner(gateway, person, job)
    listed = await _listed(gateway, owner, job)
    if job.status != CREATED:
        return NamedByParams()  # it is not started again, whatever its params say
    async with gateway.params_reading:
        params = await gateway.objects.find_params(job.bucket, job.params_key)
        if params is None:
            return NamedByParams()
        return await resolve(
            job.task_type, params, listed, owner, gateway.views, gateway.settings.webui
        )


def _owner(gateway: Gateway, person: Person, job: Job) -> Person:
    """Whose rights a job has, whoever starts it. Of one who is gone, what everybody may is left."""
    if person.username == job.owner:
        return person
    nobody = Person(username=job.owner, roles=[], permissions=frozenset())
    return person_of(gateway.directory, job.owner) or nobody


def _no_checkpoint(name: str, type_: str) -> ApiError:
    return ApiError(404, f"checkpoint with name {name}, type {type_} is not found")


async def _start(
    gateway: Gateway, person: Person, job: Job, ticket: Ticket, named: NamedByParams
) -> Response[Any]:
    endpoints = await _list_usable_endpoints(gateway, person, job.inference_type)
    command = StartJob(
        job_id=job.job_id,
        username=person.username,
        endpoints=endpoints,
        roles=person.roles,
        administrator=person.is_administrator,
        params_at=named.params_at,
        models=named.models,
        checkpoints=named.checkpoints,
    )
    await gateway.dispatcher.send(command, ticket, step="start")
    started = await _get(gateway, job.job_id)
    if job.inference_type == "Real-time":
        finished = await _wait(gateway, job.job_id)
        if finished:
            return Response(Answer(200, _view(gateway, finished)), status_code=200)
    inference = StartedInferenceView(
        inference_id=started.job_id,
        status=started.status,
        endpoint_name=started.endpoint_name,
        output_path=output_path(started),
    )
    answer = Answer(202, StartedInference(inference=inference), "Accepted")
    return Response(answer, status_code=202)


async def _list_usable_endpoints(
    gateway: Gateway, person: Person, inference_type: str
) -> list[Endpoint]:
    return [
        endpoint
        for endpoint in await gateway.views.list_endpoints()
        if endpoint.endpoint_type == inference_type
        and endpoint.endpoint_status in SERVING
        and person.may_use_endpoint(endpoint)
    ]


async def _wait(gateway: Gateway, job_id: str) -> Job | None:
    """The finished job. Asks the table after it has begun to listen, so that no end is missed."""
    ended = gateway.projector.expect("job", job_id)
    job = await gateway.views.find_job(job_id)
    if job and job.status in FINISHED:
        ended.cancel()
        return job
    finished = await gateway.projector.wait_for(ended, gateway.settings.realtime_timeout)
    return finished if isinstance(finished, Job) else None


@put(
    "/inferences/{id:str}/cancel",
    operation_id="CancelInferenceJob",
    tags=["Inferences"],
    responses=WRITE_ONE,
)
async def cancel_inference(
    request: Request[Any, Any, Any], gateway: Gateway, id: str
) -> Answer[InferenceView]:
    """Ends a job that has not ended: its status is `failed` and its error says who cancelled it.
    To cancel it again is no error."""
    person, job = await _authorized(request, gateway, id, "inference:create")
    command = CancelJob(job_id=job.job_id, username=person.username)
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))
    return Answer(200, _view(gateway, await _get(gateway, job.job_id)))


@get(
    "/inferences/{id:str}", operation_id="GetInferenceJob", tags=["Inferences"], responses=READ_ONE
)
async def get_inference(
    request: Request[Any, Any, Any], gateway: Gateway, id: str
) -> Answer[InferenceView]:
    """One job, with presigned URLs of its images once it has succeeded."""
    _, job = await _authorized(request, gateway, id, "inference:list")
    return Answer(200, _view(gateway, job))


@delete("/inferences", operation_id="DeleteInferenceJobs", tags=["Inferences"], responses=WRITE)
async def delete_inferences(
    request: Request[Any, Any, Any], gateway: Gateway, data: DeleteInferencesBody
) -> None:
    """Deletes jobs with their images. What does not exist is passed over."""
    found = [await gateway.views.find_job(id_) for id_ in data.inference_id_list]
    compat.claim(request, next((job.owner for job in found if job), None), or_administrator=True)
    person = await gateway.authorize(request, "inference:create")
    for job in found:
        if job:
            _check_owner(person, job)
    # Only what was found and checked is passed on: what comes to be meanwhile was not.
    command = DeleteJobs(job_ids=[job.job_id for job in found if job])
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))


async def _authorized(
    request: Request[Any, Any, Any], gateway: Gateway, job_id: str, permission: str
) -> tuple[Person, Job]:
    """Who asks, and the job, which they may see."""
    job = await gateway.views.find_job(job_id)
    compat.claim(request, job.owner if job else None, or_administrator=True)
    person = await gateway.authorize(request, permission)
    if job is None:
        raise _not_found(job_id)
    _check_owner(person, job)
    return person, job


async def _get(gateway: Gateway, job_id: str) -> Job:
    job = await gateway.views.find_job(job_id)
    if job is None:
        raise _not_found(job_id)
    return job


def _view(gateway: Gateway, job: Job) -> InferenceView:
    view = job_view(job, gateway.objects, gateway.settings.presign_seconds)
    return compat.as_texts(view) if gateway.settings.esd_compat else view


def _not_found(job_id: str) -> ApiError:
    return ApiError(404, f"inference with id {job_id} not found")


def _check_owner(person: Person, job: Job) -> None:
    if not person.may_see_job(job):
        raise ApiError(403, f"inference {job.job_id} belongs to somebody else")


ROUTES = [
    list_inferences,
    create_inference,
    start_inference,
    cancel_inference,
    get_inference,
    delete_inferences,
]
