"""What happens to a command when things go wrong: on a real nats-server and a real Postgres, with a
real service that fails where the tests want it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.local.stack import Stack
from shared.contracts import envelope as cloud
from shared.contracts import identity
from shared.contracts.envelope import Rejected, new_id
from shared.contracts.identity import CreateRole, RoleCreated
from shared.contracts.subjects import COMMANDS, CONSUMERS, EVENTS
from tests.integration.identity_bus import Bus, Wire

TRIAL = "tests.integration.trial_service"
CONSUMER = next(c for stream, c in CONSUMERS if stream == COMMANDS and c.durable_name == "identity")


@pytest.fixture(scope="module")
async def bus(servers: Stack) -> AsyncIterator[Bus]:
    async with Bus(servers).open() as bus:
        yield bus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def trial(bus: Bus, folder: Path) -> AsyncIterator[Bus]:
    await bus.start(TRIAL, trial_folder=folder)
    yield bus
    await bus.stop_idle()


def role(name: str = "", **more: Any) -> CreateRole:
    return CreateRole(
        role_name=f"{name} {new_id()[:8]}".strip(), permissions=[], creator="admin", **more
    )


def runs(folder: Path, command: CreateRole) -> list[float]:
    """When the handler of a command was run."""
    file = folder / command.role_name
    return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


async def version(bus: Bus, command: CreateRole) -> int | None:
    row = await bus.row("SELECT version FROM roles WHERE role_name = $1", command.role_name)
    return row["version"] if row else None


async def test_a_command_delivered_many_times_has_one_effect(trial: Bus, folder: Path) -> None:
    command = role(replace=True)  # a second effect would be a second version
    id_ = new_id()
    await asyncio.gather(*(trial.send(command, id=id_) for _ in range(8)))
    assert isinstance(await trial.answer(id_), RoleCreated)
    await trial.send(command, id=id_)
    await trial.until(trial.commands_left, 0)
    await trial.catch_up()
    assert await version(trial, command) == 1
    assert len(trial.caused_by(id_)) == 1
    assert len(runs(folder, command)) == 1


async def test_a_repeated_command_is_answered_again_when_its_answer_was_lost(trial: Bus) -> None:
    command, refused = role(), CreateRole(role_name="x", permissions=["no:such"], creator="x")
    first, second = await trial.send(command), await trial.send(refused)
    await trial.answer(first)
    await trial.answer(second)
    await trial.js.purge_stream(EVENTS)
    trial.stack.kill("nats")  # which forgets what it has seen, as after a power cut
    trial.events.clear()
    await trial.send(command, id=first)
    await trial.send(refused, id=second)
    assert isinstance(await trial.answer(first), RoleCreated)
    answer = await trial.answer(second)
    assert isinstance(answer, Rejected)
    assert answer.code == "identity.unknown_permission"


async def test_what_a_crash_left_unsent_is_sent_by_the_relay(bus: Bus, folder: Path) -> None:
    command = role("unsent")
    await bus.start(TRIAL, trial_folder=folder)
    id_ = await bus.send(command)
    assert bus.process
    await asyncio.to_thread(bus.process.wait, 20)
    assert await version(bus, command) == 1
    await bus.catch_up()
    assert not bus.caused_by(id_)
    await bus.start()
    assert isinstance(await bus.answer(id_, seconds=5), RoleCreated)
    assert len(runs(folder, command)) == 1
    await bus.stop_idle()


async def test_the_events_of_a_transaction_keep_their_order(bus: Bus, folder: Path) -> None:
    """Also when the bus went away between two of them."""
    for publishes in (1000, 4):
        await bus.start(TRIAL, trial_folder=folder, publishes=publishes)
        id_ = await bus.send(role("emits 9"))
        await bus.answer(id_)
        await asyncio.sleep(1.5)  # would a second sending come?
        await bus.catch_up()
        events = bus.caused_by(id_)
        assert [m.version for _, m in events if isinstance(m, identity.Role)] == list(range(1, 11))
        assert [e.answers for e, _ in events] == [None] * 9 + [id_]
        await bus.stop_idle()


async def test_a_refusal_is_told_at_once_and_changes_nothing(trial: Bus) -> None:
    kept, default = role(), role()
    await trial.ask(kept)
    await trial.ask(default)
    await trial.row(
        "UPDATE roles SET is_default = true WHERE role_name = $1 RETURNING 1", default.role_name
    )
    began = time.monotonic()
    id_ = await trial.send(identity.DeleteRoles(role_names=[kept.role_name, default.role_name]))
    answer = await trial.answer(id_)
    assert time.monotonic() - began < 2
    assert isinstance(answer, Rejected)
    assert answer.code == "identity.default_role"
    row = await trial.row("SELECT version, deleted FROM roles WHERE role_name = $1", kept.role_name)
    assert (row["version"], row["deleted"]) == (1, False)
    assert [type(m) for _, m in trial.caused_by(id_)] == [Rejected]


async def test_a_failing_handler_is_tried_again_after_growing_pauses(
    trial: Bus, folder: Path
) -> None:
    for name in ("fails 3", "retries 3"):
        command = role(name)
        id_ = await trial.send(command)
        assert isinstance(await trial.answer(id_), RoleCreated)
        times = runs(folder, command)
        pauses = [after - before for before, after in pairwise(times)]
        assert len(times) == 4
        assert pauses == sorted(pauses)
        assert pauses[2] > 0.6


async def test_what_fails_for_good_becomes_a_dead_letter_and_the_caller_is_told(
    trial: Bus, folder: Path
) -> None:
    command = role("fails 99")
    id_ = await trial.send(command)
    answer = await trial.answer(id_)
    assert isinstance(answer, Rejected)
    assert answer.code == "darkroom.failed"
    assert "a bug" not in answer.message
    letter = await trial.dead_letter(id_)
    assert letter.attempts == 6
    assert "RuntimeError('a bug')" in letter.reason
    assert command.role_name in bytes(letter.envelope).decode()
    assert len(runs(folder, command)) == 6
    assert await version(trial, command) is None
    await trial.until(trial.commands_left, 0)
    await trial.send(command, id=id_)  # and it stays refused
    await trial.until(trial.commands_left, 0)
    assert len(runs(folder, command)) == 6


async def test_what_is_no_command_becomes_a_dead_letter_at_once(trial: Bus) -> None:
    framed = cloud.wrap(role(), type="identity.create_role.v1", source="x", subject="x")
    unknown = msgspec.structs.replace(framed, type="identity.dance.v1")
    bad = cloud.wrap(role(), type="identity.delete_users.v1", source="x", subject="x")
    bodies = [
        (b"\x00\xff not json", "no envelope"),
        (b'{"id": "half-an-envelope"}', "no envelope"),
        (cloud.encode(unknown), "unknown type identity.dance.v1"),
        (cloud.encode(bad), "bad payload"),
    ]
    before = len(await trial.dead_letters())
    for body, _ in bodies:
        await trial.send_raw("cmd.identity.create_role.v1", body)
    await trial.until(trial.commands_left, 0, seconds=5)
    reasons = [letter.reason for letter in await trial.dead_letters()][before:]
    for _, reason in bodies:
        assert any(reason in given for given in reasons), reasons
    assert len(reasons) == len(bodies)
    for envelope in (unknown, bad):
        answer = await trial.answer(envelope.id, seconds=5)
        assert isinstance(answer, Rejected)
        assert answer.code == "darkroom.failed"
    assert isinstance(await trial.ask(role()), RoleCreated)


async def test_what_kills_its_process_each_time_becomes_a_dead_letter(
    bus: Bus, folder: Path
) -> None:
    await bus.js.add_consumer(COMMANDS, replace(CONSUMER, ack_wait=1.0))
    poison, others = role("dies 99"), [role() for _ in range(20)]
    id_ = await bus.send(poison)
    ids = [await bus.send(command) for command in others]
    lives = 0
    try:
        while not (answers := await bus.answers(id_)):
            if bus.process is None or bus.process.poll() is not None:
                await bus.start(TRIAL, trial_folder=folder, wait=False)
                lives += 1
            await asyncio.sleep(0.1)
    finally:
        await bus.js.add_consumer(COMMANDS, CONSUMER)
    assert [type(answer) for answer in answers] == [Rejected]
    assert lives == 7
    assert (await bus.dead_letter(id_)).attempts == 6
    assert len(runs(folder, poison)) == 6
    for other, other_id in zip(others, ids, strict=True):
        assert isinstance(await bus.answer(other_id), RoleCreated)
        assert await version(bus, other) == 1
    await bus.stop_idle()


async def test_a_slow_command_does_not_hold_up_the_others(trial: Bus, folder: Path) -> None:
    """Nor is it delivered again while it goes on."""
    slow = role("sleeps 7")
    id_ = await trial.send(slow)
    began = time.monotonic()
    for _ in range(5):
        await trial.ask(role())
    assert time.monotonic() - began < 3
    assert isinstance(await trial.answer(id_), RoleCreated)
    assert len(runs(folder, slow)) == 1


async def test_a_polite_stop_finishes_what_is_in_hand(bus: Bus, folder: Path) -> None:
    await bus.start(TRIAL, trial_folder=folder)
    slow = role("sleeps 2")
    ids = [await bus.send(slow), *[await bus.send(role()) for _ in range(40)]]
    await asyncio.sleep(0.3)
    began = time.monotonic()
    assert await bus.terminate() == 0
    assert time.monotonic() - began < 8
    await bus.start(TRIAL, trial_folder=folder)
    for id_ in ids:
        assert isinstance(await bus.answer(id_, seconds=8), RoleCreated)
    assert len(runs(folder, slow)) == 1
    await bus.stop_idle()


async def test_a_service_outlasts_its_database(bus: Bus, folder: Path) -> None:
    """What comes while Postgres is away is done when it is back, and waiting is no attempt."""
    wire = Wire(bus.installation.ports["postgres"])
    await wire.mend()
    await bus.start(TRIAL, trial_folder=folder, postgres_url=through(wire, bus))
    slow = role("sleeps 1")
    ids = [await bus.send(slow)]
    await asyncio.sleep(0.5)
    await wire.cut()  # in the middle of a transaction
    ids += [await bus.send(role()) for _ in range(20)]
    await bus.until(lambda: bus.status("/readyz"), 503)
    assert await bus.status("/healthz") == 200
    await asyncio.sleep(6)
    await wire.mend()
    for id_ in ids:
        assert isinstance(await bus.answer(id_, seconds=10), RoleCreated)
    await bus.until(lambda: bus.status("/readyz"), 200)
    assert len(runs(folder, slow)) == 2
    assert await version(bus, slow) == 1
    assert not [
        x for x in await bus.dead_letters() if any(i in str(bytes(x.envelope)) for i in ids)
    ]
    await bus.stop_idle()
    await wire.cut()


@pytest.mark.parametrize("how", ["killed", "restarted"])
async def test_a_service_outlasts_its_servers(trial: Bus, how: str) -> None:
    """While a stream of commands goes on: each is done once, and the pause is short."""
    sent: dict[str, CreateRole] = {}
    enough = asyncio.Event()

    async def send_on() -> None:
        while not enough.is_set():
            command = role()
            sent[await trial.send(command)] = command
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(send_on())
    for server in ("nats", "postgres"):
        await asyncio.sleep(1)
        if how == "killed":
            old = trial.stack.kill(server)
            await asyncio.to_thread(trial.stack.wait_ready, server, other_than=old)
        else:
            await asyncio.to_thread(trial.stack.restart, server)
        began = time.monotonic()
        await trial.ask(role(), seconds=8)
        print(f"{server} {how}: the next answer after {time.monotonic() - began:.1f} s")
    enough.set()
    await sending
    for id_, command in sent.items():
        assert isinstance(await trial.answer(id_), RoleCreated)
        assert await version(trial, command) == 1
    assert len(sent) > 20


async def test_a_service_may_start_before_its_servers(bus: Bus) -> None:
    database = Wire(bus.installation.ports["postgres"])
    broker = Wire(bus.installation.ports["nats"])
    for wire in (database, broker):
        await wire.mend()  # for its port
        await wire.cut()
    nats_url = f"nats://127.0.0.1:{broker.port}"
    await bus.start(wait=False, postgres_url=through(database, bus), nats_url=nats_url)
    await bus.until(lambda: bus.status("/healthz"), 200)
    assert await bus.status("/readyz") == 503
    await database.mend()
    await asyncio.sleep(1)
    assert await bus.status("/readyz") == 503
    await broker.mend()
    await bus.until(lambda: bus.status("/readyz"), 200)
    assert isinstance(await bus.ask(role()), RoleCreated)
    await bus.stop_idle()
    await database.cut()
    await broker.cut()


async def test_a_service_that_waits_can_be_stopped(bus: Bus) -> None:
    wire = Wire(bus.installation.ports["nats"])
    await wire.mend()
    await wire.cut()
    await bus.start(wait=False, nats_url=f"nats://127.0.0.1:{wire.port}")
    await bus.until(lambda: bus.status("/healthz"), 200)
    assert await bus.terminate() == 0


def through(wire: Wire, bus: Bus) -> str:
    port = bus.installation.ports["postgres"]
    return bus.installation.postgres_url("identity").replace(f":{port}/", f":{wire.port}/")
