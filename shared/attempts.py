"""How often a message was tried, and which messages may run beside each other.

The bus counts deliveries, but a message that was only waiting in a process that died was not tried.
So tries are counted here, for messages that did not succeed at once; and one whose process died
with it runs alone from then on, so that it can take no other with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from shared.logs import get_logger

log = get_logger(__name__)

PATIENCE = 10.0
"""Seconds that a suspect waits for the others to finish, while new ones wait for it."""


class Attempts:
    """One per process. A row in `attempts` says how often a message was begun, and whether the
    last try came to an end that was seen."""

    def __init__(self, pool: asyncpg.Pool[Any]) -> None:
        self._pool = pool
        self._gate = asyncio.Lock()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def is_suspect(self, message_id: str) -> bool:
        """Of a message that is delivered again: whether its last try never ended."""
        ended = await self._pool.fetchval(
            "SELECT ended FROM attempts WHERE message_id = $1", message_id
        )
        return not ended

    @contextlib.asynccontextmanager
    async def turn(self, *, alone: bool) -> AsyncIterator[None]:
        """Held while a message is worked on."""
        await self._gate.acquire()
        try:
            if alone:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), PATIENCE)
            else:
                self._gate.release()
            self._running += 1
            self._idle.clear()
            try:
                yield
            finally:
                self._running -= 1
                if not self._running:
                    self._idle.set()
        finally:
            if alone:
                self._gate.release()

    async def begin_again(self, message_id: str) -> int:
        """The number of the try that begins now, from 2."""
        number: int = await self._pool.fetchval(
            """
            INSERT INTO attempts (message_id, number, ended) VALUES ($1, 2, false)
            ON CONFLICT (message_id) DO UPDATE SET number = attempts.number + 1, ended = false
            RETURNING number
            """,
            message_id,
        )
        return number

    async def end(self, message_id: str, number: int) -> None:
        """Notes that a try has failed and its process lives. Never raises."""
        try:
            await self._pool.execute(
                """
                INSERT INTO attempts (message_id, number, ended) VALUES ($1, $2, true)
                ON CONFLICT (message_id) DO UPDATE SET ended = true
                """,
                message_id,
                number,
            )
        except Exception as error:
            log.warning("attempt_not_noted", error=repr(error))

    async def forget(self, message_id: str) -> None:
        """Of a message that is done with. Never raises."""
        try:
            await self._pool.execute("DELETE FROM attempts WHERE message_id = $1", message_id)
        except Exception as error:
            log.warning("attempt_not_forgotten", error=repr(error))
