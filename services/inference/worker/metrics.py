"""What a worker knows of its device and its engine. What becomes of jobs is counted by the ledger,
which outlives workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import Counter, Gauge

from services.inference.worker.frames import Well
from shared.metrics import Reading, Sampler

STEPS = Counter("darkroom_worker_steps_total", "Steps of all jobs")
IMAGES = Counter("darkroom_worker_images_total", "Pictures made and uploaded")
INTERRUPTED = Counter(
    "darkroom_worker_jobs_interrupted_total", "Attempts that the engine did not survive, and bugs"
)
IN_HAND = Gauge("darkroom_worker_jobs_in_hand", "Jobs taken from the queue", ["state"])
MODELS = Gauge("darkroom_worker_models_loaded", "Models in memory", ["device"])
USED = Gauge(
    "darkroom_device_memory_used_bytes",
    "Memory of the GPU in use, by whomever; on a CPU that of the engine",
    ["device", "name"],
)
TOTAL = Gauge("darkroom_device_memory_total_bytes", "Memory that it has", ["device", "name"])


def worker_sampler(
    device: str, well: Callable[[], Well | None], in_hand: Callable[[], tuple[int, int]]
) -> Sampler:
    """`well`: how the engine is; None while nobody knows. `in_hand`: how many jobs wait, and how
    many have been begun."""

    async def read() -> Iterable[Reading]:
        waiting, begun = in_hand()
        readings: list[Reading] = [
            (IN_HAND, ("waiting",), waiting),
            (IN_HAND, ("begun",), begun),
        ]
        if known := well():
            labels = (device, known.device_name)
            readings.append((USED, labels, known.memory))
            readings.append((TOTAL, labels, known.memory_total))
            readings.append((MODELS, (device,), len(known.models)))
        return readings

    return Sampler((IN_HAND, USED, TOTAL, MODELS), read)
