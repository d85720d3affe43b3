"""S3: one client per process, and the keys under which things lie."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Set
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import aioboto3
import aiohttp
import msgspec
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, ResponseStreamingError

from shared.settings import ObjectSettings

MAX_PARAMS = 64 * 1024**2
"""Bytes of the params of a job."""
MISSING = ("404", "NoSuchKey", "NotFound")


class StoredParams(msgspec.Struct, frozen=True):
    """`body` is empty where it is larger than MAX_PARAMS. `written_at`: to the second."""

    body: bytes
    written_at: datetime


class Objects:
    """An S3 client that is opened once and shared by all tasks of a process.

    SigV4 and path style, since self-hosted S3 wants both; a few fast retries of its own."""

    def __init__(self, settings: ObjectSettings) -> None:
        self.settings = settings
        self.client: Any = None

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

    def presign(self, method: str, bucket: str, key: str, seconds: int, **query: str | int) -> str:
        """A URL with which its holder may do this one thing for `seconds`.

        Straight from botocore's signer, which takes a tenth of a millisecond; a client's
        `generate_presigned_url` takes ten times as long, and lists and polls need many."""
        base = (self.settings.s3_public_url or self.settings.s3_url).rstrip("/")
        request = AWSRequest(
            method, f"{base}/{bucket}/{quote(key, safe='/-_.~')}", params=dict(query)
        )
        credentials = Credentials(self.settings.s3_access_key, self.settings.s3_secret_key)
        S3SigV4QueryAuth(credentials, "s3", self.settings.s3_region, expires=seconds).add_auth(
            request
        )
        url: str = request.prepare().url
        return url

    async def size(self, bucket: str, key: str) -> int | None:
        """Bytes of an object, None if there is none. Raises botocore errors otherwise."""
        head = await self._head(bucket, key)
        return None if head is None else int(head["ContentLength"])

    async def written_at(self, bucket: str, key: str) -> datetime | None:
        """To the second. None if there is no such object. Raises botocore errors otherwise."""
        head = await self._head(bucket, key)
        return None if head is None else head["LastModified"].astimezone(UTC)

    async def find_params(self, bucket: str, key: str) -> StoredParams | None:
        """None if there are none. Raises botocore errors otherwise."""
        try:
            found = await self.client.get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in MISSING:
                return None
            raise
        try:
            async with found["Body"]:
                body = await found["Body"].read() if found["ContentLength"] <= MAX_PARAMS else b""
        except aiohttp.ClientError as error:  # of which aiobotocore translates some
            raise ResponseStreamingError(error=error) from error
        return StoredParams(body, found["LastModified"].astimezone(UTC))

    async def _head(self, bucket: str, key: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = await self.client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in MISSING:
                return None
            raise
        return head

    async def delete_prefix(self, bucket: str, prefix: str, *, keep: Set[str] = frozenset()) -> int:
        """Deletes every object under a prefix, which must end with `/`, but those whose keys are
        in `keep`. Returns how many."""
        assert prefix.endswith("/"), "a prefix without / would reach into its neighbours"
        deleted = 0
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        async for page in pages:
            keys = [
                {"Key": item["Key"]} for item in page.get("Contents", []) if item["Key"] not in keep
            ]
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
