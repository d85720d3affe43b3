"""What a transaction sends, beside what the tests of services see of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from shared.contracts.inference import JobCreated, JobFailed, JobStarted
from shared.errors import TooLarge
from shared.unit_of_work import ROOM_TO_GROW, Tx
from tests.contracts.test_contracts import example_of

NOW = datetime(2026, 11, 29, tzinfo=UTC)
MOST = 1024 * 1024


def size(event: JobCreated | JobStarted | JobFailed, growth: int) -> int:
    tx = Tx("inference", None, NOW, max_payload=MOST)
    tx.emit(replace(event, params_key="x" * (MOST - growth)))
    return len(tx.rows()[0].body)


def test_a_job_that_could_be_started_can_be_ended_whatever_came_of_it() -> None:
    created = replace(example_of(JobCreated), version=1)
    started, failed = example_of(JobStarted), example_of(JobFailed)
    more = 4096
    assert size(created, ROOM_TO_GROW + more) < MOST - ROOM_TO_GROW
    assert size(started, ROOM_TO_GROW // 2 + more) < MOST - ROOM_TO_GROW // 2
    assert size(failed, more) < MOST
    for event, growth in ((created, ROOM_TO_GROW), (started, ROOM_TO_GROW // 2), (failed, 0)):
        with pytest.raises(TooLarge):
            size(event, growth)
