"""What a worker knows of its machine and its engine. What becomes of jobs is counted by the ledger,
which outlives workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import Counter, Gauge

from services.inference.worker.gpu import read_gpu
from shared.metrics import Reading, Sampler

STEPS = Counter("darkroom_worker_steps_total", "Steps of all jobs")
IMAGES = Counter("darkroom_worker_images_total", "Pictures made and uploaded")
INTERRUPTED = Counter(
    "darkroom_worker_jobs_interrupted_total", "Attempts that the engine did not survive, and bugs"
)
IN_HAND = Gauge("darkroom_worker_jobs_in_hand", "Jobs taken from the queue", ["state"])
ENGINE_MEMORY = Gauge(
    "darkroom_worker_engine_memory_bytes", "Resident memory of the engine's process", ["pid"]
)
GPU_USED = Gauge("darkroom_gpu_memory_used_bytes", "Memory in use, by whomever", ["gpu"])
GPU_TOTAL = Gauge("darkroom_gpu_memory_total_bytes", "Memory there is", ["gpu"])
GPU_BUSY = Gauge("darkroom_gpu_busy_ratio", "Share of the last moment in which it worked", ["gpu"])


def worker_sampler(
    engine_pid: Callable[[], int | None], in_hand: Callable[[], tuple[int, int]]
) -> Sampler:
    """`in_hand`: how many jobs wait, and how many have been begun."""

    async def read() -> Iterable[Reading]:
        waiting, begun = in_hand()
        readings: list[Reading] = [
            (IN_HAND, ("waiting",), waiting),
            (IN_HAND, ("begun",), begun),
        ]
        if pid := engine_pid():
            readings.append((ENGINE_MEMORY, (str(pid),), _resident(pid)))
        return readings

    return Sampler((IN_HAND, ENGINE_MEMORY), read)


def gpu_sampler(device: str) -> Sampler:
    async def read() -> Iterable[Reading]:
        gpu = await asyncio.to_thread(read_gpu, device)
        if gpu is None:
            return []
        return [
            (GPU_USED, (gpu.uuid,), gpu.used_bytes),
            (GPU_TOTAL, (gpu.uuid,), gpu.total_bytes),
            (GPU_BUSY, (gpu.uuid,), gpu.busy),
        ]

    return Sampler((GPU_USED, GPU_TOTAL, GPU_BUSY), read)


def _resident(pid: int) -> int:
    """Bytes. Raises OSError for a process that is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
