"""Wires identity: the only place that knows all of its parts."""

from __future__ import annotations

from functools import partial

from services.identity.commands import found
from services.identity.settings import Settings
from services.identity.subscribers import COMMANDS
from shared.service import Service


def build(settings: Settings) -> Service:
    async def make_first_user(service: Service) -> None:
        await service.work.run(partial(found, settings.admin_user, settings.admin_password_hash))

    return Service("identity", settings, commands=COMMANDS, background=make_first_user)
