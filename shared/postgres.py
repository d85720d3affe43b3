"""Connections and migrations. Every service connects as its own role into its own schema."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from shared.logs import get_logger

log = get_logger(__name__)

PLUMBING = Path(__file__).with_name("outbox.sql")


async def _prepare(connection: asyncpg.Connection[Any]) -> None:
    for kind in ("json", "jsonb"):
        await connection.set_type_codec(
            kind,
            encoder=lambda value: msgspec.json.encode(value).decode(),
            decoder=lambda text: msgspec.json.decode(text),
            schema="pg_catalog",
        )


async def connect_pool(
    url: str, *, size: int = 8, server_settings: dict[str, str] | None = None
) -> asyncpg.Pool[Any]:
    """Waits for the server as long as it takes: a service may start before its database."""
    pause = 0.1
    while True:
        try:
            return await asyncpg.create_pool(
                url,
                min_size=1,
                max_size=size,
                command_timeout=30,
                init=_prepare,
                server_settings=server_settings or {},
            )
        except (OSError, asyncpg.PostgresError) as error:
            log.warning("waiting_for_postgres", error=repr(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


AWAY = (
    ConnectionError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
)
"""What asyncpg raises while the server is away or restarting."""


async def migrate(url: str, folder: Path) -> list[str]:
    """Applies the `.sql` files of `folder` that have not run yet, in order of name, each in its own
    transaction, as the role that owns the schema. Returns the names of those applied."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SELECT pg_advisory_lock(hashtext(current_schema()))")
        await connection.execute(PLUMBING.read_text())
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations"
            " (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        done = {row["name"] for row in await connection.fetch("SELECT name FROM migrations")}
        applied = []
        for file in sorted(folder.glob("*.sql")):
            if file.name in done:
                continue
            async with connection.transaction():
                await connection.execute(file.read_text())
                await connection.execute("INSERT INTO migrations (name) VALUES ($1)", file.name)
            applied.append(file.name)
        return applied
    finally:
        await connection.close()
