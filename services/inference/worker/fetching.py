"""S3 as the worker uses it: what is missing fails the job, what is away is waited for."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import aiohttp
import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from services.inference.worker.engine import JobFailure
from shared.errors import Retry
from shared.logs import get_logger
from shared.objects import MISSING, Objects

log = get_logger(__name__)

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds for which an object store that is away is waited for, before it costs an attempt."""

STREAMS = 4
RANGE = 8 * 1024**2
"""Bytes that one request of one stream asks for."""
PIECE = 1024**2
"""Bytes that are written or hashed at once: what a stream has in memory."""

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


async def get_params(objects: Objects, bucket: str, key: str, *, most: int) -> bytes:
    async def work() -> bytes:
        asked = objects.client.get_object(Bucket=bucket, Key=key)
        response = await _found(asked, "the params object of this job")
        async with response["Body"]:
            if response["ContentLength"] > most:
                raise JobFailure(
                    f"the params have {response['ContentLength']} bytes; {most} are allowed"
                )
            params: bytes = await response["Body"].read()
            return params

    return await patiently(work)


class StoredFile(msgspec.Struct, frozen=True):
    """An object as it was found. `size` in bytes."""

    bucket: str
    key: str
    size: int
    etag: str


async def find_file(objects: Objects, bucket: str, key: str, what: str) -> StoredFile:
    """Raises JobFailure if there is no such object."""

    async def work() -> StoredFile:
        head = await _found(objects.client.head_object(Bucket=bucket, Key=key), what)
        return StoredFile(bucket, key, head["ContentLength"], head["ETag"])

    return await patiently(work)


async def fetch_file(objects: Objects, stored: StoredFile, fd: int) -> str:
    """Writes an object to `fd`, several ranges at once, and returns its SHA-256. A range that
    breaks off is fetched again alone. Whatever is raised, nothing writes to `fd` afterwards.

    What has come is hashed from the page cache as soon as nothing is missing before it: the file
    is not read from the disk again, and no range waits in memory for its turn."""
    starts = range(0, stored.size, RANGE)
    came = [asyncio.Event() for _ in starts]
    left = iter(enumerate(starts))

    async def stream() -> None:
        for number, start in left:
            end = min(start + RANGE, stored.size)
            await patiently(partial(_fetch_range, objects, stored, fd, start, end))
            came[number].set()

    async def hash_what_came() -> str:
        digest = hashlib.sha256()
        for number, start in enumerate(starts):
            await came[number].wait()
            await in_thread(_hash, digest, fd, start, min(start + RANGE, stored.size))
        return digest.hexdigest()

    try:
        async with asyncio.TaskGroup() as group:
            sha256 = group.create_task(hash_what_came())
            for _ in range(STREAMS):
                group.create_task(stream())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return sha256.result()


async def _fetch_range(objects: Objects, stored: StoredFile, fd: int, start: int, end: int) -> None:
    response = await objects.client.get_object(
        Bucket=stored.bucket,
        Key=stored.key,
        Range=f"bytes={start}-{end - 1}",
        IfMatch=stored.etag,
    )
    async with response["Body"] as body:
        if response["ContentLength"] != end - start:
            raise Retry(f"{response['ContentLength']} bytes offered, {end - start} wanted")
        while start < end:
            piece = bytearray()
            while len(piece) < min(PIECE, end - start):
                chunk = await body.content.read(PIECE)
                if not chunk:
                    raise Retry(f"a range broke off, {end - start - len(piece)} bytes are missing")
                piece += chunk
            await in_thread(_write, fd, piece, start)
            start += len(piece)


def _write(fd: int, piece: bytearray, at: int) -> None:
    left = memoryview(piece)
    while left:
        written = os.pwrite(fd, left, at)
        left, at = left[written:], at + written


def _hash(digest: Any, fd: int, start: int, end: int) -> None:
    while start < end:
        piece = os.pread(fd, min(PIECE, end - start), start)
        if not piece:
            raise OSError(f"the part file ends at {start}, {end} wanted")
        digest.update(piece)
        start += len(piece)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Work with a file descriptor. A thread can't be cancelled, so this waits for its end: nothing
    must use a descriptor that is another file's by then."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def put(objects: Objects, bucket: str, key: str, body: bytes, kind: str) -> None:
    async def work() -> None:
        await objects.client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=kind)

    await patiently(work)


async def _found(asked: Awaitable[Any], what: str) -> Any:
    """Raises JobFailure if there is no such object."""
    try:
        return await asked
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            raise JobFailure(f"{what} is not in the object store any more") from error
        raise


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
