"""What the relay does with what it can't send."""

from __future__ import annotations

import asyncio

import nats

from deploy.local.stack import Stack
from shared.outbox import Outbox, OutboxRow, store
from shared.postgres import connect_pool


async def test_a_message_that_is_too_large_does_not_stand_in_the_way_of_others(
    servers: Stack,
) -> None:
    installation = servers.installation
    pool = await connect_pool(installation.postgres_url("identity"), size=2)
    client = await nats.connect(
        installation.nats_url_as("identity"), inbox_prefix=b"_INBOX_identity"
    )
    try:
        rows = [
            OutboxRow("too large", "evt.identity.role.x", b"x" * (client.max_payload + 1), None),
            OutboxRow("with headers", "evt.identity.role.x", b"x" * client.max_payload, None),
            OutboxRow("small", "evt.identity.role.x", b"{}", None),
        ]
        await store(pool, rows)
        await pool.execute("UPDATE outbox SET created_at = now() - interval '1 minute'")
        outbox = Outbox(pool, client)
        relay = asyncio.create_task(outbox.relay(every=0.1))
        async with asyncio.timeout(10):
            while await pool.fetchval("SELECT count(*) FROM outbox WHERE sent_at IS NULL"):
                await asyncio.sleep(0.05)
        relay.cancel()
        async with asyncio.timeout(10):
            await outbox.resend_events(60)
        assert client.stats["reconnects"] == 0
    finally:
        await client.close()
        await pool.close()
