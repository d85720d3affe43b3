"""One module per resource; `ROUTES` is all of them."""

from __future__ import annotations

from typing import Any

from litestar import Response, route
from litestar.handlers import HTTPRouteHandler

from services.gateway.routes import (
    checkpoints,
    docs,
    endpoints,
    events,
    inferences,
    ping,
    roles,
    tokens,
    users,
)

_RESOURCES: list[Any] = [
    *ping.ROUTES,
    *roles.ROUTES,
    *users.ROUTES,
    *tokens.ROUTES,
    *checkpoints.ROUTES,
    *endpoints.ROUTES,
    *inferences.ROUTES,
    *events.ROUTES,
    *docs.ROUTES,
]


def _options(path: str) -> HTTPRouteHandler:
    """Litestar's own answer to OPTIONS tells only of the first route of a path. It makes none where
    there is one already, so these come first."""
    methods = [m for handler in _RESOURCES if path in handler.paths for m in handler.http_methods]
    headers = {"Allow": ", ".join(sorted({*methods, "OPTIONS"}))}

    @route(path, http_method="OPTIONS", status_code=204, include_in_schema=False)
    async def options() -> Response[None]:
        return Response(None, status_code=204, headers=headers)

    return options


ROUTES = [
    *map(_options, sorted({path for handler in _RESOURCES for path in handler.paths})),
    *_RESOURCES,
]
