"""`just bench`: what Darkroom adds to the bare work, measured against a named peer in one run.
`just bench endpoints registry cache switches`: endpoints on their way into service, model files on
theirs in and to a picture, and the memory of services and engines.

Starts a stack of its own and removes it. Trust the ratios, not the milliseconds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from tests.bench import cache, endpoints, http, jobs, registry, switching
from tests.bench.report import Row, print_table

THREADS = 1
USUAL = ("jobs", "memory", "http")
NAMES = (*USUAL, "endpoints", "registry", "cache", "switches")


def main() -> None:
    wanted = set(sys.argv[1:] or USUAL)
    if unknown := wanted - set(NAMES):
        raise SystemExit(f"just bench [{' '.join(NAMES)}]; got {', '.join(unknown)}")
    if "registry" in wanted:
        may_download = {"download_schemes": "http", "download_allowed_hosts": "127.0.0.1"}
        with stack_with(instances=0, **may_download) as (stack, client):
            print_table("Into the registry", "bare boto3", registry.ways_in(stack, client))
    if "endpoints" in wanted:
        with stack_with(scale_in_after=1, instances=0) as (_, client):
            rows = endpoints.starting(client) + endpoints.waking(client)
            print_table("Endpoints", "importing torch", rows)
    if "cache" in wanted:
        cache.run()
    if "switches" in wanted:
        switching.run()
    if not wanted.intersection(USUAL):
        return
    with jobs.bare_pipeline(THREADS) as bare:
        if "jobs" in wanted:
            with stack_with(jobs_in_hand=1) as (_, client):
                rows = jobs.many(client, bare, "one after the other")
            with stack_with(batch_rows=2) as (_, client):
                rows += jobs.many(client, bare, "side by side, not batched")
        with stack_with() as (stack, client):
            if "jobs" in wanted:
                rows += jobs.many(client, bare, "side by side, batched")
                rows += jobs.one_by_one(client, bare) + jobs.cancelling(client)
                print_table("Jobs end to end", "bare diffusers pipeline", rows)
            if "memory" in wanted:
                client.run_job("txt2img", jobs.MODELS, {"prompt": "x", "steps": 9, "width": 64})
                print_table("Resident memory after jobs", "", _memory(stack))
            if "http" in wanted:
                job = client.run_job("txt2img", jobs.MODELS, {"prompt": "x", "steps": 1})
                http_rows = asyncio.run(http.run(stack, client, job["InferenceJobId"]))
                print_table("HTTP, p50 / p99", "bare Litestar + asyncpg", http_rows)


@contextmanager
def stack_with(*, instances: int = 1, **settings: object) -> Iterator[tuple[Stack, Client]]:
    """A stack with the demo checkpoint, and an endpoint unless it has no instances."""
    told = {f"DARKROOM_{name.upper()}": str(value) for name, value in settings.items()}
    told["DARKROOM_WORKER_THREADS"] = str(THREADS)
    with Stack.temporary(settings=told) as stack:
        client = Client.log_in_at(stack.home)
        client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
        if instances:
            client.create_endpoint("bench", count=instances)
            client.wait_for_endpoint("bench")
            client.run_job("txt2img", jobs.MODELS, {"prompt": "x", "steps": 1, "width": 64})
        yield stack, client


def _memory(stack: Stack) -> list[Row]:
    rows = []
    for name in stack.names():
        process = psutil.Process(stack.pid(name))
        rows.append(_memory_row(name, [process, *process.children(recursive=True)]))
        if name == "endpoints":
            rows[-1] = _memory_row(name, [process])
            for worker in process.children():
                rows.append(_memory_row("  worker (bus side)", [worker]))
                engine = worker.children(recursive=True)
                rows.append(_memory_row("  worker's engine (torch)", engine))
    return rows


def _memory_row(name: str, processes: list[psutil.Process]) -> Row:
    resident = sum(process.memory_info().rss for process in processes)
    return Row(name, f"{resident / 1e6:.0f} MB", "", "")


if __name__ == "__main__":
    main()
