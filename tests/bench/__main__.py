"""`just bench`: what Darkroom adds to the bare work, measured against a named peer in one run.

Starts a stack of its own and removes it. Trust the ratios, not the milliseconds.
"""

from __future__ import annotations

import asyncio

import psutil

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from tests.bench import http, jobs
from tests.bench.report import Row, print_table

THREADS = 1


def main() -> None:
    with Stack.temporary(settings={"DARKROOM_WORKER_THREADS": str(THREADS)}) as stack:
        measure(stack)


def measure(stack: Stack) -> None:
    settings = stack.environment()
    client = Client.log_in(
        settings["DARKROOM_URL"],
        settings["DARKROOM_API_KEY"],
        settings["DARKROOM_ADMIN_USER"],
        settings["DARKROOM_ADMIN_PASSWORD"],
    )
    client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    client.create_endpoint("bench")
    client.wait_for_endpoint("bench")
    rows = jobs.run(client, THREADS)
    print_table("A job end to end", "bare diffusers pipeline", rows)
    print_table("Resident memory after those jobs", "", _memory(stack))
    job = client.run_job("txt2img", jobs.MODELS, {"prompt": "x", "steps": 1, "width": 64})
    http_rows = asyncio.run(http.run(stack, client, job["InferenceJobId"]))
    print_table("HTTP, p50 / p99", "bare Litestar + asyncpg", http_rows)


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
