"""One detached process that starts the stack in order, restarts what dies, and stops it in order.

    servers (NATS, Postgres, SeaweedFS) -> provisioning and migrations -> services, gateways

It writes what it does to `run/state.json`, which `stack.py` reads; the other direction is signals
only: SIGTERM stops everything, and a child that anybody kills is started again. It holds a lock
on `run/supervisor.lock` for as long as it lives, so that no stale file can pass for a running one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import psutil

from deploy.local import processes, servers
from deploy.local.installation import Installation, write_private
from deploy.local.processes import Process

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
"""Seconds before a dead child is started again: doubled with each death in a row."""
STEADY = 5.0
"""A child that was ready for this long has recovered: the next pause is short again."""
START_SECONDS = 120.0
"""How long the first start of a stage may take."""
START_ATTEMPTS = 3
"""A child that dies this often before it was ever ready stops the whole start."""
MAX_LOG_BYTES = 10_000_000
LOG_CHECK_SECONDS = 60.0
CLOCK_STEP = 2.0
"""Seconds by which the start time of one process may seem to differ when the clock was set."""


class ProcessState(msgspec.Struct):
    pid: int
    started: float
    url: str = ""
    ready: bool = False
    ready_seconds: float | None = None
    restarts: int = 0


class State(msgspec.Struct):
    """What the supervisor tells about itself. `failed` names the log to read."""

    phase: Literal["starting", "ready", "stopping", "stopped", "failed"]
    services: bool
    settings: dict[str, str] = {}
    failed: str = ""
    reason: str = ""
    processes: dict[str, ProcessState] = {}


class StartFailed(Exception):
    """A process did not come up; `name` is the one whose log tells why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Child:
    """One process that is kept alive until `stop`."""

    def __init__(
        self,
        describe: Callable[[], Process],
        state: ProcessState,
        log_file: Path,
        save: Callable[[], None],
    ) -> None:
        self.ready = asyncio.Event()
        """Set once it has been ready for the first time."""
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._describe = describe
        self._state = state
        self._log_file = log_file
        self._save = save
        self._stop_wanted = asyncio.Event()
        self._running: asyncio.subprocess.Process | None = None
        self._task = asyncio.create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        pause, deaths = FIRST_PAUSE, 0
        while not self._stop_wanted.is_set():
            try:
                process = self._describe()
                await process.prepare()
                if self._stop_wanted.is_set():
                    break
                code, steady = await self._run(process)
            except Exception as error:
                if not self.ready.is_set():
                    self._give_up(str(error))
                    return
                _log(f"{self._state.url}: {error!r}")
                code, steady = None, False
            if self._stop_wanted.is_set():
                break
            deaths += 1
            if not self.ready.is_set() and deaths == START_ATTEMPTS:
                self._give_up(f"ended {deaths} times before it was ready, last with code {code}")
                return
            if steady:
                pause = FIRST_PAUSE
            _log(f"{self._log_file.stem} ended with code {code}, starts again in {pause:.1f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_wanted.wait(), pause)
            pause = min(pause * 2, LONGEST_PAUSE)
            self._state.restarts += 1

    async def _run(self, process: Process) -> tuple[int, bool]:
        """Starts it and waits for its end. Returns its code and whether it ran well for a while."""
        begun = time.monotonic()
        self._running = await _spawn(process, self._log_file)
        if self._stop_wanted.is_set():
            self._running.kill()
        self._state.pid = self._running.pid
        self._state.started = start_time(self._running.pid)
        self._save()
        watch = asyncio.create_task(self._watch(process, begun))
        code = await self._running.wait()
        watch.cancel()
        steady = self._state.ready and time.monotonic() - begun > STEADY
        self._state.ready = False
        self._save()
        return code, steady

    async def _watch(self, process: Process, begun: float) -> None:
        while True:
            try:
                if await process.ready():
                    break
            except Exception as error:  # an odd answer is no reason to stop asking
                _log(f"{process.name}: {error!r}")
            await asyncio.sleep(0.05)
        self._state.ready = True
        self._state.ready_seconds = round(time.monotonic() - begun, 2)
        self._save()
        self.ready.set()

    def _give_up(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)

    async def stop(self) -> None:
        """Asks it to end, waits as long as it may take, then kills it with all its children."""
        self._stop_wanted.set()
        process = self._describe()
        if self._running is not None and self._running.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._running.send_signal(process.stop_signal)
            try:
                await asyncio.wait_for(self._running.wait(), process.stop_seconds)
            except TimeoutError:
                _log(f"{process.name} did not stop in {process.stop_seconds:.0f} s: killed")
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._running.pid, signal.SIGKILL)
        await self._task


class Supervisor:
    def __init__(self, installation: Installation, *, services: bool) -> None:
        self._installation = installation
        self._services = services
        self._settings = processes.read_settings(installation)
        self._state = State("starting", services, self._settings)
        self._children: dict[str, Child] = {}
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Runs until SIGTERM. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._save()
        try:
            start = asyncio.create_task(self._start())
            if await self._unless_stopped(start):
                self._state.phase = "ready"
                self._save()
                _log("ready")
                await self._look_after_logs()
            self._state.phase = "stopping"
        except StartFailed as error:
            self._state.failed, self._state.reason = error.name, str(error)
            _log(f"start failed: {error.name}: {error}")
        self._save()
        await self._stop_all()
        self._state.processes.clear()
        self._state.phase = "failed" if self._state.failed else "stopped"
        self._save()
        _log(self._state.phase)
        return 1 if self._state.failed else 0

    async def _look_after_logs(self) -> None:
        """Until somebody asks to stop."""
        while not self._stop.is_set():
            await asyncio.to_thread(rotate_logs, self._installation)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOG_CHECK_SECONDS)

    async def _unless_stopped(self, task: asyncio.Task[None]) -> bool:
        """Whether the task ended before somebody asked to stop. Raises what the task raises."""
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return False

    async def _start(self) -> None:
        # Started first, since its imports take as long as the servers; it waits for them.
        provisioning = await _spawn(
            Process(
                name="provision",
                command=[sys.executable, "-m", "deploy.local.provision"],
                ready=_always,
                url="",
                environment={
                    **processes.base_environment(),
                    "DARKROOM_HOME": str(self._installation.home),
                },
            ),
            self._installation.log("provision"),
        )
        try:
            await self._start_children([p.name for p in servers.table(self._installation)])
            try:
                code = await asyncio.wait_for(provisioning.wait(), START_SECONDS)
            except TimeoutError:
                raise StartFailed("provision", f"not done after {START_SECONDS:.0f} s") from None
            if code:
                raise StartFailed("provision", f"ended with code {code}")
        finally:
            if provisioning.returncode is None:
                provisioning.kill()
                await provisioning.wait()
        if self._services:
            await self._start_children(
                [p.name for p in processes.table(self._installation, self._settings)]
            )

    async def _start_children(self, names: list[str]) -> None:
        for name in names:
            process = self._describe(name)
            state = ProcessState(pid=0, started=0.0, url=process.url)
            self._state.processes[name] = state
            log_file = self._installation.log(name)
            self._children[name] = Child(partial(self._describe, name), state, log_file, self._save)
        async with _cancelling(
            [asyncio.create_task(self._first_ready(name)) for name in names]
        ) as waits:
            done, pending = await asyncio.wait(
                waits, timeout=START_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for wait in done:
                wait.result()
            if pending:
                late = [name for name in names if not self._children[name].ready.is_set()]
                raise StartFailed(late[0], f"not ready after {START_SECONDS:.0f} s")

    async def _first_ready(self, name: str) -> None:
        child = self._children[name]
        ready = asyncio.create_task(child.ready.wait())
        async with _cancelling([ready]):
            waits: set[asyncio.Future[Any]] = {ready, child.failed}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if child.failed.done():
                raise StartFailed(name, child.failed.result())

    def _describe(self, name: str) -> Process:
        """Read anew at each start, so that a restarted process sees a changed `settings.env`."""
        settings = {**processes.read_settings(self._installation)}
        settings[processes.GATEWAYS] = self._settings.get(processes.GATEWAYS, "1")
        described = servers.table(self._installation)
        if self._services:
            described += processes.table(self._installation, settings)
        return next(process for process in described if process.name == name)

    async def _stop_all(self) -> None:
        """Gateways first, so that nothing new comes in; the servers last."""
        first = [name for name in self._children if name.startswith("gateway")]
        last = [p.name for p in servers.table(self._installation) if p.name in self._children]
        others = [name for name in self._children if name not in first and name not in last]
        for names in (first, others):
            await asyncio.gather(*(self._children[name].stop() for name in names))
        await asyncio.to_thread(stop_workers, self._installation)
        await asyncio.gather(*(self._children[name].stop() for name in last))
        servers.remove_sockets(self._installation)

    def _save(self) -> None:
        text = msgspec.json.format(msgspec.json.encode(self._state), indent=1).decode()
        write_private(state_file(self._installation), text + "\n")


async def _always() -> bool:
    return True


@contextlib.asynccontextmanager
async def _cancelling(tasks: list[asyncio.Task[Any]]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Cancels what has not ended when the block does."""
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def _spawn(process: Process, log_file: Path) -> asyncio.subprocess.Process:
    """Starts it in a session of its own, with its output appended to its log."""
    descriptor = open_log(log_file)
    identity: dict[str, Any] = {}
    if process.user is not None:
        identity = {"user": process.user, "group": process.user, "extra_groups": []}
    try:
        return await asyncio.create_subprocess_exec(
            *process.command,
            cwd=process.directory,
            env=dict(process.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            **identity,
        )
    finally:
        os.close(descriptor)


def open_log(file: Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def rotate_logs(installation: Installation) -> None:
    """Sets the text of a log that has grown too long aside, once, and lets it begin anew. Whoever
    writes to it goes on doing so."""
    for file in installation.logs.glob("*.log"):
        if file.stat().st_size > MAX_LOG_BYTES:
            shutil.copy(file, file.with_suffix(".log.1"))
            os.truncate(file, 0)


# What an earlier supervisor left behind


def start_time(pid: int) -> float:
    """With the pid, this names a process for ever: pids come round again. 0 if it is gone."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process of this pid if it is still the one that started then."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < CLOCK_STEP
    except psutil.NoSuchProcess:
        return None
    return process if same and _lives(process) else None


def stop_leftovers(installation: Installation) -> None:
    """Ends the children of a supervisor that was killed, and forgets them: their ports and files
    are free then."""
    state = read_state(installation)
    found: dict[psutil.Process, signal.Signals] = {}
    for name, child in (state.processes if state else {}).items():
        if child.pid and (process := find_process(child.pid, child.started)):
            _log(f"ends {name} ({child.pid}), left behind by an earlier supervisor")
            found[process] = signal.SIGINT if name == "postgres" else signal.SIGTERM
    _end(found)
    servers.remove_sockets(installation)
    state_file(installation).unlink(missing_ok=True)


def list_workers(installation: Installation) -> list[tuple[Path, psutil.Process]]:
    """The workers that run, by the files that the endpoints service writes."""
    found = []
    for file in sorted(installation.workers.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            worker = json.loads(file.read_text())
            if process := find_process(int(worker["pid"]), float(worker["started"])):
                found.append((file, process))
    return found


def stop_workers(installation: Installation) -> None:
    """Ends workers that the endpoints service did not, for example because it was killed."""
    found: dict[psutil.Process, signal.Signals] = {}
    for file, worker in list_workers(installation):
        _log(f"ends worker {file.stem} ({worker.pid})")
        found[worker] = signal.SIGTERM
    _end(found)
    for file in installation.workers.glob("*.json"):
        file.unlink(missing_ok=True)
    for process in psutil.process_iter():  # what a killed worker had started, or had no record yet
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            ours = environment.get("DARKROOM_CACHE") == str(installation.cache)
            if ours and "DARKROOM_INSTANCE_ID" in environment:
                process.kill()


def _end(found: dict[psutil.Process, signal.Signals], seconds: float = 5.0) -> None:
    """Asks each to end, with the signal that it understands; kills what has not after `seconds`,
    with all that it started."""
    families = set(found)
    for process, polite in found.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            families.update(process.children(recursive=True))
            process.send_signal(polite)
    deadline = time.monotonic() + seconds
    while any(map(_lives, families)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in filter(_lives, families):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    while any(map(_lives, families)) and time.monotonic() < deadline + seconds:
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: it has ended, and its parent has not noticed."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# Files that stack.py reads


def state_file(installation: Installation) -> Path:
    return installation.run / "state.json"


def read_state(installation: Installation) -> State | None:
    try:
        return msgspec.json.decode(state_file(installation).read_bytes(), type=State)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def lock_file(installation: Installation) -> Path:
    return installation.run / "supervisor.lock"


def running_supervisor(installation: Installation) -> psutil.Process | None:
    """The supervisor, if one lives: it holds the lock until its last breath."""
    try:
        with open(lock_file(installation)) as file:
            return _lock_holder(file)
    except FileNotFoundError:
        return None


def _lock_holder(file: TextIO) -> psutil.Process | None:
    for _ in range(200):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            file.seek(0)
        with contextlib.suppress(ValueError):  # not written yet
            pid, started = file.read().split()
            if process := find_process(int(pid), float(started)):
                return process
        time.sleep(0.01)
    raise RuntimeError(f"{file.name} is locked by a process that does not tell its id")


def _hold_lock(file: TextIO) -> bool:
    """Takes the lock for good. False if another supervisor has it."""
    for _ in range(20):  # a reader may hold it for a moment
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{os.getpid()} {start_time(os.getpid())}")
            file.flush()
            return True
        time.sleep(0.05)
    return False


def _log(text: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), text, flush=True)


async def _run(installation: Installation, *, services: bool) -> int:
    return await Supervisor(installation, services=services).run()


def _raise_file_limit() -> None:
    """For our children: the usual 1024 open files are few for event streams and connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: list[str]) -> int:
    installation = Installation.open()
    with open(lock_file(installation), "a") as lock:
        if not _hold_lock(lock):
            _log("another supervisor is running")
            return 1
        _log(f"supervisor {os.getpid()} starts")
        _raise_file_limit()
        return asyncio.run(_run(installation, services="--servers-only" not in arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
