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


class Bus:
    """In NATS' own words: there is no client here."""

    def __init__(self, settings: dict[str, str]) -> None:
        self._about = {
            "endpoint_id": settings["DARKROOM_ENDPOINT_ID"],
            "instance_id": INSTANCE,
            "device": settings["DARKROOM_DEVICE"],
        }
        address = settings["DARKROOM_NATS_URL"].removeprefix("nats://")
        host, _, port = address.partition(":")
        self._socket = socket.create_connection((host, int(port)))
        user = {
            "verbose": False,
            "user": settings["DARKROOM_NATS_USER"],
            "pass": settings["DARKROOM_NATS_PASSWORD"],
        }
        self._say(f"CONNECT {json.dumps(user)}", "PING")
        heard = b""
        while b"PONG" not in heard:
            part = self._socket.recv(4096)
            if not part or b"-ERR" in part:
                raise SystemExit(f"no bus: {heard + part!r}")
            heard += part

    def _say(self, *lines: str) -> None:
        self._socket.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def tell(self, subject: str, type_name: str, **more: Any) -> None:
        frame = {
            "id": str(uuid.uuid4()),
            "source": "worker",
            "type": type_name,
            "subject": INSTANCE,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "data": {**self._about, **more},
        }
        body = json.dumps(frame)
        self._say(f"PUB {subject} {len(body)}", body)

    def beat(self) -> None:
        self.tell(f"beats.{INSTANCE}", "endpoints.instance_beat.v1", jobs=[])


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
    bus = Bus(settings) if settings["DARKROOM_NATS_URL"] != "nats://nowhere:1" else None
    if bus:
        ready = "endpoints.report_instance.v1"
        bus.tell(f"cmd.{ready}", ready, status="ready", pid=os.getpid())
    while not stopping or NAME.startswith("stubborn"):
        if bus:
            bus.beat()
        with contextlib.suppress(InterruptedError):
            time.sleep(0.1)
    tell(settings, finished=True)


main()
