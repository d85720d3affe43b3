from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.identity.domain import (
    DEFAULT_ROLES,
    PERMISSIONS,
    Role,
    Token,
    User,
    check_an_administrator_stays,
    check_permissions,
    check_roles,
)
from shared.errors import Rejected

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def role(name: str = "painter", *permissions: str, is_default: bool = False) -> Role:
    return Role(
        role_name=name,
        permissions=list(permissions),
        creator="admin",
        is_default=is_default,
        created_at=NOW,
    )


def user(*roles: str, permissions: tuple[str, ...] = ()) -> User:
    return User(
        username="alice",
        password_hash="$argon2id$…",
        roles=list(roles),
        permissions=list(permissions),
        creator="admin",
        created_at=NOW,
    )


def refusal(code: str) -> pytest.RaisesExc[Rejected]:
    return pytest.raises(Rejected, match=code)


def test_a_name_that_comes_back_goes_on_counting_versions() -> None:
    deleted = role().delete()
    again = deleted.change(permissions=["role:list"], creator="bob")
    assert (deleted.version, deleted.deleted) == (2, True)
    assert (again.version, again.deleted, again.creator) == (3, False, "bob")


def test_a_default_role_stays() -> None:
    with refusal("identity.default_role"):
        role("Designer", is_default=True).delete()


def test_a_deleted_user_leaves_no_password_behind() -> None:
    deleted = user("painter").delete()
    assert deleted.password_hash == ""
    assert deleted.deleted


def test_losing_a_role_keeps_the_others() -> None:
    assert user("a", "b", "c").lose_role("b").roles == ["a", "c"]


def test_a_revoked_token_is_a_new_version() -> None:
    token = Token(
        token_id="t",
        username="alice",
        name="ci",
        token_hash="0",
        created_at=NOW,
        expires_at=None,
    )
    assert (token.revoke().version, token.revoke().deleted) == (2, True)


def test_permissions_are_those_that_exist_once_each() -> None:
    assert check_permissions(["role:list", "checkpoint:all", "role:list"]) == [
        "checkpoint:all",
        "role:list",
    ]
    for wrong in ("role:delete", "role", "*", "ROLE:ALL", ""):
        with refusal("identity.unknown_permission"):
            check_permissions([wrong])


def test_roles_are_those_that_exist_in_the_order_given() -> None:
    assert check_roles(["b", "a", "b"], {"a", "b", "c"}) == ["b", "a"]
    with refusal("identity.role_not_found"):
        check_roles(["a", "no"], {"a"})


def test_somebody_must_be_able_to_let_others_in() -> None:
    managers, painters = role("managers", "user:all"), role("painters", "user:list")
    both = [managers, painters]
    check_an_administrator_stays([user("painters"), user("managers")], both)
    check_an_administrator_stays([user(permissions=("user:all",))], [])
    for left in ([], [user("painters")], [user("gone")]):
        with refusal("identity.last_administrator"):
            check_an_administrator_stays(left, both)
    with refusal("identity.last_administrator"):
        check_an_administrator_stays([user("managers")], [painters])


def test_the_default_roles_hold_only_permissions_that_exist() -> None:
    given = {permission for held in DEFAULT_ROLES.values() for permission in held}
    assert given <= set(PERMISSIONS)
    assert set(DEFAULT_ROLES) == {"IT Operator", "Designer", "byoc"}
