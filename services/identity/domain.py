"""What a role, a user and a personal token are, and what may be done with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

import msgspec
from msgspec.structs import replace

from shared.errors import Rejected

RESOURCES = ("train", "checkpoint", "inference", "sagemaker_endpoint", "user", "role")
ACTIONS = ("all", "create", "list")
PERMISSIONS = tuple(f"{resource}:{action}" for resource in RESOURCES for action in ACTIONS)

DEFAULT_ROLES: dict[str, list[str]] = {
    "IT Operator": [f"{resource}:all" for resource in RESOURCES],
    "Designer": [
        "train:all",
        "checkpoint:all",
        "inference:all",
        "sagemaker_endpoint:list",
        "user:list",
        "role:list",
    ],
    "byoc": ["checkpoint:list", "inference:all", "sagemaker_endpoint:all", "role:list"],
}


class Role(msgspec.Struct, frozen=True, kw_only=True):
    role_name: str
    permissions: list[str]
    creator: str
    is_default: bool
    created_at: datetime
    version: int = 1
    deleted: bool = False

    def change(self, *, permissions: list[str], creator: str) -> Role:
        return replace(
            self,
            permissions=check_permissions(permissions),
            creator=creator,
            deleted=False,
            version=self.version + 1,
        )

    def delete(self) -> Role:
        if self.is_default:
            raise Rejected("identity.default_role", role_name=self.role_name)
        return replace(self, deleted=True, version=self.version + 1)


class User(msgspec.Struct, frozen=True, kw_only=True):
    """`password_hash` is argon2id; empty once the user is deleted."""

    username: str
    password_hash: str
    roles: list[str]
    permissions: list[str]
    creator: str
    created_at: datetime
    version: int = 1
    deleted: bool = False

    def change(
        self, *, password_hash: str, roles: list[str], permissions: list[str], creator: str
    ) -> User:
        return replace(
            self,
            password_hash=password_hash,
            roles=roles,
            permissions=check_permissions(permissions),
            creator=creator,
            deleted=False,
            version=self.version + 1,
        )

    def lose_role(self, role_name: str) -> User:
        roles = [role for role in self.roles if role != role_name]
        return replace(self, roles=roles, version=self.version + 1)

    def delete(self) -> User:
        return replace(self, deleted=True, password_hash="", version=self.version + 1)


class Token(msgspec.Struct, frozen=True, kw_only=True):
    token_id: str
    username: str
    name: str
    token_hash: str
    created_at: datetime
    expires_at: datetime | None
    version: int = 1
    deleted: bool = False

    def revoke(self) -> Token:
        return replace(self, deleted=True, version=self.version + 1)


def check_permissions(permissions: list[str]) -> list[str]:
    """Sorted and without doubles. Raises Rejected for one that does not exist."""
    for permission in permissions:
        if permission not in PERMISSIONS:
            raise Rejected(
                "identity.unknown_permission",
                permission=permission,
                known=", ".join(PERMISSIONS),
            )
    return sorted(set(permissions))


def check_roles(wanted: Iterable[str], existing: Collection[str]) -> list[str]:
    """In the order given, without doubles. Raises Rejected for one that does not exist."""
    roles = list(dict.fromkeys(wanted))
    for role in roles:
        if role not in existing:
            raise Rejected("identity.role_not_found", role_name=role)
    return roles


def check_an_administrator_stays(users: Iterable[User], roles: Iterable[Role]) -> None:
    """Of those who would be left, somebody must be able to let others in."""
    managing = {role.role_name for role in roles if "user:all" in role.permissions}
    if not any(managing.intersection(u.roles) or "user:all" in u.permissions for u in users):
        raise Rejected("identity.last_administrator")
