"""A Docker engine that may be killed: dockerd with a socket and data of its own, started again
whenever it ends, as an init system does. Needs root, and Debian's docker.io. Its containers know no
network but the machine's."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil

STARTS_WITHIN = 90.0
STOPS_WITHIN = 60.0
AGAIN_AFTER = 1.0
"""Seconds; as long as `kill` says otherwise."""


class Engine:
    def __init__(self, home: Path, *, live_restore: bool = False) -> None:
        """`live_restore`: containers go on while dockerd is away and are taken over by the next
        one, which stops them otherwise."""
        self.home = home
        self.url = f"unix://{home}/docker.sock"
        self._live_restore = live_restore
        self._away = AGAIN_AFTER
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._keeper.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._process = self._start()
            self._process.wait()
            self._stopping.wait(self._away)
            self._away = AGAIN_AFTER

    def _start(self) -> subprocess.Popen[bytes]:
        pidfile = self.home / "docker.pid"
        containerd = self.home / "exec" / "containerd" / "containerd.pid"
        for file in (pidfile, containerd):  # whose numbers may be somebody else's by now
            file.unlink(missing_ok=True)
        command = [
            *("dockerd", "--host", self.url, "--data-root", str(self.home / "data")),
            *("--exec-root", str(self.home / "exec"), "--pidfile", str(pidfile)),
            *("--iptables=false", "--ip6tables=false", "--bridge", "none"),
            f"--live-restore={str(self._live_restore).lower()}",
        ]
        with (self.home / "dockerd.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with the end of its log."""
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            if self._run("version").returncode == 0:
                return
            time.sleep(0.1)
        log = (self.home / "dockerd.log").read_text().splitlines()[-20:]
        raise RuntimeError("\n".join(["dockerd does not answer", *log]))

    def kill(self, *, away: float) -> bool:
        """SIGKILL; `away` seconds later it is started again. False if it is away already. Its
        containerd, a child, dies with it."""
        if not self._process or self._process.poll() is not None:
            return False
        self._away = away
        self._process.kill()
        return True

    def stop(self) -> None:
        """With all containers. Their shims outlive a dockerd that was killed."""
        with contextlib.suppress(RuntimeError):
            self.wait()
            if left := self.docker("ps", "--all", "--quiet").split():
                self.docker("rm", "--force", *left)
        self._stopping.set()
        if self._process:
            self._process.terminate()
        self._keeper.join(STOPS_WITHIN)
        if self._process and self._keeper.is_alive():
            self._process.kill()
            self._keeper.join()
        for shim in self.shims().values():
            with contextlib.suppress(psutil.Error):
                for process in [*shim.children(recursive=True), shim]:
                    process.kill()
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", mount], check=False)

    def _mounts(self) -> list[str]:
        """What one that was killed left, without which its folder can't be removed."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        targets = [line.split()[1] for line in lines]
        return [target for target in targets if target.startswith(f"{self.home}/")]

    def docker(self, *command: str) -> str:
        """Raises RuntimeError with what the engine says."""
        done = self._run(*command)
        if done.returncode:
            raise RuntimeError(f"docker {' '.join(command)}: {done.stderr}")
        return done.stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "--host", self.url, *command], capture_output=True, text=True, check=False
        )

    def fetch(self, image: str) -> None:
        """From the engine that `docker` speaks to without being told; unless this one has it."""
        if self._run("image", "inspect", image).returncode == 0:
            return
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run(["docker", "--host", self.url, "load"], stdin=saved.stdout, check=True)

    def shims(self) -> dict[str, psutil.Process]:
        """The process above each container that lives, by container id, whether dockerd knows of
        it or not."""
        return dict(self._shims())

    def _shims(self) -> Iterator[tuple[str, psutil.Process]]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "shim" in process.name() and any(str(self.home) in word for word in command):
                    yield command[command.index("-id") + 1], process
