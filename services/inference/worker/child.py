"""The engine process: `python -m services.inference.worker.child MODULE:CLASS DEVICE CACHE PARENT`.

Reads jobs from stdin, writes progress and results to stdout, one job at a time. It dies with the
worker that started it, even in the middle of a long C call.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from services.inference.worker import frames
from shared import logs
from shared.contracts.inference import RunJob

log = logs.get_logger(__name__)

PR_SET_PDEATHSIG = 1


class Result(Protocol):
    images: list[bytes]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class Engine(Protocol):
    def run(
        self,
        job: RunJob,
        params: bytes,
        files: dict[str, Path],
        progress: Callable[[int, int], None],
    ) -> Result: ...


Request = tuple[frames.Run, bytes]


def main() -> None:
    path, device, cache, parent = sys.argv[1:]
    _die_with(int(parent))
    inbox, outbox = _take_pipes()
    logs.configure("engine")
    faulthandler.enable()  # a crash in C leaves its Python lines in the log
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the worker decides when a job has had its time
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox, requests), daemon=True).start()
    try:
        module, _, name = path.partition(":")
        loaded = importlib.import_module(module)
        unfit: type[Exception] = loaded.JobFailure
        engine: Engine = getattr(loaded, name)(device, Path(cache))
        _write(outbox, frames.Ready())
        while True:
            _serve(engine, unfit, *requests.get(), outbox)
    except Exception as error:
        log.exception("engine_broken")
        _write(outbox, frames.Broken(f"{type(error).__name__}: {error}"))
        sys.stderr.flush()
        os._exit(1)  # no farewell: threads of torch may hang


def _serve(
    engine: Engine, unfit: type[Exception], run: frames.Run, params: bytes, outbox: BinaryIO
) -> None:
    logs.bind(run.correlation_id, job_id=run.job.job_id)
    files = {name: Path(path) for name, path in run.files.items()}

    def progress(step: int, steps: int) -> None:
        _write(outbox, frames.Step(step, steps))

    try:
        result = engine.run(run.job, params, files, progress)
    except unfit as failure:
        _write(outbox, frames.Unfit(str(failure)))
        return
    done = frames.Done(result.seconds, result.warnings)
    _write(outbox, done, [result.param_json, *result.images])


def _write(outbox: BinaryIO, head: msgspec.Struct, parts: list[bytes] | None = None) -> None:
    for piece in frames.pack(head, parts or []):
        outbox.write(piece)
    outbox.flush()


def _read(inbox: BinaryIO, requests: queue.SimpleQueue[Request]) -> None:
    """Hands requests over. The end of the pipe is the end of the worker, and so of this process."""
    try:
        while True:
            (count,) = frames.COUNT.unpack(_exactly(inbox, frames.COUNT.size))
            table = _exactly(inbox, frames.LENGTH.size * count)
            head, params = (_exactly(inbox, length) for length in frames.part_lengths(table))
            requests.put((frames.decode_run(head), params))
    except EOFError:
        os._exit(0)
    except Exception:
        log.exception("engine_misled")
        os._exit(1)


def _exactly(inbox: BinaryIO, size: int) -> bytes:
    piece = inbox.read(size)
    if len(piece) < size:
        raise EOFError
    return piece


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keeps stdin and stdout for the frames; whatever a library prints goes to stderr."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbox, outbox


def _die_with(parent: int) -> None:
    """On Linux the kernel ends this process with its parent; elsewhere the end of stdin does, as
    soon as Python code runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died while this process was being started


if __name__ == "__main__":
    main()
