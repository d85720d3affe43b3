"""Message type -> function: all that endpoints does when spoken to."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from services.endpoints import commands
from services.endpoints.domain import InstanceTypes
from shared.bus import Handlers
from shared.contracts import endpoints
from shared.unit_of_work import Handler, Tx


def handlers(types: InstanceTypes, drain: timedelta, wake: Callable[[], None]) -> Handlers:
    """`wake` calls the reconciler after each command that may have left it something to do."""
    return {
        endpoints.CreateEndpoint: _then(partial(commands.create_endpoint, types=types), wake),
        endpoints.DeleteEndpoints: _then(partial(commands.delete_endpoints, drain=drain), wake),
        endpoints.ReportInstance: _then(commands.report_instance, wake),
        endpoints.ResyncEndpoints: commands.resync,
    }


def _then(handler: Handler, wake: Callable[[], None]) -> Handler:
    async def handle(command: Any, tx: Tx) -> None:
        async def wake_reconciler() -> None:
            wake()

        await handler(command, tx)
        tx.after_commit.append(wake_reconciler)

    return handle
