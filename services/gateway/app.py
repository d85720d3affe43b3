"""Wires the gateway: opens what it needs in the background, and serves from the first moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn
from litestar import Litestar
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from services.gateway import compat, errors, metrics
from services.gateway.auth import check_api_key
from services.gateway.bodies import body_check
from services.gateway.dispatch import Dispatcher
from services.gateway.events import Hub
from services.gateway.projections import Projector
from services.gateway.routes import ROUTES
from services.gateway.settings import Settings
from services.gateway.state import Gateway
from services.gateway.views import Views
from shared import bus, logs, tracing
from shared.contracts import endpoints, identity, inference, models
from shared.contracts import envelope as cloud
from shared.contracts.registry import type_of
from shared.contracts.subjects import command_subject
from shared.postgres import connect_pool
from shared.service import HealthServer
from shared.settings import ObjectSettings
from shared.webui.styles import check_styles

log = logs.get_logger(__name__)

OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/api", "/asyncapi")
"""Served without an API key: health for orchestrators, and the public description of the API."""
ALWAYS = (*OPEN_PATHS, "/", "/ping")
"""Served while the servers behind are still waited for."""

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def _make_app(gateway: Gateway) -> Litestar:
    return Litestar(
        route_handlers=ROUTES,
        dependencies={"gateway": Provide(lambda: gateway, sync_to_thread=False, use_cache=True)},
        exception_handlers=errors.handlers(compat.phrase if gateway.settings.esd_compat else str),
        before_request=body_check(esd_compat=gateway.settings.esd_compat),
        request_max_body_size=(
            gateway.settings.max_params_bytes
            if gateway.settings.esd_compat
            else gateway.settings.max_body_bytes
        ),
        openapi_config=OpenAPIConfig(
            title="Darkroom",
            version="1.4.0",
            description="Stable Diffusion for teams: the ESD 1.4.0 API on your own machines. "
            "Every call carries x-api-key; all but POST /auth/token and GET /ping also carry "
            "Authorization: Bearer <token>.",
            path=None,
            use_handler_docstrings=True,
            security=[{"apiKey": [], "person": []}],
            components=Components(
                security_schemes={
                    "apiKey": SecurityScheme(
                        type="apiKey", name="x-api-key", security_scheme_in="header"
                    ),
                    "person": SecurityScheme(type="http", scheme="bearer"),
                }
            ),
        ),
        middleware=_middleware(),
        lifespan=[lambda _: _opened(gateway)],
        logging_config=None,
    )


def _middleware() -> list[Any]:
    """Litestar's own, for metrics and, where somebody collects them, traces."""
    if not tracing.enabled():
        return [metrics.HTTP.middleware]
    from litestar.plugins.opentelemetry import OpenTelemetryConfig

    def on_request(span: Any, scope: dict[str, Any]) -> None:
        span.set_attribute("darkroom.correlation_id", scope["state"]["correlation_id"])

    traces = OpenTelemetryConfig(
        scope_span_details_extractor=lambda scope: (str(scope.get("method")), {}),
        server_request_hook_handler=on_request,
        exclude=["^/healthz$", "^/readyz$"],
        exclude_spans=["receive", "send"],
    )
    return [traces.middleware, _named_by_route, metrics.HTTP.middleware]


def _named_by_route(app: Asgi) -> Asgi:
    """Litestar puts its traces around the routing, where the route is not known yet."""

    async def named(scope: Any, receive: Any, send: Any) -> None:
        tracing.name_span(f"{scope['method']} {scope['path_template']}")
        await app(scope, receive, send)

    return named


@contextlib.asynccontextmanager
async def _opened(gateway: Gateway) -> AsyncIterator[None]:
    opening = asyncio.create_task(_open(gateway))
    opening.add_done_callback(_end_if_failed)
    try:
        async with _showing_metrics(gateway):
            yield
    finally:
        while not opening.done():
            opening.cancel()
            await asyncio.wait({opening}, timeout=1)  # a library may swallow the first
        await asyncio.to_thread(tracing.close)  # uvicorn ends this process by a signal


def _showing_metrics(gateway: Gateway) -> AbstractAsyncContextManager[None]:
    settings = gateway.settings
    if not settings.metrics_port:
        return contextlib.nullcontext()
    return HealthServer(
        settings,
        gateway.checks,
        gateway.samplers,
        pages={"/workers": gateway.list_workers},
        port=settings.metrics_port,
    ).serving()


def _end_if_failed(opening: asyncio.Task[None]) -> None:
    """A gateway that follows no events is of no use: whoever started it starts another."""
    if not opening.cancelled() and (error := opening.exception()):
        log.critical("gateway_failed", exc_info=error)
        os._exit(1)


async def _open(gateway: Gateway) -> None:
    """Waits for Postgres and NATS, then follows the events until the process stops."""
    settings = gateway.settings
    if settings.esd_compat:
        compat.announce()
    gateway.pool = await connect_pool(
        settings.postgres_url, size=12, server_settings={"synchronous_commit": "off"}
    )
    while not await gateway.pool.fetchval("SELECT to_regclass('position') IS NOT NULL"):
        log.warning("waiting_for_migrations")
        await asyncio.sleep(0.5)
    renew = asyncio.Event()

    async def on_reconnect() -> None:
        renew.set()

    client = await bus.connect(settings, on_reconnect)
    js = client.jetstream()

    async def resync() -> set[str]:
        sent = set()
        for owner, command in (
            ("identity", identity.ResyncIdentity()),
            ("models", models.ResyncModels()),
            ("endpoints", endpoints.ResyncEndpoints()),
            ("inference", inference.ResyncInference()),
        ):
            name = type_of(command)
            framed = cloud.wrap(command, type=name, source="gateway", subject=owner)
            await js.publish(command_subject(name), cloud.encode(framed), timeout=5)
            sent.add(framed.id)
        return sent

    async with gateway.objects.open():
        gateway.views = Views(gateway.pool)
        gateway.projector = Projector(gateway.pool, js, gateway.directory, resync, renew)
        gateway.dispatcher = Dispatcher(client, js, gateway.pool, settings.command_timeout)
        gateway.projector.listeners.append(gateway.dispatcher.on_events)
        gateway.hub = Hub(gateway.projector, js)
        await gateway.hub.follow_progress(client)
        await gateway.pulses.follow(client)
        gateway.samplers.append(metrics.log_sampler(js, lambda: gateway.projector.seq))
        metrics.STREAMS.set_function(lambda: gateway.hub.count)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(gateway.projector.run())
            tasks.create_task(gateway.dispatcher.forget_old_keys())
            await gateway.projector.complete.wait()  # before that, nobody would be known here
            gateway.checks |= {
                "postgres": lambda: gateway.pool.fetchval("SELECT 1"),
                "s3": gateway.objects.check,
            }
            gateway.ready = True
            log.info("ready", service="gateway")


class Gate:
    """Around everything, unknown paths included: API key first, then are we up; correlation id
    and common headers on every answer."""

    def __init__(self, app: Asgi, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        self._settings = gateway.settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._settings.esd_compat:
            scope["path"] = compat.strip_prefix(scope["path"])
            scope["raw_path"] = scope["path"].encode()
            scope["query_string"] = compat.without_empty(scope["query_string"])
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        correlation_id = headers.get(b"x-correlation-id", "")[:100] or cloud.new_id()
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        logs.bind(correlation_id)
        send = self._with_headers(send, correlation_id)
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        path = scope["path"].rstrip("/") or "/"
        if scope["method"] == "OPTIONS" and self._cors_origin and b"x-api-key" not in headers:
            # A browser asks beforehand, with no header of the request to come.
            await _answer(send, 204, b"")
        elif path not in OPEN_PATHS and not check_api_key(
            headers.get(b"x-api-key"), self._settings.api_key_sha256
        ):
            await _refuse(send, 403, "x-api-key is missing or wrong")
        elif "\0" in path or b"%00" in scope["query_string"]:
            await _refuse(send, 400, "the URL holds %00; leave it out")
        elif path not in ALWAYS and not self._gateway.ready:
            message = "Darkroom is starting; try again"
            await _refuse(send, 503, message, [(b"retry-after", b"2")])
        else:
            await self._app(scope, receive, send)

    @property
    def _cors_origin(self) -> str:
        return "*" if self._settings.esd_compat else self._settings.cors_origin

    def _with_headers(self, send: Any, correlation_id: str) -> Any:
        more = {"x-correlation-id": correlation_id, "x-content-type-options": "nosniff"}
        if self._settings.esd_compat:
            more |= compat.HEADERS
        else:
            more["x-api-version"] = compat.API_VERSION
            if self._cors_origin:
                more |= {
                    **compat.HEADERS,
                    "Access-Control-Allow-Origin": self._cors_origin,
                }
        extra = [(name.lower().encode(), value.encode("latin-1")) for name, value in more.items()]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = map(_allowing_head, message.get("headers", []))
                message = {**message, "headers": [*given, *extra]}
            await send(message)

        return with_headers


def _allowing_head(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """`Allow` as Litestar makes it knows nothing of HEAD."""
    name, value = header
    return (name, value.replace(b"GET", b"GET, HEAD")) if name.lower() == b"allow" else header


def _without_body(send: Any) -> Any:
    """For HEAD: the start of what GET answers. A stream of events is over with it, too."""

    async def without_body(message: Any) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return without_body


async def _refuse(
    send: Any, status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    metrics.REFUSED.labels(status).inc()
    await _answer(send, status, errors.body(status, message), headers)


async def _answer(
    send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    start = [(b"content-type", b"application/json"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def make_asgi(settings: Settings, object_settings: ObjectSettings) -> Asgi:
    gateway = Gateway(settings, object_settings)
    return Gate(_make_app(gateway), gateway)


def run(settings: Settings, object_settings: ObjectSettings) -> None:
    check_styles(settings.webui.styles)
    logs.configure("gateway", settings.log_level)
    tracing.configure("gateway", settings.otlp_url)
    uvicorn.run(
        make_asgi(settings, object_settings),
        host=settings.http_host,
        port=settings.http_port,
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,  # open event streams would hold it for ever
    )
