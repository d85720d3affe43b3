"""A service of identity's rights as a process of its own, and a client that speaks to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import asyncpg
import msgspec
import nats
from nats.js.errors import NotFoundError

from deploy.local.installation import REPOSITORY
from deploy.local.processes import http_status
from deploy.local.stack import Stack
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Command, DeadLetter, Envelope, Message, Rejected, new_id
from shared.contracts.registry import payload, type_of
from shared.contracts.subjects import COMMANDS, DEAD, EVENTS, command_subject

T = TypeVar("T")


class Wire:
    """A TCP connection to a server that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError


class Bus:
    """`events` is all of EVENTS since it was opened, read message by message, so that neither a
    restart of the server nor a second sending can hide from it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.installation = stack.installation
        self.events: list[tuple[Envelope, Message]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._next = 1
        self._log = self.installation.log("identity-under-test")

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Bus]:
        self.client = await nats.connect(
            self.installation.nats_url,
            user="admin",
            password=self.installation.secrets.nats["admin"],
            inbox_prefix=b"_INBOX_admin",
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            error_cb=_quiet,
        )
        self.js = self.client.jetstream(timeout=2)
        self._next = (await self.js.stream_info(EVENTS)).state.last_seq + 1
        try:
            yield self
        finally:
            self.kill()
            await self.client.close()

    # The process

    async def start(self, module: str = "services.identity", **settings: object) -> None:
        """Returns when it is ready, unless `wait=False`."""
        self.kill()
        wait = settings.pop("wait", True)
        port = self.installation.ports["identity"]
        given = {
            "nats_url": self.installation.nats_url,
            "nats_user": "identity",
            "nats_password": self.installation.secrets.nats["identity"],
            "postgres_url": self.installation.postgres_url("identity"),
            "http_port": port,
            **settings,
        }
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={
                    **{n: os.environ[n] for n in ("PATH", "HOME", "LANG") if n in os.environ},
                    "PYTHONUNBUFFERED": "1",
                    **{f"DARKROOM_{name.upper()}": str(value) for name, value in given.items()},
                },
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        if wait:
            await self.until(lambda: self.status("/readyz"), 200)

    async def status(self, path: str) -> int | None:
        return await http_status(self.installation.ports["identity"], path)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    async def stop_idle(self) -> None:
        """Once it has nothing left to do: what is killed with work in hand gets it again later."""
        await self.until(self.commands_left, 0)
        self.kill()

    async def terminate(self) -> int:
        assert self.process
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, 20)

    def log(self) -> str:
        return self._log.read_text()

    # Commands and answers

    async def send(self, command: Command, *, id: str = "", actor: str = "admin") -> str:
        """The id of the command. Sent twice with one id, it is delivered twice."""
        name, id = type_of(command), id or new_id()
        framed = cloud.wrap(
            command, id=id, type=name, source="test", subject="", correlation_id=id, actor=actor
        )
        await self.send_raw(command_subject(name), cloud.encode(framed))
        return id

    async def send_raw(self, subject: str, body: bytes) -> None:
        while True:
            try:
                await self.js.publish(subject, body, stream=COMMANDS)
                return
            except Exception as error:
                print("not taken yet:", repr(error))
                await asyncio.sleep(0.1)

    async def answers(self, command_id: str) -> list[Message]:
        await self.catch_up()
        return [m for e, m in self.events if e.answers == command_id]

    async def answer(self, command_id: str, *, seconds: float = 20) -> Message:
        async def look() -> Message | None:
            found = await self.answers(command_id)
            return found[-1] if found else None

        return await self.found(look, f"answer to {command_id}", seconds=seconds)

    async def ask(self, command: Command, *, seconds: float = 20) -> Message:
        return await self.answer(await self.send(command), seconds=seconds)

    async def refused(self, command: Command) -> str:
        """The code of its rejection."""
        answer = await self.ask(command)
        assert isinstance(answer, Rejected), answer
        return answer.code

    async def catch_up(self) -> None:
        """Reads what has come to EVENTS since the last time."""
        state = (await self.js.stream_info(EVENTS)).state
        self._next = max(self._next, state.first_seq)
        while self._next <= state.last_seq:
            with contextlib.suppress(NotFoundError):
                raw = await self.js.get_msg(EVENTS, self._next, direct=True)
                envelope = cloud.decode(raw.data or b"")
                self.events.append((envelope, payload(envelope)))
            self._next += 1

    def caused_by(self, command_id: str) -> list[tuple[Envelope, Message]]:
        return [(e, m) for e, m in self.events if e.causation_id == command_id]

    async def dead_letter(self, text: str, *, seconds: float = 20) -> DeadLetter:
        """The one that holds `text`. Raises if there are two."""

        async def look() -> DeadLetter | None:
            letters = [x for x in await self.dead_letters() if text in bytes(x.envelope).decode()]
            assert len(letters) < 2, letters
            return letters[0] if letters else None

        return await self.found(look, f"dead letter with {text}", seconds=seconds)

    async def dead_letters(self) -> list[DeadLetter]:
        state = (await self.js.stream_info(DEAD)).state
        letters = []
        for seq in range(state.first_seq, state.last_seq + 1):
            raw = await self.js.get_msg(DEAD, seq)
            envelope = cloud.decode(raw.data or b"")
            letters.append(msgspec.json.decode(envelope.data, type=DeadLetter))
        return letters

    async def commands_left(self) -> int:
        """Whatever is not done with yet."""
        info = await self.js.stream_info(COMMANDS, subjects_filter="cmd.identity.>")
        return sum((info.state.subjects or {}).values())

    # Looking and waiting

    async def row(self, query: str, *arguments: object) -> Any:
        """As the service sees its schema."""
        connection = await asyncpg.connect(self.installation.postgres_url("identity"))
        try:
            return await connection.fetchrow(query, *arguments)
        finally:
            await connection.close()

    async def found(
        self, look: Callable[[], Awaitable[T | None]], what: str, *, seconds: float = 20
    ) -> T:
        """What `look` gives as soon as it gives something."""
        deadline = time.monotonic() + seconds
        last: BaseException | None = None
        while time.monotonic() < deadline:
            try:
                if (seen := await look()) is not None:
                    return seen
            except (nats.errors.Error, OSError, asyncpg.PostgresError) as error:
                last = error  # a server that is just being restarted
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {what} in {seconds} s ({last!r})\n{self.log()[-6000:]}")

    async def until(
        self, look: Callable[[], Awaitable[object]], wanted: object, *, seconds: float = 30
    ) -> None:
        async def check() -> bool | None:
            return True if await look() == wanted else None

        await self.found(check, str(wanted), seconds=seconds)


async def _quiet(_: Exception) -> None:
    """A server that is being killed is expected here."""
