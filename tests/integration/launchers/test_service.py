"""The endpoints service with workers that are not its children: containers and jobs."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import aiodocker
import pytest

from deploy.local.installation import Installation
from shared.contracts.endpoints import ResyncEndpoints
from tests.integration.launchers.places import Containers, FakeNomad
from tests.integration.test_endpoints_service import (  # noqa: F401 - fixtures
    Endpoints,
    folder,
    installation,
    running_with,
)


class Workers(Protocol):
    """By looking at what runs them, not by asking the service."""

    async def living(self) -> set[str]: ...
    async def kill(self, worker: str) -> None: ...


class InContainers:
    def __init__(self, place: Containers) -> None:
        self.place = place
        self.settings = {
            "DARKROOM_LAUNCHER": "docker",
            "DARKROOM_INSTALLATION": f"service{place.suffix}",
            "DARKROOM_DOCKER_URL": place.engine,
            "DARKROOM_DOCKER_NETWORK": "host",
            "DARKROOM_WORKER_CACHE": str(place.cache),
            "DARKROOM_INSTANCE_TYPES": json.dumps(
                {
                    "cpu": {"device": "cpu", "max": 4, "image": place.type().image},
                    "broken": {"device": "cpu", "max": 4, "image": "darkroom-nowhere:1"},
                }
            ),
        }

    async def living(self) -> set[str]:
        found = await self.place.list_all()
        return {c.id for c in found if c["State"] == "running"}

    async def kill(self, worker: str) -> None:
        async with aiodocker.Docker(self.place.engine) as docker:
            await docker.containers.container(worker).kill(signal="SIGKILL")


class InJobs:
    def __init__(self, place: FakeNomad) -> None:
        self.place = place
        type = {"device": "cpu", "max": 4, "memory": "256 MiB", "image": "worker:1"}
        self.settings = {
            "DARKROOM_LAUNCHER": "nomad",
            "DARKROOM_INSTALLATION": "service",
            "DARKROOM_NOMAD_ADDR": place.address,
            "DARKROOM_NOMAD_TOKEN": "let me in",
            "DARKROOM_WORKER_CACHE": "darkroom-cache",
            "DARKROOM_INSTANCE_TYPES": json.dumps(
                {"cpu": type, "broken": {**type, "image": "darkroom-nowhere:1"}}
            ),
        }

    async def living(self) -> set[str]:
        return {a.id for a in self.place.fake.allocations.values() if a.status == "running"}

    async def kill(self, worker: str) -> None:
        process = self.place.fake.allocations[worker].process
        assert process
        process.kill()


@pytest.fixture(params=["docker", "nomad fake"])
async def workers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    if request.param == "docker":
        containers = await Containers.find(tmp_path)
        yield InContainers(containers)
        await containers.close()
    else:
        nomad = await FakeNomad.find(tmp_path)
        yield InJobs(nomad)
        await nomad.close()


@pytest.fixture
async def service(
    installation: Installation,  # noqa: F811
    workers: Any,
) -> AsyncIterator[Endpoints]:
    settings = {
        **workers.settings,
        "DARKROOM_WORKER_COMMAND": "{python} /worker.py",
        "DARKROOM_RUN": "",
    }
    async with running_with(installation, settings) as made:
        yield made


async def until_living(workers: Workers, count: int, seconds: float = 30) -> set[str]:
    end = time.monotonic() + seconds
    while len(living := await workers.living()) != count:
        assert time.monotonic() < end, f"{living}, not {count}"
        await asyncio.sleep(0.1)
    return living


async def until_serving(
    service: Endpoints, workers: Workers, endpoint_id: str, count: int, seconds: float = 60
) -> set[str]:
    """By its newest state: two that change it at once may tell of it in either order."""
    end = time.monotonic() + seconds
    while True:
        newest = max(service.states(endpoint_id), key=lambda state: state.version)
        living = await workers.living()
        said = (newest.endpoint_status, newest.current_instance_count)
        if said == ("InService", count) and len(living) == count:
            return living
        assert time.monotonic() < end, f"{said} and {living}, not {count}"
        await asyncio.sleep(0.1)


async def test_workers_outlive_the_service_and_are_found_again(
    service: Endpoints, workers: Workers
) -> None:
    endpoint_id = await service.create("lasting", 2)
    before = await until_serving(service, workers, endpoint_id, 2)

    service.kill()
    assert await workers.living() == before
    service.start()
    await service.send(ResyncEndpoints())
    await asyncio.sleep(2)  # some passes of the reconciler
    assert await workers.living() == before

    assert await service.terminate() == 0
    assert await workers.living() == before, "stopping is no reason either"
    victim = before.pop()
    await workers.kill(victim)  # while nobody watches
    service.start()
    await service.send(ResyncEndpoints())
    assert before < await until_serving(service, workers, endpoint_id, 2)

    await service.delete("lasting")
    await until_living(workers, 0)


async def test_no_worker_is_lost_or_orphaned_by_kills_at_random_moments(
    service: Endpoints, workers: Workers
) -> None:
    endpoint_id = await service.create("chaos", 3)
    for _ in range(5):
        await asyncio.sleep(random.uniform(0.2, 3))
        service.kill()
        for worker in list(await workers.living())[:1]:
            if random.random() < 0.5:
                await workers.kill(worker)
        service.start()
    await service.send(ResyncEndpoints())
    await asyncio.sleep(2)  # some passes of the reconciler
    serving = await until_serving(service, workers, endpoint_id, 3)
    await asyncio.sleep(2)
    assert await workers.living() == serving
    service.kill()
    service.start()
    await service.delete("chaos")
    await until_living(workers, 0)


async def test_an_image_that_is_nowhere_fails_the_endpoint_with_that_reason(
    service: Endpoints, workers: Workers
) -> None:
    endpoint_id = await service.create("nowhere", type="broken")
    state = await service.wait_status(endpoint_id, "Failed", 0)
    assert state.error
    assert "darkroom-nowhere:1" in state.error
    assert not await workers.living()
    await service.delete("nowhere")
