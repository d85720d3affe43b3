"""The engine process as the worker sees it: started, given jobs, killed, found dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec

from services.inference.worker import frames
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.errors import DarkroomError
from shared.logs import get_logger
from shared.settings import PREFIX

log = get_logger(__name__)

START_SECONDS = 300.0
"""The first import of some libraries compiles for minutes."""

KILL_SECONDS = 10.0

CANCEL_SECONDS = 5.0
"""An engine that does not let go of a job within this time is killed: it hangs in a C call."""

ANSWER_SECONDS = 1.0
"""So long a beat waits for an engine that computes to say how it is."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
"""Nothing is ever fetched from a hub, whatever a model file asks for."""

INHERITED = ("DARKROOM_ENDPOINT_ID", "DARKROOM_INSTANCE_ID")
"""Of our settings, those by which a launcher knows what belongs to a worker. The engine reads files
that strangers made: it gets no password."""


class EngineDied(DarkroomError):
    """The engine is gone; the job it had may do better next time."""


class JobFailure(DarkroomError):
    """The job can't be done, now or later; the message is the reason for its owner."""


class JobGone(DarkroomError):
    """The engine gave the job up because it was told to."""


class ResultImage(msgspec.Struct, frozen=True):
    name: str
    media_type: str
    data: bytes


class Result(msgspec.Struct, frozen=True):
    images: list[ResultImage]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class Following:
    """What a job's engine tells of it while it runs; the default does nothing with it."""

    async def on_begun(self) -> None:
        """Its turn has come. It goes on when this returns."""

    async def on_step(self, step: int, steps: int) -> None: ...

    async def on_preview(self, media_type: str, picture: bytes) -> None: ...


Said = tuple[frames.JobAnswer, list[bytes]] | EngineDied


class EngineProcess:
    """One process with several jobs in hand. Its death is the death of all of them."""

    def __init__(
        self, engine: str, device: str, cache: Path, options: EngineOptions | None = None
    ) -> None:
        self._engine = engine
        self._device = device
        self._cache = cache
        self._options = options or EngineOptions()
        self._process: Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._jobs: dict[str, asyncio.Queue[Said]] = {}
        self._answered = asyncio.Event()
        self.well: frames.Well | None = None
        """What it said last of itself."""

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def check(self) -> None:
        """Raises while there is no engine."""
        if not self.alive:
            raise EngineDied("no engine is running")

    async def start(self) -> None:
        """Returns when the engine is loaded and has answered a probe. Raises EngineDied if it can't
        be."""
        async with self._starting:
            if not self.alive:
                await self._start()

    async def look(self) -> None:
        """Asks it how it is, for `well`. One that is busy says so later, and is not asked again."""
        if self.alive and self._answered.is_set():
            self._answered.clear()
            await self._send(frames.Look())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._answered.wait(), ANSWER_SECONDS)

    async def run(
        self,
        job: RunJob,
        params: bytes,
        files: dict[str, Path],
        following: Following,
        *,
        seconds: float,
        alone: bool = False,
    ) -> Result:
        """Raises JobFailure for a job that can't be done or takes longer than `seconds` from its
        beginning, EngineDied if the engine did not survive it, JobGone once it was cancelled or
        recalled. Cancelled itself, it returns when the engine has let go of the job or is gone."""
        await self.start()
        said: asyncio.Queue[Said] = asyncio.Queue()
        self._jobs[job.job_id] = said
        paths = {name: str(path) for name, path in files.items()}
        try:
            await self._send(frames.Run(job, paths, alone, may_go=False), params)
            return await self._follow(job.job_id, said, following, seconds)
        except asyncio.CancelledError:
            await asyncio.shield(self._withdraw(job.job_id, said))
            raise
        finally:
            del self._jobs[job.job_id]

    async def cancel(self, job_id: str) -> None:
        """The job's `run` ends with JobGone, or with EngineDied if the engine does not listen."""
        if job_id in self._jobs and self.alive:
            await self._send(frames.Cancel(job_id))
            asyncio.get_running_loop().call_later(CANCEL_SECONDS, self._kill_if_deaf, job_id)

    async def recall(self, job_id: str) -> None:
        """The job's `run` ends with JobGone, unless it has been begun."""
        if job_id in self._jobs and self.alive:
            await self._send(frames.Recall(job_id))

    async def kill(self) -> None:
        """Returns when there is no engine, or none that anybody could still end."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        try:
            await asyncio.wait_for(process.wait(), KILL_SECONDS)
        except TimeoutError:
            log.error("engine_left_behind", pid=process.pid)  # stuck in a driver

    async def _start(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(PREFIX) or name in INHERITED
        } | OFFLINE
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.inference.worker.child",
            self._engine,
            self._device,
            str(self._cache),
            str(os.getpid()),
            msgspec.json.encode(self._options).decode(),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                answer, _ = await self._answer(process)
                if isinstance(answer, frames.Ready):
                    await self._send(frames.Look())
                    answer, _ = await self._answer(process)
        except TimeoutError:
            await self.kill()
            raise EngineDied(f"it did not load within {START_SECONDS:.0f} s") from None
        except BaseException:
            await self.kill()
            raise
        if not isinstance(answer, frames.Well):
            raise await self._died(process, f"it said {type(answer).__name__} first")
        self._heed(answer)
        log.info("engine_ready", pid=process.pid, device=self._device)
        self._listening = asyncio.create_task(self._listen(process))

    async def _listen(self, process: Process) -> None:
        """Hands what the engine says to whom it is about, until the engine is gone."""
        try:
            while True:
                answer, parts = await self._answer(process)
                if isinstance(answer, frames.Ready | frames.Broken):
                    raise await self._died(process, f"it said {type(answer).__name__} out of turn")
                if isinstance(answer, frames.Well):
                    self._heed(answer)
                elif answer.job_id in self._jobs:
                    self._jobs[answer.job_id].put_nowait((answer, parts))
        except EngineDied as death:
            for said in self._jobs.values():
                said.put_nowait(death)

    def _heed(self, well: frames.Well) -> None:
        self.well = well
        self._answered.set()

    async def _follow(
        self, job_id: str, said: asyncio.Queue[Said], following: Following, seconds: float
    ) -> Result:
        deadline: float | None = None
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                answer = await asyncio.wait_for(said.get(), left)
            except TimeoutError:
                if await self._withdraw(job_id, said):
                    raise JobFailure(f"it took longer than {seconds:g} s") from None
                raise EngineDied(f"no result within {seconds:g} s") from None
            if isinstance(answer, EngineDied):
                raise EngineDied(str(answer))
            match answer:
                case frames.Begun(), _:
                    await following.on_begun()
                    await self._send(frames.Go(job_id))
                    deadline = time.monotonic() + seconds
                case frames.Step(_, step, steps), _:
                    await following.on_step(step, steps)
                case frames.Preview(_, media_type), [picture]:
                    await following.on_preview(media_type, picture)
                case frames.Done() as done, [param_json, *images]:
                    return _result(done, param_json, images)
                case frames.Unfit(_, reason), _:
                    raise JobFailure(reason)
                case frames.Gone(), _:
                    raise JobGone(job_id)

    async def _withdraw(self, job_id: str, said: asyncio.Queue[Said]) -> bool:
        """Takes a job back from the engine. False if the engine had to be killed for it."""
        if not self.alive:
            return False
        with contextlib.suppress(TimeoutError, EngineDied):
            async with asyncio.timeout(CANCEL_SECONDS):
                await self._send(frames.Cancel(job_id))
                while True:
                    answer = await said.get()
                    if isinstance(answer, EngineDied):
                        return False
                    if isinstance(answer[0], frames.Gone | frames.Done | frames.Unfit):
                        return True
        await self.kill()
        return False

    def _kill_if_deaf(self, job_id: str) -> None:
        if job_id in self._jobs and self._process is not None:
            log.warning("engine_deaf", job_id=job_id)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _send(self, request: frames.Request, *parts: bytes) -> None:
        """Raises EngineDied."""
        process = self._process
        if process is None or process.stdin is None:
            raise EngineDied("it was gone before it could be asked")
        try:
            for piece in frames.pack(request, parts):
                process.stdin.write(piece)
            await process.stdin.drain()
        except (ConnectionError, RuntimeError):
            raise await self._died(process) from None

    async def _answer(self, process: Process) -> tuple[frames.Answer, list[bytes]]:
        assert process.stdout is not None
        read = process.stdout.readexactly
        try:
            (count,) = frames.COUNT.unpack(await read(frames.COUNT.size))
            lengths = frames.part_lengths(await read(frames.LENGTH.size * count))
            head, *parts = [await read(length) for length in lengths]
            answer = frames.decode_answer.decode(head)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._died(process) from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise await self._died(process, f"it spoke nonsense: {error}") from error
        if isinstance(answer, frames.Broken):
            raise await self._died(process, answer.cause)
        return answer, parts

    async def _died(self, process: Process, cause: str | None = None) -> EngineDied:
        """What to raise, once the process is really gone."""
        if cause is None:
            with contextlib.suppress(TimeoutError):  # it may have closed its pipe and live on
                await asyncio.wait_for(process.wait(), 5)
        if self._process is process:
            await self.kill()
        death = EngineDied(cause or _cause_of_death(process.returncode))
        log.warning("engine_died", cause=str(death))
        return death


def _result(done: frames.Done, param_json: bytes, images: list[bytes]) -> Result:
    packed = [
        ResultImage(image.name, image.media_type, data)
        for image, data in zip(done.images, images, strict=True)
    ]
    return Result(packed, param_json, done.seconds, done.warnings)


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else ""
        return f"signal {-code} ({name})" if name else f"signal {-code}"
    return f"exit code {code}"
