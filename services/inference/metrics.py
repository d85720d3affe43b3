"""What the ledger counts of jobs: it hears of all of them, however short a worker lives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from services.inference.store import JobStore
from shared.contracts.envelope import Message
from shared.contracts.inference import (
    Job,
    JobCancelled,
    JobFailed,
    JobMoved,
    JobStarted,
    JobSucceeded,
    JobTaken,
)
from shared.metrics import LONG_SECONDS, Reading, Sampler

QUEUE = "queue"
"""The stage before a worker's own: from the start of a job until a worker had it in hand."""

STARTED = Counter("darkroom_jobs_started_total", "Jobs put into the queue", ["endpoint"])
ENDED = Counter(
    "darkroom_jobs_ended_total",
    "Jobs that ended: succeed, failed, cancelled",
    ["endpoint", "end"],
)
RETRIED = Counter(
    "darkroom_jobs_retried_total",
    "Further attempts: a worker or its engine died",
    ["endpoint"],
)
MOVED = Counter(
    "darkroom_jobs_moved_total", "Jobs that came from an endpoint that has ended", ["endpoint"]
)
IMAGES = Counter("darkroom_images_total", "Pictures made", ["endpoint"])
STAGES = Histogram(
    "darkroom_job_stage_seconds",
    "Seconds of each stage of a job: queue, fetch (download), line, load, encode, render, …",
    ["endpoint", "stage"],
    buckets=LONG_SECONDS,
)
TOTAL = Histogram(
    "darkroom_job_seconds",
    "Seconds from the start of a job to its success",
    ["endpoint"],
    buckets=LONG_SECONDS,
)
WAITING = Gauge("darkroom_queue_jobs", "Jobs that no worker has begun", ["endpoint"])
RUNNING = Gauge("darkroom_running_jobs", "Jobs that a worker has begun", ["endpoint"])
OLDEST = Gauge("darkroom_queue_oldest_seconds", "How long the first one has waited", ["endpoint"])


def observe(message: Message) -> None:
    """Every message that the ledger emits, once."""
    if not isinstance(message, Job) or message.endpoint_name is None:
        return
    endpoint = message.endpoint_name
    match message:
        case JobStarted():
            STARTED.labels(endpoint).inc()
        case JobMoved():
            MOVED.labels(endpoint).inc()
        case JobTaken(attempt=1, started_at=started, taken_at=taken) if started and taken:
            behind = sum(message.seconds.values())
            waited = (taken - started).total_seconds() - behind
            STAGES.labels(endpoint, QUEUE).observe(max(0.0, waited))
        case JobTaken():
            RETRIED.labels(endpoint).inc()
        case JobSucceeded(started_at=started, completed_at=completed) if started and completed:
            ENDED.labels(endpoint, message.status).inc()
            IMAGES.labels(endpoint).inc(len(message.image_names))
            TOTAL.labels(endpoint).observe((completed - started).total_seconds())
            for stage, seconds in message.seconds.items():
                STAGES.labels(endpoint, stage).observe(seconds)
        case JobFailed():
            ENDED.labels(endpoint, message.status).inc()
        case JobCancelled():
            ENDED.labels(endpoint, "cancelled").inc()


def queues_sampler(pool: Any) -> Sampler:
    async def read() -> Iterable[Reading]:
        readings: list[Reading] = []
        for queue in await JobStore(pool).list_queues():
            labels = (queue.endpoint_name,)
            readings.append((WAITING, labels, queue.waiting))
            readings.append((RUNNING, labels, queue.running))
            readings.append((OLDEST, labels, queue.oldest_seconds))
        return readings

    return Sampler((WAITING, RUNNING, OLDEST), read)
