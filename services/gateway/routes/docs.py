"""The description of the API: as OpenAPI 3.1 for programs, as a page for people; and of the events
on the bus, as AsyncAPI 3.0."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Request, Response, get

from services.gateway.routes.answers import errors
from shared.contracts import asyncapi

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line) }
section { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; padding: .2rem 1rem }
section h3 { font: 600 1rem ui-monospace, monospace; margin: .6rem 0 }
b.get { color: #2a7 } b.post { color: #27c } b.put { color: #b70 } b.delete { color: #c33 }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0 }
code, pre { font: .85rem ui-monospace, monospace; background: var(--soft); border-radius: 4px }
pre { padding: .6rem; overflow-x: auto }
summary { cursor: pointer; margin: .4rem 0 }
"""


_GENERIC = re.compile(rb"Answer_services\.gateway\.schemas\.(\w+)_")

ALSO_CALLED = {"ListInferenceJobs": "ListInferences", "StartInferences": "StartInferenceJob"}
"""What another version of ESD calls an operation. An operation has one name, so the other one
stands in an extension of its path: clients of ESD look through all that a path has."""
NO_CONTENT = {"type": "object", "maxProperties": 0, "description": "A 204 has no body"}
"""Clients of ESD look for the schema of every answer, and of the empty one too."""


@cache
def _describe(app: Litestar) -> dict[str, Any]:
    """As Litestar makes it, but that `Answer[Roles]` is called `RolesAnswer` and does not say in
    which module the class lies, and with what ESD's clients look for."""
    made = msgspec.json.encode(app.openapi_schema.to_schema())
    api: dict[str, Any] = msgspec.json.decode(_GENERIC.sub(rb"\1Answer", made))
    schemas = api["components"]["schemas"]
    api["components"]["schemas"] = {
        **{name: _inlined(schema, schemas) for name, schema in schemas.items()},
        "NoContent": NO_CONTENT,
    }
    for methods in api["paths"].values():
        for operation in list(methods.values()):
            if empty := operation["responses"].get("204"):
                schema = {"$ref": "#/components/schemas/NoContent"}
                empty["content"] = {"application/json": {"schema": schema}}
            if also := ALSO_CALLED.get(operation["operationId"]):
                methods[f"x-{also}"] = {**operation, "operationId": also}
    return api


def _inlined(schema: Any, schemas: dict[str, Any]) -> Any:
    """The schema with those that it refers to in their places, so that it can be used alone."""
    match schema:
        case {"$ref": str(reference), **beside}:
            referred = _inlined(schemas[reference.rsplit("/", 1)[1]], schemas)
            return {**referred, **beside}
        case dict():
            return {key: _inlined(value, schemas) for key, value in schema.items()}
        case list():
            return [_inlined(value, schemas) for value in schema]
    return schema


@get("/api", operation_id="GetApi", tags=["Description"], responses=errors())
async def get_api(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """This API as OpenAPI 3.1."""
    return _describe(request.app)


@cache
def _describe_events() -> dict[str, Any]:
    return asyncapi.document()


@get("/asyncapi", operation_id="GetAsyncApi", tags=["Description"], responses=errors())
async def get_asyncapi() -> dict[str, Any]:
    """The events on the bus, for programs that subscribe at NATS, as AsyncAPI 3.0."""
    return _describe_events()


@get("/docs", include_in_schema=False, media_type=MediaType.HTML)
async def get_docs(request: Request[Any, Any, Any]) -> Response[str]:
    """The same for people. One page, no scripts, nothing fetched from elsewhere."""
    page = render(_describe(request.app))
    policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(page, media_type=MediaType.HTML, headers=policy)


def render(api: dict[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    groups: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            if not method.startswith("x-"):
                tag = operation.get("tags", ["Other"])[0]
                groups.setdefault(tag, []).append(_operation(api, path, method, operation))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in groups.items())
    info = api["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"<p>{escape(info.get('description', ''))}</p>"
        "<p>Machine-readable: <a href='api'><code>GET /api</code></a>; the events on the bus: "
        f"<a href='asyncapi'><code>GET /asyncapi</code></a></p>{body}</html>"
    )


def _operation(api: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<section id='{escape(operation['operationId'])}'><h3><b class={method}>{method.upper()}"
        f"</b> {escape(path)}</h3><p>{escape(operation.get('description', ''))}</p>"
    ]
    rows = [
        (f"{p['name']} ({p['in']})", _type(api, p.get("schema", {})))
        for p in operation.get("parameters", [])
    ]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    rows += _properties(api, content.get("schema", {}))
    if rows:
        cells = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>"
            for name, text in rows
        )
        parts.append(f"<table>{cells}</table>")
    answers = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(answer.get('description', ''))}</td></tr>"
        for status, answer in operation.get("responses", {}).items()
    )
    parts.append(f"<details><summary>Answers</summary><table>{answers}</table></details></section>")
    return "".join(parts)


def _resolve(api: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        found: dict[str, Any] = api["components"]["schemas"][name]
        return found
    return schema


def _properties(api: dict[str, Any], schema: dict[str, Any]) -> list[tuple[str, str]]:
    schema = _resolve(api, schema)
    required = schema.get("required", [])
    return [
        (name, _type(api, value) + ("" if name in required else ", optional"))
        for name, value in schema.get("properties", {}).items()
    ]


def _type(api: dict[str, Any], schema: dict[str, Any]) -> str:
    schema = _resolve(api, schema)
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(api, part) for part in schema[several]))
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(api, schema.get('items', {}))}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


ROUTES = [get_api, get_asyncapi, get_docs]
