"""What the streams and the object store hold when everything has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from nats.js import JetStreamContext

from deploy.local.installation import JOBS_BUCKET, Installation
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Message
from shared.contracts.registry import payload
from shared.contracts.subjects import COMMANDS, DEAD, EVENTS, JOBS
from shared.objects import Objects, result_prefix


async def until(
    look: Callable[[], Awaitable[object]], wanted: object, what: str, seconds: float = 20
) -> None:
    deadline = time.monotonic() + seconds
    while (seen := await look()) != wanted:
        assert time.monotonic() < deadline, f"{what}: {seen}, not {wanted}"
        await asyncio.sleep(0.2)


async def until_nothing_waits(js: JetStreamContext) -> None:
    """No command, no job and no dead letter."""
    for stream in (COMMANDS, JOBS, DEAD):
        await until(lambda stream=stream: count(js, stream), 0, f"messages in {stream}")  # type: ignore[misc]


async def count(js: JetStreamContext, stream: str) -> int:
    messages: int = (await js.stream_info(stream)).state.messages
    return messages


async def all_events(js: JetStreamContext) -> AsyncIterator[Message]:
    """In the order of the stream."""
    state = (await js.stream_info(EVENTS)).state
    for seq in range(state.first_seq, state.last_seq + 1):
        stored = await js.get_msg(EVENTS, seq, direct=True)
        yield payload(cloud.decode(stored.data or b""))


async def check_results(installation: Installation, jobs: Iterable[str]) -> None:
    """Each job has left one picture and its params, and nothing else."""
    async with Objects(installation.object_settings("admin")).open() as objects:
        for job_id in jobs:
            prefix = result_prefix(job_id)
            found = await objects.client.list_objects_v2(Bucket=JOBS_BUCKET, Prefix=prefix)
            results = {item["Key"].removeprefix(prefix) for item in found["Contents"]}
            assert results == {"image_0.png", f"{job_id}_param.json"}
