"""Wires endpoints: the only place that knows all of its parts."""

from __future__ import annotations

from datetime import timedelta

from services.endpoints.domain import Patience
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
    )
    patience = Patience(
        ready=timedelta(seconds=settings.worker_ready_within),
        drain=timedelta(seconds=settings.drain_seconds),
        stop=timedelta(seconds=settings.worker_stop_within),
        silent=timedelta(seconds=settings.worker_silent_within),
    )
    reconciler = Reconciler(
        launcher,
        types,
        patience=patience,
        out_after=timedelta(seconds=settings.scale_out_after),
        in_after=timedelta(seconds=settings.scale_in_after),
    )
    return Service(
        "endpoints",
        settings,
        commands=handlers(types, patience.drain, reconciler.wake),
        background=reconciler.run,
        on_stop=reconciler.stop,
    )
