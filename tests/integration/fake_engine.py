"""An engine without torch that does what its params tell it: sleep, crash, hold the interpreter."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path

import msgspec

from services.inference.worker.pipelines import JobFailure, Listener, Result, ResultImage, Vitals
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob

PNG = b"\x89PNG\r\n\x1a\n"


class Params(msgspec.Struct, kw_only=True):
    """`crashes`, `slow`: how many attempts die, or take `seconds`; counted in the file `counter`.
    Signal 0 is an exception. `poisonous`: the mere look at it is death, beside others. Jobs
    of one `group` run side by side."""

    images: int = 1
    steps: int = 0
    seconds: float = 0.0
    deaf_seconds: int = 0
    slow: int = 99
    crashes: int = 0
    signal: int = 9
    counter: str = ""
    reason: str = ""
    preview: bool = False
    warnings: int = 1
    poisonous: bool = False
    group: str = ""


class _Job(msgspec.Struct):
    job_id: str
    told: Params
    files: Mapping[str, Path]
    alone: bool
    may_go: bool
    work: Generator[None, None, Result] | None = None


class Engine:
    def __init__(
        self, device: str, cache: Path, listener: Listener, options: EngineOptions
    ) -> None:
        self._listener = listener
        self._options = options
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        print("libraries print things like this")

    @property
    def idle(self) -> bool:
        return not self._waiting and not any(job.may_go for job in self._running)

    def submit(
        self,
        job: RunJob,
        params: bytes,
        files: Mapping[str, Path],
        *,
        alone: bool,
        may_go: bool,
    ) -> None:
        self._listener.planning(job.job_id)
        told = msgspec.json.decode(params, type=Params)
        if told.poisonous and not alone:
            os.kill(os.getpid(), told.signal)
        self._listener.planned(job.job_id)
        self._waiting.append(_Job(job.job_id, told, files, alone, may_go))

    def go(self, job_id: str) -> None:
        for job in self._running:
            job.may_go |= job.job_id == job_id

    def cancel(self, job_id: str) -> None:
        for jobs in (self._waiting, self._running):
            for job in list(jobs):
                if job.job_id == job_id:
                    jobs.remove(job)
                    self._listener.gone(job_id)

    def recall(self, job_id: str) -> None:
        if any(job.job_id == job_id for job in self._waiting):
            self.cancel(job_id)

    def vitals(self) -> Vitals:
        models = {path.name for job in self._running for path in job.files.values()}
        return Vitals(device_name="none", memory=1, memory_total=2, models=sorted(models))

    def advance(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            job = self._waiting.pop(0)
            self._running.append(job)
            self._listener.begun(job.job_id)
        for job in [job for job in self._running if job.may_go]:
            job.work = job.work or self._work(job)
            try:
                next(job.work)
            except StopIteration as end:
                self._running.remove(job)
                self._listener.done(job.job_id, end.value)
            except JobFailure as failure:
                self._running.remove(job)
                self._listener.unfit(job.job_id, str(failure))

    def _fits(self, job: _Job) -> bool:
        if not self._running:
            return True
        first = self._running[0]
        together = job.told.group == first.told.group != "" and not (job.alone or first.alone)
        return together and len(self._running) < self._options.jobs

    def _work(self, job: _Job) -> Generator[None, None, Result]:
        told = job.told
        if told.counter:
            with open(told.counter, "a") as counter:
                counter.write(f"{os.getppid()} {'alone' if job.alone else 'together'}\n")
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
            self._listener.step(job.job_id, step + 1, told.steps)
            if told.preview:
                self._listener.preview(job.job_id, "image/png", PNG)
            yield
        if told.deaf_seconds:
            ctypes.PyDLL(None).sleep(told.deaf_seconds)  # in C, with the interpreter's lock
        read = {name: Path(path).read_text() for name, path in job.files.items()}
        info = msgspec.json.encode({"files": read, "pid": os.getpid()})
        images = [
            ResultImage(f"image_{number}.png", "image/png", PNG + bytes([number]))
            for number in range(told.images)
        ]
        return Result(images, info, {"render": told.seconds}, ["a warning"] * told.warnings)
