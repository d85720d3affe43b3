"""What a gateway counts: requests, commands, how far it is behind the log; and the workers that it
hears of, for whoever scrapes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from litestar.plugins.prometheus import PrometheusConfig
from nats.js import JetStreamContext
from prometheus_client import Counter, Gauge, Histogram

from shared.contracts.endpoints import InstanceBeat
from shared.contracts.subjects import DEAD, EVENTS
from shared.metrics import CONSUMER_PENDING, SECONDS, Reading, Sampler

COMMAND = Histogram(
    "darkroom_command_seconds",
    "From sending a command until the event that answers it was applied here",
    ["type", "outcome"],
    buckets=SECONDS,
)
REFUSED = Counter(
    "darkroom_http_refused_total",
    "Requests answered before a route was looked for: %00 in the URL (400), no API key (403), "
    "starting (503)",
    ["status"],
)
STREAMS = Gauge("darkroom_event_streams", "Clients that follow events here")
DEAD_STORED = Gauge(
    "darkroom_dead_letters_stored", "Messages in the stream DEAD, by whose they were", ["owner"]
)

HTTP = PrometheusConfig(
    app_name="gateway",
    prefix="darkroom_http",
    group_path=True,
    buckets=[*SECONDS, 60.0],
    # What lasts as long as somebody listens says nothing about latency, nor do probes.
    exclude=["/events$", "^/healthz$", "^/readyz$"],
)
"""Litestar's own: requests, seconds and errors by method, route and status."""


def log_sampler(js: JetStreamContext, seq: Callable[[], int]) -> Sampler:
    """`seq`: the place in the log of events up to which this process has applied them."""

    async def read() -> Iterable[Reading]:
        events = await js.stream_info(EVENTS)
        dead = await js.stream_info(DEAD, subjects_filter="dead.*")
        behind = max(0, events.state.last_seq - seq())
        readings: list[Reading] = [(CONSUMER_PENDING, (EVENTS, "gateway"), behind)]
        for subject, count in (dead.state.subjects or {}).items():
            readings.append((DEAD_STORED, (subject.partition(".")[2],), count))
        return readings

    return Sampler((CONSUMER_PENDING, DEAD_STORED), read)


def targets(workers: Iterable[InstanceBeat]) -> bytes:
    """As Prometheus' HTTP service discovery wants them."""
    return msgspec.json.encode([_target(worker) for worker in workers if worker.address])


def _target(worker: InstanceBeat) -> dict[str, Any]:
    labels = {
        "endpoint": worker.endpoint_name,
        "instance_id": worker.instance_id,
        "device": worker.device,
    }
    return {"targets": [worker.address], "labels": labels}
