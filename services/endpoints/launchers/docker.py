"""Workers as containers of a Docker engine.

A container's labels say whose it is and what it holds, so nothing is remembered here. Docker does
not count GPUs, so this launcher hands them out: `gpus` are those of the engine's machine, and the
engine must be nobody else's. Secrets are files in the container, which `docker inspect` does not
show; images are never pulled here, since that may take longer than a worker has to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import msgspec
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from services.endpoints.domain import Endpoint, InstanceType, Seen
from services.endpoints.launchers import (
    CONTAINER_CACHE,
    LAST_LINES,
    LaunchFailed,
    Program,
    describe_end,
)
from services.endpoints.launchers.gpus import Held, pick_gpus
from shared.logs import get_logger

log = get_logger(__name__)

INSTALLATION, ENDPOINT, INSTANCE = (
    "darkroom.installation",
    "darkroom.endpoint_id",
    "darkroom.instance_id",
)
COMPOSE = "com.docker.compose.project"
"""Images that compose has built bear it, and it takes containers with it for its own."""
GPUS, SHARES_GPUS = "darkroom.gpus", "darkroom.shares_gpus"

SECRETS = "run/secrets"
"""In the container."""

NO_CONNECTION = 900
"""What aiodocker says instead of an HTTP status."""
ANSWER_WITHIN = aiohttp.ClientTimeout(total=30)
LISTEN_AGAIN = 1.0
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}
"""A worker that runs for months must not fill the disk."""


class DockerLauncher:
    def __init__(
        self,
        url: str,
        program: Program,
        *,
        installation: str,
        network: str,
        cache: str,
        gpus: list[str],
        workers_outlive_service: bool,
    ) -> None:
        """`network`: of the containers, the engine's default one if empty. `cache`: a volume's name
        or a folder of the engine's machine."""
        self.workers_outlive_service = workers_outlive_service
        self._url = url
        self._program = program
        self._installation = installation
        self._network = network
        self._cache = cache
        self._gpus = gpus
        self._asked_to_stop: dict[str, float] = {}
        self._changed: Callable[[], None] = lambda: None
        self._docker: Docker
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._docker = Docker(self._url, timeout=ANSWER_WITHIN)
        self._tasks = [asyncio.create_task(work) for work in (self._listen(), self._hear())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._docker.close()

    async def _listen(self) -> None:
        """For as long as the engine answers, and again when it does."""
        events = {**self._ours(), "type": ["container"], "event": ["die", "oom", "destroy"]}
        while True:
            with contextlib.suppress(DockerError, TimeoutError, aiohttp.ClientError):
                await self._docker.events.run(filters=_json(events))
            await asyncio.sleep(LISTEN_AGAIN)

    async def _hear(self) -> None:
        """Of events, and of the end of listening, during which any may be missed."""
        heard = self._docker.events.subscribe(create_task=False)
        while True:
            await heard.get()
            self._changed()

    def _ours(self) -> dict[str, list[str]]:
        return {"label": [f"{INSTALLATION}={self._installation}"]}

    async def observe(self) -> dict[str, Seen]:
        seen = await asyncio.gather(*map(self._see, await self._look()))
        return {worker.instance_id: worker for worker in seen}

    async def _look(self) -> list[dict[str, Any]]:
        """What the engine knows of each container of ours. Its list is not enough: it may still
        call one running whose end it has told already."""
        listed = await self._docker.containers.list(all=True, filters=_json(self._ours()))
        looked = await asyncio.gather(*map(self._look_at, listed))
        return [container for container in looked if container]

    async def _look_at(self, container: DockerContainer) -> dict[str, Any] | None:
        shown = None
        with _unless_gone():
            shown = await container.show()
        return shown

    async def _see(self, container: dict[str, Any]) -> Seen:
        labels, alive = container["Config"]["Labels"], _lives(container)
        return Seen(
            instance_id=labels[INSTANCE],
            endpoint_id=labels[ENDPOINT],
            alive=alive,
            crash=None if alive else await self._describe_end(container),
        )

    async def _describe_end(self, container: dict[str, Any]) -> str | None:
        """None for a container that was never started: this service was killed just then."""
        state, lines = container["State"], []
        if state["Status"] in ("created", "removing"):
            return None
        with _unless_gone():
            lines = await self._docker.containers.container(container["Id"]).log(
                stdout=True, stderr=True, tail=LAST_LINES, timeout=ANSWER_WITHIN
            )
        limit = container["HostConfig"]["Memory"] if state["OOMKilled"] else None
        return describe_end(state["ExitCode"], "".join(lines), out_of_memory=limit)

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        gpus = await self._pick_gpus(type)
        configuration = self._describe(instance_id, endpoint, type, gpus)
        with _reasons(type.image):
            container = await self._docker.containers.create(configuration, name=_name(instance_id))
        try:
            with _reasons(type.image):
                await container.put_archive("/", _archive(self._program.secrets))
                await container.start()
        except LaunchFailed:
            await self.forget(instance_id)
            raise

    async def _pick_gpus(self, type: InstanceType) -> list[str]:
        if not type.gpu_count:
            return []
        held = []
        for container in await self._look():
            labels = container["Config"]["Labels"]
            held.append(
                Held(
                    gpus=[gpu for gpu in labels[GPUS].split(",") if gpu],
                    shared=labels[SHARES_GPUS] == "true",
                    leaving=labels[INSTANCE] in self._asked_to_stop or not _lives(container),
                )
            )
        return pick_gpus(type, self._gpus, held)

    def _describe(
        self, instance_id: str, endpoint: Endpoint, type: InstanceType, gpus: list[str]
    ) -> dict[str, Any]:
        environment = {
            **self._program.variables(instance_id, endpoint, type),
            "DARKROOM_CACHE": CONTAINER_CACHE,
            **{f"{name}_FILE": f"/{SECRETS}/{name}" for name in self._program.secrets},
        }
        host: dict[str, Any] = {
            "Binds": [f"{self._cache}:{CONTAINER_CACHE}"],
            "Memory": type.memory_bytes,
            "MemorySwap": type.memory_bytes,  # the sum of both: no swap
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
        }
        if gpus:
            host["DeviceRequests"] = [
                {"Driver": "nvidia", "DeviceIDs": gpus, "Capabilities": [["gpu"]]}
            ]
        else:
            environment["NVIDIA_VISIBLE_DEVICES"] = "void"  # where nvidia is the default runtime
        if self._network:
            host["NetworkMode"] = self._network
        return {
            "Image": type.image,
            "Healthcheck": {"Test": ["NONE"]},  # its beats tell how it is
            "Cmd": self._program.command,
            "Env": [f"{name}={value}" for name, value in environment.items()],
            "Labels": {
                COMPOSE: "",
                INSTALLATION: self._installation,
                ENDPOINT: endpoint.endpoint_id,
                INSTANCE: instance_id,
                GPUS: ",".join(gpus),
                SHARES_GPUS: str(type.share_gpus).lower(),
            },
            "HostConfig": host,
        }

    async def stop(self, instance_id: str, *, within: float) -> None:
        asked = self._asked_to_stop.get(instance_id)
        if asked is None:
            await self._signal(instance_id, "SIGTERM")
            self._asked_to_stop[instance_id] = time.monotonic()
        elif time.monotonic() - asked > within:
            log.warning("worker_killed", instance_id=instance_id, seconds=within)
            await self._signal(instance_id, "SIGKILL")

    async def _signal(self, instance_id: str, signal: str) -> None:
        with _unless_gone():
            await self._container(instance_id).kill(signal=signal)

    async def forget(self, instance_id: str) -> None:
        with _unless_gone():
            await self._container(instance_id).delete(force=True, v=True)
        self._asked_to_stop.pop(instance_id, None)

    def _container(self, instance_id: str) -> DockerContainer:
        return self._docker.containers.container(_name(instance_id))


def _lives(container: dict[str, Any]) -> bool:
    return container["State"]["Status"] in ("running", "paused", "restarting")


def _name(instance_id: str) -> str:
    return f"darkroom-worker-{instance_id}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@contextlib.contextmanager
def _reasons(image: str) -> Iterator[None]:
    """Turns what the engine refuses into LaunchFailed; that it does not answer is no refusal."""
    try:
        yield
    except DockerError as error:
        if error.status == NO_CONNECTION:
            raise
        if error.status == 404 and "No such image" in error.message:
            reason = f"image missing: the Docker engine has no {image}"
        else:
            reason = f"the Docker engine refuses: {error.message}"
        raise LaunchFailed(reason) from error


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """What is not there, not running, or being removed already needs nothing."""
    try:
        yield
    except DockerError as error:
        if error.status not in (404, 409):
            raise


def _archive(secrets: dict[str, str]) -> bytes:
    """A file for each, readable by whatever user the image has: nobody else is in there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, value in secrets.items():
            file = tarfile.TarInfo(f"{SECRETS}/{name}")
            file.mode, file.size = 0o444, len(value.encode())
            archive.addfile(file, io.BytesIO(value.encode()))
    return buffer.getvalue()
