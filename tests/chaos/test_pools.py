"""Workers and the endpoints service are killed with kill -9 at random: a short run of
`python -m tests.chaos.pools`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.client import Client
from deploy.local.stack import Stack
from tests.chaos.pools import deploy, kill_fast, run_jobs, show, show_left, wait_for_all

INSTANCES = 2


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack.temporary(settings={"DARKROOM_WORKER_THREADS": "1"}) as stack:
        yield stack


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Client:
    return deploy(stack, INSTANCES)


@pytest.mark.timeout(400)
def test_no_job_is_lost_or_doubled_when_workers_and_their_service_are_killed(
    stack: Stack, admin: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run_jobs(stack, admin, jobs=40, instances=INSTANCES, pause=(1, 4), seed=1)
    with capsys.disabled():
        print("\n" + show(figures))
    assert figures.kills.total() > 2
    assert (figures.lost, figures.doubled, figures.stuck) == (0, 0, 0)
    assert figures.failed == 0


@pytest.mark.timeout(400)
def test_nothing_is_left_over_after_kills_at_random(
    stack: Stack, admin: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    wait_for_all(admin, INSTANCES)
    left = kill_fast(stack, admin, kills=12, instances=INSTANCES, pause=(0.1, 1), seed=2)
    with capsys.disabled():
        print("\n" + show_left(left))
    assert (left.orphan_workers, left.orphan_engines, left.missing_workers) == (0, 0, 0)
    assert left.workers == INSTANCES
