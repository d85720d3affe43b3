from __future__ import annotations

from typing import Literal

import msgspec

from shared.settings import BusSettings
from shared.webui.settings import WebuiSettings

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is told once. `compile`: shapes that UNets are compiled for as the engine
    starts, such as `sd1:512x512:2 sdxl:1024x1024:2` (family, size, rows); `compile_mode`: of
    torch.compile. `jobs`: how many it runs side by side. `rows`: at most so many
    rows (a picture under one of its prompts each) are one batch. `precision`: auto is half on a GPU
    and full on a CPU. `preview_seconds`: between two previews of a job, 0 for none. `format`: of
    pictures, unless a job says otherwise. `ram_bytes`, `gpu_bytes`: what loaded models may take of
    the RAM and of the GPU's memory; 0 is half of what there is, of the container if that has
    less. `webui`: what bodies may say."""

    jobs: int = 8
    rows: int = 64
    precision: Literal["auto", "half", "bfloat16", "full"] = "auto"
    preview_seconds: float = 2.0
    format: Literal["png", "jpg", "webp"] = "png"
    compile: str = ""
    compile_mode: CompileMode = "default"
    ram_bytes: int = 0
    gpu_bytes: int = 0
    webui: WebuiSettings = WebuiSettings()


class Settings(BusSettings, frozen=True, kw_only=True):
    """`device`: cpu, cuda or cuda:1. `cache`: the folder for models, shared by the workers of a
    machine and kept under `cache_bytes`. `job_seconds`: what takes longer is stopped.
    `drain_seconds`: what begun jobs have to end when the worker is told to stop. `engine`:
    `module:Class`. `jobs_in_hand`: so many jobs are taken from the queue at once, and the one that
    comes next, as long as no other worker waits for one: the engine runs those together that fit.
    `http_address`: `host:port` under which others reach `/metrics`, if not where this process
    itself does. The others are `EngineOptions`."""

    endpoint_id: str
    instance_id: str
    cache: str
    endpoint_name: str = ""
    http_address: str = ""
    device: str = "cpu"
    cache_bytes: int = 64 * 1024**3
    job_seconds: float = 3600.0
    drain_seconds: float = 120.0
    engine: str = "services.inference.worker.pipelines.engine:Engine"
    jobs_in_hand: int = 8
    batch_rows: int = 64
    precision: Literal["auto", "half", "bfloat16", "full"] = "auto"
    preview_seconds: float = 2.0
    samples_format: Literal["png", "jpg", "webp"] = "png"
    compile: str = ""
    compile_mode: CompileMode = "default"
    ram_bytes: int = 0
    gpu_bytes: int = 0
    webui: WebuiSettings = WebuiSettings()

    @property
    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            jobs=self.jobs_in_hand,
            rows=self.batch_rows,
            precision=self.precision,
            preview_seconds=self.preview_seconds,
            format=self.samples_format,
            compile=self.compile,
            compile_mode=self.compile_mode,
            ram_bytes=self.ram_bytes,
            gpu_bytes=self.gpu_bytes,
            webui=self.webui,
        )
