from __future__ import annotations

from typing import Any

from litestar import MediaType, Response, get

from services.gateway.routes.answers import errors
from services.gateway.schemas import Message
from services.gateway.state import Gateway
from shared.health import run_checks


@get("/ping", operation_id="Ping", tags=["Ping"], responses=errors())
async def ping() -> Message:
    """Whether this client can connect and its API key is right."""
    return Message(200, "pong")


@get("/", operation_id="RootAPI", tags=["Ping"], responses=errors())
async def root() -> Message:
    """That somebody is here, as GET /ping says it too."""
    return Message(200, "OK")


@get("/healthz", include_in_schema=False, media_type=MediaType.JSON)
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@get("/readyz", include_in_schema=False, media_type=MediaType.JSON)
async def readyz(gateway: Gateway) -> Response[dict[str, Any]]:
    results = await run_checks(gateway.checks)
    ready = gateway.ready and all(result == "ok" for result in results.values())
    return Response({"ready": ready, "checks": results}, status_code=200 if ready else 503)


ROUTES = [ping, root, healthz, readyz]
