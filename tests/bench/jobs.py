"""Tiny jobs end to end beside the bare pipeline call, in one run; the two never run at once.

- one after the other: from PUT /inferences/{id}/start to the event that it has succeeded, with its
  picture in S3 by then
- many at once: from the first start to the last event
- cancelling: from PUT /inferences/{id}/cancel to the worker's taking the next job
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.installation import REPOSITORY
from tests.bench.report import Row

PROMPT, SIZE, STEPS, JOBS, MANY, CANCELLED = (
    "a red heart on a yellow background",
    64,
    10,
    15,
    200,
    10,
)
MODELS = {"Stable-diffusion": [CHECKPOINT.name]}


class BarePipeline:
    """Plain diffusers in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def render(self, seed: int) -> float:
        """Milliseconds."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def bare_pipeline(threads: int) -> Iterator[BarePipeline]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare_pipeline", PROMPT, str(SIZE), str(STEPS)],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline().strip() == "ready"
    try:
        yield BarePipeline(process)
    finally:
        process.stdin.close()
        process.wait()


def one_by_one(client: Client, bare: BarePipeline) -> list[Row]:
    def render(seed: int) -> tuple[float, dict[str, Any]]:
        job_id = client.create_job("txt2img", MODELS, _params(seed))
        started = time.perf_counter()
        client.start_job(job_id)
        for _ in client.events(f"/inferences/{job_id}/events"):
            pass
        took = (time.perf_counter() - started) * 1000
        return took, client.get_job(job_id)

    for seed in (1, 2):
        render(seed)
        bare.render(seed)
    ours, theirs, inside = [], [], []
    for seed in range(JOBS):
        took, job = render(seed)
        assert job["status"] == "succeed", job["error"]
        ours.append(took)
        inside.append(sum(job["seconds"].values()) * 1000)
        theirs.append(bare.render(seed))
    own, peer = statistics.median(ours), statistics.median(theirs)
    stages = statistics.median(inside)
    name = f"txt2img {SIZE} px, {STEPS} steps, median of {JOBS}"
    return [
        Row(name, f"{own:.0f} ms", f"{peer:.0f} ms", f"{own / peer:.2f}×"),
        Row("  of it in the worker's stages", f"{stages:.0f} ms", "", ""),
    ]


def many(client: Client, bare: BarePipeline, how: str) -> list[Row]:
    """`MANY` jobs that are created, then started as fast as they can be."""
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        jobs = list(
            pool.map(lambda seed: client.create_job("txt2img", MODELS, _params(seed)), range(MANY))
        )
        started = time.perf_counter()
        list(pool.map(client.start_job, jobs))
    last = [client.wait_for_job(job_id, seconds=600) for job_id in reversed(jobs)]
    ended = time.perf_counter()
    assert all(job["status"] == "succeed" for job in last), [job["error"] for job in last]
    theirs = sum(bare.render(seed) for seed in range(MANY)) / 1000
    ours = ended - started
    share = f"{theirs / ours:.0%} of the bare loop's rate"
    return [
        Row(f"{MANY} jobs, {how}", f"{MANY / ours:.2f}/s", f"{MANY / theirs:.2f}/s", share),
        Row("  with creating them", f"{MANY / (ended - began):.2f}/s", "", ""),
    ]


def cancelling(client: Client) -> list[Row]:
    times = []
    for seed in range(CANCELLED):
        long = client.create_job("txt2img", MODELS, {**_params(seed), "steps": 150, "n_iter": 50})
        client.start_job(long)
        for event in client.events(f"/inferences/{long}/events"):
            if event.name == "progress":
                break
        following = client.create_job("txt2img", MODELS, {**_params(seed), "width": 128})
        client.start_job(following)
        cancelled = time.time()
        client.cancel_job(long)
        for event in client.events(f"/inferences/{following}/events"):
            if event.name == "inference.job_taken.v1":
                taken = datetime.fromisoformat(event.data["time"]).timestamp()
                times.append((taken - cancelled) * 1000)
        assert client.get_job(long)["error"].startswith("cancelled by")
    middle, worst = statistics.median(times), max(times)
    name = f"from cancel to the next job, median / worst of {CANCELLED}"
    return [Row(name, f"{middle:.0f} / {worst:.0f} ms", "", "")]


def _params(seed: int) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "steps": STEPS,
        "sampler_name": "Euler",
        "cfg_scale": 5.0,
        "seed": seed,
        "width": SIZE,
        "height": SIZE,
    }
