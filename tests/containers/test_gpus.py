"""Profile gpu asks the engine for GPUs. Here no more than that can be seen: an engine for tests has
NVIDIA's hook stood in for, and hands out what is not there."""

from __future__ import annotations

import subprocess

import pytest

from deploy.local.installation import REPOSITORY
from tests.containers.engine import PYTHON, needs_engine, run

pytestmark = needs_engine

COMPOSE = ("docker", "compose", "--profile", "gpu", "--profile", "cpu", "--profile", "tools")
OVERRIDES = ((), ("compose.cluster.yaml",), ("compose.docker.yaml",))


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda names: "+".join(names) or "alone")
def test_compose_accepts_the_files(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_DOCKER_GID", "1")
    files = [word for name in ("compose.yaml", *overrides) for word in ("-f", name)]
    run(*COMPOSE[:2], *files, *COMPOSE[2:], "config", "--quiet", cwd=REPOSITORY / "deploy")


def test_profile_gpu_gives_all_gpus_to_the_container_of_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In another image: that with CUDA takes long to build."""
    image, _, tag = PYTHON.rpartition(":")
    monkeypatch.setenv("DARKROOM_WORKER_CUDA_IMAGE", image)
    monkeypatch.setenv("DARKROOM_VERSION", tag)
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "darkroom-test-gpus")
    monkeypatch.chdir(REPOSITORY / "deploy")
    told = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])"
    command = (*COMPOSE[:2], "-f", "compose.yaml", "--profile", "gpu")
    once = ("run", "--rm", "--no-deps", "--entrypoint", "python3", "endpoints-gpu", "-c", told)
    try:
        done = subprocess.run(
            [*command, *once],
            capture_output=True,
            text=True,
        )
        if "could not select device driver" in done.stderr:
            pytest.skip("the engine knows no NVIDIA")
        assert done.stdout.split() == ["all"], done.stderr
    finally:
        subprocess.run([*command, "down", "--volumes"], capture_output=True)
