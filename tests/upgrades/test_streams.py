"""Streams and consumers take another configuration while there are messages in them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import nats
import pytest
from nats.errors import TimeoutError as NothingThere
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig

from deploy.local.provision import provision_nats
from deploy.local.stack import Stack
from shared.contracts.subjects import COMMANDS, CONSUMERS, DEAD, EVENTS, JOBS, STREAMS

PUBLISHED = {
    COMMANDS: [f"cmd.models.wish_{n}.v1" for n in range(20)],
    EVENTS: [f"evt.models.checkpoint.{n}" for n in range(20)],
    JOBS: [f"jobs.{n % 2}" for n in range(20)],
    DEAD: [f"dead.models_{n}" for n in range(20)],
}


def older(stream: StreamConfig) -> StreamConfig:
    """With other bounds and another window, as an earlier release may have had them."""
    return stream.evolve(
        max_age=(stream.max_age or 0) / 2 + 3600,
        max_bytes=64 * 1024**2,
        duplicate_window=60,
        allow_direct=None,
        max_msgs=100_000,
    )


def older_consumer(consumer: ConsumerConfig) -> ConsumerConfig:
    narrower = consumer.filter_subjects[:1] if consumer.filter_subjects else None
    return consumer.evolve(ack_wait=30, max_ack_pending=16, filter_subjects=narrower)


@pytest.fixture(scope="module")
def bare() -> Iterator[Stack]:
    """Of our own, since its streams go."""
    with Stack.temporary(services=False) as stack:
        yield stack


@pytest.fixture
async def js(bare: Stack) -> AsyncIterator[JetStreamContext]:
    """Of a NATS with nothing in it."""
    client = await nats.connect(
        bare.installation.nats_url_as("admin"), inbox_prefix=b"_INBOX_admin"
    )
    context = client.jetstream()
    for known in await context.streams_info():
        await context.delete_stream(known.config.name or "")
    yield context
    await client.close()


async def fetch(js: JetStreamContext, stream: str, durable: str, most: int) -> list[bytes]:
    """Acknowledged; less than `most` if there are no more."""
    consumer = await js.pull_subscribe_bind(durable, stream)
    got: list[bytes] = []
    try:
        while len(got) < most:
            (message,) = await consumer.fetch(1, timeout=1)
            await message.ack_sync()
            got.append(message.data)
    except (NothingThere, TimeoutError):
        pass
    return got


async def test_another_configuration_loses_nothing(bare: Stack, js: JetStreamContext) -> None:
    installation = bare.installation
    old_streams = [older(stream) for stream in STREAMS]
    old_consumers = [(stream, older_consumer(consumer)) for stream, consumer in CONSUMERS]
    await provision_nats(installation, old_streams, old_consumers)
    for subjects in PUBLISHED.values():
        for subject in subjects:
            await js.publish(subject, subject.encode())
    done = await fetch(js, COMMANDS, "models", 5)
    seen = await fetch(js, EVENTS, "inference", 7)
    in_hand = await js.pull_subscribe_bind("models", COMMANDS)
    held = [await in_hand.fetch(1, timeout=2) for _ in range(3)]

    await provision_nats(installation)

    for stream in STREAMS:
        info = await js.stream_info(stream.name or "")
        expected = 20 - (len(done) if stream.name == COMMANDS else 0)
        assert info.state.messages == expected, stream.name
        assert info.config.max_age == (stream.max_age or 0)
        assert info.config.duplicate_window == 120
        assert info.config.allow_direct == bool(stream.allow_direct)
    for stream_name, consumer in CONSUMERS:
        known = await js.consumer_info(stream_name, consumer.durable_name or "")
        assert known.config.ack_wait == consumer.ack_wait
        assert known.config.max_ack_pending == consumer.max_ack_pending
        assert known.config.filter_subjects == consumer.filter_subjects

    for (message,) in held:  # what was in hand is still theirs to acknowledge
        await message.ack_sync()
    rest = await fetch(js, COMMANDS, "models", 20)
    told = [*done, *(message.data for (message,) in held), *rest]
    assert [data.decode() for data in told] == PUBLISHED[COMMANDS], "each once, in order"
    more = await fetch(js, EVENTS, "inference", 20)
    assert [data.decode() for data in [*seen, *more]] == PUBLISHED[EVENTS]


async def test_a_message_that_was_sent_before_is_known_after(
    bare: Stack, js: JetStreamContext
) -> None:
    """The window in which a repetition is recognised outlives the change."""
    await provision_nats(bare.installation, [older(stream) for stream in STREAMS], CONSUMERS)
    header = {"Nats-Msg-Id": "a command"}
    await js.publish("cmd.models.wish.v1", b"", headers=header)
    await provision_nats(bare.installation)
    again = await js.publish("cmd.models.wish.v1", b"", headers=header)
    assert again.duplicate


async def test_what_can_not_be_changed_stays_as_it_is_and_says_so(
    bare: Stack, js: JetStreamContext
) -> None:
    await provision_nats(bare.installation)
    await js.publish("cmd.models.wish.v1", b"kept")
    streams = [
        stream.evolve(retention=RetentionPolicy.LIMITS) if stream.name == COMMANDS else stream
        for stream in STREAMS
    ]
    with pytest.raises(RuntimeError, match="stream COMMANDS can't be changed"):
        await provision_nats(bare.installation, streams)
    consumers = [
        (
            name,
            consumer.evolve(ack_policy="none") if consumer.durable_name == "models" else consumer,
        )
        for name, consumer in CONSUMERS
    ]
    with pytest.raises(RuntimeError, match="consumer models of COMMANDS can't be changed"):
        await provision_nats(bare.installation, STREAMS, consumers)
    assert await fetch(js, COMMANDS, "models", 2) == [b"kept"]
