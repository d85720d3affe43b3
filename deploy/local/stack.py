"""The whole stack as one object, for the command line and for tests.

    with Stack.temporary() as stack:    # a home of its own, on random ports, deleted at the end
    with Stack(home) as stack:          # up(), and down() at the end
        stack.url                       # of the API
        stack.environment()             # DARKROOM_URL, DARKROOM_API_KEY, …
        stack.installation.postgres_url("models")
        stack.kill("nats")              # SIGKILL; the supervisor starts it again
        stack.wait_ready("nats")        # … and this waits for it
        stack.restart("gateway")        # politely, and waits
        stack.pid("gateway")
        stack.workers()                 # pids by instance id

`Stack(home, services=False)` runs the servers only, provisioned and migrated.
`settings={"DARKROOM_GATEWAYS": "2"}` is like exporting it before `just up`.
`random_ports=True` lets several stacks run on one machine; it counts when the home is made.
`delete()` removes a stopped stack with its data.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil

from deploy.local import processes, servers, supervisor
from deploy.local.installation import REPOSITORY, Installation, default_home, locked
from deploy.local.processes import Process
from deploy.local.supervisor import State

UP_SECONDS = 300.0
HEALTHY_SECONDS = 60.0
DOWN_SECONDS = 120.0


class StackError(Exception):
    """The stack did not do what it was asked; the message holds the log lines that tell why."""


class Stack:
    def __init__(
        self,
        home: Path | None = None,
        *,
        services: bool = True,
        settings: Mapping[str, str] | None = None,
        random_ports: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` is told what a person at the terminal should know."""
        self.home = (home or default_home()).absolute()
        self._services = services
        self._settings = dict(settings or {})
        self._random_ports = random_ports
        self._say = say
        self._child: subprocess.Popen[bytes] | None = None
        self._installation: Installation | None = None

    @property
    def installation(self) -> Installation:
        if self._installation is None:
            self._installation = Installation.open(self.home, random_ports=self._random_ports)
        return self._installation

    @property
    def url(self) -> str:
        return self.installation.url

    def environment(self) -> dict[str, str]:
        return self.installation.client_environment()

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @classmethod
    @contextlib.contextmanager
    def temporary(
        cls, *, services: bool = True, settings: Mapping[str, str] | None = None
    ) -> Iterator[Self]:
        """A stack for a test, in a folder that Postgres' user can reach even when we are root."""
        with tempfile.TemporaryDirectory(prefix="darkroom-") as folder:
            Path(folder).chmod(0o711)
            home = Path(folder) / ".darkroom"
            stack = cls(home, services=services, settings=settings, random_ports=True)
            try:
                stack.up()
                yield stack
            finally:
                stack.delete()

    # Up and down

    def up(self) -> State:
        """Starts what does not run and returns when everything is healthy. Raises StackError."""
        with locked(self.home):
            if supervisor.running_supervisor(self.installation):
                state = supervisor.read_state(self.installation)
                if state and (state.services or not self._services):
                    return self._wait_until_up(was_running=True)
                self._down()  # servers only, and now everything is wanted
            supervisor.stop_leftovers(self.installation)
            for name, port in self.installation.move_taken_ports().items():
                self._say(f"the port of {name} is taken by another program: it moves to {port}")
            servers.write_configuration(self.installation)
            self._start_supervisor()
            return self._wait_until_up(was_running=False)

    def _start_supervisor(self) -> None:
        environment = {**os.environ, **self._settings, "DARKROOM_HOME": str(self.home)}
        command = [sys.executable, "-m", "deploy.local.supervisor"]
        with os.fdopen(supervisor.open_log(self.installation.log("supervisor")), "ab") as log:
            self._child = subprocess.Popen(
                command if self._services else [*command, "--servers-only"],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_up(self, *, was_running: bool) -> State:
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline:
            state = self.state()
            if state and state.phase == "ready":
                return self._wait_until_healthy(state) if was_running else state
            if state and state.phase == "failed":
                self._reap()
                raise StackError(
                    f"{state.failed} did not start: {state.reason}\n" + self.log_tail(state.failed)
                )
            if self._child and self._child.poll() is not None:
                raise StackError("the supervisor ended\n" + self.log_tail("supervisor"))
            if not self._child and not supervisor.running_supervisor(self.installation):
                raise StackError("the stack was stopped meanwhile")
            time.sleep(0.05)
        raise StackError(f"not up after {UP_SECONDS:.0f} s\n" + self.log_tail("supervisor"))

    def _wait_until_healthy(self, state: State) -> State:
        running = processes.read_settings(self.installation, {**os.environ, **self._settings})
        if changed := sorted(dict(running.items() ^ state.settings.items())):
            self._say(f"`down` and `up` again to apply the change of {', '.join(changed)}")
        deadline = time.monotonic() + HEALTHY_SECONDS
        while not all((healthy := self.health()).values()):
            if time.monotonic() > deadline:
                sick = [name for name, well in healthy.items() if not well]
                raise StackError(f"{', '.join(sick)}: not healthy\n" + self.log_tail(sick[0]))
            time.sleep(0.1)
        return self.state() or state

    def down(self) -> None:
        """Stops everything, workers included; nothing is left running. Safe to repeat."""
        with locked(self.home):
            self._down()

    def _down(self) -> None:
        running = supervisor.running_supervisor(self.installation)
        if running:
            with contextlib.suppress(psutil.NoSuchProcess):
                running.terminate()
            deadline = time.monotonic() + DOWN_SECONDS
            while supervisor.running_supervisor(self.installation):
                if time.monotonic() > deadline:
                    running.kill()
                    break
                time.sleep(0.05)
        self._reap()
        supervisor.stop_leftovers(self.installation)
        supervisor.stop_workers(self.installation)

    def _reap(self) -> None:
        if self._child:
            self._child.wait(DOWN_SECONDS)
            self._child = None

    def delete(self) -> None:
        """Stops the stack and removes it with all its data."""
        with locked(self.home):
            self._down()
            self.installation.delete()
            self._installation = None

    # While it runs

    def state(self) -> State | None:
        """What the supervisor last said; None if none runs."""
        state = supervisor.read_state(self.installation)
        if state and state.phase == "failed":
            return state
        return state if supervisor.running_supervisor(self.installation) else None

    def names(self) -> list[str]:
        state = self.state()
        return list(state.processes) if state else []

    def pid(self, name: str) -> int:
        """Raises StackError if no such process runs."""
        state = self.state()
        if not state or name not in state.processes:
            known = ", ".join(state.processes) if state else "the stack is down"
            raise StackError(f"there is no process {name} ({known})")
        return state.processes[name].pid

    def health(self) -> dict[str, bool]:
        """Asks each process now."""
        described = self._described()

        async def ask() -> list[bool]:
            return await asyncio.gather(*(process.ready() for process in described.values()))

        with ThreadPoolExecutor(1) as thread:  # the caller may have an event loop in its own
            answers = thread.submit(asyncio.run, ask()).result()
        return dict(zip(described, answers, strict=True))

    def workers(self) -> dict[str, int]:
        """The pid of each worker that runs, by instance id."""
        found = supervisor.list_workers(self.installation)
        return {file.stem: process.pid for file, process in found}

    def kill(self, name: str) -> int:
        """SIGKILL, as a crash would. Returns the pid that it had."""
        pid = self.pid(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return pid

    def restart(self, name: str, timeout: float = 60.0) -> None:
        """Stops it politely and waits until it is back. It then sees a changed `settings.env`."""
        described = self._described()
        old = self.pid(name)
        process = supervisor.find_process(old, self._state_of(name).started)
        if process:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(described[name].stop_signal)
                _, alive = psutil.wait_procs([process], timeout=described[name].stop_seconds)
                for stubborn in alive:
                    stubborn.kill()
        self.wait_ready(name, other_than=old, timeout=timeout)

    def wait_ready(self, name: str, *, other_than: int = 0, timeout: float = 60.0) -> int:
        """Waits until it is ready, with another pid than `other_than`. Returns the pid."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self._state_of(name)
            alive = supervisor.find_process(state.pid, state.started)
            if state.ready and alive and state.pid != other_than:
                return state.pid
            time.sleep(0.05)
        raise StackError(f"{name} not ready after {timeout:.0f} s\n" + self.log_tail(name))

    def log_tail(self, name: str, lines: int = 20) -> str:
        file = self.installation.log(name)
        if not file.exists():
            return f"({file} does not exist)"
        text = file.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- {file}", *text])

    def _state_of(self, name: str) -> supervisor.ProcessState:
        self.pid(name)
        state = self.state()
        assert state is not None
        return state.processes[name]

    def _described(self) -> dict[str, Process]:
        state = self.state()
        if not state:
            return {}
        described = servers.table(self.installation)
        if state.services:
            described += processes.table(self.installation, state.settings)
        return {process.name: process for process in described}
