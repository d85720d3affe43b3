"""What is counted when, without servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from uuid import uuid4

from prometheus_client import REGISTRY, Gauge

from services.inference import metrics as ledger
from shared.contracts import inference
from shared.metrics import Reading, Sampler, scrape
from tests.unit.test_inference_domain import NOW, make_job

QUEUE = Gauge("test_queue", "A queue", ["endpoint"])


def sampler(read: Callable[[], Iterable[Reading]]) -> Sampler:
    async def awaited() -> Iterable[Reading]:
        return read()

    return Sampler((QUEUE,), awaited)


async def test_what_can_not_be_looked_up_is_left_out_and_takes_nothing_with_it() -> None:
    seen = [3.0]
    queue = sampler(lambda: [(QUEUE, ("a",), seen.pop())])
    assert b'test_queue{endpoint="a"} 3.0' in await scrape([queue], {"nats": "ok"})
    text = await scrape([queue], {"nats": "ok", "s3": "TimeoutError"})  # nothing to pop: it raises
    assert b"test_queue{" not in text
    assert b'darkroom_dependency_up{dependency="nats"} 1.0' in text
    assert b'darkroom_dependency_up{dependency="s3"} 0.0' in text


async def test_what_is_gone_is_not_shown_any_more() -> None:
    names = ["a", "b"]
    queue = sampler(lambda: [(QUEUE, (name,), 1.0) for name in names])
    assert b'test_queue{endpoint="b"}' in await scrape([queue], {})
    names.remove("b")
    text = await scrape([queue], {})
    assert b'endpoint="a"' in text
    assert b'endpoint="b"' not in text


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_the_ledger_counts_a_job_by_its_events() -> None:
    endpoint = f"e-{uuid4().hex[:8]}"
    started = make_job(status="inprogress", endpoint_name=endpoint, started_at=NOW)
    begun = NOW + timedelta(seconds=5)
    taken = started.take(1, instance_id="i", seconds={"fetch": 1.5, "line": 0.5}, now=begun)
    again = taken.take(2, instance_id="j", seconds={}, now=begun)
    done = again.succeed(
        attempt=2,
        image_names=["a.png", "b.png"],
        info_name="j",
        seconds={"fetch": 0.1, "render": 4.0},
        warnings=[],
        now=NOW + timedelta(seconds=9),
    )
    ledger.observe(inference.JobCreated.of(make_job()))
    for event in (
        inference.JobStarted.of(started),
        inference.JobTaken.of(taken),
        inference.JobMoved.of(taken),
        inference.JobTaken.of(again),
        inference.JobSucceeded.of(done),
        inference.JobSynced.of(done),
        inference.JobFailed.of(started.fail("no", now=NOW)),
        inference.JobCancelled.of(started.cancel("bob", now=NOW)),
    ):
        ledger.observe(event)
    stage = "darkroom_job_stage_seconds"
    assert count("darkroom_jobs_started_total", endpoint=endpoint) == 1
    assert count("darkroom_jobs_retried_total", endpoint=endpoint) == 1
    assert count("darkroom_jobs_moved_total", endpoint=endpoint) == 1
    assert count("darkroom_images_total", endpoint=endpoint) == 2
    assert count(f"{stage}_sum", endpoint=endpoint, stage="queue") == 3.0
    assert count(f"{stage}_sum", endpoint=endpoint, stage="render") == 4.0
    assert count("darkroom_job_seconds_sum", endpoint=endpoint) == 9.0
    for end in ("succeed", "failed", "cancelled"):
        assert count("darkroom_jobs_ended_total", endpoint=endpoint, end=end) == 1
