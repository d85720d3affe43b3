"""A migration may only add: what the previous release writes and reads is still there, so its
processes go on while the schema is already the new one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from deploy.local.installation import REPOSITORY, ROLES
from deploy.local.stack import Stack
from shared.postgres import PLUMBING

RELEASED = {
    "gateway": 1,
    "identity": 1,
    "models": 1,
    "endpoints": 1,
    "inference": 2,
}
"""How many migrations the previous release has."""

VALUES = {
    "text": "'x'",
    "integer": "1",
    "bigint": "1",
    "double precision": "1",
    "boolean": "false",
    "timestamp with time zone": "now()",
    "jsonb": "'{}'",
    "bytea": "''",
    "ARRAY": "'{}'",
}
"""Something of every type that there is; the same text everywhere, so that references find it."""

Columns = dict[str, dict[str, str]]


@pytest.fixture
async def database(servers: Stack) -> AsyncIterator[asyncpg.Connection[Any]]:
    name = f"trial_{uuid4().hex[:8]}"
    admin = await asyncpg.connect(servers.installation.postgres_url("postgres", "postgres"))
    await admin.execute(f"CREATE DATABASE {name}")
    connection = await asyncpg.connect(servers.installation.postgres_url("postgres", name))
    try:
        yield connection
    finally:
        await connection.close()
        await admin.execute(f"DROP DATABASE {name}")
        await admin.close()


def migrations(service: str) -> list[Path]:
    return sorted((REPOSITORY / "services" / service / "migrations").glob("*.sql"))


async def columns_of(connection: asyncpg.Connection[Any]) -> Columns:
    """Table -> column -> type, in the order in which they were made."""
    rows = await connection.fetch(
        """
        SELECT table_name, column_name, data_type FROM information_schema.columns
        JOIN pg_class ON relname = table_name AND relkind = 'r'
        WHERE table_schema = 'public' ORDER BY pg_class.oid, ordinal_position
        """
    )
    found: Columns = {}
    for row in rows:
        found.setdefault(row["table_name"], {})[row["column_name"]] = row["data_type"]
    return found


async def add_a_row(
    connection: asyncpg.Connection[Any], table: str, columns: dict[str, str]
) -> None:
    """As a process would that knows these columns."""
    names = [name for name in columns if (table, name) != ("outbox", "id")]
    values = ", ".join(VALUES[columns[name]] for name in names)
    await connection.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})")


@pytest.mark.parametrize("service", ROLES)
async def test_the_previous_release_can_work_with_the_new_schema(
    database: asyncpg.Connection[Any], service: str
) -> None:
    await database.execute(PLUMBING.read_text())
    files = migrations(service)
    for file in files[: RELEASED[service]]:
        await database.execute(file.read_text())
    before = await columns_of(database)
    assert {"inbox", "outbox"} < set(before)
    for table, columns in before.items():
        await add_a_row(database, table, columns)
    for file in files[RELEASED[service] :]:
        await database.execute(file.read_text())
    after = await columns_of(database)
    for table, columns in before.items():
        assert columns.items() <= after[table].items(), f"{table} has lost what was read"
    for table in reversed(before):
        assert await database.fetchval(f"SELECT count(*) FROM {table}") == 1
        await database.execute(f"DELETE FROM {table}")
    for table, columns in before.items():
        await add_a_row(database, table, columns)


async def test_a_migration_that_takes_something_away_is_seen(
    database: asyncpg.Connection[Any],
) -> None:
    """Else the test above would be worth nothing."""
    await database.execute("CREATE TABLE trial (a text NOT NULL)")
    before = await columns_of(database)
    await database.execute("ALTER TABLE trial ADD COLUMN b integer NOT NULL")
    with pytest.raises(asyncpg.NotNullViolationError):
        await add_a_row(database, "trial", before["trial"])
    await database.execute("ALTER TABLE trial RENAME COLUMN a TO c")
    after = await columns_of(database)
    assert not before["trial"].items() <= after["trial"].items()
