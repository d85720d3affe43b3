"""Where workers can run, for one suite of behaviour: this machine, a Docker engine, Nomad."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import aiodocker
import httpx
import psutil
import pytest

from services.endpoints.domain import InstanceType, NomadNeeds
from services.endpoints.launchers import Launcher, Program, stop_all
from services.endpoints.launchers.docker import DockerLauncher
from services.endpoints.launchers.nomad import NomadLauncher
from services.endpoints.launchers.process import ProcessLauncher
from tests.integration.launchers.image import WORKER, make_image
from tests.integration.launchers.nomad_fake import Node, NomadFake

SECRET = 'a "secret" with {{ braces }}'
STOP_WITHIN = 60.0
NEEDED = 'no Docker engine answers; eval "$(tests/containers/engine.sh start)" starts one'


class Place(Protocol):
    """`cache`: where workers write what they were told. `broken`: a type that can't be started, and
    `broken_because` what is said then, by `start` or by the end of its worker. `launcher` makes one
    more: what is there after this service was killed. `silence`: what is raised when nobody
    answers."""

    cache: Path
    silence: type[Exception]
    broken_because: str
    gpus_are_real: bool

    def launcher(self, installation: str = "ours") -> Launcher: ...
    def type(self, **fields: Any) -> InstanceType: ...
    def broken(self) -> InstanceType: ...
    async def leftovers(self) -> list[str]: ...
    def gpus_of(self, told: dict[str, str]) -> list[str]: ...
    async def go_away(self) -> None: ...
    async def come_back(self) -> None: ...
    async def close(self) -> None: ...


def program(*command: str) -> Program:
    return Program(
        command=list(command),
        environment={"DARKROOM_NATS_URL": "nats://nowhere:1", "DARKROOM_NATS_USER": "worker"},
        secrets={"DARKROOM_NATS_PASSWORD": SECRET},
        stop_within=STOP_WITHIN,
    )


class Processes:
    broken_because = "/no/such/python does not start"
    silence: type[Exception] = OSError
    gpus_are_real = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.cache.mkdir()
        self._breaks = False

    def launcher(self, installation: str = "ours") -> Launcher:
        made = program("/no/such/python" if self._breaks else sys.executable, str(WORKER))
        made.environment["DARKROOM_CACHE"] = str(self.cache)
        return ProcessLauncher(
            made,
            run=self.folder / installation,
            logs=self.folder / "logs",
            gpus=["0", "1"],
        )

    def type(self, **fields: Any) -> InstanceType:
        return InstanceType(**{"device": "cpu", "max": 9, **fields})

    def broken(self) -> InstanceType:
        self._breaks = True
        return self.type()

    async def leftovers(self) -> list[str]:
        files = (self.folder / "ours" / "workers").glob("*.*")
        return [str(left) for left in (*files, *self._processes())]

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("DARKROOM_CACHE") == str(self.cache):
                    found.append(process)
        return found

    def gpus_of(self, told: dict[str, str]) -> list[str]:
        return [gpu for gpu in told["CUDA_VISIBLE_DEVICES"].split(",") if gpu]

    async def go_away(self) -> None:
        pytest.skip("processes are always there")

    async def come_back(self) -> None: ...

    async def close(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


class Containers:
    """By way of a socket of our own, which can be taken away without hurting the engine."""

    broken_because = "image missing: the Docker engine has no darkroom-nowhere:1"
    silence: type[Exception] = aiodocker.DockerError
    gpus_are_real = False

    def __init__(self, folder: Path, engine: str) -> None:
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.cache.chmod(0o777)
        self.engine = engine
        self.suffix = f"-{os.getpid()}"
        self._image = make_image(engine)
        self._socket = folder / "docker.sock"
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    async def find(cls, folder: Path) -> Containers:
        engine = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        docker = aiodocker.Docker(engine)
        try:
            await docker.version()
        except aiodocker.DockerError:
            pytest.skip(NEEDED)
        finally:
            await docker.close()
        made = cls(folder, engine)
        await made.come_back()
        return made

    def launcher(self, installation: str = "ours") -> Launcher:
        return DockerLauncher(
            f"unix://{self._socket}",
            program("python", "/worker.py"),
            installation=installation + self.suffix,
            network="",
            cache=str(self.cache),
            gpus=["0", "1"],
            workers_outlive_service=True,
        )

    def type(self, **fields: Any) -> InstanceType:
        return InstanceType(**{"device": "cpu", "max": 9, "image": self._image, **fields})

    def broken(self) -> InstanceType:
        return self.type(image="darkroom-nowhere:1")

    async def list_all(self) -> list[Any]:
        async with aiodocker.Docker(self.engine) as docker:
            found = await docker.containers.list(all=True)
            ours = "darkroom.installation"
            return [c for c in found if c["Labels"].get(ours, "").endswith(self.suffix)]

    async def leftovers(self) -> list[str]:
        mine = f"ours{self.suffix}"
        found = await self.list_all()
        return [str(c["Names"]) for c in found if c["Labels"]["darkroom.installation"] == mine]

    def gpus_of(self, told: dict[str, str]) -> list[str]:
        """The engine tells its hook by this variable which to make visible."""
        return [gpu for gpu in told["NVIDIA_VISIBLE_DEVICES"].split(",") if gpu]

    async def go_away(self) -> None:
        assert self._server
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._socket.unlink()

    async def come_back(self) -> None:
        self._server = await asyncio.start_unix_server(self._pass_on, self._socket)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_unix_connection(
            self.engine.removeprefix("unix://")
        )
        self._writers |= {writer, other_writer}

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))
        self._writers -= {writer, other_writer}

    async def close(self) -> None:
        for container in await self.list_all():
            async with aiodocker.Docker(self.engine) as docker:
                await docker.containers.container(container.id).delete(force=True)
        if self._server:
            self._server.close()


class FakeNomad:
    """Two nodes, one with two GPUs."""

    broken_because = "Failed to pull `darkroom-nowhere:1`"
    silence: type[Exception] = httpx.TransportError
    gpus_are_real = False

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.fake = NomadFake(
            [Node("small", memory=1024), Node("large", gpus=2)],
            images=["worker:1"],
            worker=WORKER,
            cache=self.cache,
            token="let me in",
        )
        self.address = ""

    @classmethod
    async def find(cls, folder: Path) -> FakeNomad:
        made = cls(folder)
        made.address = await made.fake.serve()
        return made

    def launcher(self, installation: str = "ours", token: str = "let me in") -> Launcher:
        return NomadLauncher(
            self.address,
            program("python", "/worker.py"),
            installation=installation,
            token=token,
            namespace="default",
            cache="darkroom-cache",
            workers_outlive_service=True,
        )

    def type(self, **fields: Any) -> InstanceType:
        needed = {"device": "cpu", "max": 9, "image": "worker:1", "memory": "256 MiB"}
        return InstanceType(**{**needed, **fields})

    def broken(self) -> InstanceType:
        return self.type(image="darkroom-nowhere:1")

    async def leftovers(self) -> list[str]:
        alive = [a for a in self.fake.allocations.values() if a.status in ("pending", "running")]
        return [
            *(name for name in self.fake.jobs if name.startswith("darkroom-ours-")),
            *(name for name in self.fake.variables if "darkroom-ours-" in name),
            *(a.id for a in alive if a.job["ID"].startswith("darkroom-ours-")),
        ]

    def gpus_of(self, told: dict[str, str]) -> list[str]:
        return [gpu for gpu in told["NVIDIA_VISIBLE_DEVICES"].split(",") if gpu]

    async def go_away(self) -> None:
        await self.fake.stop_serving()

    async def come_back(self) -> None:
        await self.fake.serve()

    async def close(self) -> None:
        await self.fake.close()


class RealNomad:
    """An agent at NOMAD_ADDR that is on this machine and may use raw_exec, as with
    `nomad agent -dev -config` of `plugin "raw_exec" { config { enabled = true } }`."""

    broken_because = "the worker does not start"
    silence: type[Exception] = httpx.TransportError
    gpus_are_real = True

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.cache.mkdir()
        self.cache.chmod(0o777)
        self.installation = f"test-{os.getpid()}-{time.monotonic_ns()}"
        self._breaks = False

    def launcher(self, installation: str = "ours") -> Launcher:
        python = "/no/such/python" if self._breaks else sys.executable
        return NomadLauncher(
            os.environ["NOMAD_ADDR"],
            program(python, str(WORKER)),
            installation=f"{self.installation}-{installation}",
            token=os.environ.get("NOMAD_TOKEN", ""),
            namespace=os.environ.get("NOMAD_NAMESPACE", "default"),
            cache=str(self.cache),
            workers_outlive_service=True,
        )

    def type(self, **fields: Any) -> InstanceType:
        needs = NomadNeeds(driver="raw_exec", cpu=50)
        return InstanceType(
            **{"device": "cpu", "max": 9, "memory": "64 MiB", "nomad": needs, **fields}
        )

    def broken(self) -> InstanceType:
        self._breaks = True
        return self.type()

    async def leftovers(self) -> list[str]:
        headers = {"X-Nomad-Token": os.environ.get("NOMAD_TOKEN", "")}
        prefix = f"darkroom-{self.installation}-ours-"
        async with httpx.AsyncClient(base_url=os.environ["NOMAD_ADDR"], headers=headers) as nomad:
            jobs = (await nomad.get("/v1/jobs", params={"prefix": prefix})).json()
            variables = (
                await nomad.get("/v1/vars", params={"prefix": f"nomad/jobs/{prefix}"})
            ).json()
        return [job["ID"] for job in jobs] + [variable["Path"] for variable in variables]

    def gpus_of(self, told: dict[str, str]) -> list[str]:
        return [gpu for gpu in told.get("NVIDIA_VISIBLE_DEVICES", "").split(",") if gpu]

    async def go_away(self) -> None:
        pytest.skip("a real agent stays")

    async def come_back(self) -> None: ...

    async def close(self) -> None:
        for installation in ("ours", "theirs"):
            launcher = self.launcher(installation)
            await launcher.open(lambda: None)
            await stop_all(launcher, within=5)
            await launcher.close()


def read_told(place: Place, instance_id: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((place.cache / f"{instance_id}.json").read_text())
    return told


async def until(
    condition: Callable[[], Any], what: str = "", seconds: float = 20, every: float = 0.05
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what or condition
        await asyncio.sleep(every)
