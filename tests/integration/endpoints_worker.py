"""Stands in for the GPU process: speaks to the bus like a worker, renders nothing.

Its endpoint's name says how it behaves: `crash…` exits at start, `stubborn…` ignores SIGTERM,
`silent…` says nothing after its first word, `broken…` that it has no engine, and ends."""

from __future__ import annotations

import asyncio
import contextlib
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
from shared.contracts.endpoints import InstanceBeat, ReportInstance  # noqa: E402
from shared.contracts.registry import type_of  # noqa: E402
from shared.contracts.subjects import beat_subject, command_subject  # noqa: E402
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
        status="failed" if name.startswith("broken") else "ready",
        error="libcuda is older than torch" if name.startswith("broken") else None,
        device=os.environ["DARKROOM_DEVICE"],
        pid=os.getpid(),
    )
    type_name = type_of(ReportInstance)
    framed = cloud.wrap(report, type=type_name, source="worker", subject=report.instance_id)
    await client.jetstream().publish(command_subject(type_name), cloud.encode(framed))
    if name.startswith("broken"):
        engine.kill()
        print("RuntimeError: the driver is too old", flush=True)
        sys.exit(1)
    beat = InstanceBeat(
        endpoint_id=report.endpoint_id,
        instance_id=report.instance_id,
        device=report.device,
    )
    framed = cloud.wrap(beat, type=type_of(beat), source="worker", subject=report.instance_id)
    while not stop.is_set():
        if not name.startswith("silent"):
            await client.publish(beat_subject(report.instance_id), cloud.encode(framed))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.5)
    while name.startswith("stubborn"):
        await asyncio.sleep(60)
    engine.kill()
    await client.close()


asyncio.run(main())
