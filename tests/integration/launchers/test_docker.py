"""What only containers do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiodocker
import pytest

from services.endpoints.domain import Seen
from services.endpoints.launchers import LaunchFailed
from services.endpoints.launchers.docker import DockerLauncher
from tests.integration.launchers.places import SECRET, Containers, program
from tests.integration.launchers.test_launchers import Watched, endpoint, nothing_left, told


@pytest.fixture
async def docker(tmp_path: Path) -> AsyncIterator[Containers]:
    made = await Containers.find(tmp_path)
    yield made
    await made.close()


async def test_who_may_inspect_containers_reads_no_secret(docker: Containers) -> None:
    async with Watched(docker.launcher()) as ours, aiodocker.Docker(docker.engine) as engine:
        settings = await told(docker, await ours.start("quiet", docker.type()))
        assert settings["DARKROOM_NATS_PASSWORD"] == SECRET
        (container,) = await docker.list_all()
        shown = await engine.containers.container(container.id).show()
        assert json.dumps(SECRET)[1:-1] not in json.dumps(shown)
        assert shown["HostConfig"]["CapDrop"] == ["ALL"]
        assert shown["HostConfig"]["RestartPolicy"]["Name"] in ("", "no")


async def test_a_container_that_was_never_started_is_nobodys_fault(docker: Containers) -> None:
    """This service was killed between the two."""
    launcher = docker.launcher()
    assert isinstance(launcher, DockerLauncher)
    async with Watched(launcher) as ours, aiodocker.Docker(docker.engine) as engine:
        described = launcher._describe("i-half", endpoint("half"), docker.type(), [])
        await engine.containers.create(described, name="darkroom-worker-i-half")
        assert await ours.launcher.observe() == {
            "i-half": Seen(instance_id="i-half", endpoint_id="e-half", alive=False)
        }
        await ours.launcher.forget("i-half")
        await nothing_left(docker)


async def test_what_the_engine_refuses_to_start_is_removed(docker: Containers) -> None:
    launcher = DockerLauncher(
        docker.engine,
        program("python", "/worker.py"),
        installation="ours" + docker.suffix,
        network="no-such-network",
        cache=str(docker.cache),
        gpus=[],
        workers_outlive_service=True,
    )
    async with Watched(launcher) as ours:
        with pytest.raises(LaunchFailed, match="no-such-network"):
            await ours.start("cut-off", docker.type())
        with pytest.raises(LaunchFailed, match="out of GPUs: 1 wanted, 0 of 0 free"):
            await ours.start("blind", docker.type(device="cuda"))
        await nothing_left(docker)


async def test_one_that_was_removed_by_hand_is_gone_without_a_reason(docker: Containers) -> None:
    async with Watched(docker.launcher()) as ours, aiodocker.Docker(docker.engine) as engine:
        instance_id = await ours.start("removed", docker.type())
        await told(docker, instance_id)
        ours.changed.clear()
        (container,) = await docker.list_all()
        await engine.containers.container(container.id).delete(force=True)
        await ours.changed.wait()
        assert instance_id not in await ours.launcher.observe()
        await ours.launcher.stop(instance_id, within=1)
        await ours.launcher.forget(instance_id)
