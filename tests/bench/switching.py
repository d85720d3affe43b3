"""`just bench switches`: the resident memory of an engine that switches between checkpoints, with
room for one or for all of them. Prints the curve.

Each run has a process of its own. The files are of half precision, so that on a CPU each load makes
tensors of twice their size, which have to be given back.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

MB = 10**6
MODELS, SWITCHES = 4, 200
BARS = 40


def run() -> None:
    import torch

    from shared.weights.kinds import SD1
    from tests.bench import true_size

    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as name:
        files = [Path(name) / f"model-{number}.safetensors" for number in range(MODELS)]
        for seed, file in enumerate(files):
            configs = true_size.smaller(unet=0.3, vae=0.5, text_layers=3)
            true_size.write_checkpoint(file, SD1, torch.device("cpu"), configs=configs, seed=seed)
        size = files[0].stat().st_size
        loaded = 2 * size
        for room, budget in (("one", 1.5 * loaded), ("all", 5 * loaded)):
            resident = resident_after_switches(files, SWITCHES, int(budget))
            _print(f"{MODELS} models of {size / MB:.0f} MB, room for {room}", resident)


def _print(title: str, resident: list[int]) -> None:
    print(f"\n{title}: resident memory")
    most = max(resident)
    for switch in range(MODELS - 1, len(resident), 14):
        now = resident[switch]
        print(f"  {switch + 1:>4}  {now / MB:6.0f} MB  {'#' * round(BARS * now / most)}")
    first, end = resident[MODELS - 1], resident[-1]
    print(f"  after the first round {first / MB:.0f} MB, after {len(resident)} switches", end=" ")
    print(f"{end / MB:.0f} MB ({end / first - 1:+.1%}); at most {most / MB:.0f} MB")


def resident_after_switches(files: Sequence[Path], switches: int, ram_bytes: int) -> list[int]:
    """Bytes, after each of the switches: one job of one step, of different sizes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_switch, list(files), switches, ram_bytes).result()


def _switch(files: list[Path], switches: int, ram_bytes: int) -> list[int]:
    from services.inference.worker.pipelines import Listener
    from services.inference.worker.pipelines.engine import Engine
    from services.inference.worker.settings import EngineOptions
    from shared.contracts.inference import RunJob
    from tests.weights import files_of, used

    told = EngineOptions(preview_seconds=0, ram_bytes=ram_bytes)
    process, resident = psutil.Process(), []
    with tempfile.TemporaryDirectory() as cache:
        engine = Engine("cpu", Path(cache), Listener(), told)
        for switch in range(switches):
            file = files[switch % len(files)]
            job = RunJob(
                job_id=str(switch),
                endpoint_id="",
                task_type="txt2img",
                models=[used(file)],
                bucket="",
                params_key="",
                result_prefix="",
            )
            size = {"width": 64 * (1 + switch * 7 % 6), "height": 64 * (1 + switch % 5)}
            body = {"prompt": "x", "steps": 1, "seed": 1, "batch_size": 1 + switch % 3, **size}
            engine.run(job, json.dumps(body).encode(), files_of(job))
            resident.append(process.memory_info().rss)
    return resident


if __name__ == "__main__":
    run()
