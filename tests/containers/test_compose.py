"""What an operator does with compose.yaml, and sees go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from deploy.local.installation import REPOSITORY
from tests.containers.engine import Deployment, inspect, needs_engine, run, wait_healthy

pytestmark = [needs_engine, pytest.mark.timeout(2400)]

SERVICES = ("gateway", "identity", "models", "inference", "endpoints-cpu")


def test_the_demo_renders_a_picture_and_cuts_its_background_out(
    deployment: Deployment, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.local.demo"],
        cwd=tmp_path,
        env={**os.environ, "DARKROOM_HOME": str(deployment.home), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    heart = Image.open(tmp_path / "darkroom-demo" / "heart.png").convert("RGB")
    red, green, _ = heart.getpixel((128, 128))  # type: ignore[misc]
    assert red > 150 > green, "a red heart"
    red, green, blue = heart.getpixel((4, 4))  # type: ignore[misc]
    assert min(red, green) > 150 > blue, "on a yellow background"
    cut = Image.open(tmp_path / "darkroom-demo" / "heart-cut-out.png")
    assert cut.mode == "RGBA"
    assert cut.getpixel((4, 4))[3] < 30 < 200 < cut.getpixel((128, 128))[3]  # type: ignore[index]


def test_up_again_changes_nothing(deployment: Deployment) -> None:
    before = {service: deployment.containers(service) for service in SERVICES}
    deployment.just("compose-up")
    assert {service: deployment.containers(service) for service in SERVICES} == before


def test_requests_go_on_while_one_of_two_gateways_is_down(deployment: Deployment) -> None:
    with deployment.log_in() as client:
        first, second = deployment.containers("gateway")
        for stopped in (first, second):
            run("docker", "stop", stopped)
            for _ in range(20):
                assert client.call("GET", "/ping")["message"] == "pong"
            run("docker", "start", stopped)
            wait_healthy(stopped)


def test_what_is_killed_starts_again(deployment: Deployment) -> None:
    (container,) = deployment.containers("models")
    before = inspect(container)["RestartCount"]
    kill = "import os, signal; [os.kill(int(p), 9) for p in os.listdir('/proc') if p.isdigit()"
    kill += " and int(p) not in (1, os.getpid())]"
    deployment.inside("models", "python", "-c", kill)
    deadline = time.monotonic() + 60
    while inspect(container)["RestartCount"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    wait_healthy(container)


def test_only_the_proxy_reaches_the_object_store_and_everything_is_on_loopback(
    deployment: Deployment,
) -> None:
    look = "import socket; socket.create_connection(('{}', {}), 3)"
    deployment.inside("models", "python", "-c", look.format("s3", 8333))
    for service in ("models", "endpoints-cpu"):
        with pytest.raises(AssertionError, match="gaierror"):
            deployment.inside(service, "python", "-c", look.format("seaweedfs", 8333))
    for service in (*SERVICES, "nats", "postgres", "seaweedfs", "proxy"):
        ports = inspect(deployment.containers(service)[0])["NetworkSettings"]["Ports"] or {}
        bound = [binding for bindings in ports.values() for binding in bindings or []]
        assert all(binding["HostIp"] == "127.0.0.1" for binding in bound), service
        assert bool(bound) == (service in ("nats", "proxy")), service


def test_limits_and_log_rotation_are_in_force(deployment: Deployment) -> None:
    for service in (*SERVICES, "nats", "postgres", "seaweedfs", "proxy"):
        host = inspect(deployment.containers(service)[0])["HostConfig"]
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
        assert host["LogConfig"]["Config"] == {"max-file": "5", "max-size": "10m"}
        assert host["RestartPolicy"]["Name"] == "unless-stopped"


def test_a_large_upload_and_a_silent_event_stream_pass_the_proxy(deployment: Deployment) -> None:
    with deployment.log_in() as client:
        body = {
            "checkpoint_type": "Lora",
            "filenames": [{"filename": "large.bin", "parts_number": 1}],
        }
        created = client.call("POST", "/checkpoints", body)["data"]
        (url,) = created["s3PresignUrl"]["large.bin"]
        answer = client.http.put(url, content=os.urandom(70_000_000))
        assert answer.status_code == 200
        assert answer.headers["ETag"]
        with (
            httpx.stream(
                "GET", f"{client.url}/events", headers=client.headers, timeout=30, trust_env=False
            ) as stream,
        ):
            assert stream.status_code == 200
            client.call("POST", "/roles", {"role_name": "seen", "permissions": ["role:list"]})
            assert any("identity.role_created.v1" in line for line in stream.iter_lines())
