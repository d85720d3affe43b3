"""What the routes work with: everything that the gateway opened, under one name."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import asyncpg
from litestar import Request

from services.gateway.auth import Authenticator, Person
from services.gateway.dispatch import Dispatcher, Ticket, make_ticket
from services.gateway.errors import ApiError, Unavailable
from services.gateway.events import Hub
from services.gateway.metrics import targets
from services.gateway.projections import Directory, Projector
from services.gateway.pulses import Pulses
from services.gateway.settings import Settings
from services.gateway.views import Views
from shared.health import Check
from shared.metrics import Sampler
from shared.objects import Objects
from shared.settings import ObjectSettings

PARAMS_AT_ONCE = 4
"""Of jobs that are started: each takes as much memory as it is long."""


class Gateway:
    """Filled while the servers answer; `ready` once all are there."""

    def __init__(self, settings: Settings, object_settings: ObjectSettings) -> None:
        self.settings = settings
        self.directory = Directory()
        self.authenticator = Authenticator(
            self.directory,
            settings.token_secret,
            settings.token_seconds,
            compat=settings.esd_compat,
        )
        self.objects = Objects(object_settings)
        self.pulses = Pulses()
        self.ready = False
        self.checks: dict[str, Check] = {"nats": self._check_log}
        self.samplers: list[Sampler] = []
        self.params_reading = asyncio.Semaphore(PARAMS_AT_ONCE)
        self.pool: asyncpg.Pool[Any]
        self.views: Views
        self.projector: Projector
        self.dispatcher: Dispatcher
        self.hub: Hub

    async def list_workers(self) -> bytes:
        """For whoever scrapes their metrics."""
        return targets(self.pulses.all())

    async def _check_log(self) -> None:
        if not self.ready or not self.projector.healthy:
            raise RuntimeError("not following the event log yet")

    async def authorize(self, request: Request[Any, Any, Any], permission: str | None) -> Person:
        """Raises ApiError 401 without a valid person, 403 without the permission."""
        await self.catch_up()
        return self.authenticator.authorize(request, permission)

    async def catch_up(self) -> None:
        """Before anybody asks what is in memory: another replica may have answered a write a moment
        ago, and what it answered (a new role, a revoked token) holds here as well."""
        if not await self.projector.catch_up():
            raise Unavailable("the event log")

    async def ticket(self, request: Request[Any, Any, Any], person: Person | None) -> Ticket:
        """For one writing request. Raises 503 while the projection can't follow: an answer would
        never be seen."""
        if not self.projector.healthy:
            raise Unavailable("the event log")
        return make_ticket(
            actor=person.username if person else "",
            correlation_id=request.scope["state"]["correlation_id"],
            route=f"{request.method} {request.url.path}",
            key=request.headers.get("idempotency-key"),
            body=await request.body(),
            traceparent=_traceparent(request.headers.get("traceparent")),
        )


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _traceparent(given: str | None) -> str | None:
    """The caller's W3C trace context, if it is one: it goes with the command and its events."""
    return given if given and _TRACEPARENT.fullmatch(given) else None


def check_page(page: int, per_page: int) -> None:
    if not 1 <= page <= 1_000_000_000 or not 1 <= per_page <= 1000:
        raise ApiError(400, "page starts at 1, per_page goes from 1 to 1000")
