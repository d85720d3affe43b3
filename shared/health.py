"""`/healthz` says that the process lives, `/readyz` that what it needs answers, `/metrics` how it
does (metrics.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from shared import metrics
from shared.metrics import Sampler

Check = Callable[[], Awaitable[object]]
"""Returns anything when all is well; raises otherwise."""

TIMEOUT = 2.0


async def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """Name -> "ok" or what is wrong, each check within TIMEOUT seconds."""

    async def run(check: Check) -> str:
        try:
            await asyncio.wait_for(_call(check), TIMEOUT)
            return "ok"
        except Exception as error:
            return f"{type(error).__name__}: {error}".strip(": ")

    names = list(checks)  # a process may add checks while these run
    results = await asyncio.gather(*(run(checks[name]) for name in names))
    return dict(zip(names, results, strict=True))


async def _call(check: Check) -> None:
    await check()


Page = Callable[[], Awaitable[bytes]]
"""One more thing to GET, as JSON."""


def health_app(
    checks: Mapping[str, Check],
    samplers: Sequence[Sampler] = (),
    pages: Mapping[str, Page] | None = None,
) -> Callable[..., Awaitable[None]]:
    """A bare ASGI application; `checks` and `samplers` may be filled later. `pages`: by path."""
    more = pages or {}
    paths = ["/healthz", "/readyz", "/metrics", *more]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path, kind = scope["path"], b"application/json"
        status, body = 404, msgspec.json.encode({"message": f"only {', '.join(paths)} here"})
        if path == "/healthz":
            status, body = 200, b'{"status":"alive"}'
        elif path == "/readyz":
            results = await run_checks(checks)
            ready = bool(results) and all(result == "ok" for result in results.values())
            status = 200 if ready else 503
            body = msgspec.json.encode({"ready": ready, "checks": results})
        elif path == "/metrics":
            body = await metrics.scrape(samplers, await run_checks(checks))
            status, kind = 200, metrics.CONTENT_TYPE
        elif path in more:
            status, body = 200, await more[path]()
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
