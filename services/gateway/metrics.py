"""What a gateway counts: requests, commands, how far it is behind the log; and the workers that it
hears of, for whoever scrapes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from litestar.plugins.prometheus import PrometheusConfig
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from prometheus_client import Counter, Gauge, Histogram

from shared.contracts import envelope as cloud
from shared.contracts.endpoints import InstanceBeat
from shared.contracts.registry import payload
from shared.contracts.subjects import DEAD, EVENTS, beat_subject
from shared.metrics import CONSUMER_PENDING, SECONDS, Reading, Sampler

COMMAND = Histogram(
    "darkroom_command_seconds",
    "From sending a command until the event that answers it was applied here",
    ["type", "outcome"],
    buckets=SECONDS,
)
REFUSED = Counter(
    "darkroom_http_refused_total",
    "Requests answered before a route was looked for: no API key (403), starting (503)",
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

FORGOTTEN = 20.0
"""Seconds after which a worker that has not shown itself is not listed any more."""


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


class Workers:
    """Those that have shown themselves lately, as Prometheus' HTTP service discovery wants them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, InstanceBeat]] = {}

    async def follow(self, client: Client) -> None:
        await client.subscribe(beat_subject("*"), cb=self._on_seen)

    async def _on_seen(self, message: Msg) -> None:
        try:
            seen = payload(cloud.decode(message.data))
        except (msgspec.MsgspecError, KeyError):
            return
        if isinstance(seen, InstanceBeat) and seen.address:
            self._seen[seen.instance_id] = (time.monotonic(), seen)

    async def list_targets(self) -> bytes:
        now = time.monotonic()
        self._seen = {
            id_: (when, seen) for id_, (when, seen) in self._seen.items() if now - when < FORGOTTEN
        }
        return msgspec.json.encode([_target(seen) for _, seen in self._seen.values()])


def _target(seen: InstanceBeat) -> dict[str, Any]:
    labels = {
        "endpoint": seen.endpoint_name,
        "instance_id": seen.instance_id,
        "device": seen.device,
    }
    return {"targets": [seen.address], "labels": labels}
