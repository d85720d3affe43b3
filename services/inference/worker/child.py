"""The engine process: `python -m services.inference.worker.child MODULE:CLASS DEVICE CACHE PARENT
OPTIONS`, the options as JSON.

Reads requests from stdin, writes progress and results to stdout. It dies with the worker that
started it, even in the middle of a long C call.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from services.inference.worker import frames
from services.inference.worker.pipelines import Listener, Result, Vitals
from services.inference.worker.settings import EngineOptions
from shared import logs
from shared.contracts.inference import RunJob

log = logs.get_logger(__name__)

PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    """See `pipelines.engine.Engine`."""

    @property
    def idle(self) -> bool: ...

    def submit(
        self,
        job: RunJob,
        params: bytes,
        files: Mapping[str, Path],
        *,
        alone: bool,
        may_go: bool,
    ) -> None: ...

    def go(self, job_id: str) -> None: ...

    def cancel(self, job_id: str) -> None: ...

    def recall(self, job_id: str) -> None: ...

    def advance(self) -> None: ...

    def vitals(self) -> Vitals: ...


Request = tuple[frames.Request, list[bytes]] | None
"""None: the engine has something to do without being asked."""


def main() -> None:
    path, device, cache, parent, options = sys.argv[1:]
    _die_with(int(parent))
    inbox, outbox = _take_pipes()
    logs.configure("engine")
    faulthandler.enable()  # a crash in C leaves its Python lines in the log
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the worker decides when a job has had its time
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox, requests), daemon=True).start()
    speaker = Speaker(outbox, lambda: requests.put(None))
    try:
        module, _, name = path.partition(":")
        make: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        told = msgspec.json.decode(options, type=EngineOptions)
        engine = make(device, Path(cache), speaker, told)
        speaker.write(frames.Ready())
        while True:
            _serve(engine, requests, speaker)
            engine.advance()
    except Exception as error:
        log.exception("engine_broken")
        speaker.write(frames.Broken(f"{type(error).__name__}: {error}"))
        sys.stderr.flush()
        os._exit(1)  # no farewell: threads of torch may hang


def _serve(engine: Engine, requests: queue.SimpleQueue[Request], speaker: Speaker) -> None:
    """Takes what has been asked for; waits for it if the engine has nothing else to do."""
    while True:
        try:
            request = requests.get(block=engine.idle)
        except queue.Empty:
            return
        match request:
            case (frames.Run() as run, [params]):
                files = {name: Path(path) for name, path in run.files.items()}
                engine.submit(run.job, params, files, alone=run.alone, may_go=run.may_go)
            case (frames.Go(job_id), _):
                engine.go(job_id)
            case (frames.Cancel(job_id), _):
                engine.cancel(job_id)
            case (frames.Recall(job_id), _):
                engine.recall(job_id)
            case (frames.Look(), _):
                speaker.well(engine.vitals())
            case _:
                return


class Speaker(Listener):
    """Says to the worker what the engine says of its jobs."""

    def __init__(self, outbox: BinaryIO, wake: Callable[[], None]) -> None:
        self._outbox = outbox
        self._wake = wake

    def wake(self) -> None:
        self._wake()

    def begun(self, job_id: str) -> None:
        self.write(frames.Begun(job_id))

    def step(self, job_id: str, step: int, steps: int) -> None:
        self.write(frames.Step(job_id, step, steps))

    def preview(self, job_id: str, media_type: str, picture: bytes) -> None:
        self.write(frames.Preview(job_id, media_type), [picture])

    def done(self, job_id: str, result: Result) -> None:
        images = [frames.Image(image.name, image.media_type) for image in result.images]
        done = frames.Done(job_id, images, result.seconds, result.warnings)
        self.write(done, [result.param_json, *(image.data for image in result.images)])

    def unfit(self, job_id: str, reason: str) -> None:
        self.write(frames.Unfit(job_id, reason))

    def gone(self, job_id: str) -> None:
        self.write(frames.Gone(job_id))

    def well(self, vitals: Vitals) -> None:
        self.write(
            frames.Well(vitals.device_name, vitals.memory, vitals.memory_total, vitals.models)
        )

    def write(self, head: msgspec.Struct, parts: list[bytes] | None = None) -> None:
        for piece in frames.pack(head, parts or []):
            self._outbox.write(piece)
        self._outbox.flush()


def _read(inbox: BinaryIO, requests: queue.SimpleQueue[Request]) -> None:
    """Hands requests over. The end of the pipe is the end of the worker, and so of this process."""
    try:
        while True:
            (count,) = frames.COUNT.unpack(_exactly(inbox, frames.COUNT.size))
            table = _exactly(inbox, frames.LENGTH.size * count)
            head, *parts = (_exactly(inbox, length) for length in frames.part_lengths(table))
            requests.put((frames.decode_request.decode(head), parts))
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
