"""Wires endpoints: the only place that knows all of its parts."""

from __future__ import annotations

from datetime import timedelta

from services.endpoints.domain import Patience
from services.endpoints.launchers import Launcher
from services.endpoints.launchers.process import ProcessLauncher
from services.endpoints.reactions import Reconciler
from services.endpoints.settings import Settings
from services.endpoints.subscribers import handlers
from shared.service import Service


def build(settings: Settings) -> Service:
    types = settings.known_types()
    patience = Patience(
        ready=timedelta(seconds=settings.worker_ready_within),
        drain=timedelta(seconds=settings.drain_seconds),
        stop=timedelta(seconds=settings.worker_stop_within),
        silent=timedelta(seconds=settings.worker_silent_within),
    )
    reconciler = Reconciler(
        choose_launcher(settings),
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


def choose_launcher(settings: Settings) -> Launcher:
    """Raises SystemExit that names what the settings lack. Imports no client that is not used."""
    settings.check_launcher()
    if settings.launcher == "docker":
        from services.endpoints.launchers.docker import DockerLauncher

        return DockerLauncher(
            settings.docker_url,
            settings.program(),
            installation=settings.installation,
            network=settings.docker_network,
            cache=settings.worker_cache,
            gpus=settings.known_gpus(),
            workers_outlive_service=settings.keep_workers,
        )
    if settings.launcher == "nomad":
        from services.endpoints.launchers.nomad import NomadLauncher

        return NomadLauncher(
            settings.nomad_addr,
            settings.program(),
            installation=settings.installation,
            token=settings.nomad_token,
            namespace=settings.nomad_namespace,
            cache=settings.worker_cache,
            workers_outlive_service=settings.keep_workers,
        )
    return ProcessLauncher(
        settings.program(),
        run=settings.run_folder(),
        logs=settings.logs_folder(),
        gpus=settings.known_gpus(),
    )
