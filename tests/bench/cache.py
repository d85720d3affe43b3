"""A model file from the object store to a picture: fetching beside a bare `download_file` of
aioboto3, and each way to a picture beside `cat FILE > /dev/null` of the same file.

Each download has a process of its own. Ours is hashed, synced to the disk and put in place; theirs
is in the page cache when it returns. Pictures have 64 px and one step, of an engine that has made
one with another checkpoint before. The file is of half precision; on a CPU its tensors are made
twice as long while they are loaded. What is said to be only on the disk was taken out of the page
cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import uvloop

from deploy.local.installation import MODELS_BUCKET
from deploy.local.stack import Stack
from services.inference.worker.cache import ModelCache
from shared.contracts.inference import RunJob, UsedModel
from shared.objects import Objects
from shared.settings import ObjectSettings
from tests.bench.report import Row, print_table, watched
from tests.weights import used

T = TypeVar("T")

ROUNDS, MB = 3, 10**6
THREADS = 2
SAMPLE_SECONDS = 0.005
FETCHED, ON_DISK, PAGED, LOADED = (
    "fetched from the store",
    "only on the disk",
    "in the page cache",
    "loaded",
)


class Measured(msgspec.Struct, frozen=True):
    """`growth`: of the process's resident memory, at its worst, in bytes."""

    seconds: float
    growth: int


class Picture(msgspec.Struct, frozen=True):
    """`load`: seconds of the engine's stage. `cat`: of reading the same file in the same state."""

    seconds: float
    load: float
    cat: float


def run() -> None:
    with (
        Stack.temporary(services=False) as stack,
        tempfile.TemporaryDirectory(prefix="darkroom-bench-") as name,
    ):
        folder = Path(name)
        model = asyncio.run(_upload(stack.installation.object_settings("admin"), folder / "source"))
        (folder / "source").unlink()
        ours, theirs, reads = [], [], []
        pictures: list[dict[str, Picture]] = []
        costs: list[dict[str, tuple[float, float]]] = []
        settings = stack.installation.object_settings("worker")
        for _ in range(ROUNDS):
            theirs.append(_alone(partial(_download, settings, model, folder / "bare")))
            ours.append(_alone(partial(_fetch, settings, model, folder / "cache")))
            (kept,) = folder.glob("cache/*.safetensors")
            reads.append(_read(kept))
            kept.unlink()
            pictures.append(_alone(partial(_paint, settings, model, folder / "cache")))
            costs.append(_alone(partial(_load, kept)))
            kept.unlink()
    _print(model.size // MB, ours, theirs, reads)
    _print_pictures(model.size // MB, pictures)
    _print_costs(model.size // MB, costs)


def _print_costs(megabytes: int, rounds: list[dict[str, tuple[float, float]]]) -> None:
    rows = []
    for what in rounds[0]:
        own, bare = (statistics.median(each[what][side] for each in rounds) for side in (0, 1))
        rows.append(Row(what, f"{own:.2f} s", f"{bare:.2f} s", f"{own / bare:.2f}×"))
    title = f"CPU time of loading {megabytes} MB from the page cache, median of {ROUNDS}"
    print_table(title, "the tensors alone", rows)


def _print_pictures(megabytes: int, rounds: list[dict[str, Picture]]) -> None:
    def median(what: str, field: str) -> float:
        values: list[float] = [getattr(each[what], field) for each in rounds]
        return statistics.median(values)

    for title, field in (("Time to a picture", "seconds"), ("Its stage of loading", "load")):
        rows = []
        for what in (FETCHED, ON_DISK, PAGED, LOADED):
            own, cat = median(what, field), median(what, "cat")
            rows.append(Row(what, f"{own:.2f} s", f"{cat:.2f} s", f"{own / cat:.2f}×"))
        print_table(f"{title}, {megabytes} MB, median of {ROUNDS}", "cat > /dev/null", rows)


def _print(
    megabytes: int, ours: list[Measured], theirs: list[Measured], reads: list[float]
) -> None:
    own, bare = (statistics.median(one.seconds for one in each) for each in (ours, theirs))
    read = statistics.median(reads)
    name = f"{megabytes} MB, cold, median of {ROUNDS}"
    rows = [
        Row(name, _speed(megabytes, own), _speed(megabytes, bare), f"{own / bare:.2f}×"),
        Row("  peak growth of memory, worst", _growth(ours), _growth(theirs), ""),
    ]
    print_table("Fetching a model", "bare download_file", rows)
    row = Row(name, _speed(megabytes, own), _speed(megabytes, read), f"{own / read:.2f}×")
    print_table("The same beside the local disk", "cat > /dev/null", [row])


def _speed(megabytes: int, seconds: float) -> str:
    return f"{seconds:.2f} s ({megabytes / seconds:.0f} MB/s)"


def _growth(measured: list[Measured]) -> str:
    return f"{max(one.growth for one in measured) / MB:.0f} MB"


async def _upload(settings: ObjectSettings, source: Path) -> UsedModel:
    import torch

    from shared.weights.kinds import SD1
    from tests.bench import true_size

    configs = true_size.smaller(unet=0.6)
    true_size.write_checkpoint(source, SD1, torch.device("cpu"), configs=configs, seed=1)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    key = "Stable-diffusion/checkpoint/custom/bench/model.safetensors"
    async with Objects(settings).open() as objects:
        await objects.client.upload_file(str(source), MODELS_BUCKET, key)
    return UsedModel(
        type="Stable-diffusion",
        name="model.safetensors",
        checkpoint_id="bench",
        bucket=MODELS_BUCKET,
        key=key,
        size=source.stat().st_size,
        sha256=digest.hexdigest(),
    )


def _alone(work: Callable[[], T]) -> T:
    """In a new process, with no dirty pages of others to write."""
    os.sync()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(work).result()


def _fetch(settings: ObjectSettings, model: UsedModel, folder: Path) -> Measured:
    async def work() -> Measured:
        async with Objects(settings).open() as objects:
            cache = ModelCache(objects, folder, 2 * model.size)
            with watched(psutil.Process(), every=SAMPLE_SECONDS) as memory:
                began = time.perf_counter()
                async with cache.hold([model]):
                    pass
                seconds = time.perf_counter() - began
            return Measured(seconds, memory.peak - memory.before)

    return uvloop.run(work())


def _paint(settings: ObjectSettings, model: UsedModel, folder: Path) -> dict[str, Picture]:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    from deploy.local.demo import CHECKPOINT
    from services.inference.worker.pipelines import Listener
    from services.inference.worker.pipelines.engine import Engine
    from services.inference.worker.settings import EngineOptions

    engine = Engine("cpu", folder, Listener(), EngineOptions(preview_seconds=0))
    params = json.dumps({"prompt": "x", "steps": 1, "width": 64, "height": 64}).encode()

    def paint(wanted: UsedModel, files: dict[str, Path]) -> float:
        job = RunJob(
            job_id="bench",
            endpoint_id="",
            task_type="txt2img",
            models=[wanted],
            bucket="",
            params_key="",
            result_prefix="",
        )
        load: float = engine.run(job, params, files).seconds["load"]
        return load

    async def work() -> dict[str, Picture]:
        async with Objects(settings).open() as objects:
            cache = ModelCache(objects, folder, 2 * model.size)

            async def measured() -> tuple[float, float]:
                began = time.perf_counter()
                async with cache.hold([model]) as files:
                    load = paint(model, files)
                return time.perf_counter() - began, load

            fetched = await measured()
            (kept,) = folder.glob("*.safetensors")
            on_disk = await _fresh(engine, kept, measured)
            engine.library.forget()
            paged = await measured()
            loaded = await measured()
        cold, warm = _read(kept), _read(kept, drop=False)
        return {
            FETCHED: Picture(*fetched, cold),
            ON_DISK: Picture(*on_disk, cold),
            PAGED: Picture(*paged, warm),
            LOADED: Picture(*loaded, warm),
        }

    demo = used(CHECKPOINT)
    paint(demo, {demo.content: CHECKPOINT})
    return uvloop.run(work())


def _load(path: Path) -> dict[str, tuple[float, float]]:
    """CPU seconds of a checkpoint, and of nothing but its file's tensors: read and made twice as
    long, or only read."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from safetensors import safe_open

    from services.inference.worker.pipelines.models.checkpoints import Checkpoint
    from services.inference.worker.pipelines.models.components import Place
    from services.inference.worker.pipelines.models.files import ModelFile

    def own(dtype: torch.dtype) -> Checkpoint:
        return Checkpoint(ModelFile(path, path.name), Place(torch.device("cpu"), dtype))

    def widened() -> list[torch.Tensor]:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(name).float() for name in file.keys()]  # noqa: SIM118

    def read() -> None:
        piece = bytearray(MB)
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass

    def cost(work: Callable[[], object]) -> float:
        before = time.process_time()
        work()
        return time.process_time() - before

    own(torch.float16)  # imports what it needs
    return {
        "in full precision": (cost(lambda: own(torch.float32)), cost(widened)),
        "as it is, mapped; read": (cost(lambda: own(torch.float16)), cost(read)),
    }


async def _fresh(
    engine: Any, kept: Path, measured: Callable[[], Awaitable[tuple[float, float]]]
) -> tuple[float, float]:
    """With nothing of the file in memory, nor mapped."""
    engine.library.forget()
    _drop(kept)
    return await measured()


def _download(settings: ObjectSettings, model: UsedModel, path: Path) -> Measured:
    async def work() -> Measured:
        async with Objects(settings).open() as objects:
            with watched(psutil.Process(), every=SAMPLE_SECONDS) as memory:
                began = time.perf_counter()
                await objects.client.download_file(model.bucket, model.key, str(path))
                seconds = time.perf_counter() - began
            path.unlink()
            return Measured(seconds, memory.peak - memory.before)

    return uvloop.run(work())


def _drop(path: Path) -> None:
    """Takes it out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path, *, drop: bool = True) -> float:
    if drop:
        _drop(path)
    began = time.perf_counter()
    subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    run()
