"""What the schema of a body does not say, for every route that takes one.

Postgres holds no NUL, and nobody needs a hundred levels. A key that a body does not know is a slip
of the pen and refused, but for ESD's own clients, whose server ignores such keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from litestar import Request
from litestar.exceptions import SerializationException
from msgspec import Struct, inspect

from services.gateway.errors import ApiError

MAX_DEPTH = 100
_TOO_DEEP = f"the body is nested more than {MAX_DEPTH} levels deep; make it flatter"
_inspect = cache(inspect.type_info)


def body_check(*, esd_compat: bool) -> Callable[[Request[Any, Any, Any]], Awaitable[None]]:
    async def check(request: Request[Any, Any, Any]) -> None:
        field = request.route_handler.parsed_fn_signature.parameters.get("data")
        if field is None:
            return
        try:
            given = await request.json()
        except (SerializationException, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None
        except RecursionError:
            raise ApiError(400, _TOO_DEEP) from None
        if not isinstance(given, dict):
            raise ApiError(400, 'the body must be a JSON object, like {"name": "value"}')
        if _depth(given) > MAX_DEPTH:
            raise ApiError(400, _TOO_DEEP)
        if b"\\u0000" in await request.body() and _holds_nul(given):
            raise ApiError(400, "the body holds the character \\u0000; leave it out")
        if not esd_compat and (unknown := find_unknown_field(given, field.annotation)):
            raise ApiError(400, unknown)

    return check


def _depth(value: object) -> int:
    """How many levels of objects and lists; stops counting when there are too many."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        opened = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [v for items in opened if isinstance(items, list) for v in items]
        depth += 1
    return depth


def _holds_nul(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


def find_unknown_field(body: object, struct: type[Struct]) -> str | None:
    """What to say about the first key that no struct of the body has; None when all are known."""
    return _find_unknown(body, _inspect(struct), "")


def _find_unknown(value: object, known: inspect.Type, where: str) -> str | None:
    inner: list[tuple[object, inspect.Type, str]] = []
    match known, value:
        case inspect.StructType(fields=fields), dict():
            types = {field.encode_name: field.type for field in fields}
            for key in value:
                if key not in types:
                    return f"unknown field {where}{key}; known are: {', '.join(types)}"
            inner = [(value[key], types[key], f"{where}{key}.") for key in value]
        case inspect.DictType(value_type=item), dict():
            inner = [(value[key], item, f"{where}{key}.") for key in value]
        case inspect.ListType(item_type=item), list():
            inner = [(element, item, where) for element in value]
        case inspect.UnionType(types=several), _:
            inner = [(value, one, where) for one in several]
    return next(filter(None, (_find_unknown(*each) for each in inner)), None)
