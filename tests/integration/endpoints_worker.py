"""Stands in for the GPU process: speaks to the bus like a worker, renders nothing.

Its endpoint's name says how it behaves: `crash…` exits at start, `stubborn…` ignores SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

name = os.environ["DARKROOM_ENDPOINT_NAME"]
if name.startswith("crash"):
    print("loading the engine\nCUDA error: no kernel image is available", flush=True)
    sys.exit(3)

from shared.bus import connect  # noqa: E402 - a crash need not wait for imports
from shared.contracts import envelope as cloud  # noqa: E402
from shared.contracts.endpoints import ReportInstance  # noqa: E402
from shared.contracts.registry import type_of  # noqa: E402
from shared.contracts.subjects import command_subject  # noqa: E402
from shared.settings import BusSettings, load  # noqa: E402


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    engine = subprocess.Popen(["sleep", "600"])
    print(f"engine {engine.pid}", flush=True)
    client = await connect(load(BusSettings))
    report = ReportInstance(
        endpoint_id=os.environ["DARKROOM_ENDPOINT_ID"],
        instance_id=os.environ["DARKROOM_INSTANCE_ID"],
        status="ready",
        device=os.environ["DARKROOM_DEVICE"],
        pid=os.getpid(),
    )
    type_name = type_of(ReportInstance)
    framed = cloud.wrap(report, type=type_name, source="worker", subject=report.instance_id)
    await client.jetstream().publish(command_subject(type_name), cloud.encode(framed))
    await stop.wait()
    while name.startswith("stubborn"):
        await asyncio.sleep(60)
    engine.kill()
    await client.close()


asyncio.run(main())
