"""compose.docker.yaml: workers are containers beside the others, and outlive endpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.demo import CHECKPOINT
from tests.chaos.calling import PARAMS
from tests.chaos.test_kill import MODEL
from tests.containers.engine import Deployment, deployed, inspect, needs_engine, run

SOCKET = Path(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://"))

pytestmark = [
    needs_engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not SOCKET.is_socket(), reason=f"the engine is not at a socket: {SOCKET}"),
]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    settings = {
        "DARKROOM_DOCKER_SOCKET": str(SOCKET),
        "DARKROOM_DOCKER_GID": str(SOCKET.stat().st_gid),
    }
    with deployed("compose.yaml", "compose.docker.yaml", **settings) as deployment:
        try:
            yield deployment
        finally:
            deployment.just("compose-down")


def workers(deployment: Deployment) -> list[str]:
    label = f"label=darkroom.installation={deployment.project}"
    return run("docker", "ps", "--quiet", "--no-trunc", "--filter", label).split()


def test_a_worker_is_a_container_that_works_on_while_endpoints_is_away(
    deployment: Deployment,
) -> None:
    with deployment.log_in() as client:
        client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
        client.create_endpoint("contained")
        client.wait_for_endpoint("contained")
        (worker,) = workers(deployment)
        state = inspect(worker)
        assert state["Config"]["User"] == "10001:10001"
        assert state["HostConfig"]["Memory"] == 6 * 1024**3
        assert list(state["NetworkSettings"]["Networks"]) == [f"{deployment.project}_inside"]
        secrets = deployment.installation.secrets
        assert secrets.nats["worker"] not in str(state)

        (endpoints,) = deployment.containers("endpoints-cpu")
        run("docker", "stop", endpoints)
        job = client.run_job("txt2img", MODEL, {**PARAMS, "seed": 1})
        assert job["status"] == "succeed", job["error"]
        run("docker", "start", endpoints)
        time.sleep(5)
        assert workers(deployment) == [worker], "it was found again"

        client.call("DELETE", "/endpoints", {"delete_endpoint_list": ["contained"]})
        deadline = time.monotonic() + 60
        while workers(deployment):
            assert time.monotonic() < deadline
            time.sleep(0.5)
