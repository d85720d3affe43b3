"""What happens to a command when things go wrong: on a real nats-server and a real Postgres, with a
real service that fails where the tests want it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.local.stack import Stack
from shared.contracts import envelope as cloud
from shared.contracts import identity
from shared.contracts.envelope import Rejected, new_id
from shared.contracts.identity import CreateRole, RoleCreated
from shared.contracts.subjects import COMMANDS, EVENTS, _commands_consumer
from tests.integration.identity_bus import Bus, Wire

TRIAL = "tests.integration.trial_service"


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
    bus.kill()


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
    bus.kill()


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
    bus.kill()


async def test_a_refusal_is_told_at_once_and_changes_nothing(trial: Bus) -> None:
    kept = role()
    await trial.ask(kept)
    began = time.monotonic()
    names = [kept.role_name, "Designer"]  # of which the second can't be deleted
    await trial.ask(CreateRole(role_name="Designer", permissions=[], creator="x", replace=True))
    await trial.js.publish("cmd.identity.none", b"")  # keeps the connection warm
    connection_row = await trial.row(
        "UPDATE roles SET is_default = true WHERE role_name = 'Designer' RETURNING version"
    )
    assert connection_row
    id_ = await trial.send(identity.DeleteRoles(role_names=names))
    answer = await trial.answer(id_)
    assert isinstance(answer, Rejected)
    assert answer.code == "identity.default_role"
    assert time.monotonic() - began < 2
    row = await trial.row("SELECT version, deleted FROM roles WHERE role_name = $1", names[0])
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
        pauses = [after - before for before, after in zip(times, times[1:], strict=False)]
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
    unknown = replace_type(framed, "identity.dance.v1")
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


def replace_type(envelope: cloud.Envelope, type: str) -> cloud.Envelope:
    import msgspec

    return msgspec.structs.replace(envelope, type=type)
