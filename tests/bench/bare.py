"""The peer of the HTTP benchmark: a Litestar route that inserts or reads one row, and no more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import uvicorn
from litestar import Litestar, get, post
from litestar.datastructures import State

SCHEMA = """
CREATE TABLE IF NOT EXISTS bench_roles (role_name text PRIMARY KEY, permissions text[] NOT NULL);
CREATE TABLE IF NOT EXISTS bench_jobs (id text PRIMARY KEY, state jsonb NOT NULL)
"""


class Role(msgspec.Struct):
    role_name: str
    permissions: list[str]


@post("/roles")
async def create_role(state: State, data: Role) -> dict[str, Any]:
    await state.pool.execute(
        "INSERT INTO bench_roles (role_name, permissions) VALUES ($1, $2)",
        data.role_name,
        data.permissions,
    )
    return {"statusCode": 201, "message": "role created"}


@get("/inferences/{id:str}")
async def get_inference(state: State, id: str) -> dict[str, Any]:
    text = await state.pool.fetchval("SELECT state::text FROM bench_jobs WHERE id = $1", id)
    return {"statusCode": 200, "data": msgspec.json.decode(text), "message": "OK"}


@contextlib.asynccontextmanager
async def with_pool(app: Litestar) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["BARE_POSTGRES_URL"], min_size=4) as pool:
        await pool.execute(SCHEMA)
        app.state.pool = pool
        yield


if __name__ == "__main__":
    app = Litestar([create_role, get_inference], lifespan=[with_pool], openapi_config=None)
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
