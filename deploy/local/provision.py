"""Brings the servers to the declared state: roles and schemas, migrations, streams, buckets.

Safe to run again at any time: it makes what is missing, updates what differs and never deletes.
Each part waits for its server, so it may be started together with them.

    python -m deploy.local.provision
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import boto3
import nats
import nats.errors
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, StreamConfig
from nats.js.errors import APIError, BadRequestError, ServiceUnavailableError

from deploy.local.installation import (
    JOBS_BUCKET,
    MODELS_BUCKET,
    REPOSITORY,
    ROLES,
    Installation,
)
from shared.contracts.subjects import CONSUMERS, STREAMS
from shared.postgres import migrate

DATABASE = "darkroom"
STREAM_DIFFERS = 10058

T = TypeVar("T")


async def _when_it_answers(
    attempt: Callable[[], Awaitable[T]], away: tuple[type[Exception], ...], seconds: float = 60.0
) -> T:
    """Tries until the server is up. Raises the last error after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await attempt()
        except away:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.05)


# Postgres

POSTGRES_AWAY = (OSError, TimeoutError, asyncpg.CannotConnectNowError)


@asynccontextmanager
async def _superuser(
    installation: Installation, database: str
) -> AsyncIterator[asyncpg.Connection[Any]]:
    url = installation.postgres_url("postgres", database)
    connection = await _when_it_answers(lambda: asyncpg.connect(url), POSTGRES_AWAY)
    try:
        yield connection
    finally:
        await connection.close()


async def provision_postgres(installation: Installation) -> None:
    """One role per service that owns one schema of the same name and can see no other."""
    async with _superuser(installation, "postgres") as connection:
        for role in ROLES:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
                await _execute(connection, "CREATE ROLE %I LOGIN", role)
            password = installation.secrets.postgres[role]
            await _execute(connection, "ALTER ROLE %I PASSWORD %L", role, password)
            await _execute(connection, "ALTER ROLE %I SET search_path = %I", role, role)
        if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
            await _execute(connection, "CREATE DATABASE %I", DATABASE)
        for database in (DATABASE, "postgres", "template1"):
            await _execute(connection, "REVOKE ALL ON DATABASE %I FROM PUBLIC", database)
        for role in ROLES:
            await _execute(connection, "GRANT CONNECT ON DATABASE %I TO %I", DATABASE, role)
    async with _superuser(installation, DATABASE) as connection:
        await connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        for role in ROLES:
            await _execute(
                connection, "CREATE SCHEMA IF NOT EXISTS %I AUTHORIZATION %I", role, role
            )


async def _execute(connection: asyncpg.Connection[Any], template: str, *names: str) -> None:
    """DDL takes no parameters: Postgres' own format() quotes identifiers (%I) and literals (%L)."""
    statement = await connection.fetchval(
        "SELECT format($1, VARIADIC $2::text[])", template, list(names)
    )
    await connection.execute(statement)


async def migrate_all(installation: Installation) -> dict[str, list[str]]:
    """Applies the migrations of every service that has some, each as its own role.

    Returns the names of those applied, by service."""
    applied = {}
    for role in ROLES:
        folder = REPOSITORY / "services" / role / "migrations"
        if folder.is_dir():
            applied[role] = await migrate(installation.postgres_url(role), folder)
    return applied


# NATS


async def provision_nats(
    installation: Installation,
    streams: list[StreamConfig] = STREAMS,
    consumers: list[tuple[str, ConsumerConfig]] = CONSUMERS,
    *,
    replicas: int = 1,
) -> None:
    """`replicas`: how many servers of a cluster keep each stream, and its consumers."""
    client = await _when_it_answers(
        lambda: nats.connect(
            installation.nats_url.split(","),
            user="admin",
            password=installation.secrets.nats["admin"],
            inbox_prefix=b"_INBOX_admin",
            allow_reconnect=False,
            error_cb=_quiet,
        ),
        (OSError, TimeoutError, nats.errors.Error),
    )
    try:
        jetstream = client.jetstream()
        created = [
            await _when_it_answers(
                partial(_declare_stream, jetstream, replace(stream, num_replicas=replicas)),
                (ServiceUnavailableError, TimeoutError),  # a cluster that has no leader yet
            )
            for stream in streams
        ]
        for stream_name, consumer in consumers:
            await _declare_consumer(jetstream, stream_name, consumer)
    finally:
        await client.close()
    if any(created):
        await asyncio.to_thread(_flush, installation.data / "nats")


def _flush(folder: Path) -> None:
    """NATS itself leaves a new stream's files to the system, which may take half a minute: a power
    cut would take the whole stream with it."""
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


async def _quiet(_: Exception) -> None:
    """The client would print what the caller is told anyway."""


async def _declare_stream(jetstream: JetStreamContext, config: StreamConfig) -> bool:
    """Creates or updates, and keeps the messages. Returns whether it was created. Raises
    RuntimeError for what can't be changed: the stream stays as it is then."""
    try:
        return bool((await jetstream.add_stream(config)).did_create)
    except BadRequestError as error:
        if error.err_code != STREAM_DIFFERS:
            raise
    try:
        await jetstream.update_stream(config)
    except APIError as error:
        raise RuntimeError(
            f"stream {config.name} can't be changed to what is declared: {error.description}"
        ) from error
    print(f"updated stream {config.name}", flush=True)
    return False


async def _declare_consumer(
    jetstream: JetStreamContext, stream: str, config: ConsumerConfig
) -> None:
    """Creates or updates. Some settings can't be changed on a consumer that exists: that is an
    error here, since deleting it would lose its place in the stream."""
    try:
        await jetstream.add_consumer(stream, config)
    except APIError as error:
        raise RuntimeError(
            f"consumer {config.durable_name} of {stream} can't be changed to what is declared:"
            f" {error.description}"
        ) from error


# S3

CORS = {
    "CORSRules": [
        {
            "AllowedOrigins": ["*"],  # what protects an object is its signed URL
            "AllowedMethods": ["GET", "HEAD", "PUT"],
            "AllowedHeaders": ["*"],
            "ExposeHeaders": ["ETag"],  # a browser must read it to complete a multipart upload
            "MaxAgeSeconds": 3600,
        }
    ]
}


def s3_client(installation: Installation) -> Any:
    """As the administrator of the object store."""
    key = installation.secrets.s3["admin"]
    return boto3.client(
        "s3",
        endpoint_url=installation.s3_url,
        aws_access_key_id=key.access_key,
        aws_secret_access_key=key.secret_key,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=3,
            read_timeout=30,
            retries={"max_attempts": 1},
        ),
    )


async def provision_s3(installation: Installation) -> None:
    client = s3_client(installation)

    async def declare(bucket: str) -> None:
        exists = (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists)
        with suppress(*exists):
            await asyncio.to_thread(client.create_bucket, Bucket=bucket)
        await asyncio.to_thread(client.put_bucket_cors, Bucket=bucket, CORSConfiguration=CORS)

    for bucket in (MODELS_BUCKET, JOBS_BUCKET):
        await _when_it_answers(partial(declare, bucket), (BotoCoreError, ClientError))
    client.close()


async def provision(installation: Installation, *, replicas: int = 1) -> None:
    async def postgres() -> None:
        await provision_postgres(installation)
        for role, names in (await migrate_all(installation)).items():
            if names:
                print(f"{role}: applied {', '.join(names)}", flush=True)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(postgres())
        tasks.create_task(provision_nats(installation, replicas=replicas))
        tasks.create_task(provision_s3(installation))


if __name__ == "__main__":
    sys.exit(asyncio.run(provision(Installation.open())))
