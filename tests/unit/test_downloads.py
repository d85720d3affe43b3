"""Where downloads go, whatever a name resolves to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from services.models.domain import Unfit
from services.models.downloads import Downloader, Interrupted


class Resolver:
    """Answers with each list of addresses in turn, and with the last one from then on."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (address, port)) for address in answer]


class Door:
    """A server on loopback that counts who comes in."""

    def __init__(self) -> None:
        self.visits = 0

    async def __aenter__(self) -> Door:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
        writer.close()


async def fetch(url: str) -> bytes:
    downloader = Downloader(schemes={"http"}, allowed_hosts=frozenset(), max_bytes=1000)
    async with downloader.open(url) as source:
        return b"".join([chunk async for chunk in source.chunks])


@pytest.mark.parametrize(
    "answers",
    [
        [["127.0.0.1"]],
        [["192.0.2.1", "127.0.0.1"]],
        [["192.0.2.1"], ["127.0.0.1"]],
    ],
    ids=["inside", "outside and inside", "outside when checked, inside when connected"],
)
async def test_a_name_that_leads_inside_reaches_nobody(
    monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]
) -> None:
    """192.0.2.1 is nobody's (RFC 5737), and no address of the internet either."""
    resolver = Resolver(*answers)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolver.getaddrinfo)
    async with Door() as door:
        for _ in answers:
            with pytest.raises((Unfit, Interrupted)):
                await fetch(f"http://rebound.test:{door.port}/x.pth")
        assert resolver.asked == len(answers), "each connection goes where its own answer says"
        assert door.visits == 0
