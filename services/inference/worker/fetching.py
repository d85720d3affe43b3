"""S3 as the worker uses it: what is missing fails the job, what is away is waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from services.inference.worker.engine import JobFailure
from shared.errors import Retry
from shared.logs import get_logger
from shared.objects import MISSING, Objects

log = get_logger(__name__)

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds for which an object store that is away is waited for, before it costs an attempt."""

AWAY = (BotoCoreError, ClientError, aiohttp.ClientError, ConnectionError, TimeoutError, Retry)


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Does the work again while the store is away. Raises JobFailure for what is no use repeating,
    and the last error when patience ends."""
    end, pause = time.monotonic() + PATIENCE, 0.25
    while True:
        try:
            return await work()
        except AWAY as error:
            if isinstance(error, ClientError) and _status(error) < 500:
                code = error.response["Error"]["Code"]
                raise JobFailure(f"the object store refused: {code}") from error
            if time.monotonic() > end:
                raise
            log.warning("waiting_for_s3", error=repr(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)


async def get(objects: Objects, bucket: str, key: str, what: str) -> Any:
    """The response of a GET. Raises JobFailure if there is no such object."""
    try:
        return await objects.client.get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            raise JobFailure(f"{what} is not in the object store any more") from error
        raise


async def get_params(objects: Objects, bucket: str, key: str, *, most: int) -> bytes:
    async def work() -> bytes:
        response = await get(objects, bucket, key, "the params object of this job")
        async with response["Body"]:
            if response["ContentLength"] > most:
                raise JobFailure(
                    f"the params have {response['ContentLength']} bytes; {most} are allowed"
                )
            params: bytes = await response["Body"].read()
            return params

    return await patiently(work)


async def put(objects: Objects, bucket: str, key: str, body: bytes, kind: str) -> None:
    async def work() -> None:
        await objects.client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=kind)

    await patiently(work)


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
