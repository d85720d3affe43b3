"""An engine without torch that does what its params tell it: sleep, crash, hold the interpreter."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from shared.contracts.inference import RunJob

PNG = b"\x89PNG\r\n\x1a\n"


class JobFailure(Exception): ...


class Result(msgspec.Struct, frozen=True):
    images: list[bytes]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class Params(msgspec.Struct, kw_only=True):
    """`crashes`, `slow`: how many attempts die, or take `seconds`; counted in the file `counter`.
    Signal 0 is an exception."""

    images: int = 1
    steps: int = 0
    seconds: float = 0.0
    deaf_seconds: int = 0
    slow: int = 99
    crashes: int = 0
    signal: int = 9
    counter: str = ""
    reason: str = ""


class Engine:
    def __init__(self, device: str, cache: Path) -> None:
        self._device = device
        print("libraries print things like this")

    def run(
        self,
        job: RunJob,
        params: bytes,
        files: Mapping[str, Path],
        progress: Callable[[int, int], None],
    ) -> Result:
        told = msgspec.json.decode(params, type=Params)
        if told.counter:
            with open(told.counter, "a") as counter:
                counter.write(f"{os.getppid()}\n")
            attempt = len(Path(told.counter).read_text().splitlines())
            if attempt > told.slow:
                told.seconds = 0
            if attempt <= told.crashes:
                if told.signal:
                    os.kill(os.getpid(), told.signal)
                raise RuntimeError("device-side assert")
        if told.reason:
            raise JobFailure(told.reason)
        for step in range(told.steps):
            time.sleep(told.seconds / told.steps)
            progress(step + 1, told.steps)
        if told.deaf_seconds:
            ctypes.PyDLL(None).sleep(told.deaf_seconds)  # in C, with the interpreter's lock
        read = {name: Path(path).read_text() for name, path in files.items()}
        info = msgspec.json.encode({"files": read, "pid": os.getpid()})
        images = [PNG + bytes([number]) for number in range(told.images)]
        return Result(images, info, {"render": told.seconds}, ["a warning"])
