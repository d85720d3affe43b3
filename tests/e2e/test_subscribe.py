"""docs/subscribe.py does what it says, with the rights that a program outside has."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.installation import REPOSITORY
from deploy.local.stack import Stack

MODEL = {"Stable-diffusion": [CHECKPOINT.name]}
EXAMPLE = REPOSITORY / "docs" / "subscribe.py"


class Listener:
    def __init__(self, output: Path) -> None:
        self._output = output

    def told_of(self, job_id: str) -> list[str]:
        """The types of the events about a job."""
        lines = self._output.read_text().splitlines()
        return [line.split()[1].split(".")[1] for line in lines if job_id in line]

    def wait(self, seen: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < deadline, self._output.read_text()
            time.sleep(0.05)


@contextmanager
def listening(stack: Stack, output: Path, *arguments: str) -> Iterator[Listener]:
    """The example as a program of its own, with nothing of ours in its environment."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), *arguments],
            env={"DARKROOM_NATS_URL": stack.environment()["DARKROOM_NATS_URL"]},
            cwd=output.parent,
            stdout=file,
            stderr=file,
        )
    try:
        yield Listener(output)
        assert process.poll() is None, output.read_text()
    finally:
        process.terminate()
        process.wait(10)


def create_job(client: Client) -> str:
    if client.find_checkpoint("Stable-diffusion", CHECKPOINT.name) is None:
        client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    return client.create_job("txt2img", MODEL, {"steps": 1})


def test_a_subscriber_goes_on_where_it_was(stack: Stack, admin: Client, tmp_path: Path) -> None:
    name = f"example-{uuid4().hex[:8]}"
    before = create_job(admin)
    with listening(stack, tmp_path / "first", name) as first:
        first.wait(lambda: first.told_of(before) == ["job_created"])
        during = create_job(admin)
        first.wait(lambda: first.told_of(during) == ["job_created"])
        time.sleep(0.5)  # the last acknowledgement is on its way
    admin.cancel_job(during)
    away = create_job(admin)
    with listening(stack, tmp_path / "second", name) as second:
        second.wait(lambda: second.told_of(away) == ["job_created"])
        assert second.told_of(during) == ["job_cancelled"], "not the creation once more"
        assert second.told_of(before) == []
    with listening(stack, tmp_path / "other", f"{name}-b") as other:
        other.wait(lambda: other.told_of(away) == ["job_created"])
        assert other.told_of(during) == ["job_created", "job_cancelled"]


def test_a_live_subscriber_hears_what_happens_from_now_on(
    stack: Stack, admin: Client, tmp_path: Path
) -> None:
    old = create_job(admin)
    with listening(stack, tmp_path / "live", "--live") as live:
        deadline = time.monotonic() + 20
        while True:
            job_id = create_job(admin)
            time.sleep(0.3)
            if live.told_of(job_id):
                break
            assert time.monotonic() < deadline
        assert not live.told_of(old)


@pytest.mark.parametrize("arguments", [(), ("a-name", "--live")])
def test_it_says_how_to_use_it(stack: Stack, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, str(EXAMPLE), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "give a name, or --live" in ended.stderr
