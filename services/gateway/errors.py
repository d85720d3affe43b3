"""Every way a request can go wrong, as an ESD envelope: `{"statusCode": …, "message": …}`.

ApiError
├── from a rejection   STATUS says which HTTP status each code has: the only such table
├── Unavailable        503 with Retry-After: the bus, the database or S3 does not answer
└── Unanswered         504: the command was sent and will be done, its answer is late
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
import msgspec
import nats.errors
from botocore.exceptions import BotoCoreError, ClientError
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from shared.logs import get_logger
from shared.postgres import AWAY

log = get_logger(__name__)

STATUS: dict[str, int] = {
    "identity.role_exists": 400,
    "identity.role_not_found": 400,
    "identity.default_role": 400,
    "identity.unknown_permission": 400,
    "identity.user_exists": 400,
    "identity.user_not_found": 404,
    "identity.last_administrator": 400,
    "identity.token_not_found": 404,
    "identity.already_initialised": 403,
    "models.name_taken": 400,
    "models.not_found": 404,
    "models.not_uploading": 400,
    "models.unknown_file": 400,
    "models.missing_file": 400,
    "models.part_mismatch": 400,
    "models.not_renamable": 400,
    "models.not_complete": 400,
    "models.not_retriable": 400,
    "models.refused": 400,
    "models.invalid": 400,
    "endpoints.name_taken": 400,
    "endpoints.not_found": 404,
    "endpoints.unknown_instance_type": 400,
    "endpoints.quota": 400,
    "inference.not_found": 404,
    "inference.exists": 400,
    "inference.not_startable": 400,
    "inference.not_cancellable": 400,
    "inference.no_endpoint": 400,
    "inference.params_missing": 400,
    "inference.checkpoint_gone": 404,
    "darkroom.failed": 500,
    "darkroom.too_large": 413,
}


class ErrorBody(msgspec.Struct, frozen=True):
    """The envelope of every error."""

    statusCode: int
    message: str


class ApiError(Exception):
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


class Unavailable(ApiError):
    def __init__(self, what: str) -> None:
        super().__init__(503, f"{what} does not answer; try again", {"Retry-After": "2"})


class Unanswered(ApiError):
    def __init__(self, seconds: float) -> None:
        message = (
            f"no answer within {seconds:g} s; the request was accepted and will be completed: "
            "look at its result later, or send it again with the same Idempotency-Key"
        )
        super().__init__(504, message, {"Retry-After": "5"})


def rejection(code: str, message: str) -> ApiError:
    """The HTTP form of a command's rejection. A code that is not in the table is a 400."""
    return ApiError(STATUS.get(code, 400), message)


def body(status: int, message: str) -> bytes:
    return msgspec.json.encode(ErrorBody(status, message))


def respond(status: int, message: str, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(
        body(status, message),
        status_code=status,
        media_type="application/json",
        headers=headers or {},
    )


def _on_api_error(_: Request[Any, Any, Any], error: ApiError) -> Response[bytes]:
    return respond(error.status, error.message, error.headers)


def _on_validation(phrase: Callable[[str], str]) -> Callable[..., Response[bytes]]:
    def on_validation(_: Request[Any, Any, Any], error: ValidationException) -> Response[bytes]:
        return respond(400, "; ".join(map(phrase, _wrong(error))) or error.detail)

    return on_validation


def _wrong(error: ValidationException) -> list[str]:
    """`role_name: Expected …`, one for each fault."""
    details = error.extra if isinstance(error.extra, list) else []
    places = [item.get("key", "body") for item in details]
    return [
        f"{'body' if place == 'data' else place}: {item.get('message', '')}"
        for place, item in zip(places, details, strict=True)
    ]


_HTTP = {
    404: "there is no such path; GET /api and /docs list them all",
    405: "this path does not take this method; GET /api and /docs list what it takes",
    413: "the body is larger than is accepted here; send less, files go to presigned URLs",
}


def _on_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals."""
    status = error.status_code
    if status >= 500:
        return _on_bug(request, error)
    return respond(status, _HTTP.get(status, error.detail), dict(error.headers or {}))


def _on_away(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    what = "the database"
    if isinstance(error, nats.errors.Error):
        what = "the bus"
    elif isinstance(error, BotoCoreError | ClientError):
        what = "the object store"
    log.warning("unavailable", what=what, error=repr(error))
    return _on_api_error(_, Unavailable(what))


def _on_bug(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("request_failed", path=request.url.path, exc_info=error)
    return respond(500, "Darkroom failed on this request; its log has the reason")


_BROKEN_CONNECTION = (asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises on a connection that dies while it is used or handed back."""


def handlers(phrase: Callable[[str], str] = str) -> dict[Any, Any]:
    """`phrase` has the last word on what is said of a wrong body."""
    return {
        ApiError: _on_api_error,
        ValidationException: _on_validation(phrase),
        HTTPException: _on_http,
        **dict.fromkeys((*AWAY, *_BROKEN_CONNECTION), _on_away),
        **dict.fromkeys((nats.errors.Error, BotoCoreError, ClientError), _on_away),
        Exception: _on_bug,
    }
