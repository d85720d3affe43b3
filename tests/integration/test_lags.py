"""How far a service is behind, as its metrics tell while messages wait."""

from __future__ import annotations

from collections.abc import AsyncIterator

import nats
import pytest
from nats.js import JetStreamContext
from prometheus_client import REGISTRY

from deploy.local.stack import Stack
from services.gateway.metrics import log_sampler
from shared.contracts.envelope import new_id
from shared.contracts.subjects import COMMANDS, DEAD, EVENTS
from shared.metrics import consumers_sampler, outbox_sampler, scrape
from shared.outbox import OutboxRow, store
from shared.postgres import connect_pool


@pytest.fixture
async def js(servers: Stack) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(
        servers.installation.nats_url_as("admin"), inbox_prefix=b"_INBOX_admin"
    )
    context = client.jetstream()
    await context.purge_stream(DEAD)
    yield context
    await context.purge_stream(COMMANDS, subject="cmd.models.>")
    await context.purge_stream(DEAD)
    await client.close()


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_messages_that_the_bus_has_not_taken_are_counted_and_their_age(
    servers: Stack,
) -> None:
    pool = await connect_pool(servers.installation.postgres_url("models"), size=2)
    sampler = outbox_sampler("models", pool)
    try:
        await scrape([sampler], {})
        assert shown("darkroom_outbox_unsent", owner="models") == 0
        assert shown("darkroom_outbox_oldest_seconds", owner="models") == 0
        rows = [OutboxRow(new_id(), "evt.models.checkpoint.x", b"{}", None) for _ in range(3)]
        await store(pool, rows)
        await pool.execute(
            """
            UPDATE outbox SET created_at = now() - interval '1 minute'
            WHERE id = (SELECT min(id) FROM outbox WHERE sent_at IS NULL)
            """
        )
        await scrape([sampler], {})
        assert shown("darkroom_outbox_unsent", owner="models") == 3
        assert 60 <= (shown("darkroom_outbox_oldest_seconds", owner="models") or 0) < 90
        await pool.execute("DELETE FROM outbox")
    finally:
        await pool.close()
    await scrape([sampler], {})
    assert shown("darkroom_outbox_unsent", owner="models") is None, "nobody knows"


async def test_messages_that_wait_for_a_consumer_are_counted(js: JetStreamContext) -> None:
    sampler = consumers_sampler(js, [(COMMANDS, "models")])
    labels = {"stream": COMMANDS, "consumer": "models"}
    await js.purge_stream(COMMANDS, subject="cmd.models.>")
    for number in range(5):
        await js.publish(f"cmd.models.wish_{number}.v1", b"{}")
    queue = await js.pull_subscribe_bind("models", COMMANDS)
    (message,) = await queue.fetch(1, timeout=2)
    await scrape([sampler], {})
    assert shown("darkroom_consumer_pending", **labels) == 4
    assert shown("darkroom_consumer_in_hand", **labels) == 1
    await message.ack_sync()
    await scrape([sampler], {})
    assert shown("darkroom_consumer_in_hand", **labels) == 0


async def test_the_gateway_tells_how_far_it_is_behind_and_what_was_given_up(
    js: JetStreamContext,
) -> None:
    last = (await js.publish("evt.models.checkpoint.x", b"{}")).seq
    for subject in ("dead.models", "dead.models", "dead.identity"):
        await js.publish(subject, b"{}")
    await scrape([log_sampler(js, lambda: last - 7)], {})
    assert shown("darkroom_consumer_pending", stream=EVENTS, consumer="gateway") == 7
    assert shown("darkroom_dead_letters_stored", owner="models") == 2
    assert shown("darkroom_dead_letters_stored", owner="identity") == 1
