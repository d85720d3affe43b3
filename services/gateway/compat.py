"""The ESD compatibility profile (`DARKROOM_ESD_COMPAT=true`), all of it.

It lets clients written for ESD 1.4 to 1.6 work unchanged. Those clients name their user without
proving it, so with this profile whoever holds the API key can act as any user. Off by default.

- every route also under /prod; `x-api-version` and CORS headers on every answer
- the person: base16 of the username as bearer token, or a `username` header, or with the API key
  alone the user that the body or the job names, or an administrator where ESD asks for nobody
- keys that the original ignores are ignored; missing ones are named in the original's words
- GET /checkpoints also shows `checkpoints` beside `data`
- creating a role or user that exists updates it; `initial` makes the first user of an empty place
- DELETE /endpoints takes `endpoint_name_list`; names get the prefix `esd-async-`, `esd-real-time-`
- POST /inferences takes `payload_string`: the params inline, started at once
"""

from __future__ import annotations

import binascii
import re
from typing import Any

from litestar import Request

from shared.logs import get_logger

log = get_logger(__name__)

API_VERSION = "1.4.0"
ENDPOINT_PREFIX = "esd"

HEADERS = {
    "x-api-version": API_VERSION,
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "*",
    "Access-Control-Allow-Methods": "OPTIONS,POST,GET,PUT,DELETE",
}


def announce() -> None:
    log.warning(
        "esd_compatibility_profile_is_on",
        meaning="whoever holds the API key can act as any user without a password",
    )


def strip_prefix(path: str) -> str:
    """`/prod/roles` -> `/roles`."""
    return path[len("/prod") :] or "/" if path == "/prod" or path.startswith("/prod/") else path


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


_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_TOO_SHORT = re.compile(r"Expected `(str|array)` of length >= (\d+)")


def phrase(message: str) -> str:
    """A validation message in the words of the original's validator."""
    if found := _MISSING.search(message):
        return f'object has missing required properties (["{found[1]}"])'
    if found := _TOO_SHORT.search(message):
        return f"{message} (length: 0, required minimum: {found[2]})"
    return message
