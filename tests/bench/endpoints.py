"""Endpoints from POST to `InService`; and once one sleeps, from the start of a job that wakes it to
the job's end. Beside them what any worker has to do: a process that imports torch and diffusers."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from deploy.local.client import Client
from deploy.local.installation import REPOSITORY
from tests.bench.jobs import MODELS
from tests.bench.report import Row

ROUNDS = 5
BARE = "import torch, diffusers, transformers"
PARAMS = {"prompt": "x", "steps": 1, "width": 64, "height": 64}


def starting(client: Client) -> list[Row]:
    ours, bare = [], []
    for number in range(ROUNDS):
        bare.append(_import())
        name = f"start-{number}"
        began = time.perf_counter()
        client.create_endpoint(name)
        client.wait_for_endpoint(name)
        ours.append(time.perf_counter() - began)
        _delete(client, name)
    return [_row("POST /endpoints to InService", ours, bare)]


def waking(client: Client) -> list[Row]:
    """Needs a short DARKROOM_SCALE_IN_AFTER, and no other Async endpoint."""
    client.create_endpoint("waking", min_instance_number=0)
    ours, bare = [], []
    for _ in range(ROUNDS):
        while (client.find_endpoint("waking") or {}).get("endpoint_status") != "InService":
            time.sleep(0.1)
        while (client.find_endpoint("waking") or {}).get("current_instance_count") != "0":
            time.sleep(0.1)
        bare.append(_import())
        job_id = client.create_job("txt2img", MODELS, PARAMS)
        began = time.perf_counter()
        client.start_job(job_id)
        client.wait_for_job(job_id)
        ours.append(time.perf_counter() - began)
    _delete(client, "waking")
    return [_row("a job that wakes an endpoint, start to end", ours, bare)]


def _import() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", BARE], cwd=REPOSITORY, check=True)
    return time.perf_counter() - began


def _delete(client: Client, name: str) -> None:
    client.call("DELETE", "/endpoints", {"delete_endpoint_list": [name], "username": ""})
    while name in str(client.call("GET", "/endpoints")):
        time.sleep(0.1)


def _row(what: str, ours: list[float], bare: list[float]) -> Row:
    mine, peer = statistics.median(ours), statistics.median(bare)
    return Row(
        f"{what}, median / worst of {len(ours)}",
        f"{mine:.1f} / {max(ours):.1f} s",
        f"{peer:.1f} / {max(bare):.1f} s",
        f"{mine / peer:.2f}",
    )
