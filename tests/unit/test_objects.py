"""The object store as it answers when it is in trouble."""

from __future__ import annotations

import asyncio

import pytest

from shared.objects import S3_AWAY, Objects
from shared.settings import ObjectSettings


async def test_params_that_break_off_are_those_of_a_store_that_is_away() -> None:
    """Whoever reads them tries again, and does not take a part for the whole."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        modified = b"last-modified: Sun, 29 Nov 2026 10:00:00 GMT"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n" + modified + b"\r\n\r\n{")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    settings = ObjectSettings(
        s3_url=f"http://{host}:{port}", s3_access_key="key", s3_secret_key="secret"
    )
    async with server, Objects(settings).open() as objects:
        with pytest.raises(S3_AWAY):
            await objects.find_params("jobs", "params")
