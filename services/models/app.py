"""Wires models: the only place that knows all of its parts."""

from __future__ import annotations

from services.models.downloads import Downloader
from services.models.intake import Intake
from services.models.settings import Settings
from services.models.store.files import MAX_BYTES, FileStore
from services.models.subscribers import handlers
from services.models.upkeep import Upkeep, Wake
from shared.objects import Objects
from shared.service import Service
from shared.settings import ObjectSettings


def build(settings: Settings, object_settings: ObjectSettings) -> Service:
    objects = Objects(object_settings)
    files = FileStore(objects)
    downloader = Downloader(
        schemes=settings.schemes(),
        allowed_hosts=settings.allowed_hosts(),
        max_bytes=min(settings.download_max_bytes, MAX_BYTES),
    )
    wake = Wake()
    intake = Intake(
        files,
        downloader,
        parallel=settings.downloads_parallel,
        lease_seconds=settings.download_lease_seconds,
        convert_pickles=settings.convert_pickles,
        on_end=wake,
    )
    upkeep = Upkeep(
        files,
        intake,
        wake,
        lease_seconds=settings.download_lease_seconds,
        expires_hours=settings.upload_expires_hours,
        sweep_seconds=settings.sweep_seconds,
    )
    return Service(
        "models",
        settings,
        commands=handlers(files, wake=wake, schemes=settings.schemes()),
        checks={"s3": objects.check},
        background=upkeep.run,
        resources=[objects.open()],
    )
