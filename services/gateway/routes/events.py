from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from litestar import Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Stream

from services.gateway import compat
from services.gateway.errors import ApiError
from services.gateway.routes.answers import READ, READ_ONE
from services.gateway.state import Gateway
from shared.contracts.inference import FINISHED


def _last_event_id(request: Request[Any, Any, Any]) -> int | None:
    given = request.headers.get("last-event-id", "").strip()
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise ApiError(400, "Last-Event-ID: expected the id of an event, a number")
    return int(given)


def _stream(frames: AsyncIterator[bytes]) -> Stream:
    return Stream(
        frames,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


SERVER_SENT_EVENTS = {
    200: ResponseSpec(
        str,
        description="Server-Sent Events",
        media_type="text/event-stream",
        generate_examples=False,
    )
}

NOTHING_MORE = ResponseSpec(None, description="It has ended, and you know it")


@get(
    "/events",
    operation_id="FollowEvents",
    tags=["Events"],
    responses={**READ, **SERVER_SENT_EVENTS},
)
async def follow_events(request: Request[Any, Any, Any], gateway: Gateway) -> Stream:
    """Server-Sent Events of all that you may see, from now on, or from `Last-Event-ID` on.

    `event` is the message type (`inference.job_succeeded.v1`), `data` a CloudEvents envelope whose
    `data` is the full state. Without an id, and so never told again: `event: progress` with the
    steps of running jobs and the bytes of checkpoints on their way in, and `event: preview` with a
    small picture (`media_type`; `image` in base64) of how far a job is."""
    person = await gateway.authorize(request, None)
    after = _last_event_id(request)
    return _stream(gateway.hub.stream(person, after=after))


@get(
    "/inferences/{id:str}/events",
    operation_id="FollowInferenceJob",
    tags=["Events"],
    responses={**READ_ONE, **SERVER_SENT_EVENTS, 204: NOTHING_MORE},
)
async def follow_inference(
    request: Request[Any, Any, Any], gateway: Gateway, id: str
) -> Stream | Response[None]:
    """Server-Sent Events of one job, from its beginning or from `Last-Event-ID` on, with its steps
    (`event: progress`) and small pictures of how far it is (`event: preview`, with `media_type` and
    `image` in base64) as they come; ends when the job has ended. Who comes back knowing its end
    gets 204, which tells browsers not to come again."""
    job = await gateway.views.find_job(id)
    compat.claim(request, job.owner if job else None, or_administrator=True)
    person = await gateway.authorize(request, "inference:list")
    if job is None:
        raise ApiError(404, f"inference with id {id} not found")
    if not person.may_see_job(job):
        raise ApiError(403, f"inference {id} belongs to somebody else")
    after = _last_event_id(request)
    if after and job.status in FINISHED and after >= await gateway.hub.find_end(id):
        return Response(None, status_code=204)
    return _stream(gateway.hub.stream(person, job=job, after=after))


ROUTES = [follow_events, follow_inference]
