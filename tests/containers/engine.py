"""Darkroom in containers, as tests start it: the compose file, the recipes' secrets, random ports.

They run wherever a container engine answers. Its images come from a registry, or are stand-ins:
engine.sh sets the variables of compose.yaml accordingly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from testcontainers.compose import DockerCompose

from deploy.containers.installation import ContainerInstallation
from deploy.local.client import Client
from deploy.local.installation import REPOSITORY, port_is_free

POSTGRES = os.environ.get("DARKROOM_POSTGRES_IMAGE", "postgres:17-bookworm")
PYTHON = os.environ.get("DARKROOM_PYTHON_IMAGE", "python:3.11-slim-bookworm")
NATS = os.environ.get("DARKROOM_NATS_IMAGE", "nats:2.15-alpine")


@functools.cache
def why_not() -> str:
    """Why there is no engine; empty if one answers."""
    if not shutil.which("docker"):
        return "there is no docker command"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            return f"`{' '.join(command)}`: {' '.join(last) or 'failed'}"
    return ""


needs_engine = pytest.mark.skipif(bool(why_not()), reason=f"no container engine: {why_not()}")


class Deployment:
    """What `just compose-up` starts, under a name of its own."""

    def __init__(self, home: Path, files: tuple[str, ...], environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment
        self.compose = DockerCompose(
            REPOSITORY / "deploy",
            compose_file_name=list(files),
            wait=True,
            profiles=["cpu"],
        )
        self.project = environment["COMPOSE_PROJECT_NAME"]
        self._files = ":".join(str(REPOSITORY / "deploy" / file) for file in files)

    @property
    def installation(self) -> ContainerInstallation:
        """As this machine reaches it."""
        found = ContainerInstallation.read(self.home / "secrets.json")
        addresses = {
            "DARKROOM_URL": f"http://127.0.0.1:{self.environment['DARKROOM_PORT']}",
            "DARKROOM_NATS_URL": f"nats://127.0.0.1:{self.environment['DARKROOM_NATS_PORT']}",
            "DARKROOM_S3_URL": f"http://127.0.0.1:{self.environment['DARKROOM_S3_PORT']}",
        }
        return ContainerInstallation(self.home, found.secrets, addresses)

    def just(self, *command: str) -> str:
        """One of the recipes, with what this deployment is called and has. Raises AssertionError
        with its output."""
        environment = {**os.environ, "COMPOSE_FILE": self._files}
        return run("just", *command, cwd=REPOSITORY, environment=environment)

    def run(self, *command: str) -> str:
        """`docker compose …` of this deployment. Raises AssertionError with its output."""
        return run(*self.compose.docker_compose_command(), *command, cwd=REPOSITORY / "deploy")

    def containers(self, service: str) -> list[str]:
        """The ids, the running ones first."""
        listed = run(
            *("docker", "ps", "--all", "--quiet", "--no-trunc"),
            *("--filter", f"label=com.docker.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        )
        return listed.split()

    def inside(self, service: str, *command: str) -> str:
        """What a command prints that runs in the first container of a service."""
        return run("docker", "exec", self.containers(service)[0], *command)

    def sql(self, query: str) -> list[str]:
        """Rows as Postgres' superuser sees them, their columns separated by `|`."""
        psql = ("psql", "-U", "postgres", "-d", "darkroom", "-AtX", "-c", query)
        return self.inside("postgres", *psql).splitlines()

    def log_in(self) -> Client:
        return Client.log_in_at(self.home)


def run(
    *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What a command prints. Raises AssertionError with its output."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("docker", "inspect", container))[0]
    return found


def wait_healthy(container: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while inspect(container)["State"].get("Health", {}).get("Status") != "healthy":
        assert time.monotonic() < deadline, run("docker", "logs", "--tail", "30", container)
        time.sleep(0.2)


@contextlib.contextmanager
def deployed(*files: str, **settings: str) -> Iterator[Deployment]:
    """Up and healthy; at its end everything is removed, with the data."""
    with (
        tempfile.TemporaryDirectory(prefix="darkroom-") as folder,
        pytest.MonkeyPatch.context() as m,
    ):
        ports = _free_ports(3)
        environment = {
            "COMPOSE_PROJECT_NAME": f"darkroom-test-{uuid.uuid4().hex[:8]}",
            "DARKROOM_COMPOSE_HOME": folder,
            "DARKROOM_PORT": str(ports[0]),
            "DARKROOM_S3_PORT": str(ports[1]),
            "DARKROOM_NATS_PORT": str(ports[2]),
            **settings,
        }
        for name, value in environment.items():
            m.setenv(name, value)
        deployment = Deployment(Path(folder), files, environment)
        try:
            deployment.just("compose-secrets")
            deployment.run("build")  # `up --build` marks containers in another way than `up`
            try:
                deployment.compose.start()
            except subprocess.CalledProcessError as error:
                logs = deployment.run("logs", "--no-color", "--tail", "20")
                raise AssertionError(f"{error.stderr.decode()}\n{logs}") from error
            yield deployment
        finally:
            deployment.compose.stop()


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        if port not in found and port_is_free(port):
            found.append(port)
    return found
