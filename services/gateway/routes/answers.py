"""The error answers that a route can give, for its OpenAPI description."""

from __future__ import annotations

from litestar.openapi.datastructures import ResponseSpec

from services.gateway.errors import ErrorBody

_TEXT = {
    400: "The body or a parameter is wrong; the message says what to change",
    401: "No valid person in Authorization",
    403: "No valid x-api-key, or the person lacks the permission",
    404: "Not found",
    405: "Wrong method",
    413: "The body is too large",
    500: "Darkroom failed; its log has the reason",
    503: "The bus, the database or the object store does not answer; see Retry-After",
    504: "The command was accepted, its answer is late",
}


def errors(*statuses: int) -> dict[int, ResponseSpec]:
    """403, 405, 500 and 503 are always possible."""
    return {
        status: ResponseSpec(ErrorBody, description=_TEXT[status], generate_examples=False)
        for status in sorted({403, 405, 500, 503, *statuses})
    }


READ = errors(400, 401)
WRITE = errors(400, 401, 413, 504)
READ_ONE = errors(400, 401, 404)
WRITE_ONE = errors(400, 401, 404, 413, 504)
