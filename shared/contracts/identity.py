"""identity: users, roles, permissions, passwords, personal tokens."""

from __future__ import annotations

from datetime import datetime

from shared.contracts.envelope import Command, State

OWNER = "identity"

REJECTIONS = {
    "identity.role_exists": 'role "{role_name}" already exists',
    "identity.role_not_found": 'user roles "{role_name}" not exist',
    "identity.default_role": 'cannot delete default role "{role_name}"',
    "identity.user_exists": 'user "{username}" already exists',
    "identity.user_not_found": 'user: "{username}" not exist',
    "identity.last_administrator": "nobody would be left who may manage users; add one first",
    "identity.token_not_found": 'token "{token_id}" not found',
    "identity.already_initialised": "this deployment already has users; ask one of them for yours",
    "identity.unknown_permission": 'permission "{permission}" is none of: {known}',
}


class CreateRole(Command, frozen=True, kw_only=True):
    role_name: str
    permissions: list[str]
    creator: str
    replace: bool = False
    """Update a role that exists instead of refusing (ESD compatibility profile)."""


class DeleteRoles(Command, frozen=True, kw_only=True):
    role_names: list[str]


class CreateUser(Command, frozen=True, kw_only=True):
    """`password_hash` is an argon2id string: the clear password never reaches the bus."""

    username: str
    password_hash: str
    roles: list[str]
    creator: str
    permissions: list[str] = []
    replace: bool = False
    initial: bool = False
    """Only while there is no user: the first one, with all default roles (ESD profile)."""


class ChangeUser(Command, frozen=True, kw_only=True):
    """What is None stays as it is."""

    username: str
    roles: list[str] | None = None
    permissions: list[str] | None = None
    password_hash: str | None = None


class DeleteUsers(Command, frozen=True, kw_only=True):
    usernames: list[str]


class CreateToken(Command, frozen=True, kw_only=True):
    """`token_hash` is the SHA-256 hex digest of a 256-bit random token."""

    token_id: str
    username: str
    name: str
    token_hash: str
    expires_at: datetime | None = None


class RevokeToken(Command, frozen=True, kw_only=True):
    token_id: str
    username: str


class ResyncIdentity(Command, frozen=True, kw_only=True):
    """Asks for the current state of every aggregate, once more, as `…_synced` events."""


class Role(State, frozen=True, kw_only=True):
    role_name: str
    permissions: list[str]
    creator: str
    is_default: bool
    created_at: datetime


class User(State, frozen=True, kw_only=True):
    """`permissions` are the user's own, beside those of the roles."""

    username: str
    roles: list[str]
    permissions: list[str]
    creator: str
    created_at: datetime


class Credential(State, frozen=True, kw_only=True):
    """Private: its subject is readable by the gateway alone, which verifies passwords with it."""

    username: str
    password_hash: str


class Token(State, frozen=True, kw_only=True):
    token_id: str
    username: str
    name: str
    token_hash: str
    created_at: datetime
    expires_at: datetime | None


class RoleCreated(Role, frozen=True, kw_only=True): ...


class RoleChanged(Role, frozen=True, kw_only=True): ...


class RoleDeleted(Role, frozen=True, kw_only=True): ...


class RoleSynced(Role, frozen=True, kw_only=True): ...


class UserCreated(User, frozen=True, kw_only=True): ...


class UserChanged(User, frozen=True, kw_only=True): ...


class UserDeleted(User, frozen=True, kw_only=True): ...


class UserSynced(User, frozen=True, kw_only=True): ...


class CredentialChanged(Credential, frozen=True, kw_only=True): ...


class CredentialSynced(Credential, frozen=True, kw_only=True): ...


class TokenCreated(Token, frozen=True, kw_only=True): ...


class TokenRevoked(Token, frozen=True, kw_only=True): ...


class TokenSynced(Token, frozen=True, kw_only=True): ...
