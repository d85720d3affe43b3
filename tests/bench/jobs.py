"""A tiny job end to end beside the bare pipeline call, alternating, in one run.

End to end: from PUT /inferences/{id}/start to the event that it has succeeded, with its picture in
S3 by then. The two never run at the same time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.installation import REPOSITORY
from tests.bench.report import Row

PROMPT, SIZE, STEPS, JOBS = "a red heart on a yellow background", 64, 10, 15
MODELS = {"Stable-diffusion": [CHECKPOINT.name]}


def run(client: Client, threads: int) -> list[Row]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    bare = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare_pipeline", PROMPT, str(SIZE), str(STEPS)],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert bare.stdin
    assert bare.stdout
    assert bare.stdout.readline().strip() == "ready"

    def render_bare(seed: int) -> float:
        assert bare.stdin
        assert bare.stdout
        bare.stdin.write(f"{seed}\n")
        bare.stdin.flush()
        return float(bare.stdout.readline())

    def render(seed: int) -> tuple[float, dict[str, Any]]:
        job_id = client.create_job("txt2img", MODELS, _params(seed))
        started = time.perf_counter()
        client.start_job(job_id)
        for _ in client.events(f"/inferences/{job_id}/events"):
            pass
        took = (time.perf_counter() - started) * 1000
        return took, client.get_job(job_id)

    try:
        for seed in (1, 2):
            render(seed)
            render_bare(seed)
        ours, theirs, inside = [], [], []
        for seed in range(JOBS):
            took, job = render(seed)
            assert job["status"] == "succeed", job["error"]
            ours.append(took)
            inside.append(sum(job["seconds"].values()) * 1000)
            theirs.append(render_bare(seed))
    finally:
        bare.stdin.close()
        bare.wait()
    own, peer = statistics.median(ours), statistics.median(theirs)
    stages = statistics.median(inside)
    name = f"txt2img {SIZE} px, {STEPS} steps, median of {JOBS}"
    return [
        Row(name, f"{own:.0f} ms", f"{peer:.0f} ms", f"{own / peer:.2f}×"),
        Row("  of it in the worker's stages", f"{stages:.0f} ms", "", ""),
    ]


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
