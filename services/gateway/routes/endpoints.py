from __future__ import annotations

from typing import Any

from litestar import Request, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from msgspec import UNSET

from services.gateway import compat
from services.gateway.auth import person_of
from services.gateway.errors import ApiError
from services.gateway.routes.answers import READ, READ_ONE, WRITE
from services.gateway.schemas import (
    Answer,
    CreateEndpointBody,
    DeleteEndpointsBody,
    Empty,
    EndpointDetails,
    Endpoints,
    EndpointView,
    count,
)
from services.gateway.state import Gateway
from services.gateway.views import endpoint_view, instance_view
from shared.contracts.endpoints import CreateEndpoint, DeleteEndpoints


@get("/endpoints", operation_id="ListEndpoints", tags=["Endpoints"], responses=READ)
async def list_endpoints(
    request: Request[Any, Any, Any], gateway: Gateway, username: str | None = None
) -> Answer[Endpoints]:
    """The endpoints that your roles may use, oldest first; with `username` those that this user
    may use as well."""
    compat.claim(request, username)
    people = [await gateway.authorize(request, "sagemaker_endpoint:list")]
    if username:
        user = person_of(gateway.directory, username)
        if user is None:
            raise ApiError(400, f'user: "{username}" not exist')
        people.append(user)
    endpoints = [
        endpoint
        for endpoint in await gateway.views.list_endpoints()
        if all(person.may_use_endpoint(endpoint) for person in people)
    ]
    return Answer(200, Endpoints(endpoints=[endpoint_view(endpoint) for endpoint in endpoints]))


@get("/endpoints/{name:str}", operation_id="GetEndpoint", tags=["Endpoints"], responses=READ_ONE)
async def get_endpoint(
    request: Request[Any, Any, Any], gateway: Gateway, name: str
) -> Answer[EndpointDetails]:
    """One endpoint with its instances: their devices, memory, models and jobs."""
    person = await gateway.authorize(request, "sagemaker_endpoint:list")
    found = [
        e
        for e in await gateway.views.list_endpoints()
        if e.endpoint_name == name and person.may_use_endpoint(e)
    ]
    if not found:
        raise ApiError(404, f'endpoint "{name}" not found')
    newest = found[-1]  # one that is being deleted may have had the name before
    return Answer(
        200,
        EndpointDetails(
            endpoint=endpoint_view(newest),
            min_instance_number=str(newest.min_instance_number),
            instances=[instance_view(beat) for beat in gateway.pulses.of(newest.endpoint_id)],
        ),
    )


@post(
    "/endpoints",
    operation_id="CreateEndpoint",
    tags=["Endpoints"],
    status_code=200,
    responses=WRITE,
)
async def create_endpoint(
    request: Request[Any, Any, Any], gateway: Gateway, data: CreateEndpointBody
) -> Answer[EndpointView]:
    """Deploys a pool of workers. It takes jobs once GET /endpoints shows it `InService`."""
    person = await gateway.authorize(request, "sagemaker_endpoint:create")
    _check_image(data)
    instances, least, most = _counts(data)
    for role in data.assign_to_roles:
        if role not in gateway.directory.roles:
            raise ApiError(400, f'user roles "{role}" not exist')
    ticket = await gateway.ticket(request, person)
    endpoint_id = ticket.new_id()
    name = _full_name(gateway, data.endpoint_type, data.endpoint_name or endpoint_id[:8])
    command = CreateEndpoint(
        endpoint_id=endpoint_id,
        endpoint_name=name,
        endpoint_type=data.endpoint_type,
        instance_type=data.instance_type,
        initial_instance_count=instances,
        autoscaling=data.autoscaling_enabled,
        roles=list(dict.fromkeys(data.assign_to_roles)),
        creator=person.username,
        min_instance_number=least,
        max_instance_number=most,
    )
    await gateway.dispatcher.send(command, ticket)
    endpoint = await gateway.views.find_endpoint(endpoint_id)
    if endpoint is None:
        raise ApiError(404, f'endpoint "{name}" not found')
    return Answer(200, endpoint_view(endpoint), f"Endpoint deployment started: {name}")


def _check_image(data: CreateEndpointBody) -> None:
    """Raises ApiError for wishes about what runs on an endpoint."""
    if data.workflow_name:
        raise ApiError(400, f"workflow {data.workflow_name} not found: there are none here")
    for field in ("custom_docker_image_uri", "custom_extensions"):
        if getattr(data, field):
            raise ApiError(
                400, f"{field}: workers run the image of their instance_type; leave it out"
            )


def _counts(data: CreateEndpointBody) -> tuple[int, int | None, int | None]:
    """How many at first, at least and at most. Raises ApiError for what contradicts itself; the
    bounds of an endpoint that does not scale have no meaning."""
    initial = count(data.initial_instance_count)
    if initial < 1:
        raise ApiError(400, "initial_instance_count: at least 1")
    if not data.autoscaling_enabled:
        return initial, None, None
    least = None if data.min_instance_number is UNSET else count(data.min_instance_number)
    most = None if data.max_instance_number is UNSET else count(data.max_instance_number)
    if least == 0 and data.endpoint_type == "Real-time":
        raise ApiError(400, "min_instance_number: a Real-time endpoint keeps at least 1")
    if most is not None and most < initial:
        raise ApiError(400, "max_instance_number: at least initial_instance_count")
    if least is not None and least > initial:
        raise ApiError(400, "min_instance_number: at most initial_instance_count")
    return initial, least, most


def _full_name(gateway: Gateway, endpoint_type: str, name: str) -> str:
    """`esd-real-time-NAME` where a prefix is set; a name that has it already is left alone."""
    settings = gateway.settings
    prefix = settings.endpoint_prefix or (compat.ENDPOINT_PREFIX if settings.esd_compat else "")
    full = f"{prefix}-{endpoint_type.lower()}-"
    return name if not prefix or name.startswith(full) else full + name


@delete(
    "/endpoints",
    operation_id="DeleteEndpoints",
    tags=["Endpoints"],
    status_code=200,
    responses={
        **WRITE,
        204: ResponseSpec(None, description="For endpoint_name_list (ESD compatibility profile)"),
    },
)
async def delete_endpoints(
    request: Request[Any, Any, Any], gateway: Gateway, data: DeleteEndpointsBody
) -> Response[Empty]:
    """Deletes endpoints and stops their workers. What does not exist is passed over."""
    names = data.delete_endpoint_list
    old_form = names is None and gateway.settings.esd_compat
    if old_form:
        names = data.endpoint_name_list
    if names is None:
        raise ApiError(400, 'object has missing required properties (["delete_endpoint_list"])')
    compat.claim(request, data.username or None, or_administrator=True)
    person = await gateway.authorize(request, "sagemaker_endpoint:all")
    found = [e for e in await gateway.views.list_endpoints() if e.endpoint_name in names]
    for endpoint in found:
        if not person.may_use_endpoint(endpoint):
            raise ApiError(403, f'endpoint "{endpoint.endpoint_name}" belongs to other roles')
    # Only what was found and checked is passed on: what comes to be meanwhile was not.
    command = DeleteEndpoints(endpoint_names=[endpoint.endpoint_name for endpoint in found])
    await gateway.dispatcher.send(command, await gateway.ticket(request, person))
    answer: Any = None if old_form else Empty()
    return Response(answer, status_code=204 if old_form else 200)


ROUTES = [list_endpoints, get_endpoint, create_endpoint, delete_endpoints]
