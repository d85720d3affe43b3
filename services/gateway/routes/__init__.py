"""One module per resource; `ROUTES` is all of them."""

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

ROUTES = [
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
