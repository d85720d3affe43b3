"""JSON as the webui's clients send it -> typed params.

They send bare `Infinity` and `NaN`, nulls for "default", numbers and flags as text, whole numbers
as fractions (`1.0`), and many keys that mean nothing here. The webui reads them with pydantic 1;
what that would cut off (`20.5` for a whole number) is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure
from shared.webui.values import as_flag, as_number, as_whole

Level = Annotated[int, Meta(ge=0, le=255)]
Share = Annotated[float, Meta(ge=0, le=1)]

Body = dict[str, Any]

MOST_NESTED = 100
"""Objects and lists within each other: whoever walks a body later has a stack for so many."""

P = TypeVar("P", bound=msgspec.Struct)
K = TypeVar("K", dict[str, Any], list[Any])


def read_body(body: bytes) -> Body:
    """A body as it came, less its nulls; in any of the encodings that JSON may have. Raises
    JobFailure."""
    try:
        raw = _clean(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise JobFailure(f"the params are no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise JobFailure(f"the params are no JSON object but {short(raw)}")
    return raw


def convert(
    raw: Body, params: type[P], where: str = "", most: Mapping[str, float] | None = None
) -> P:
    """The typed params. `where`: the path of `raw` in its body, for what is said of a wrong field.
    `most`: what the deployment allows beside what the types do, by the paths of fields: the largest
    number, or the longest text. Raises JobFailure."""
    most = most or {}
    try:
        read = msgspec.convert(_fitted(raw, _type_of(params)), params)
    except msgspec.ValidationError as error:
        found = re.search(r"at `\$\.(.+)`", str(error))
        path = found[1] if found else ""
        missing = re.search(r"missing required field (`\w+`)", str(error))
        if missing:
            raise JobFailure(f"{where}{path}: {missing[1]} is missing") from None
        raise JobFailure(where + _explain(path, raw, params, most)) from None
    for path, limit in most.items():
        value = attrgetter(path)(read)
        if value is not None and (len(value) if isinstance(value, str) else value) > limit:
            raise JobFailure(where + _explain(path, raw, params, most))
    return read


def checked(given: Any, kind: type[K], where: str) -> K:
    """An object or a list. Raises JobFailure."""
    if given in ({}, []):
        return kind()  # the webui takes one for the other
    if not isinstance(given, kind):
        allowed = "an object" if kind is dict else "a list"
        raise JobFailure(f"{where}: got {short(given)}, allowed is {allowed}")
    return given


def ignored(
    raw: dict[str, Any],
    harmless: dict[str, tuple[object, ...]],
    known: Iterable[str],
    where: str = "",
) -> list[str]:
    """A warning for each field that asks for something and has no effect. `harmless`: fields
    without effect, each with the values that ask for nothing."""
    taken = set(known)
    return [
        f"{where}{cut(name)}: no effect here"
        for name, value in raw.items()
        if name not in taken and not any(means(value, one) for one in harmless.get(name, ()))
    ]


def means(given: Any, value: object) -> bool:
    """Whether it is this value, or a way to write it."""
    match value:
        case bool():
            return as_flag(given) is value
        case int() | float():
            return bool(as_number(given) == value)
    return bool(given == value)


def printable(raw: dict[str, Any]) -> dict[str, Any]:
    """A body as strict JSON can carry it back, without its pictures."""
    pictures = ("init_images", "mask", "latent_mask", "input_image", "image", "alwayson_scripts")
    return {key: _finite(value) for key, value in raw.items() if key not in pictures}


def short(value: object, limit: int = 60) -> str:
    """A value as an error message may quote it."""
    return cut(json.dumps(value, ensure_ascii=False, default=str), limit)


def cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _clean(value: Any, room: int = MOST_NESTED) -> Any:
    """Without nulls in objects, and without half characters (`"\\ud800"`) in texts, which neither a
    tokenizer nor a log takes. Raises ValueError for what is nested too deep."""
    if isinstance(value, dict | list) and room == 0:
        raise ValueError(f"more than {MOST_NESTED} levels of objects and lists")
    if isinstance(value, dict):
        return {
            _clean(key): _clean(item, room - 1) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [_clean(item, room - 1) for item in value]
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fitted(given: Any, kind: msgspec.inspect.Type) -> Any:
    """With what only is written in another way than its type wants it."""
    match kind:
        case msgspec.inspect.BoolType():
            return as_flag(given)
        case msgspec.inspect.IntType() | msgspec.inspect.LiteralType(values=(int(), *_)):
            return as_whole(given)
        case msgspec.inspect.FloatType():
            return as_number(given)
        case msgspec.inspect.StrType() if type(given) in (int, float):
            return str(given)
        case msgspec.inspect.ListType(item_type=item) if isinstance(given, list):
            return [_fitted(one, item) for one in given]
        case msgspec.inspect.StructType(fields=fields) if isinstance(given, dict):
            kinds = {field.name: field.type for field in fields}
            return {n: _fitted(v, kinds[n]) if n in kinds else v for n, v in given.items()}
        case msgspec.inspect.UnionType(types=kinds):
            same = next((one for one in kinds if _is_of(given, one)), None)
            if same is not None:
                return _fitted(given, same)
            others = [one for one in kinds if not isinstance(one, msgspec.inspect.StrType)]
            fitted = [(_fitted(given, one), one) for one in others]
            return next((value for value, one in fitted if _is_of(value, one)), given)
    return given


def _is_of(value: Any, kind: msgspec.inspect.Type) -> bool:
    match kind:
        case msgspec.inspect.BoolType():
            return isinstance(value, bool)
        case msgspec.inspect.IntType():
            return type(value) is int
        case msgspec.inspect.FloatType():
            return type(value) in (int, float)
        case msgspec.inspect.StrType():
            return isinstance(value, str)
        case msgspec.inspect.ListType():
            return isinstance(value, list)
        case msgspec.inspect.DictType() | msgspec.inspect.StructType():
            return isinstance(value, dict)
    return False


def _explain(path: str, raw: Any, params: type[msgspec.Struct], most: Mapping[str, float]) -> str:
    """The path of a wrong field -> field, what was got, what is allowed."""
    got: Any = raw
    kind = _type_of(params)
    for name, position in re.findall(r"(\w+)|\[(\d+)\]", path):
        if name and isinstance(kind, msgspec.inspect.StructType):
            field = next(field for field in kind.fields if field.name == name)
            got, kind = got.get(name, field.default), field.type
        elif position and isinstance(got, list):
            got = got[int(position)]
            kind = kind.item_type if isinstance(kind, msgspec.inspect.ListType) else kind
    if path in most:
        kind = _bounded(kind, most[path])
    # A reason goes to the logs; prompts do not.
    shown = short(got) if "prompt" not in path else f"another value ({type(got).__name__})"
    if isinstance(got, str) and len(got) > 60:
        shown = f"{len(got)} characters"
    return f"{path}: got {shown}, allowed is {_allowed(kind)}"


@cache
def _type_of(params: type[msgspec.Struct]) -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(params)


def _bounded(kind: msgspec.inspect.Type, limit: float) -> msgspec.inspect.Type:
    match kind:
        case msgspec.inspect.StrType():
            return msgspec.structs.replace(kind, max_length=int(limit))
        case msgspec.inspect.UnionType(types=kinds):
            return msgspec.structs.replace(kind, types=tuple(_bounded(k, limit) for k in kinds))
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            return msgspec.structs.replace(kind, le=limit)
    return kind


def _allowed(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.IntType(ge=int(low), le=int(high)):
            return f"a whole number from {low} to {high}"
        case msgspec.inspect.IntType(le=int(high)):
            return f"a whole number up to {high}"
        case msgspec.inspect.IntType(ge=int(low)):
            return f"a whole number from {low} on"
        case msgspec.inspect.FloatType(ge=(int() | float()) as low, le=(int() | float()) as high):
            return f"a number from {low:g} to {high:g}"
        case msgspec.inspect.FloatType(ge=(int() | float()) as low):
            return f"a number from {low:g} on"
        case msgspec.inspect.StrType(max_length=int(limit)):
            return f"a text of up to {limit} characters"
        case msgspec.inspect.StrType():
            return "a text"
        case msgspec.inspect.LiteralType(values=values):
            return f"one of {', '.join(str(value) for value in values if value != '')}"
        case msgspec.inspect.IntType():
            return "a whole number"
        case msgspec.inspect.FloatType():
            return "a number"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.ListType(item_type=item, min_length=least, max_length=most):
            count = f"{least or 0} to {most} items" if most is not None else "items"
            return f"a list of {count}, each {_allowed(item)}"
        case msgspec.inspect.UnionType(types=kinds):
            named = [_allowed(k) for k in kinds if not isinstance(k, msgspec.inspect.NoneType)]
            return " or ".join(named)
        case _:
            return "an object"
