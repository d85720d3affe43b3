"""identity as a process of its own: commands in, events out, rows in a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from deploy.local.stack import Stack
from shared.contracts import identity
from shared.contracts.envelope import Completed, Message, Rejected, State, new_id
from shared.contracts.identity import (
    ChangeUser,
    CreateRole,
    CreateToken,
    CreateUser,
    DeleteRoles,
    DeleteUsers,
    ResyncIdentity,
    RevokeToken,
)
from tests.integration.identity_bus import Bus

HASH = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA"


@pytest.fixture(scope="module")
async def bus(servers: Stack) -> AsyncIterator[Bus]:
    async with Bus(servers).open() as bus:
        await bus.start(admin_user="admin", admin_password_hash=HASH)
        yield bus


def name(kind: str) -> str:
    return f"{kind} {new_id()[:8]}"


def role(role_name: str = "", *permissions: str, **more: Any) -> CreateRole:
    return CreateRole(
        role_name=role_name or name("role"), permissions=list(permissions), creator="admin", **more
    )


def user(username: str = "", *roles: str, **more: Any) -> CreateUser:
    return CreateUser(
        username=username or name("user"),
        password_hash=HASH,
        roles=list(roles),
        creator="admin",
        **more,
    )


def token(username: str) -> CreateToken:
    return CreateToken(token_id=new_id(), username=username, name="ci", token_hash=new_id())


async def events(bus: Bus, command: Any) -> list[Message]:
    """All that a command led to."""
    id_ = await bus.send(command)
    await bus.answer(id_)
    return [message for _, message in bus.caused_by(id_)]


async def has_row(bus: Bus, table: str, column: str, value: str) -> bool:
    query = f"SELECT deleted FROM {table} WHERE {column} = $1"
    row = await bus.row(query, value)
    return bool(row) and not row["deleted"]


async def test_an_empty_deployment_gets_its_roles_and_its_first_user(bus: Bus) -> None:
    await bus.until(lambda: has_row(bus, "users", "username", "admin"), True)
    row = await bus.row("SELECT roles FROM users WHERE username = 'admin'")
    assert "IT Operator" in row["roles"]
    defaults = await bus.row("SELECT count(*) AS n FROM roles WHERE is_default AND NOT deleted")
    assert defaults["n"] >= 3
    await bus.start(admin_user="other", admin_password_hash=HASH)  # not empty any more
    assert not await has_row(bus, "users", "username", "other")


async def test_a_role_from_its_making_to_its_end(bus: Bus) -> None:
    first = role("", "role:list", "checkpoint:all", "role:list")
    (made,) = await events(bus, first)
    assert isinstance(made, identity.RoleCreated)
    assert made.permissions == ["checkpoint:all", "role:list"]
    assert (made.version, made.creator, made.is_default) == (1, "admin", False)
    assert await bus.refused(role(first.role_name)) == "identity.role_exists"
    (changed,) = await events(bus, role(first.role_name, "user:list", replace=True))
    assert isinstance(changed, identity.RoleChanged)
    assert (changed.version, changed.created_at) == (2, made.created_at)
    (deleted,) = await events(bus, DeleteRoles(role_names=[first.role_name, first.role_name]))
    assert isinstance(deleted, identity.RoleDeleted)
    assert (deleted.version, deleted.deleted) == (3, True)
    (again,) = await events(bus, role(first.role_name, "role:list"))
    assert isinstance(again, identity.RoleCreated)
    assert (again.version, again.deleted, again.permissions) == (4, False, ["role:list"])


async def test_what_is_not_there_is_deleted_without_a_word(bus: Bus) -> None:
    assert [type(m) for m in await events(bus, DeleteRoles(role_names=["no such"]))] == [Completed]
    assert [type(m) for m in await events(bus, DeleteUsers(usernames=["no such"]))] == [Completed]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (role("", "role:destroy"), "identity.unknown_permission"),
        (role("Designer"), "identity.role_exists"),
        (DeleteRoles(role_names=["Designer"]), "identity.default_role"),
        (user("", "no such role"), "identity.role_not_found"),
        (user("", permissions=["x:y"]), "identity.unknown_permission"),
        (user("admin"), "identity.user_exists"),
        (user("", initial=True), "identity.already_initialised"),
        (DeleteUsers(usernames=["admin"]), "identity.last_administrator"),
        (ChangeUser(username="admin", roles=["Designer"]), "identity.last_administrator"),
        (ChangeUser(username="admin", roles=["no such role"]), "identity.role_not_found"),
        (ChangeUser(username="admin", permissions=["x:y"]), "identity.unknown_permission"),
        (ChangeUser(username="no such user"), "identity.user_not_found"),
        (user("admin", "Designer", replace=True), "identity.last_administrator"),
        (role("IT Operator", "role:all", replace=True), "identity.last_administrator"),
        (token("no such user"), "identity.user_not_found"),
        (RevokeToken(token_id="no such", username="admin"), "identity.token_not_found"),
    ],
)
async def test_what_is_refused(bus: Bus, command: Any, code: str) -> None:
    assert await bus.refused(command) == code


async def test_a_user_is_changed_in_what_is_named_and_no_more(bus: Bus) -> None:
    command = user("", "Designer", permissions=["train:all"])
    await events(bus, command)
    (changed,) = await events(bus, ChangeUser(username=command.username, roles=["byoc"]))
    assert isinstance(changed, identity.UserChanged)
    assert (changed.roles, changed.permissions, changed.version) == (["byoc"], ["train:all"], 2)
    change = ChangeUser(username=command.username, permissions=[], password_hash="another")
    credential, again = await events(bus, change)
    assert isinstance(credential, identity.CredentialChanged)
    assert credential.password_hash == "another"
    assert isinstance(again, identity.UserChanged)
    assert (again.roles, again.permissions, again.version) == (["byoc"], [], 3)


async def test_a_user_is_told_with_a_credential_that_ends_with_them(bus: Bus) -> None:
    command = user("", "Designer")
    credential, made = await events(bus, command)
    assert isinstance(credential, identity.CredentialChanged)
    assert isinstance(made, identity.UserCreated)
    assert (credential.password_hash, made.roles, made.version) == (HASH, ["Designer"], 1)
    credential, deleted = await events(bus, DeleteUsers(usernames=[command.username]))
    assert isinstance(credential, identity.CredentialChanged)
    assert isinstance(deleted, identity.UserDeleted)
    assert (credential.password_hash, credential.deleted) == ("", True)
    row = await bus.row("SELECT password_hash FROM users WHERE username = $1", command.username)
    assert row["password_hash"] == ""
    credential, again = await events(bus, user(command.username, "byoc"))
    assert isinstance(again, identity.UserCreated)
    assert isinstance(credential, identity.CredentialChanged)
    assert (again.version, credential.version, again.roles) == (3, 3, ["byoc"])


async def test_whoever_holds_a_deleted_role_loses_it(bus: Bus) -> None:
    lost, kept = role(), role()
    await bus.ask(lost)
    await bus.ask(kept)
    holders = [user("", kept.role_name, lost.role_name) for _ in range(3)]
    other = user("", kept.role_name)
    for command in (*holders, other):
        await bus.ask(command)
    told = await events(bus, DeleteRoles(role_names=[lost.role_name]))
    changed = [m for m in told if isinstance(m, identity.UserChanged)]
    assert {m.username for m in changed} == {h.username for h in holders}
    assert all(m.roles == [kept.role_name] and m.version == 2 for m in changed)
    assert isinstance(told[-1], identity.RoleDeleted)


async def test_tokens_end_with_their_user_and_do_not_come_back(bus: Bus) -> None:
    owner, other = user(), user()
    await bus.ask(owner)
    await bus.ask(other)
    mine = [token(owner.username) for _ in range(2)]
    for command in (*mine, token(other.username)):
        assert isinstance(await bus.ask(command), identity.TokenCreated)
    wrong = RevokeToken(token_id=mine[0].token_id, username=other.username)
    assert await bus.refused(wrong) == "identity.token_not_found"
    right = RevokeToken(token_id=mine[0].token_id, username=owner.username)
    assert isinstance(await bus.ask(right), identity.TokenRevoked)
    assert await bus.refused(right) == "identity.token_not_found"
    told = await events(bus, DeleteUsers(usernames=[owner.username]))
    revoked = [m for m in told if isinstance(m, identity.TokenRevoked)]
    assert [(m.token_id, m.deleted) for m in revoked] == [(mine[1].token_id, True)]
    assert isinstance(told[-1], identity.UserDeleted)
    await bus.ask(user(owner.username))
    left = await bus.row(
        "SELECT count(*) AS n FROM tokens WHERE username = $1 AND NOT deleted", owner.username
    )
    assert left["n"] == 0


async def test_of_many_who_create_one_name_at_once_one_wins(bus: Bus) -> None:
    for make in (role, user):
        wanted = name("wanted")
        ids = await asyncio.gather(*(bus.send(make(wanted)) for _ in range(12)))
        answers = [await bus.answer(id_) for id_ in ids]
        won = [a for a in answers if isinstance(a, State)]
        lost = [a.code for a in answers if isinstance(a, Rejected)]
        assert len(won) == 1
        assert won[0].version == 1
        assert set(lost) <= {"identity.role_exists", "identity.user_exists"}
        assert len(lost) == 11


async def test_two_administrators_can_not_delete_each_other_at_once(bus: Bus) -> None:
    """Else nobody would be left who may manage users."""
    for _ in range(5):
        pair = [user("", "IT Operator"), user("", "IT Operator")]
        for command in pair:
            await bus.ask(command)
        everybody_else = await administrators(bus) - {command.username for command in pair}
        for username in everybody_else - {"admin"}:
            await bus.ask(DeleteUsers(usernames=[username]))
        deletions = [DeleteUsers(usernames=[n]) for n in ("admin", *(c.username for c in pair))]
        ids = await asyncio.gather(*(bus.send(deletion) for deletion in deletions))
        answers = [await bus.answer(id_) for id_ in ids]
        assert [a.code for a in answers if isinstance(a, Rejected)] == [
            "identity.last_administrator"
        ]
        assert len(await administrators(bus)) == 1
        await bus.ask(user("admin", "IT Operator", "byoc", replace=True))


async def administrators(bus: Bus) -> set[str]:
    row = await bus.row(
        "SELECT array_agg(username) AS names FROM users"
        " WHERE NOT deleted AND 'IT Operator' = ANY(roles)"
    )
    return set(row["names"])


async def test_a_resync_tells_the_state_of_everything_once_more(bus: Bus) -> None:
    kept, gone, owner = role(), role(), user()
    for command in (kept, gone, owner, made := token(owner.username)):
        await bus.ask(command)
    await bus.ask(DeleteRoles(role_names=[gone.role_name]))
    told = await events(bus, ResyncIdentity())
    synced = {(type(m).__name__, _id(m)): m for m in told if isinstance(m, State)}
    assert len(synced) == len(told)
    for kind, id_, version, deleted in (
        ("RoleSynced", kept.role_name, 1, False),
        ("RoleSynced", gone.role_name, 2, True),
        ("UserSynced", owner.username, 1, False),
        ("CredentialSynced", owner.username, 1, False),
        ("TokenSynced", made.token_id, 1, False),
    ):
        state = synced[kind, id_]
        assert (state.version, state.deleted) == (version, deleted)
    assert isinstance(synced["RoleSynced", kept.role_name], identity.Role)
    row = await bus.row("SELECT created_at FROM roles WHERE role_name = $1", kept.role_name)
    assert row["created_at"] < datetime.now(UTC)


def _id(message: State) -> str:
    if isinstance(message, identity.Role):
        return message.role_name
    if isinstance(message, identity.Token):
        return message.token_id
    assert isinstance(message, identity.User | identity.Credential)
    return message.username
