from __future__ import annotations

from shared.settings import BusSettings


class Settings(BusSettings, frozen=True, kw_only=True):
    """`device`: cpu, cuda or cuda:1. `cache`: the folder for models, shared by the workers of a
    machine and kept under `cache_bytes`. `job_seconds`: what takes longer is stopped. `engine`:
    `module:Class`; the module also has its `JobFailure`."""

    endpoint_id: str
    instance_id: str
    cache: str
    endpoint_name: str = ""
    device: str = "cpu"
    cache_bytes: int = 64 * 1024**3
    job_seconds: float = 3600.0
    engine: str = "services.inference.worker.pipelines:Engine"
