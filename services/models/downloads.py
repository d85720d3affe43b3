"""Fetching a file from a URL that a user gave, without being led to where users may not go.

A URL is a way to make this process speak to any address it can reach: other services on
loopback, machines in the same network, the metadata address of a cloud. So the address is checked
where it counts, when the socket is made: a name that resolves anew between check and connection,
a redirect, a number that is an address in disguise all end there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Set

import aiohttp
import msgspec
from aiohttp.connector import AddrInfoType
from yarl import URL

from services.models.domain import Unfit, filename_of, find_fault

MAX_REDIRECTS = 5
PAUSES = (1.0, 5.0, 15.0)
"""Seconds before a broken connection is made again, as long as nothing comes through it."""
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 256 * 1024
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
HEADERS = {"User-Agent": "Darkroom", "Accept": "*/*", "Accept-Encoding": "identity"}

METADATA = (ipaddress.ip_address("168.63.129.16"),)
"""Addresses of clouds' own services that are public by their number."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Interrupted(Exception):
    """The connection failed or the server is in trouble: worth another try."""


class Changed(Interrupted):
    """What has come so far is of no use."""


class Source(msgspec.Struct, frozen=True):
    """A file whose bytes are about to come. `total`: how many, if the server tells."""

    filename: str
    total: int | None
    chunks: AsyncIterator[bytes]


class Downloader:
    def __init__(self, *, schemes: Set[str], allowed_hosts: Set[str], max_bytes: int) -> None:
        self._schemes = schemes
        self._allowed_hosts = allowed_hosts
        self._max_bytes = max_bytes

    @contextlib.asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Source]:
        """Follows redirects and answers with the file. Its chunks raise Unfit or Interrupted; where
        the server can, they go on behind what has come when the connection breaks."""
        first = _parse(url)
        async with contextlib.AsyncExitStack() as stack:
            at, response = await self._follow(first, stack, HEADERS)
            self._check(at, response)
            filename = _filename(response, first, at)
            chunks = self._chunks(first, at, response, stack)
            async with contextlib.aclosing(chunks):
                yield Source(filename, response.content_length, chunks)

    async def _follow(
        self, url: URL, stack: contextlib.AsyncExitStack, headers: Mapping[str, str]
    ) -> tuple[URL, aiohttp.ClientResponse]:
        at = url
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(at, stack, headers)
            if response.status not in REDIRECTS:
                return at, response
            at = _target(at, response)
            await stack.aclose()
        raise Unfit(f"{_plain(url)}: more than {MAX_REDIRECTS} redirects")

    async def _get(
        self, at: URL, stack: contextlib.AsyncExitStack, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        if at.scheme not in self._schemes or not at.host:
            raise Unfit(f"{_plain(at)}: only {', '.join(sorted(self._schemes))} is allowed")
        guard = Guard(open_to_all=self._is_allowed(at))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=guard.make_socket, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=TIMEOUT,
                headers=headers,
                auto_decompress=False,
                trust_env=False,
            )
        )
        try:
            return await stack.enter_async_context(session.get(at, allow_redirects=False))
        except aiohttp.InvalidURL as error:
            raise Unfit(f"{_plain(at)}: no valid URL") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if guard.refused:
                raise Unfit(
                    f"{_plain(at)}: {at.host} is at an address that downloads may not reach"
                ) from error
            raise _connection_failed(at, error) from error

    def _is_allowed(self, at: URL) -> bool:
        return not self._allowed_hosts.isdisjoint((at.host or "", f"{at.host}:{at.port}"))

    def _check(self, at: URL, response: aiohttp.ClientResponse, expected: int = 200) -> None:
        where = _plain(at)
        if response.status >= 500 or response.status in (408, 429):
            raise Interrupted(f"{where}: answered {response.status}")
        if response.status != expected:
            raise Unfit(f"{where}: answered {response.status}")
        if response.content_type == "text/html":
            raise Unfit(f"{where}: answered with a web page, not with a file")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Unfit(f"{where}: answered in a content encoding that was not asked for")
        if (response.content_length or 0) > self._max_bytes:
            raise self._too_large(at)

    async def _chunks(
        self,
        first: URL,
        at: URL,
        response: aiohttp.ClientResponse,
        stack: contextlib.AsyncExitStack,
    ) -> AsyncGenerator[bytes, None]:
        size, total, version = 0, response.content_length, _version(response)
        pauses = list(PAUSES)
        while True:
            try:
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    size += len(chunk)
                    if size > self._max_bytes:
                        raise self._too_large(at)
                    pauses = list(PAUSES)
                    yield chunk
                return
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                broken = Interrupted(f"{_plain(at)}: broke off after {size} bytes")
                broken.__cause__ = error
            while version:
                if not pauses:
                    raise broken
                await asyncio.sleep(pauses.pop(0))
                try:
                    await stack.aclose()
                    at, response = await self._go_on(first, stack, size, total, version)
                    break
                except Changed:
                    raise
                except Interrupted:
                    continue
            else:
                raise broken

    async def _go_on(
        self,
        first: URL,
        stack: contextlib.AsyncExitStack,
        size: int,
        total: int | None,
        version: str,
    ) -> tuple[URL, aiohttp.ClientResponse]:
        """The rest of a file of which `size` bytes have come. By its first URL: what that led to
        may be out of date. Raises Changed if it is another file by now."""
        more = {"Range": f"bytes={size}-", "If-Range": version}
        at, response = await self._follow(first, stack, {**HEADERS, **more})
        if response.status == 200:
            raise Changed(f"{_plain(at)}: is another file than it was before")
        self._check(at, response, expected=206)
        expected = re.escape(f"bytes {size}-") + r"\d+/" + (str(total) if total else r"(\d+|\*)")
        if not re.fullmatch(expected, response.headers.get("Content-Range", "")):
            raise Changed(f"{_plain(at)}: does not go on where it broke off")
        return at, response

    def _too_large(self, at: URL) -> Unfit:
        return Unfit(f"{_plain(at)}: larger than the {self._max_bytes} bytes that are allowed")


class Guard:
    """Makes the sockets of one connection, unless they lead to a forbidden address."""

    def __init__(self, *, open_to_all: bool) -> None:
        self._open_to_all = open_to_all
        self.refused = False

    def make_socket(self, address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, target = address
        if not self._open_to_all and not is_public(str(target[0])):
            self.refused = True
            raise OSError("address not allowed")
        return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is out in the internet: not loopback, private, link-local, shared,
    reserved, multicast or a cloud's metadata service, also not wrapped into IPv6."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            return is_public(str(inner))
    if isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local:
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip not in METADATA


def _version(response: aiohttp.ClientResponse) -> str:
    """What says that a file is still the same; empty where the server can't go on with one."""
    if response.headers.get("Accept-Ranges", "").lower() != "bytes":
        return ""
    tag = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified", "")


def _parse(url: str) -> URL:
    try:
        return URL(url)
    except ValueError as error:
        raise Unfit("no valid URL") from error


def _connection_failed(at: URL, error: Exception) -> Exception:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Unfit(f"{_plain(at)}: its certificate is not valid")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Interrupted(f"{_plain(at)}: no host of this name was found")
    if isinstance(error, TimeoutError):
        return Interrupted(f"{_plain(at)}: no answer in time")
    return Interrupted(f"{_plain(at)}: the connection failed")


def _target(at: URL, response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise Unfit(f"{_plain(at)}: answered {response.status} without a Location")
    try:
        return at.join(URL(location))
    except ValueError as error:
        raise Unfit(f"{_plain(at)}: redirects to no valid URL") from error


def _plain(url: URL) -> str:
    """A URL as it may be told and logged: without what could be a secret."""
    return str(url.with_query(None).with_fragment(None).with_user(None)) if url.host else "URL"


def _filename(response: aiohttp.ClientResponse, first: URL, last: URL) -> str:
    """By the answer's Content-Disposition, else by the path of the URL that was asked for."""
    disposition = response.content_disposition
    given = disposition.filename if disposition else None
    if given:
        name = given.replace("\\", "/").rsplit("/", 1)[-1]
        fault = find_fault(name)
        if fault:
            raise Unfit(f"{_plain(first)}: the file name {name[:80]!r} can't be used: {fault}")
        return name
    name = filename_of(first.raw_path) or filename_of(last.raw_path)
    if not name:
        raise Unfit(f"{_plain(first)}: neither the URL nor the answer has a file name")
    return name
