"""identity as it is, but for the role names that make something go wrong.

The name `fails 2 x` fails twice. Files in DARKROOM_TRIAL_FOLDER tell when which was tried, so that
it is known after the process has died.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from services.identity import commands, subscribers
from shared import bus
from shared.bus import Handlers
from shared.contracts import identity
from shared.errors import Retry
from shared.outbox import Outbox, OutboxRow
from shared.service import Service
from shared.settings import ServiceSettings, load
from shared.unit_of_work import Tx


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """`publishes`: how many messages of a transaction get out before the bus seems gone."""

    trial_folder: str
    publishes: int = 1000


def _note(folder: Path, role_name: str) -> int:
    """Adds the time to the notes about this name; returns how many there are."""
    file = folder / role_name
    with file.open("a") as notes:
        notes.write(f"{time.time()}\n")
    return len(file.read_text().splitlines())


async def create_role(cmd: identity.CreateRole, tx: Tx, *, folder: Path) -> None:
    runs = _note(folder, cmd.role_name)
    verb, number = (*cmd.role_name.split(), "", "")[:2]
    await commands.create_role(cmd, tx)
    match verb:
        case "fails" if runs <= int(number):
            raise RuntimeError("a bug")
        case "retries" if runs <= int(number):
            raise Retry("not yet")
        case "dies" if runs <= int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        case "sleeps":
            await asyncio.sleep(float(number))
        case "emits":
            for _ in range(int(number)):
                again = identity.CreateRole(
                    role_name=cmd.role_name, permissions=[], creator="x", replace=True
                )
                await commands.create_role(again, tx)


class BrokenOutbox(Outbox):
    """Dies with everything committed and nothing sent, if the name says `unsent`."""

    settings: Settings

    async def publish(self, rows: Sequence[OutboxRow]) -> None:
        if any("unsent" in row.subject for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        await super().publish(rows[: self.settings.publishes])


def build(settings: Settings) -> Service:
    handlers: dict[Any, Any] = dict(subscribers.COMMANDS)
    handlers[identity.CreateRole] = partial(create_role, folder=Path(settings.trial_folder))
    table: Handlers = handlers
    return Service("identity", settings, commands=table)


if __name__ == "__main__":
    settings = load(Settings)
    BrokenOutbox.settings = settings
    import shared.service

    vars(shared.service)["Outbox"] = BrokenOutbox
    bus.PAUSES = (0.1, 0.3, 0.6, 1.0, 1.5)
    build(settings).run()
