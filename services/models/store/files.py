"""The bytes of checkpoints. Each has its own prefix in the models bucket and never leaves it.

Every method raises Retry while the object store is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence, Set
from datetime import datetime

import aiohttp
import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from services.models.domain import CHECKPOINT_TYPES, MAX_PARTS, Checkpoint, UploadedPart
from shared.contracts.models import MultipartUpload, PartTag, UploadFile
from shared.errors import Rejected, Retry
from shared.logs import get_logger
from shared.objects import Objects, checkpoint_prefix

log = get_logger(__name__)

PART_BYTES = 8 * 1024**2
PARTS_AT_ONCE = 3
"""A file on its way holds two more of them in memory: one is read, one waits."""
MAX_BYTES = PART_BYTES * MAX_PARTS

GONE = ("NoSuchUpload", "404", "NotFound")
UNFIT = ("InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML")


class OpenUpload(msgspec.Struct, frozen=True):
    checkpoint_id: str
    key: str
    upload_id: str


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """What the object store refuses stays an error: that is a bug or a wrong permission."""
    try:
        yield
    except (BotoCoreError, aiohttp.ClientError) as error:
        raise Retry(f"object store away: {type(error).__name__}") from error
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
            raise Retry(f"object store away: {error}") from error
        raise


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


class Digest:
    """SHA-256 of a stream that passes, computed beside the event loop."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.size = 0

    async def over(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await asyncio.to_thread(self._digest.update, chunk)
            self.size += len(chunk)
            yield chunk

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class FileStore:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.bucket = objects.settings.s3_models_bucket

    def location(self, checkpoint_type: str, checkpoint_id: str) -> str:
        return f"s3://{self.bucket}/{checkpoint_prefix(checkpoint_type, checkpoint_id)}"

    def key(self, checkpoint_type: str, checkpoint_id: str, filename: str) -> str:
        return f"{checkpoint_prefix(checkpoint_type, checkpoint_id)}/{filename}"

    @contextlib.asynccontextmanager
    async def begin_uploads(
        self, checkpoint: Checkpoint, files: Sequence[UploadFile]
    ) -> AsyncIterator[dict[str, MultipartUpload]]:
        """Filename -> upload. If what is done with them fails, they are aborted again."""
        uploads: dict[str, MultipartUpload] = {}
        try:
            for file in files:
                key = self.key(checkpoint.type, checkpoint.checkpoint_id, file.filename)
                uploads[file.filename] = MultipartUpload(
                    upload_id=await self._begin(key),
                    bucket=self.bucket,
                    key=key,
                    parts_number=file.parts_number,
                )
            yield uploads
        except BaseException:
            for upload in uploads.values():
                await self._abort_at_any_price(upload.key, upload.upload_id)
            raise

    async def abort_uploads(self, checkpoint: Checkpoint) -> None:
        """Aborts all that is open under the checkpoint's prefix, whoever began it."""
        prefix = checkpoint_prefix(checkpoint.type, checkpoint.checkpoint_id)
        for upload in await self._list_open(f"{prefix}/"):
            await self.abort(upload)

    async def list_parts(self, upload: MultipartUpload) -> list[UploadedPart] | None:
        """In order of number; None if the upload is complete or aborted."""
        pages = self._objects.client.get_paginator("list_parts").paginate(
            Bucket=upload.bucket, Key=upload.key, UploadId=upload.upload_id
        )
        parts = []
        try:
            with _answering():
                async for page in pages:
                    parts += [
                        UploadedPart(number=p["PartNumber"], etag=p["ETag"], size=p["Size"])
                        for p in page.get("Parts", [])
                    ]
        except ClientError as error:
            if _code(error) in GONE:
                return None
            raise
        return parts

    async def complete(self, filename: str, upload: MultipartUpload, tags: list[PartTag]) -> None:
        """Raises Rejected if the object store finds a fault with the parts that we did not."""
        try:
            await self._complete(
                upload.key,
                upload.upload_id,
                [{"ETag": tag.ETag, "PartNumber": tag.PartNumber} for tag in tags],
            )
        except ClientError as error:
            if _code(error) in UNFIT:
                detail = error.response["Error"].get("Message", _code(error))
                raise Rejected("models.part_mismatch", filename=filename, detail=detail) from error
            raise

    async def size(self, key: str) -> int | None:
        with _answering():
            return await self._objects.size(self.bucket, key)

    async def write(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """Stores a stream of unknown length as one object and returns its size in bytes. Nothing
        stays behind if the stream breaks. Raises ValueError for an empty stream."""
        upload_id = await self._begin(key)
        under_way: deque[asyncio.Task[dict[str, object]]] = deque()
        parts: list[dict[str, object]] = []
        size = 0
        try:
            async with contextlib.aclosing(_ahead(_blocks(chunks))) as blocks:
                async for block in blocks:
                    size += len(block)
                    number = len(parts) + len(under_way) + 1
                    put = self._put_part(key, upload_id, number, block)
                    under_way.append(asyncio.create_task(put))
                    if len(under_way) == PARTS_AT_ONCE:
                        parts.append(await under_way.popleft())
            while under_way:
                parts.append(await under_way.popleft())
            if not parts:
                raise ValueError("empty")
            await self._complete(key, upload_id, parts)
        except BaseException:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await self._abort_at_any_price(key, upload_id)
            raise
        return size

    async def read(self, key: str, size: int, *, start: int = 0) -> AsyncIterator[bytes]:
        """`size` bytes of an object from `start` on, block by block."""
        end = start + size

        async def blocks() -> AsyncIterator[bytes]:
            for at in range(start, end, PART_BYTES):
                yield await self.read_range(key, at, min(at + PART_BYTES, end))

        async with contextlib.aclosing(_ahead(blocks())) as ahead:
            async for block in ahead:
                yield block

    async def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes from `start` to before `end`."""
        with _answering():
            response = await self._objects.client.get_object(
                Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}"
            )
            async with response["Body"] as body:
                data: bytes = await body.read()
                return data

    async def delete(self, key: str) -> None:
        with _answering():
            await self._objects.client.delete_object(Bucket=self.bucket, Key=key)

    async def remove(self, checkpoint: Checkpoint, *, keep: Set[str] = frozenset()) -> None:
        """Everything under the checkpoint's own prefix but `keep`: open uploads and objects."""
        await self.abort_uploads(checkpoint)
        prefix = f"{checkpoint_prefix(checkpoint.type, checkpoint.checkpoint_id)}/"
        with _answering():
            # An object that could not be deleted is no error in S3's answer: look again.
            if await self._objects.delete_prefix(
                self.bucket, prefix, keep=keep
            ) and await self._objects.delete_prefix(self.bucket, prefix, keep=keep):
                raise Retry(f"objects remain under {prefix}")

    async def list_uploads(self, *, before: datetime) -> list[OpenUpload]:
        """All open uploads that were begun before a moment, of any checkpoint."""
        return await self._list_open("", before=before)

    async def abort(self, upload: OpenUpload) -> None:
        with _answering():
            await self._abort(upload.key, upload.upload_id)

    async def _list_open(self, prefix: str, before: datetime | None = None) -> list[OpenUpload]:
        found = []
        with _answering():
            pages = self._objects.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=prefix
            )
            async for page in pages:
                for item in page.get("Uploads", []):
                    checkpoint_id = _owner_of(item["Key"])
                    if checkpoint_id and (before is None or item["Initiated"] < before):
                        found.append(OpenUpload(checkpoint_id, item["Key"], item["UploadId"]))
        return found

    async def _begin(self, key: str) -> str:
        with _answering():
            begun = await self._objects.client.create_multipart_upload(Bucket=self.bucket, Key=key)
        return str(begun["UploadId"])

    async def _put_part(
        self, key: str, upload_id: str, number: int, body: bytes
    ) -> dict[str, object]:
        with _answering():
            answer = await self._objects.client.upload_part(
                Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=body
            )
        return {"ETag": answer["ETag"], "PartNumber": number}

    async def _complete(self, key: str, upload_id: str, parts: list[dict[str, object]]) -> None:
        with _answering():
            await self._objects.client.complete_multipart_upload(
                Bucket=self.bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )

    async def _abort(self, key: str, upload_id: str) -> None:
        try:
            await self._objects.client.abort_multipart_upload(
                Bucket=self.bucket, Key=key, UploadId=upload_id
            )
        except ClientError as error:
            if _code(error) not in GONE:
                raise

    async def _abort_at_any_price(self, key: str, upload_id: str) -> None:
        """For the way out of a failure: it must not hide the failure. What stays open after all is
        found by the next delivery or by the sweep."""
        try:
            await asyncio.shield(self._abort(key, upload_id))
        except (BotoCoreError, ClientError) as error:
            log.warning("upload_not_aborted", key=key, error=repr(error))


def _owner_of(key: str) -> str | None:
    """The checkpoint whose prefix a key has; None for a key that is not one of ours."""
    match key.split("/"):
        case [checkpoint_type, "checkpoint", "custom", checkpoint_id, _] if (
            checkpoint_type in CHECKPOINT_TYPES
        ):
            return checkpoint_id
    return None


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Cuts a stream into blocks of PART_BYTES and a rest."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= PART_BYTES:
            yield bytes(buffer[:PART_BYTES])
            del buffer[:PART_BYTES]
    if buffer:
        yield bytes(buffer)


async def _ahead(blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Reads the next block while the receiver still works on the one before."""

    async def read() -> bytes | None:
        return await anext(blocks, None)

    coming = asyncio.create_task(read())
    try:
        while (block := await coming) is not None:
            coming = asyncio.create_task(read())
            yield block
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
