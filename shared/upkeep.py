"""What a service does unasked, again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from shared.logs import get_logger

log = get_logger(__name__)


async def repeat(chore: Callable[[], Awaitable[None]], due: asyncio.Event, seconds: float) -> None:
    """Does a chore at once, then whenever it is due and at least every so many seconds, until
    cancelled. What goes wrong is tried again the next time."""
    while True:
        due.clear()
        try:
            await chore()
        except Exception as error:
            log.warning("chore_postponed", chore=chore.__name__, error=repr(error))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(due.wait(), seconds)
