"""`/healthz` says that the process lives, `/readyz` that what it needs answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

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


def health_app(checks: Mapping[str, Check]) -> Callable[..., Awaitable[None]]:
    """A bare ASGI application; `checks` may be filled later."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, body = 404, b'{"message":"only /healthz and /readyz here"}'
        if scope["path"] == "/healthz":
            status, body = 200, b'{"status":"alive"}'
        elif scope["path"] == "/readyz":
            results = await run_checks(checks)
            ready = bool(results) and all(result == "ok" for result in results.values())
            status = 200 if ready else 503
            body = msgspec.json.encode({"ready": ready, "checks": results})
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
