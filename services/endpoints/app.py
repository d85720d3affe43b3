"""Wires endpoints: the only place that knows all of its parts."""

from __future__ import annotations

from datetime import timedelta

from services.endpoints.launchers.process import ProcessLauncher
from services.endpoints.reactions import Reconciler
from services.endpoints.settings import Settings
from services.endpoints.subscribers import handlers
from shared.service import Service


def build(settings: Settings) -> Service:
    types = settings.known_types()
    launcher = ProcessLauncher(
        settings.worker_program(),
        settings.worker_environment(),
        run=settings.run_folder(),
        logs=settings.logs_folder(),
        stop_within=settings.worker_stop_within,
    )
    reconciler = Reconciler(
        launcher, types, ready_within=timedelta(seconds=settings.worker_ready_within)
    )
    return Service(
        "endpoints",
        settings,
        commands=handlers(types, reconciler.wake),
        background=reconciler.run,
        on_stop=reconciler.stop,
    )
