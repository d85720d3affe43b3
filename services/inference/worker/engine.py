"""The engine process as the worker sees it: started, given jobs, killed, found dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from services.inference.worker import frames
from shared.contracts.inference import RunJob
from shared.errors import DarkroomError
from shared.logs import get_logger
from shared.settings import PREFIX

log = get_logger(__name__)

START_SECONDS = 300.0
"""The first import of some libraries compiles for minutes."""

KILL_SECONDS = 10.0

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
"""Nothing is ever fetched from a hub, whatever a model file asks for."""

INHERITED = ("DARKROOM_ENDPOINT_ID", "DARKROOM_INSTANCE_ID")
"""Of our settings, those by which a launcher knows what belongs to a worker. The engine reads files
that strangers made: it gets no password."""

OnStep = Callable[[int, int], Awaitable[None]]


class EngineDied(DarkroomError):
    """The engine is gone; the job it had may do better next time."""


class JobFailure(DarkroomError):
    """The job can't be done, now or later; the message is the reason for its owner."""


class Result(msgspec.Struct, frozen=True):
    images: list[bytes]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class EngineProcess:
    def __init__(self, engine: str, device: str, cache: Path) -> None:
        self._engine = engine
        self._device = device
        self._cache = cache
        self._process: Process | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def check(self) -> None:
        """Raises while there is no engine."""
        if not self.alive:
            raise EngineDied("no engine is running")

    async def start(self) -> None:
        """Returns when the engine is loaded. Raises EngineDied if it can't be."""
        await self.kill()
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(PREFIX) or name in INHERITED
        } | OFFLINE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.inference.worker.child",
            self._engine,
            self._device,
            str(self._cache),
            str(os.getpid()),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                answer, _ = await self._answer()
        except TimeoutError:
            await self.kill()
            raise EngineDied(f"it did not load within {START_SECONDS:.0f} s") from None
        if not isinstance(answer, frames.Ready):
            raise await self._died(f"it said {type(answer).__name__} first")
        log.info("engine_ready", pid=self._process.pid, device=self._device)

    async def run(
        self,
        job: RunJob,
        params: bytes,
        files: dict[str, Path],
        on_step: OnStep,
        *,
        seconds: float,
        correlation_id: str | None = None,
    ) -> Result:
        """Raises JobFailure for a job that can't be done, EngineDied if the engine did not survive
        it, or had no result in time. Cancelled, it takes the engine with it."""
        if not self.alive:
            await self.start()
        paths = {name: str(path) for name, path in files.items()}
        try:
            async with asyncio.timeout(seconds):
                await self._send(frames.Run(job, paths, correlation_id), params)
                return await self._result(on_step)
        except TimeoutError:
            await self.kill()
            raise EngineDied(f"no result within {seconds:g} s") from None
        except asyncio.CancelledError:
            await self.kill()
            raise

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

    async def _result(self, on_step: OnStep) -> Result:
        while True:
            answer, parts = await self._answer()
            match answer:
                case frames.Step(step, steps):
                    await on_step(step, steps)
                case frames.Done(seconds, warnings) if parts:
                    return Result(parts[1:], parts[0], seconds, warnings)
                case frames.Unfit(reason):
                    raise JobFailure(reason)
                case _:
                    raise await self._died(f"it said {type(answer).__name__} out of turn")

    async def _send(self, run: frames.Run, params: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            for piece in frames.pack(run, [params]):
                self._process.stdin.write(piece)
            await self._process.stdin.drain()
        except (ConnectionError, RuntimeError):
            raise await self._died() from None

    async def _answer(self) -> tuple[frames.Answer, list[bytes]]:
        assert self._process is not None
        assert self._process.stdout is not None
        read = self._process.stdout.readexactly
        try:
            (count,) = frames.COUNT.unpack(await read(frames.COUNT.size))
            lengths = frames.part_lengths(await read(frames.LENGTH.size * count))
            head, *parts = [await read(length) for length in lengths]
            answer = frames.decode_answer.decode(head)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._died() from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise await self._died(f"it spoke nonsense: {error}") from error
        if isinstance(answer, frames.Broken):
            raise await self._died(answer.cause)
        return answer, parts

    async def _died(self, cause: str | None = None) -> EngineDied:
        """What to raise, once the process is really gone."""
        process = self._process
        assert process is not None
        if cause is None:
            with contextlib.suppress(TimeoutError):  # it may have closed its pipe and live on
                await asyncio.wait_for(process.wait(), 5)
        await self.kill()
        death = EngineDied(cause or _cause_of_death(process.returncode))
        log.warning("engine_died", cause=str(death))
        return death


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else ""
        return f"signal {-code} ({name})" if name else f"signal {-code}"
    return f"exit code {code}"
