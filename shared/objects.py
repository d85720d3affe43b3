"""S3: one client per process, and the keys under which things lie."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import aioboto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shared.settings import ObjectSettings

REMEMBERED_URLS = 10_000
MISSING = ("404", "NoSuchKey", "NotFound")


class Objects:
    """An S3 client that is opened once and shared by all tasks of a process.

    SigV4 and path style, since self-hosted S3 wants both; a few fast retries of its own."""

    def __init__(self, settings: ObjectSettings) -> None:
        self.settings = settings
        self.client: Any = None
        self._presigned: dict[tuple[str, str], tuple[str, float]] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Objects]:
        async with self._connect(self.settings.s3_url) as client:
            self.client = client
            yield self

    def _connect(self, url: str) -> Any:
        return aioboto3.Session().client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=self.settings.s3_access_key,
            aws_secret_access_key=self.settings.s3_secret_key,
            region_name=self.settings.s3_region,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"max_attempts": 3, "mode": "standard"},
                connect_timeout=3,
                read_timeout=60,
                max_pool_connections=32,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    async def presign_get(self, bucket: str, key: str, seconds: int) -> str:
        """A URL that is good for at least nine tenths of `seconds`. Signing is slow, and clients
        poll: the same URL is given out again while it is fresh."""
        now = time.monotonic()
        known = self._presigned.get((bucket, key))
        if known and known[1] > now:
            return known[0]
        url: str = await self.client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds
        )
        while len(self._presigned) >= REMEMBERED_URLS:
            del self._presigned[next(iter(self._presigned))]
        self._presigned[bucket, key] = (url, now + seconds / 10)
        return url

    async def size(self, bucket: str, key: str) -> int | None:
        """Bytes of an object, None if there is none. Raises botocore errors otherwise."""
        try:
            head = await self.client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in MISSING:
                return None
            raise
        return int(head["ContentLength"])

    async def delete_prefix(self, bucket: str, prefix: str) -> int:
        """Deletes every object under a prefix, which must end with `/`. Returns how many."""
        assert prefix.endswith("/"), "a prefix without / would reach into its neighbours"
        deleted = 0
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        async for page in pages:
            keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
            if keys:
                await self.client.delete_objects(
                    Bucket=bucket, Delete={"Objects": keys, "Quiet": True}
                )
                deleted += len(keys)
        return deleted

    async def check(self) -> None:
        """Raises unless S3 answers; a refusal by permission is an answer."""
        try:
            await self.client.head_bucket(Bucket=self.settings.s3_jobs_bucket)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
                raise


S3_AWAY = (BotoCoreError, ClientError)


def checkpoint_prefix(checkpoint_type: str, checkpoint_id: str) -> str:
    return f"{checkpoint_type}/checkpoint/custom/{checkpoint_id}"


def params_key(task_type: str, job_id: str) -> str:
    return f"{task_type}/infer_v2/{job_id}/api_param.json"


def result_prefix(job_id: str) -> str:
    return f"out/{job_id}/result/"
