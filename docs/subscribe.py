"""Follows the jobs of a Darkroom from outside, and goes on where it was after a restart.

    pip install nats-py
    DARKROOM_NATS_URL=nats://subscriber:…@127.0.0.1:4222 python subscribe.py my-dashboard
    DARKROOM_NATS_URL=… python subscribe.py --live

With a name, NATS remembers which events this program has acknowledged: what happens while it is
away is told when it is back, for as long as events are kept (14 days). Several programs with one
name share the events. With --live nothing is remembered: from now on, in order, with the progress
of each step. docs/events.md lists all messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from urllib.parse import urlsplit

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

STREAM = "EVENTS"
JOBS = "evt.inference.job.*"
FORGET_AFTER = 7 * 86_400.0
"""Seconds without a sign of this program after which NATS forgets its place."""


async def connect(url: str) -> Client:
    """Reconnects for ever. A NATS user may only be answered in an inbox of its own."""

    async def on_error(error: Exception) -> None:
        print(f"nats: {error!r}", file=sys.stderr)

    user = urlsplit(url).username or ""
    return await nats.connect(
        url,
        inbox_prefix=f"_INBOX_{user}".encode(),
        max_reconnect_attempts=-1,
        error_cb=on_error,
    )


async def follow(client: Client, name: str) -> None:
    """Every event once the one before it was dealt with; acknowledged means: never told again."""
    stream = client.jetstream()
    place = ConsumerConfig(
        name=name,
        durable_name=name,
        filter_subject="evt.inference.job.>",
        ack_policy=AckPolicy.EXPLICIT,
        deliver_policy=DeliverPolicy.ALL,
        inactive_threshold=FORGET_AFTER,
    )
    await stream.add_consumer(STREAM, place)  # changes nothing if it is there
    mine = await stream.pull_subscribe_bind(name, STREAM)
    versions: dict[str, int] = {}
    while True:
        try:
            (message,) = await mine.fetch(1, timeout=5)
        except (TimeoutError, nats.errors.Error):  # nothing new, or NATS restarts
            continue
        event = json.loads(message.data)
        job = event["data"]
        # Delivery is at least once: what is not newer was told before.
        if job["version"] > versions.get(job["job_id"], 0):
            versions[job["job_id"]] = job["version"]
            tell(event)
        await message.ack()


async def follow_live(client: Client) -> None:
    """What happens from now on: events and steps. Nothing is stored for this program."""

    async def hear(message: Msg) -> None:
        tell(json.loads(message.data))

    for subject in (JOBS, "progress.*"):
        await client.subscribe(subject, cb=hear)
    await asyncio.Event().wait()


def tell(event: dict) -> None:
    """One line for each event. Messages that are new to this program are passed over."""
    data = event["data"]
    match event["type"].split(".")[1]:
        case "job_progress":
            text = f"step {data['step']} of {data['steps']}"
        case "job_started":
            text = f"waits for {data['endpoint_name']}"
        case "job_taken":
            text = f"attempt {data['attempt']}"
        case "job_succeeded":
            text = f"{len(data['image_names'])} pictures"
        case "job_failed" | "job_cancelled":
            text = data["reason"]
        case "job_created" | "job_deleted":
            text = data["task_type"]
        case _:
            return
    print(event["time"], event["type"], event["subject"], text, flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="letters, digits, - and _")
    parser.add_argument("--live", action="store_true")
    options = parser.parse_args()
    if bool(options.name) == options.live:
        parser.error("give a name, or --live")
    client = await connect(os.environ["DARKROOM_NATS_URL"])
    await (follow_live(client) if options.live else follow(client, options.name))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
