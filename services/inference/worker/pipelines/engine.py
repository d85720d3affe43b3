"""Runs jobs side by side on one device.

A job is a generator (`Work`): the engine asks each what it needs next and does it, rows of UNets of
all running jobs in as few batches as their weights and shapes allow. Jobs run together if they have
one key; the one that waits longest says which. A job that comes later joins them as long as nobody
else waits, so nobody waits for more than those that were there first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from services.inference.worker.pipelines import (
    Aside,
    JobFailure,
    Listener,
    Plan,
    Result,
    Vitals,
    Work,
)
from services.inference.worker.pipelines.compiling import CompiledUNets, parse_shapes
from services.inference.worker.pipelines.cutting import CuttingPlan
from services.inference.worker.pipelines.denoising import Evaluator, Rows
from services.inference.worker.pipelines.enlarging import EnlargingPlan
from services.inference.worker.pipelines.library import Library, name_of
from services.inference.worker.pipelines.memory import (
    Memory,
    is_of_the_device,
    is_out_of_memory,
)
from services.inference.worker.pipelines.models.components import Place
from services.inference.worker.pipelines.painting import PaintingPlan, Studio
from services.inference.worker.pipelines.params.painting import script_of
from services.inference.worker.pipelines.params.reading import Body, read_body
from services.inference.worker.pipelines.pictures.files import Format
from services.inference.worker.pipelines.pictures.previews import MEDIA_TYPE, Mixes
from services.inference.worker.pipelines.plotting import PlottingPlan
from services.inference.worker.pipelines.sd_upscale import SDUpscalePlan
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.logs import get_logger
from shared.webui.body_names import PLOT, SD_UPSCALE

log = get_logger(__name__)

ASIDE_THREADS = 4
PLANS_OF_SCRIPTS: dict[str, Callable[[RunJob, Body, Mapping[str, Path], Studio], Plan]] = {
    PLOT: PlottingPlan,
    SD_UPSCALE: SDUpscalePlan,
}


class _Beside:
    """Works of a job that go on in other threads."""

    def __init__(self, futures: Sequence[Future[Any]]) -> None:
        self.futures = futures

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.futures)


class _Job:
    """One job in hand. `look`: makes its plan, if that is still to be done. `asked`: what it waits
    for. `was_put_back`: memory was short once."""

    def __init__(self, job_id: str, look: Callable[[], Plan], alone: bool) -> None:
        self.job_id = job_id
        self.look: Callable[[], Plan] | None = look
        self.plan: Plan | None = None
        self.alone = alone
        self.may_go = False
        self.was_put_back = False
        self.work: Work | None = None
        self.asked: list[Rows] | _Beside | None = None

    @property
    def key(self) -> object:
        if self.alone or self.plan is None or self.plan.key is None:
            return self
        return self.plan.key


class Engine:
    """One device and what is loaded on it. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        device: str,
        cache: Path,
        listener: Listener,
        options: EngineOptions | None = None,
    ) -> None:
        """`device`: cpu, cuda, cuda:1. `cache`: a folder for what is costly to find out again."""
        options = options or EngineOptions()
        place = _place(device, options.precision)
        self._listener = listener
        self._options = options
        self.memory = Memory(place.device)
        self.library = Library(place, cache, self.memory, options)
        self.evaluator = Evaluator(self.memory, options.rows, _compiled(options, place))
        self._studio = Studio(self.library, Mixes(), Format(options.format), options.webui)
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        on_gpu = place.device.type == "cuda"
        self._aside = ThreadPoolExecutor(ASIDE_THREADS, "aside") if on_gpu else None

    # What is asked of it

    def submit(
        self,
        job: RunJob,
        params: bytes,
        files: Mapping[str, Path],
        *,
        alone: bool = False,
        may_go: bool = True,
    ) -> None:
        """Puts a job at the end of the line, or says at once that it is unfit. Beside a job that is
        to run alone it is not even looked at, and that one itself when it is begun.

        `files`: where each of `job.models` lies, by its `content`. Never write into a file again
        that was handed in here (its pages are mapped); write a new one and rename it. `alone`: no
        other job runs beside it. `may_go`: it needs no `go` when it is begun."""
        waiting = _Job(job.job_id, lambda: self._plan(job, params, files), alone)
        waiting.may_go = may_go
        self._waiting.append(waiting)
        self._look_at_waiting()

    def go(self, job_id: str) -> None:
        for job in self._running:
            if job.job_id == job_id:
                job.may_go = True

    def cancel(self, job_id: str) -> None:
        """Ends a job at once, whatever it is doing, and gives its memory back."""
        for job in [*self._waiting, *self._running]:
            if job.job_id == job_id:
                self._end(job)
                self._listener.gone(job_id)
                self.memory.release()

    def recall(self, job_id: str) -> None:
        """Takes a job out of the line, if it has not been begun."""
        for job in list(self._waiting):
            if job.job_id == job_id:
                self._end(job)
                self._listener.gone(job_id)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done until somebody asks for it."""
        return not self._waiting and not any(self._can_go_on(job) for job in self._running)

    def vitals(self) -> Vitals:
        device = self.library.place.device
        return Vitals(
            device_name=name_of(device),
            memory=self.memory.taken(),
            memory_total=self.memory.total(),
            models=self.library.loaded,
        )

    # Its rounds

    def advance(self) -> None:
        """One round: begins what may begin, and takes every running job one step on."""
        self._admit()
        asking = []
        for job in list(self._running):
            if job.may_go and job.work is None:
                self._begin(job)
            elif isinstance(job.asked, _Beside) and job.asked.done:
                self._resume_from(job, job.asked)
            if isinstance(job.asked, list):
                asking.append(job)
        if asking:
            self._evaluate(asking)
        if not self._running and not self._waiting:
            self.memory.trim()

    def run(self, job: RunJob, params: bytes, files: Mapping[str, Path]) -> Result:
        """One job from beginning to end, with nothing beside it. Raises JobFailure."""
        seen: list[Result | JobFailure] = []
        outer, self._listener = self._listener, _Witness(self._listener, job.job_id, seen)
        try:
            self.submit(job, params, files, alone=True)
            while not seen:
                self.advance()
        finally:
            self._listener = outer
            self.cancel(job.job_id)
        if isinstance(seen[0], JobFailure):
            raise seen[0]
        return seen[0]

    def _plan(self, job: RunJob, params: bytes, files: Mapping[str, Path]) -> Plan:
        raw, studio = read_body(params), self._studio
        match job.task_type:
            case "txt2img" | "img2img":
                wanted = PLANS_OF_SCRIPTS.get(script_of(raw), PaintingPlan)
                return wanted(job, raw, files, studio)
            case "extra-single-image" | "extra-batch-images":
                return EnlargingPlan(job, raw, files, self.library, studio.format, studio.webui)
            case "rembg":
                return CuttingPlan(job, raw, files, self.library, studio.format)
        raise JobFailure(
            f"task_type {job.task_type!r} is not one of txt2img, img2img, extra-single-image,"
            " extra-batch-images, rembg"
        )

    def _look_at_waiting(self) -> None:
        if any(job.alone for job in self._running):
            return  # it has died beside others before, and is to be spared that
        for job in list(self._waiting):
            if job.look is not None and not job.alone:
                self._listener.planning(job.job_id)
                self._look_at(job)
                self._listener.planned(job.job_id)

    def _look_at(self, job: _Job) -> None:
        look, job.look = job.look, None
        assert look is not None
        try:
            job.plan = look()
        except Exception as error:
            self._fail(job, self._recover(error))

    def _begin(self, job: _Job) -> None:
        if job.look is not None:
            self._look_at(job)
        if job.plan is not None:
            job.work = job.plan.work(_Report(job, self._listener, self._options))
            self._resume(job, lambda work: next(work))

    def _admit(self) -> None:
        """Lets those begin that fit to what runs; see the head of this file."""
        self._look_at_waiting()
        while self._waiting and len(self._running) < self._options.jobs:
            if not self._running:
                chosen = self._waiting[0]
            else:
                key = self._running[0].key
                fitting = [job for job in self._waiting if job.key == key]
                if not fitting or (fitting[0] is not self._waiting[0] and self._formed):
                    break
                chosen = fitting[0]
            self._waiting.remove(chosen)
            self._running.append(chosen)
            if not chosen.may_go:
                self._listener.begun(chosen.job_id)
        self._formed = bool(self._running)

    _formed = False
    """Whether those that run have had their first round: who joins now may overtake nobody."""

    def _can_go_on(self, job: _Job) -> bool:
        if job.work is None:
            return job.may_go
        return not isinstance(job.asked, _Beside) or job.asked.done

    def _evaluate(self, jobs: list[_Job]) -> None:
        batches = [job.asked for job in jobs if isinstance(job.asked, list)]
        try:
            answers = self.evaluator.evaluate([rows for batch in batches for rows in batch])
        except Exception as error:
            self._recover(error)
            self._evaluate_each(jobs)
            return
        for job, batch in zip(jobs, batches, strict=True):
            mine, answers = answers[: len(batch)], answers[len(batch) :]
            self._resume(job, lambda work, mine=mine: work.send(mine))  # type: ignore[misc]

    def _evaluate_each(self, jobs: list[_Job]) -> None:
        """One after the other, so that who can't be served is known."""
        for job in jobs:
            assert isinstance(job.asked, list)
            try:
                answers = self.evaluator.evaluate(job.asked)
            except Exception as error:
                self._resume(job, lambda work, error=error: work.throw(error))  # type: ignore[misc]
                continue
            self._resume(job, lambda work, answers=answers: work.send(answers))  # type: ignore[misc]

    def _resume_from(self, job: _Job, beside: _Beside) -> None:
        error = next((e for future in beside.futures if (e := future.exception())), None)
        if error is not None:
            self._resume(job, lambda work: work.throw(error))
        else:
            results = [future.result() for future in beside.futures]
            self._resume(job, lambda work: work.send(results))

    def _resume(self, job: _Job, step: Callable[[Work], Any]) -> None:
        """Takes a job on to what it asks for next, or to its end."""
        assert job.work is not None
        try:
            asked = step(job.work)
            while isinstance(asked, Aside) and self._aside is None:
                asked = job.work.send([work() for work in asked.works])
        except StopIteration as end:
            self._end(job)
            self._listener.done(job.job_id, end.value)
            return
        except Exception as error:
            reason = self._recover(error)
            if not (is_out_of_memory(error) and self._put_back(job)):
                self._fail(job, reason)
            return
        if isinstance(asked, Aside):
            assert self._aside is not None
            device = self.library.place.device
            futures = [self._aside.submit(_on_own_stream(work, device)) for work in asked.works]
            job.asked = _Beside(futures)
            for future in futures:
                future.add_done_callback(lambda _: self._listener.wake())
        else:
            job.asked = asked

    def _recover(self, error: Exception) -> str:
        """Why a job that raised this has failed. Bodies and model files are made by strangers: what
        nobody has thought of ends the job that brought it, and no other. Raises it again if the
        device is broken, which only another process mends."""
        if isinstance(error, JobFailure):
            return str(error)
        if is_out_of_memory(error):
            self.library.forget()
            return (
                f"not enough memory on {self.library.place.device}; try a smaller"
                " batch_size or size"
            )
        if is_of_the_device(error):
            raise error
        log.error("job_stumbled", exc_info=error)
        return f"its params or models made the engine stumble: {type(error).__name__}"

    def _put_back(self, job: _Job) -> bool:
        """To the head of the line, for one more try with nothing beside it. False if it had that
        already."""
        if job.was_put_back:
            return False
        self._end(job)
        job.was_put_back = job.alone = True
        self._waiting.insert(0, job)
        log.warning("job_put_back", job_id=job.job_id)
        return True

    def _fail(self, job: _Job, reason: str) -> None:
        self._end(job)
        self._listener.unfit(job.job_id, reason)

    def _end(self, job: _Job) -> None:
        if job.work is not None:
            job.work.close()
        job.asked = job.work = None
        for line in (self._waiting, self._running):
            if job in line:
                line.remove(job)


class _Report:
    """What one job tells of itself, with previews no more often than they are wanted."""

    def __init__(self, job: _Job, listener: Listener, options: EngineOptions) -> None:
        self._job, self._listener, self._options = job, listener, options
        self._last = time.monotonic()

    def step(self, step: int, steps: int) -> None:
        self._listener.step(self._job.job_id, step, steps)

    def preview(self, picture: Callable[[], bytes]) -> None:
        every, now = self._options.preview_seconds, time.monotonic()
        if every <= 0 or now - self._last < every:
            return
        self._last = now
        self._listener.preview(self._job.job_id, MEDIA_TYPE, picture())


class _Witness(Listener):
    """Passes everything on, and keeps the end of one job."""

    def __init__(self, outer: Listener, job_id: str, seen: list[Result | JobFailure]) -> None:
        self._outer, self._job_id, self._seen = outer, job_id, seen

    def step(self, job_id: str, step: int, steps: int) -> None:
        self._outer.step(job_id, step, steps)

    def preview(self, job_id: str, media_type: str, picture: bytes) -> None:
        self._outer.preview(job_id, media_type, picture)

    def done(self, job_id: str, result: Result) -> None:
        if job_id == self._job_id:
            self._seen.append(result)
        else:
            self._outer.done(job_id, result)

    def unfit(self, job_id: str, reason: str) -> None:
        if job_id == self._job_id:
            self._seen.append(JobFailure(reason))
        else:
            self._outer.unfit(job_id, reason)


_thread = threading.local()


def _on_own_stream(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Work on a GPU beside the steps of others, once what it needs has been computed."""
    ready = torch.cuda.current_stream(device).record_event()

    def beside() -> Any:
        stream = getattr(_thread, "stream", None)
        if stream is None:
            stream = _thread.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            result = work()
        stream.synchronize()
        return result

    return beside


def _compiled(options: EngineOptions, place: Place) -> CompiledUNets | None:
    """Raises ValueError for shapes that are none."""
    if not options.compile:
        return None
    compiled = CompiledUNets(parse_shapes(options.compile), place, mode=options.compile_mode)
    compiled.warm_up()
    return compiled


def _place(device: str, precision: str) -> Place:
    """Half precision on a GPU; full precision on a CPU, which is slower with halves."""
    where = torch.device(device)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # The same body is to give the same pixels again.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    names = {"half": torch.float16, "bfloat16": torch.bfloat16, "full": torch.float32}
    if precision == "auto":
        return Place(where, torch.float16 if where.type == "cuda" else torch.float32)
    return Place(where, names[precision])
