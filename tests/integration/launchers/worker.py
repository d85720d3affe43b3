"""Stands in for the GPU process where nothing but Python is: in a container, on a node.

It writes what it was told to `<cache>/<instance>.json` and, if there is a bus, says that it is
ready. Its endpoint's name says how it behaves: `crash…` exits at start, `stubborn…` ignores
SIGTERM, `hungry…` takes all the memory that it gets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Any

NAME = os.environ["DARKROOM_ENDPOINT_NAME"]
INSTANCE = os.environ["DARKROOM_INSTANCE_ID"]


def told() -> dict[str, str]:
    """What shared/settings.py would read, and what tells of GPUs."""
    settings = {}
    for name, value in os.environ.items():
        if name.startswith("DARKROOM_") and name.endswith("_FILE"):
            settings[name.removesuffix("_FILE")] = Path(value).read_text()
        elif name.startswith("DARKROOM_") or name.endswith("_VISIBLE_DEVICES"):
            settings[name] = value
    return settings


def tell(settings: dict[str, str], **more: Any) -> None:
    file = Path(settings["DARKROOM_CACHE"]) / f"{INSTANCE}.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps({**settings, **more}))
    part.rename(file)


def report_ready(settings: dict[str, str]) -> socket.socket:
    """In NATS' own words: there is no client here."""
    address = settings["DARKROOM_NATS_URL"].removeprefix("nats://")
    host, _, port = address.partition(":")
    bus = socket.create_connection((host, int(port)))
    user = {
        "verbose": False,
        "user": settings["DARKROOM_NATS_USER"],
        "pass": settings["DARKROOM_NATS_PASSWORD"],
    }
    type_name = "endpoints.report_instance.v1"
    frame = {
        "id": str(uuid.uuid4()),
        "source": "worker",
        "type": type_name,
        "subject": INSTANCE,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": {
            "endpoint_id": settings["DARKROOM_ENDPOINT_ID"],
            "instance_id": INSTANCE,
            "status": "ready",
            "device": settings["DARKROOM_DEVICE"],
            "pid": os.getpid(),
        },
    }
    body = json.dumps(frame)
    lines = (f"CONNECT {json.dumps(user)}", f"PUB cmd.{type_name} {len(body)}", body, "PING", "")
    bus.sendall("\r\n".join(lines).encode())
    heard = b""
    while b"PONG" not in heard:
        part = bus.recv(4096)
        if not part or b"-ERR" in heard:
            raise SystemExit(f"no bus: {heard!r}")
        heard += part
    return bus


def main() -> None:
    settings = told()
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    tell(settings)
    print(f"worker {INSTANCE} of {NAME}", flush=True)
    if NAME.startswith("crash"):
        print("loading the engine\nCUDA error: no kernel image is available", flush=True)
        sys.exit(3)
    kept = [b""]
    while NAME.startswith("hungry"):
        kept.append(os.urandom(4 * 1024**2))
        time.sleep(0.02)
    if settings["DARKROOM_NATS_URL"] != "nats://nowhere:1":
        bus = report_ready(settings)  # noqa: F841 - open for as long as this worker lives
    while not stopping or NAME.startswith("stubborn"):
        with contextlib.suppress(InterruptedError):
            time.sleep(0.05)
    tell(settings, finished=True)


main()
