"""Workers as processes of this machine.

Each worker has a record `<run>/workers/<instance id>.json` with its process id and start time, so
that it is found again, and not confused with another process, after this service was killed. A
file `<instance id>.starting`, a record without a process, covers the moment in which a worker may
run and has no record yet; what it left is found by DARKROOM_INSTANCE_ID in the environment of the
processes.

Memory is measured whenever the workers are looked at, once a second or more often: control groups
would need rights that this service does not have, and an address space limit (`ulimit -v`) stops
CUDA, which reserves far more than it uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
from msgspec.structs import replace

from services.endpoints.domain import Endpoint, InstanceType, Seen
from services.endpoints.launchers import LAST_BYTES, LaunchFailed, Program, describe_end
from services.endpoints.launchers.gpus import Held, pick_gpus
from shared.logs import get_logger

log = get_logger(__name__)

INHERITED = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
"""All that a worker gets of our own environment: no secret of this service is among it."""

CLOCK_STEP = 2.0
"""Seconds by which the start time of one process may seem to differ when the clock was set."""

KEPT_LOGS = 40
MAX_LOG_BYTES = 10_000_000
"""Of a worker that runs for months; as much again lies beside it."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`started` is the process's create time in seconds since the epoch; `memory` in bytes, 0 for
    no limit."""

    pid: int
    started: float
    endpoint_id: str
    instance_id: str
    gpus: list[str] = []
    shares_gpus: bool = False
    memory: int = 0


class ProcessLauncher:
    workers_outlive_service = False

    def __init__(self, program: Program, *, run: Path, logs: Path, gpus: list[str]) -> None:
        self._program = program
        self._folder = run / "workers"
        self._logs = logs
        self._gpus = gpus
        self._records: dict[str, Record] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked_to_stop: dict[str, float] = {}
        self._too_big: set[str] = set()
        self._watched: dict[str, int] = {}
        self._changed: Callable[[], None] = lambda: None

    async def open(self, changed: Callable[[], None]) -> None:
        """Waits while another service holds the run folder: two would start everything twice."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        # Held until this process ends, however it ends.
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        while not self._take_lock():
            log.warning("waiting_for_run_folder", folder=str(self._folder))
            await asyncio.sleep(0.5)
        self._changed = changed
        await asyncio.to_thread(self._find_workers)
        for record in self._records.values():
            self._watch(record)

    async def close(self) -> None:
        for instance_id in list(self._watched):
            self._unwatch(instance_id)
        os.close(self._lock)

    def _take_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _find_workers(self) -> None:
        for file in self._folder.glob("*.json"):
            if record := _read(file):
                self._records[record.instance_id] = record
        for file in self._folder.glob("*.starting"):
            record = _read(file)
            for process in _processes_of(file.stem):
                if record and os.getpgid(process.pid) == process.pid:
                    self._write(record, process.pid)
            file.unlink(missing_ok=True)
        if self._records:
            log.info("workers_found", instances=sorted(self._records))

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        await asyncio.to_thread(self._start, instance_id, endpoint, type)
        self._watch(self._records[instance_id])

    def _start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        gpus = pick_gpus(type, self._gpus, map(self._held, self._records.values()))
        record = Record(
            pid=0,
            started=0,
            endpoint_id=endpoint.endpoint_id,
            instance_id=instance_id,
            gpus=gpus,
            shares_gpus=type.share_gpus,
            memory=type.memory_bytes,
        )
        environment = {
            **{name: os.environ[name] for name in INHERITED if name in os.environ},
            **self._program.variables(instance_id, endpoint, type),
            **self._program.secrets,
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        }
        self._drop_old_logs()
        starting = self._folder / f"{instance_id}.starting"
        starting.write_bytes(msgspec.json.encode(record))
        try:
            with self._log_file(instance_id).open("ab") as output:
                child = subprocess.Popen(
                    self._program.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            starting.unlink()
            raise LaunchFailed(f"{self._program.command[0]} does not start: {error}") from error
        self._children[instance_id] = child
        self._write(record, child.pid)
        starting.unlink()

    def _held(self, record: Record) -> Held:
        leaving = record.instance_id in self._asked_to_stop or not self._see(record).alive
        return Held(gpus=record.gpus, shared=record.shares_gpus, leaving=leaving)

    def _write(self, record: Record, pid: int) -> None:
        record = replace(record, pid=pid, started=psutil.Process(pid).create_time())
        whole = self._folder / f"{record.instance_id}.new"
        whole.write_bytes(msgspec.json.encode(record))
        whole.rename(self._record_file(record.instance_id))
        self._records[record.instance_id] = record

    def _watch(self, record: Record) -> None:
        """Whoever ends is noticed at once, child or not."""
        with contextlib.suppress(OSError):  # it has ended already, which the next look shows
            watched = self._watched[record.instance_id] = os.pidfd_open(record.pid)
            asyncio.get_running_loop().add_reader(watched, self._on_end, record.instance_id)

    def _on_end(self, instance_id: str) -> None:
        self._unwatch(instance_id)
        self._changed()

    def _unwatch(self, instance_id: str) -> None:
        if watched := self._watched.pop(instance_id, None):
            asyncio.get_running_loop().remove_reader(watched)
            os.close(watched)

    async def observe(self) -> dict[str, Seen]:
        if limited := [record for record in self._records.values() if record.memory]:
            await asyncio.to_thread(self._kill_the_too_big, limited)
        await asyncio.to_thread(self._rotate_logs, list(self._records))
        return {instance_id: self._see(record) for instance_id, record in self._records.items()}

    def _kill_the_too_big(self, records: list[Record]) -> None:
        for record in records:
            if _lives(record) and _memory_of(record) > record.memory:
                self._too_big.add(record.instance_id)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL)

    def _rotate_logs(self, instance_ids: list[str]) -> None:
        for file in map(self._log_file, instance_ids):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size > MAX_LOG_BYTES:
                    shutil.copy(file, file.with_suffix(".log.1"))
                    os.truncate(file, 0)  # the worker appends to it all the same

    def _see(self, record: Record) -> Seen:
        instance_id, crash = record.instance_id, None
        if child := self._children.get(instance_id):
            code = child.poll()
            alive = code is None
            if code is not None:
                crash = self._describe_end(record, 128 - code if code < 0 else code)
        else:
            alive = _lives(record)
            if not alive and instance_id in self._too_big:
                crash = self._describe_end(record, 0)
        return Seen(
            instance_id=instance_id, endpoint_id=record.endpoint_id, alive=alive, crash=crash
        )

    def _describe_end(self, record: Record, code: int) -> str:
        too_big = record.instance_id in self._too_big
        return describe_end(
            code,
            self._end_of_log(record.instance_id),
            out_of_memory=record.memory if too_big else None,
        )

    async def stop(self, instance_id: str, *, within: float) -> None:
        record = self._records[instance_id]
        asked = self._asked_to_stop.get(instance_id)
        with contextlib.suppress(ProcessLookupError):
            if asked is None:
                self._asked_to_stop[instance_id] = time.monotonic()
                os.kill(record.pid, signal.SIGTERM)
            elif time.monotonic() - asked > within:
                log.warning("worker_killed", instance_id=instance_id, seconds=within)
                os.kill(record.pid, signal.SIGKILL)

    async def forget(self, instance_id: str) -> None:
        """Ends also what the worker started and left running."""
        self._unwatch(instance_id)
        await asyncio.to_thread(self._kill_remains, instance_id)
        self._record_file(instance_id).unlink(missing_ok=True)
        self._records.pop(instance_id, None)
        self._children.pop(instance_id, None)
        self._asked_to_stop.pop(instance_id, None)
        self._too_big.discard(instance_id)

    def _kill_remains(self, instance_id: str) -> None:
        for process in _processes_of(instance_id):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _record_file(self, instance_id: str) -> Path:
        return self._folder / f"{instance_id}.json"

    def _log_file(self, instance_id: str) -> Path:
        return self._logs / f"worker-{instance_id}.log"

    def _end_of_log(self, instance_id: str) -> str:
        try:
            with self._log_file(instance_id).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _drop_old_logs(self) -> None:
        """A worker that keeps crashing must not fill the disk."""
        ended = [
            file
            for file in self._logs.glob("worker-*.log")
            if file.stem.removeprefix("worker-") not in self._records
        ]
        for file in sorted(ended, key=lambda file: file.stat().st_mtime)[:-KEPT_LOGS]:
            file.unlink()
            file.with_suffix(".log.1").unlink(missing_ok=True)


def _read(file: Path) -> Record | None:
    """None for what a power cut left, which left no process either; the file goes."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Record)
    except msgspec.MsgspecError:
        file.unlink()
        return None


def _memory_of(record: Record) -> int:
    """Bytes that a worker and what it started, such as its engine, have in RAM."""
    used = 0
    with contextlib.suppress(psutil.Error):
        worker = psutil.Process(record.pid)
        for process in (worker, *worker.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
    return used


def _lives(record: Record) -> bool:
    """A worker that is no child of ours: it was started before this service was."""
    try:
        process = psutil.Process(record.pid)
        return bool(
            abs(process.create_time() - record.started) < CLOCK_STEP
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


def _processes_of(instance_id: str) -> list[psutil.Process]:
    """A worker and what it started inherit the variable that tells them their instance."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("DARKROOM_INSTANCE_ID") == instance_id:
                found.append(process)
    return found
