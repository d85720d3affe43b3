"""What becomes of what is larger than the bus takes: on a real nats-server that takes little."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client

from deploy.local.stack import Stack
from services.gateway.dispatch import Dispatcher, make_ticket
from services.gateway.errors import ApiError
from services.inference.worker.reports import Reports
from services.inference.worker.settings import Settings
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Envelope, Rejected
from shared.contracts.identity import CreateRole
from shared.contracts.inference import ReportJobFailed, ReportJobSucceeded
from shared.contracts.registry import payload, type_of
from tests.integration.identity_bus import Bus

MOST = 64 * 1024


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nats")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "nats.conf"
    config.write_text(
        f'host: 127.0.0.1\nport: {port}\nmax_payload: {MOST}\njetstream {{ store_dir: "{folder}" }}'
    )
    server = Path(sysconfig.get_path("scripts")) / "nats-server"
    process = subprocess.Popen([server, "-c", config], stderr=subprocess.DEVNULL)
    yield f"nats://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    """With an empty stream of commands."""
    client = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    js = client.jetstream()
    await js.add_stream(name="COMMANDS", subjects=["cmd.>"])
    yield client
    await js.delete_stream("COMMANDS")
    await client.close()


async def commands(client: Client) -> list[Any]:
    js = client.jetstream()
    count = (await js.stream_info("COMMANDS")).state.messages
    messages = [await js.get_msg("COMMANDS", number + 1) for number in range(count)]
    return [payload(cloud.decode(message.data or b"")) for message in messages]


def success(size: int) -> tuple[ReportJobSucceeded, Envelope]:
    """A report whose message has so many bytes at least, and the job's message."""
    report = ReportJobSucceeded(
        job_id="job",
        instance_id="instance",
        attempt=2,
        endpoint_id="endpoint",
        image_names=["image_0.png"],
        info_name="job_param.json",
        warnings=["x" * size],
    )
    return report, cloud.wrap(report, type=type_of(report), source="s", subject="job")


@pytest.mark.parametrize("size", [5_000_000, MOST - 700])
async def test_a_result_that_can_not_be_reported_ends_the_job_with_that_reason(
    client: Client, size: int
) -> None:
    """The second is one that fits but for the headers, for which a server breaks the connection."""
    settings = Settings(
        nats_url="",
        nats_user="",
        nats_password="",
        endpoint_id="endpoint",
        instance_id="instance",
        device="cpu",
        cache="",
    )
    reports = Reports(settings, client, client.jetstream())
    async with asyncio.timeout(10):
        await reports.job(*success(size))
    (failed,) = await commands(client)
    assert isinstance(failed, ReportJobFailed)
    assert (failed.job_id, failed.attempt, failed.endpoint_id) == ("job", 2, "endpoint")
    assert failed.reason.startswith("its result can't be reported: this makes a message of ")
    assert f"the bus takes {MOST}" in failed.reason
    async with asyncio.timeout(10):
        await reports.job(*success(MOST // 2))
    assert isinstance((await commands(client))[-1], ReportJobSucceeded)
    assert client.stats["reconnects"] == 0


async def test_a_command_that_is_too_large_is_refused_at_once(client: Client) -> None:
    pool: Any = None
    dispatcher = Dispatcher(client, client.jetstream(), pool, timeout=10)
    ticket = make_ticket(actor="admin", correlation_id="c", route="r", key=None, body=b"")
    for size in (5_000_000, MOST - 800):
        command = CreateRole(role_name="x" * size, permissions=[], creator="admin")
        with pytest.raises(ApiError) as refusal:
            await dispatcher.send(command, ticket)
        assert refusal.value.status == 413
        assert refusal.value.message.startswith("this makes a message of ")
        assert refusal.value.message.endswith(f"bytes, the bus takes {MOST}; send less")
    assert await commands(client) == []
    assert client.stats["reconnects"] == 0


# With a service and its database, on a bus that takes 8 MB


@pytest.fixture(scope="module")
async def bus(servers: Stack) -> AsyncIterator[Bus]:
    async with Bus(servers).open() as bus:
        await bus.start()
        yield bus
        await bus.stop_idle()


async def test_a_command_whose_event_would_be_too_large_is_rejected_and_does_nothing(
    bus: Bus,
) -> None:
    """Room is left for what later events add."""
    most = bus.client.max_payload
    command = CreateRole(role_name="large", permissions=[], creator="x" * (most - 200_000))
    answer = await bus.ask(command)
    assert isinstance(answer, Rejected)
    assert answer.code == "darkroom.too_large"
    assert f"the bus takes {most}" in answer.message
    assert await bus.row("SELECT version FROM roles WHERE role_name = 'large'") is None
    small = msgspec.structs.replace(command, creator="admin")
    assert not isinstance(await bus.ask(small), Rejected)


async def test_a_dead_message_that_is_too_large_for_its_letter_is_kept_in_part(bus: Bus) -> None:
    """With the reason, and it is not delivered for ever."""
    body = b'{"large and dead": "' + b"\x01" * (bus.client.max_payload - 2000) + b'"}'
    await bus.send_raw("cmd.identity.create_role.v1", body)
    letter = await bus.dead_letter("large and dead")
    assert letter.reason.startswith("no envelope: ")
    assert letter.reason.endswith(f"(of its {len(body)} bytes the first 10000 are here)")
    await bus.until(bus.commands_left, 0, seconds=10)
