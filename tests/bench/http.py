"""POST /roles and GET /inferences/{id} beside a bare Litestar + asyncpg route, in one run.

The rounds of both alternate, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import asyncpg
import msgspec

from deploy.local.client import Client
from deploy.local.installation import REPOSITORY
from deploy.local.stack import Stack
from tests.bench.report import Row, free_port

REQUESTS, ROUNDS = 100, 5
Call = Callable[[], Awaitable[None]]


async def measure(call: Call, concurrency: int, requests: int = REQUESTS) -> list[float]:
    """Milliseconds of each request."""
    left = iter(range(requests))
    times: list[float] = []

    async def work() -> None:
        for _ in left:
            started = time.perf_counter()
            await call()
            times.append((time.perf_counter() - started) * 1000)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return times


@asynccontextmanager
async def bare_server(stack: Stack) -> AsyncIterator[str]:
    port = free_port()
    environment = {
        **os.environ,
        "BARE_POSTGRES_URL": stack.installation.postgres_url("gateway"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare", str(port)], cwd=REPOSITORY, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(200):
                try:
                    await session.get(url)
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


async def run(stack: Stack, client: Client, job_id: str) -> list[Row]:
    state = client.get_job(job_id)
    rows = []
    async with bare_server(stack) as bare, aiohttp.ClientSession() as session:
        headers = {**client.headers, "content-type": "application/json"}
        await _insert_job(stack, job_id, state)

        def post(url: str) -> Call:
            async def call() -> None:
                body = {"role_name": f"bench {uuid.uuid4()}", "permissions": ["train:all"]}
                async with session.post(
                    f"{url}/roles", data=msgspec.json.encode(body), headers=headers
                ) as answer:
                    await answer.read()
                    assert answer.status == 201, answer.status

            return call

        def get(url: str) -> Call:
            async def call() -> None:
                async with session.get(f"{url}/inferences/{job_id}", headers=headers) as answer:
                    await answer.read()
                    assert answer.status == 200, answer.status

            return call

        for name, make in (("POST /roles", post), ("GET /inferences/{id}", get)):
            for concurrency in (1, 16):
                await measure(make(client.url), concurrency, 30)
                await measure(make(bare), concurrency, 30)
                ours: list[float] = []
                theirs: list[float] = []
                for _ in range(ROUNDS):
                    ours += await measure(make(client.url), concurrency)
                    theirs += await measure(make(bare), concurrency)
                rows.append(_row(f"{name}, concurrency {concurrency}", ours, theirs))
    return rows


async def _insert_job(stack: Stack, job_id: str, state: dict[str, Any]) -> None:
    connection = await asyncpg.connect(stack.installation.postgres_url("gateway"))
    await connection.execute(
        "INSERT INTO bench_jobs (id, state) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        job_id,
        msgspec.json.encode(state).decode(),
    )
    await connection.close()


def _row(name: str, ours: list[float], theirs: list[float]) -> Row:
    def quantiles(times: list[float]) -> tuple[float, float]:
        cuts = statistics.quantiles(times, n=100)
        return cuts[49], cuts[98]

    (p50, p99), (bare50, bare99) = quantiles(ours), quantiles(theirs)
    return Row(
        name,
        f"{p50:.1f} / {p99:.1f} ms",
        f"{bare50:.1f} / {bare99:.1f} ms",
        f"{p50 / bare50:.1f}× / {p99 / bare99:.1f}×",
    )
