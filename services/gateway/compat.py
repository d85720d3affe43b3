"""The ESD compatibility profile (`DARKROOM_ESD_COMPAT=true`), all of it.

It lets clients written for ESD 1.4 to 1.6 work unchanged. Those clients name their user without
proving it, so with this profile whoever holds the API key can act as any user. Off by default.

- every route also under /prod; `x-api-version` and CORS headers on every answer
- the person: base16 of the username as bearer token, or a `username` header, or with the API key
  alone the user that the body or the job names, or an administrator where ESD asks for nobody
- keys that the original ignores are ignored, and empty ones of a query; missing ones are named in
  the original's words
- GET /checkpoints also shows `checkpoints` beside `data`; `username` there means what that user may
  use, not what they made
- GET /inferences without a page is the whole list; a job that waits for its start has no nulls
- creating a role or user that exists updates it; `initial` makes the first user of an empty place,
  and does nothing where there is an administrator; a password may have any length but 0
- GET /users?show_password=1 has a text of its own for each user, which is no password here; sent
  back by POST or PUT /users, it leaves the password as it is
- DELETE /endpoints takes `endpoint_name_list`; names get the prefix `esd-async-`, `esd-real-time-`
  (DARKROOM_ENDPOINT_PREFIX says another word than `esd`)
- POST /inferences takes `payload_string`: the params inline, started at once; it refuses a job that
  no endpoint could do, and passes over unknown `models` of jobs that paint nothing
"""

from __future__ import annotations

import binascii
import re
from typing import Any

from litestar import Request
from msgspec.structs import replace

from services.gateway.schemas import InferenceView
from shared.logs import get_logger

log = get_logger(__name__)

API_VERSION = "1.4.0"
ENDPOINT_PREFIX = "esd"

HEADERS = {
    "x-api-version": API_VERSION,
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Allow-Methods": "OPTIONS,POST,GET,HEAD,PUT,DELETE",
}


def announce() -> None:
    log.warning(
        "esd_compatibility_profile_is_on",
        meaning="whoever holds the API key can act as any user without a password",
    )


def strip_prefix(path: str) -> str:
    """`/prod/roles` -> `/roles`."""
    return path[len("/prod") :] or "/" if path == "/prod" or path.startswith("/prod/") else path


def without_empty(query: bytes) -> bytes:
    """`username=&limit=5` -> `limit=5`: what is empty was left out, as in the original."""
    return b"&".join(pair for pair in query.split(b"&") if pair.partition(b"=")[2])


def username_of(request: Request[Any, Any, Any]) -> str | None:
    """The user that an ESD client names, without proof."""
    if name := request.headers.get("username"):
        return name
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        try:
            return binascii.unhexlify(token.strip()).decode()
        except (ValueError, UnicodeDecodeError):
            return None
    claimed: str | None = request.scope["state"].get("claimed_user")
    return claimed


def claim(
    request: Request[Any, Any, Any], username: str | None, *, or_administrator: bool = False
) -> None:
    """For requests with the API key alone: acts as the user whom the body or the job names.
    `or_administrator`: where ESD's clients may leave that out as well."""
    request.scope["state"]["claimed_user"] = username
    request.scope["state"]["claims_administrator"] = or_administrator


def claims_administrator(request: Request[Any, Any, Any]) -> bool:
    return bool(request.scope["state"].get("claims_administrator"))


def asks_for_passwords(show_password: str | None) -> bool:
    """`show_password=True`, as Python writes it, or `1`."""
    return (show_password or "").lower() not in ("", "0", "false")


def asks_for_all(request: Request[Any, Any, Any]) -> bool:
    """Whether a list of jobs is to be whole, as in 1.4, which knew no pages; `limit=-1` is how its
    clients said so."""
    query = request.query_params
    paging = ("page", "per_page", "limit", "exclusive_start_key")
    return query.get("limit") == "-1" or not any(name in query for name in paging)


def as_texts(job: InferenceView) -> InferenceView:
    """ESD knows when a job starts, and where, from its creation on; what is not known here yet is
    said without a null."""
    names = ("instance_type", "endpoint_id", "endpoint_name")
    places = [f"sagemaker_inference_{name}" for name in names]
    texts = {place: getattr(job.params, place) or "" for place in places}
    return replace(
        job,
        startTime=job.startTime or job.createTime,
        params=replace(job.params, **texts),
    )


_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_EMPTY = re.compile(r"Expected `(str|array)` of length >= 1\b")


def phrase(message: str) -> str:
    """A validation message in the words of the original's validator."""
    if found := _MISSING.search(message):
        return f'object has missing required properties (["{found[1]}"])'
    if _EMPTY.search(message):
        return f"{message} (length: 0, required minimum: 1)"
    return message
