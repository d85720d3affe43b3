"""From the previous release to this one, as an operator does it: the new migrations and the new
streams while the old version serves, then the new version.

The previous release is taken out of git. A newer one moves PREVIOUS on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import asyncpg
import pytest

from deploy.local.client import Client
from deploy.local.installation import REPOSITORY, Installation
from deploy.local.processes import base_environment
from deploy.local.stack import Stack
from tests.upgrades import exercise

PREVIOUS = "9c303b6c6e25262745cedadef64ceee9896a4c63"
"""Before the registry looked into files, before endpoints scaled, before stages in job events."""

FOLDERS = ("services", "shared", "deploy")


class Release:
    """A version in a folder of its own, with an installation beside it."""

    def __init__(self, code: Path, home: Path) -> None:
        self.code = code
        self.home = home

    def start(self, *command: str, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        environment = {
            **base_environment(),
            "DARKROOM_HOME": str(self.home),
            "DARKROOM_WORKER_THREADS": "1",
            "PYTHONPATH": str(self.code),
        }
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.code,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command, output=subprocess.PIPE)
        assert process.stdout
        text = process.stdout.read().decode()
        assert process.wait() == 0, f"{' '.join(command)}\n{text}"
        return text

    def exercise(self) -> None:
        done = self.run(exercise.__file__, str(self.home), "all")
        assert done.split() == ["people", "checkpoints", "endpoints", "jobs"]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """People work with it meanwhile, and nothing of what they ask for fails."""
        with tempfile.TemporaryFile() as output:
            process = self.start(exercise.__file__, str(self.home), "loop", output=output)
            try:
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            output.seek(0)
            told = output.read().decode()
            assert code == 0, told
            assert int(told) >= 2, "it was used"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="darkroom-upgrade-") as name:
        Path(name).chmod(0o711)  # Postgres passes through as a user of its own
        yield Path(name)


@pytest.fixture
def previous(folder: Path) -> Iterator[Release]:
    archive = folder / "previous.tar"
    command = ["git", "archive", "--output", str(archive), PREVIOUS, *FOLDERS]
    taken = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if taken.returncode:
        pytest.skip(f"the previous release is not in this clone: {taken.stderr.strip()}")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "previous", filter="data")
    release = Release(folder / "previous", folder / ".darkroom")
    release.run("-m", "deploy.local", "setup-secrets", "--random-ports")
    try:
        release.run("-m", "deploy.local", "up")
        yield release
    finally:
        Stack(release.home).delete()


@pytest.mark.timeout(600)
async def test_the_old_version_serves_while_the_new_one_is_prepared(previous: Release) -> None:
    previous.run(exercise.__file__, str(previous.home), "prepare")
    with previous.in_use():
        time.sleep(3)
        Release(REPOSITORY, previous.home).run("-m", "deploy.local.provision")
        time.sleep(3)
    previous.exercise()

    with Client.log_in_at(previous.home) as client:
        waiting = client.create_job("txt2img", exercise.MODEL, exercise.PARAMS)
        before = client.run_job("txt2img", exercise.MODEL, exercise.PARAMS)
    previous.run("-m", "deploy.local", "down")

    stack = Stack(previous.home)
    stack.up()
    with Client.log_in_at(previous.home) as client:
        client.wait_for_endpoint(exercise.ENDPOINT)
        client.start_job(waiting)
        assert client.wait_for_job(waiting)["status"] == "succeed"
        after = client.get_job(before["InferenceJobId"])
        assert (after["status"], after["seconds"]) == ("succeed", before["seconds"])
        assert client.download(after["img_presigned_urls"][0])
    Release(REPOSITORY, previous.home).exercise()
    assert await given_up(stack.installation) == []
    await nothing_left_behind(stack.installation)


async def given_up(installation: Installation) -> list[str]:
    """Lines of logs about messages that a service could not handle, of either version."""
    return [
        line
        for file in sorted(installation.logs.glob("*.log"))
        for line in file.read_text(errors="replace").splitlines()
        if '"dead_letter"' in line or '"handler_failed"' in line
    ]


async def nothing_left_behind(installation: Installation) -> None:
    for owner in ("identity", "models", "endpoints", "inference"):
        connection = await asyncpg.connect(installation.postgres_url(owner))
        try:
            unsent = await connection.fetchval("SELECT count(*) FROM outbox WHERE sent_at IS NULL")
            assert unsent == 0, owner
        finally:
            await connection.close()


def test_python_finds_the_code_of_a_release_in_its_folder(folder: Path) -> None:
    """Else the other tests here would compare this version with itself."""
    package = folder / "shared"
    package.mkdir()
    (package / "__init__.py").write_text("print('this one')")
    assert Release(folder, folder).run("-c", "import shared") == "this one\n"
    assert os.path.samefile(
        Release(REPOSITORY, folder).run("-c", "import shared; print(shared.__path__[0])").strip(),
        REPOSITORY / "shared",
    )
