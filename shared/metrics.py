"""What a process counts, in Prometheus' text format at `/metrics` beside its health.

Counters and histograms are told as things happen. What can only be looked up (a queue, an outbox)
is looked up while somebody asks, by samplers: nobody pays for numbers that nobody reads, and a
number that can't be looked up is left out, never repeated.

Here is what every process may have; what only one has lies in its own `metrics.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from faststream.nats.prometheus.provider import NatsMetricsSettingsProvider
from faststream.prometheus import ConsumeAttrs
from faststream.prometheus.middleware import PrometheusMiddleware
from nats.js import JetStreamContext
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, generate_latest

from shared.logs import get_logger

log = get_logger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
TIMEOUT = 2.0
"""Seconds that one sampler may take."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Buckets of what a caller waits for."""
LONG_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Buckets of the stages of a job."""

DEPENDENCY_UP = Gauge(
    "darkroom_dependency_up", "1 if what this process needs answers, as in /readyz", ["dependency"]
)
DEAD_LETTERS = Counter(
    "darkroom_dead_letters_total", "Messages given up by this process, now in DEAD", ["owner"]
)
OUTBOX_UNSENT = Gauge("darkroom_outbox_unsent", "Rows that the bus has not taken yet", ["owner"])
OUTBOX_OLDEST = Gauge(
    "darkroom_outbox_oldest_seconds", "Age of the oldest row that the bus has not taken", ["owner"]
)
CONSUMER_PENDING = Gauge(
    "darkroom_consumer_pending",
    "Messages that wait in the stream for this consumer",
    ["stream", "consumer"],
)
CONSUMER_IN_HAND = Gauge(
    "darkroom_consumer_in_hand",
    "Messages delivered to this consumer and not acknowledged yet",
    ["stream", "consumer"],
)

Reading = tuple[Gauge, tuple[str, ...], float]
"""A gauge, the values of its labels, and what it shows."""


class Sampler(msgspec.Struct, frozen=True):
    """`read` looks up all that its `gauges` show, and raises if it can't."""

    gauges: tuple[Gauge, ...]
    read: Callable[[], Awaitable[Iterable[Reading]]]


async def scrape(samplers: Sequence[Sampler], dependencies: Mapping[str, str]) -> bytes:
    """All that this process counts. `dependencies`: name -> "ok", or what is wrong."""
    await asyncio.gather(*(_sample(sampler) for sampler in list(samplers)))
    DEPENDENCY_UP.clear()
    for name, result in dependencies.items():
        DEPENDENCY_UP.labels(name).set(result == "ok")
    return generate_latest(REGISTRY)


async def _sample(sampler: Sampler) -> None:
    readings: Iterable[Reading] = ()
    try:
        readings = await asyncio.wait_for(sampler.read(), TIMEOUT)
    except Exception as error:
        log.debug("not_sampled", gauges=[str(gauge) for gauge in sampler.gauges], error=repr(error))
    for gauge in sampler.gauges:
        gauge.clear()
    for gauge, labels, value in readings:
        gauge.labels(*labels).set(value)


def outbox_sampler(owner: str, pool: Any) -> Sampler:
    async def read() -> Iterable[Reading]:
        row = await pool.fetchrow(
            """
            SELECT count(*) AS unsent,
                coalesce(extract(epoch FROM now() - min(created_at)), 0)::float8 AS oldest
            FROM outbox WHERE sent_at IS NULL
            """
        )
        return [(OUTBOX_UNSENT, (owner,), row["unsent"]), (OUTBOX_OLDEST, (owner,), row["oldest"])]

    return Sampler((OUTBOX_UNSENT, OUTBOX_OLDEST), read)


def consumers_sampler(js: JetStreamContext, consumers: Sequence[tuple[str, str]]) -> Sampler:
    """`consumers`: stream and durable name of each."""

    async def read() -> Iterable[Reading]:
        readings: list[Reading] = []
        for stream, durable in consumers:
            info = await js.consumer_info(stream, durable)
            labels = (stream, durable)
            readings.append((CONSUMER_PENDING, labels, info.num_pending or 0))
            readings.append((CONSUMER_IN_HAND, labels, info.num_ack_pending or 0))
        return readings

    return Sampler((CONSUMER_PENDING, CONSUMER_IN_HAND), read)


class _BySubject(NatsMetricsSettingsProvider):
    """FastStream's label `handler` is the subject, which holds an id in events: one series for each
    checkpoint there ever was. Here it is `cmd.models.create_checkpoint.v1`, and for events
    `evt.models.checkpoint.*`."""

    def get_consume_attrs_from_message(self, msg: Any) -> ConsumeAttrs:
        attributes = super().get_consume_attrs_from_message(msg)
        if msg.raw_message.subject.startswith("evt."):
            kind = msg.raw_message.subject.rpartition(".")[0]
            attributes["destination_name"] = f"{kind}.*"
        return attributes


def message_middleware(service: str) -> PrometheusMiddleware[Any, Any]:
    """FastStream's own: messages received, in process, acked and nacked, seconds and exceptions."""
    return PrometheusMiddleware(
        settings_provider_factory=lambda _: _BySubject(),
        registry=REGISTRY,
        app_name=service,
        metrics_prefix="darkroom_bus",
        received_messages_size_buckets=(256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576),
    )
