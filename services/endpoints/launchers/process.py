"""Workers as processes of this machine.

Each worker has a record `<run>/workers/<instance id>.json` with its process id and start time, so
that it is found again, and not confused with another process, after this service was killed. A
file `<instance id>.starting` covers the moment in which a worker may run and has no record yet;
what it left is found by DARKROOM_INSTANCE_ID in the environment of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from services.endpoints.domain import Endpoint, InstanceType, Seen
from services.endpoints.launchers import LaunchFailed
from shared.logs import get_logger

log = get_logger(__name__)

INHERITED = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
"""All that a worker gets of our own environment: no secret of this service is among it."""

CLOCK_STEP = 2.0
"""Seconds by which the start time of one process may seem to differ when the clock was set."""

LAST_LINES = 6
LAST_BYTES = 4096
KEPT_LOGS = 40


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`started` is the process's create time in seconds since the epoch; `gpu` its one GPU."""

    pid: int
    started: float
    endpoint_id: str
    instance_id: str
    gpu: str = ""


class ProcessLauncher:
    workers_outlive_service = False

    def __init__(
        self,
        program: list[str],
        environment: dict[str, str],
        *,
        run: Path,
        logs: Path,
    ) -> None:
        self._program = program
        self._environment = environment
        self._folder = run / "workers"
        self._logs = logs
        self._records: dict[str, Record] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked_to_stop: dict[str, float] = {}
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
            try:
                record = msgspec.json.decode(file.read_bytes(), type=Record)
            except msgspec.MsgspecError:  # a power cut, which left no process either
                file.unlink()
                continue
            self._records[record.instance_id] = record
        for file in self._folder.glob("*.starting"):
            instance_id = file.stem
            for process in _processes_of(instance_id):
                if os.getpgid(process.pid) == process.pid and instance_id not in self._records:
                    endpoint_id = process.environ()["DARKROOM_ENDPOINT_ID"]
                    self._write(process.pid, endpoint_id, instance_id)
            file.unlink()
        if self._records:
            log.info("workers_found", instances=sorted(self._records))

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        await asyncio.to_thread(self._start, instance_id, endpoint, type)
        self._watch(self._records[instance_id])

    def _start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        gpu = self._least_used_gpu() if type.device == "cuda" else ""
        environment = {
            **{name: os.environ[name] for name in INHERITED if name in os.environ},
            **self._environment,
            "DARKROOM_ENDPOINT_ID": endpoint.endpoint_id,
            "DARKROOM_ENDPOINT_NAME": endpoint.endpoint_name,
            "DARKROOM_INSTANCE_ID": instance_id,
            "DARKROOM_DEVICE": type.device,
            "CUDA_VISIBLE_DEVICES": gpu,
        }
        self._drop_old_logs()
        starting = self._folder / f"{instance_id}.starting"
        starting.touch()
        try:
            with self._log_file(instance_id).open("ab") as output:
                child = subprocess.Popen(
                    self._program,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            starting.unlink()
            raise LaunchFailed(f"{self._program[0]} does not start: {error}") from error
        self._children[instance_id] = child
        self._write(child.pid, endpoint.endpoint_id, instance_id, gpu)
        starting.unlink()

    def _write(self, pid: int, endpoint_id: str, instance_id: str, gpu: str = "") -> None:
        record = Record(
            pid=pid,
            started=psutil.Process(pid).create_time(),
            endpoint_id=endpoint_id,
            instance_id=instance_id,
            gpu=gpu,
        )
        whole = self._folder / f"{instance_id}.new"
        whole.write_bytes(msgspec.json.encode(record))
        whole.rename(self._record_file(instance_id))
        self._records[instance_id] = record

    def _least_used_gpu(self) -> str:
        """Each worker sees one GPU; workers share one only when there are more of them."""
        gpus = visible_gpus()
        if not gpus:
            raise LaunchFailed("there is no NVIDIA GPU on this machine")
        used = Counter(record.gpu for record in self._records.values())
        return min(gpus, key=lambda gpu: used[gpu])

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
        return {instance_id: self._see(record) for instance_id, record in self._records.items()}

    def _see(self, record: Record) -> Seen:
        instance_id, crash = record.instance_id, None
        if child := self._children.get(instance_id):
            code = child.poll()
            alive = code is None
            if code is not None:
                crash = f"{_ended(code)}: {self._last_lines(instance_id)}".rstrip(": ")
        else:
            alive = _lives(record)
        return Seen(
            instance_id=instance_id, endpoint_id=record.endpoint_id, alive=alive, crash=crash
        )

    async def stop(self, instance_id: str, *, within: float) -> None:
        self._stop(instance_id, within)

    def _stop(self, instance_id: str, within: float) -> None:
        record = self._records[instance_id]
        asked = self._asked_to_stop.get(instance_id)
        with contextlib.suppress(ProcessLookupError):
            if asked is None:
                self._asked_to_stop[instance_id] = time.monotonic()
                os.kill(record.pid, signal.SIGTERM)
            elif time.monotonic() - asked > within:
                log.warning("worker_killed", instance_id=instance_id, seconds=within)
                os.kill(record.pid, signal.SIGKILL)

    async def stop_all(self, *, within: float) -> None:
        while living := [id_ for id_, seen in (await self.observe()).items() if seen.alive]:
            for instance_id in living:
                self._stop(instance_id, within)
            await asyncio.sleep(0.1)
        for instance_id in list(self._records):
            await self.forget(instance_id)

    async def forget(self, instance_id: str) -> None:
        """Ends also what the worker started and left running."""
        self._unwatch(instance_id)
        await asyncio.to_thread(self._kill_remains, instance_id)
        self._record_file(instance_id).unlink(missing_ok=True)
        self._records.pop(instance_id, None)
        self._children.pop(instance_id, None)
        self._asked_to_stop.pop(instance_id, None)

    def _kill_remains(self, instance_id: str) -> None:
        for process in _processes_of(instance_id):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _record_file(self, instance_id: str) -> Path:
        return self._folder / f"{instance_id}.json"

    def _log_file(self, instance_id: str) -> Path:
        return self._logs / f"worker-{instance_id}.log"

    def _last_lines(self, instance_id: str) -> str:
        try:
            with self._log_file(instance_id).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - LAST_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-LAST_LINES:])

    def _drop_old_logs(self) -> None:
        """A worker that keeps crashing must not fill the disk."""
        ended = [
            file
            for file in self._logs.glob("worker-*.log")
            if file.stem.removeprefix("worker-") not in self._records
        ]
        for file in sorted(ended, key=lambda file: file.stat().st_mtime)[:-KEPT_LOGS]:
            file.unlink()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here: what it names for us already, else all there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    count = len([file for file in Path("/dev").glob("nvidia*") if file.name[6:].isdigit()])
    return [str(number) for number in range(count)]


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


def _ended(code: int) -> str:
    if code < 0:
        return f"the worker was killed by {signal.Signals(-code).name}"
    return f"the worker exited with code {code}"
