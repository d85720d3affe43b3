"""What is in the images, and what is not."""

from __future__ import annotations

import json

import pytest

from tests.containers.engine import Deployment, inspect, needs_engine, run

pytestmark = [needs_engine, pytest.mark.timeout(2400)]

PROCESSES = ("gateway", "identity", "models", "inference", "endpoints-cpu")
FIND = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]) is not None)"


@pytest.fixture(scope="module")
def images(deployment: Deployment) -> dict[str, str]:
    return {name: inspect(deployment.containers(name)[0])["Image"] for name in PROCESSES}


def test_the_service_image_has_no_torch_and_the_worker_image_has(deployment: Deployment) -> None:
    assert deployment.inside("models", "python", "-c", FIND, "torch").strip() == "False"
    assert deployment.inside("endpoints-cpu", "python", "-c", FIND, "torch").strip() == "True"
    assert deployment.inside("gateway", "python", "-c", FIND, "litestar").strip() == "True"


def test_every_process_is_an_unprivileged_user_who_can_write_nothing_of_the_image(
    deployment: Deployment,
) -> None:
    for service in PROCESSES:
        assert deployment.inside(service, "id", "-u").strip() == "10001"
        state = inspect(deployment.containers(service)[0])
        assert state["HostConfig"]["ReadonlyRootfs"]
        assert state["HostConfig"]["CapDrop"] == ["ALL"]
        with pytest.raises(AssertionError, match="Read-only file system"):
            deployment.inside(service, "python", "-c", "open('/app/shared/new.py', 'w')")


def test_no_secret_is_in_an_image_or_in_what_inspect_shows(
    deployment: Deployment, images: dict[str, str]
) -> None:
    secrets = deployment.installation.secrets
    known = [
        *(secrets.api_key, secrets.admin_password, secrets.token_secret),
        *secrets.nats.values(),
        *secrets.postgres.values(),
        *(key.secret_key for key in secrets.s3.values()),
        *secrets.weed.values(),
    ]
    shown = run("docker", "image", "inspect", *set(images.values()))
    for image in set(images.values()):
        shown += run("docker", "history", "--no-trunc", image)
    for service in (*PROCESSES, "nats", "postgres", "seaweedfs", "proxy", "provision"):
        shown += json.dumps([inspect(container) for container in deployment.containers(service)])
    assert not [secret for secret in known if secret in shown]
    # What the builds were given: pip's configuration and certificates.
    files = deployment.inside(
        "models", "sh", "-c", "find / -xdev -name 'pip.conf' 2>/dev/null; true"
    )
    assert files.strip() == ""


def test_each_container_has_its_own_secret_and_no_other(deployment: Deployment) -> None:
    for service in ("gateway", "identity", "models", "inference"):
        assert deployment.inside(service, "ls", "/run/secrets").split() == [service]
    assert deployment.inside("nats", "ls", "/run/secrets").split() == ["nats.conf"]


def test_the_stop_of_a_process_takes_less_than_its_grace(deployment: Deployment) -> None:
    """Killed ones exit with 137; a gateway ends by the signal it was sent."""
    for service in PROCESSES:
        container = deployment.containers(service)[0]
        grace = inspect(container)["Config"]["StopTimeout"]
        run("docker", "stop", "--time", str(grace), container)
        assert inspect(container)["State"]["ExitCode"] in (0, 143), service
    deployment.run("up", "--wait", "--no-build")
