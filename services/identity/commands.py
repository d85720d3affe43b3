"""One function per command: load, decide, save, emit."""

from __future__ import annotations

from services.identity.domain import (
    DEFAULT_ROLES,
    Role,
    Token,
    User,
    check_an_administrator_stays,
    check_permissions,
    check_roles,
)
from services.identity.store import RoleStore, TokenStore, UserStore, hold_users
from shared.contracts import identity
from shared.errors import Rejected
from shared.logs import get_logger
from shared.unit_of_work import Tx

log = get_logger(__name__)


async def create_role(cmd: identity.CreateRole, tx: Tx) -> None:
    store = RoleStore(tx.conn)
    if cmd.replace:
        await hold_users(tx.conn)
    role = await store.find(cmd.role_name)
    if role and not role.deleted and not cmd.replace:
        raise Rejected("identity.role_exists", role_name=cmd.role_name)
    if role:
        changed = role.change(permissions=cmd.permissions, creator=cmd.creator)
        await store.save(changed)
        if not role.deleted and "user:all" in role.permissions:
            users = await UserStore(tx.conn).list_all()
            check_an_administrator_stays(users, await store.list_all())
        event = identity.RoleCreated if role.deleted else identity.RoleChanged
        tx.emit(event.of(changed))
        return
    role = Role(
        role_name=cmd.role_name,
        permissions=check_permissions(cmd.permissions),
        creator=cmd.creator,
        is_default=False,
        created_at=tx.now,
    )
    await store.save(role)
    tx.emit(identity.RoleCreated.of(role))


async def delete_roles(cmd: identity.DeleteRoles, tx: Tx) -> None:
    """All or none. Whoever holds a deleted role loses it."""
    await hold_users(tx.conn)
    roles, users = RoleStore(tx.conn), UserStore(tx.conn)
    for role_name in dict.fromkeys(cmd.role_names):
        role = await roles.find(role_name)
        if role is None or role.deleted:
            continue
        deleted = role.delete()
        holders = await users.list_with_role(role_name)
        for user in holders:
            changed = user.lose_role(role_name)
            await users.save(changed)
            tx.emit(identity.UserChanged.of(changed))
        await roles.save(deleted)
        tx.emit(identity.RoleDeleted.of(deleted))
    check_an_administrator_stays(await users.list_all(), await roles.list_all())


async def create_user(cmd: identity.CreateUser, tx: Tx) -> None:
    await hold_users(tx.conn)
    roles, users = RoleStore(tx.conn), UserStore(tx.conn)
    if cmd.initial and await users.list_all():
        raise Rejected("identity.already_initialised")
    existing = {role.role_name for role in await roles.list_all()}
    wanted = check_roles(list(DEFAULT_ROLES) if cmd.initial else cmd.roles, existing)
    user = await users.find(cmd.username)
    if user and not user.deleted and not cmd.replace:
        raise Rejected("identity.user_exists", username=cmd.username)
    if user:
        made = user.change(
            password_hash=cmd.password_hash,
            roles=wanted,
            permissions=cmd.permissions,
            creator=cmd.creator,
        )
    else:
        made = User(
            username=cmd.username,
            password_hash=cmd.password_hash,
            roles=wanted,
            permissions=check_permissions(cmd.permissions),
            creator=cmd.creator,
            created_at=tx.now,
        )
    await users.save(made)
    check_an_administrator_stays(await users.list_all(), await roles.list_all())
    tx.emit(identity.CredentialChanged.of(made))
    event = identity.UserChanged if user and not user.deleted else identity.UserCreated
    tx.emit(event.of(made))


async def change_user(cmd: identity.ChangeUser, tx: Tx) -> None:
    await hold_users(tx.conn)
    roles, users = RoleStore(tx.conn), UserStore(tx.conn)
    user = await users.find(cmd.username)
    if user is None or user.deleted:
        raise Rejected("identity.user_not_found", username=cmd.username)
    wanted = user.roles
    if cmd.roles is not None:
        wanted = check_roles(cmd.roles, {role.role_name for role in await roles.list_all()})
    changed = user.change(
        password_hash=cmd.password_hash or user.password_hash,
        roles=wanted,
        permissions=user.permissions if cmd.permissions is None else cmd.permissions,
        creator=user.creator,
    )
    await users.save(changed)
    check_an_administrator_stays(await users.list_all(), await roles.list_all())
    if cmd.password_hash:
        tx.emit(identity.CredentialChanged.of(changed))
    tx.emit(identity.UserChanged.of(changed))


async def delete_users(cmd: identity.DeleteUsers, tx: Tx) -> None:
    """All or none. Their tokens end with them."""
    await hold_users(tx.conn)
    users, tokens = UserStore(tx.conn), TokenStore(tx.conn)
    for username in dict.fromkeys(cmd.usernames):
        user = await users.find(username)
        if user is None or user.deleted:
            continue
        for token in await tokens.list_of(username):
            revoked = token.revoke()
            await tokens.save(revoked)
            tx.emit(identity.TokenRevoked.of(revoked))
        deleted = user.delete()
        await users.save(deleted)
        tx.emit(identity.CredentialChanged.of(deleted))
        tx.emit(identity.UserDeleted.of(deleted))
    check_an_administrator_stays(await users.list_all(), await RoleStore(tx.conn).list_all())


async def create_token(cmd: identity.CreateToken, tx: Tx) -> None:
    await hold_users(tx.conn)
    user = await UserStore(tx.conn).find(cmd.username)
    if user is None or user.deleted:
        raise Rejected("identity.user_not_found", username=cmd.username)
    token = Token(
        token_id=cmd.token_id,
        username=cmd.username,
        name=cmd.name,
        token_hash=cmd.token_hash,
        created_at=tx.now,
        expires_at=cmd.expires_at,
    )
    await TokenStore(tx.conn).save(token)
    tx.emit(identity.TokenCreated.of(token))


async def revoke_token(cmd: identity.RevokeToken, tx: Tx) -> None:
    store = TokenStore(tx.conn)
    token = await store.find(cmd.token_id)
    if token is None or token.username != cmd.username:
        raise Rejected("identity.token_not_found", token_id=cmd.token_id)
    revoked = token.revoke()
    await store.save(revoked)
    tx.emit(identity.TokenRevoked.of(revoked))


async def resync(_: identity.ResyncIdentity, tx: Tx) -> None:
    for role in await RoleStore(tx.conn).list_all(with_deleted=True):
        tx.emit(identity.RoleSynced.of(role))
    for user in await UserStore(tx.conn).list_all(with_deleted=True):
        tx.emit(identity.CredentialSynced.of(user))
        tx.emit(identity.UserSynced.of(user))
    for token in await TokenStore(tx.conn).list_all():
        tx.emit(identity.TokenSynced.of(token))


async def found(username: str, password_hash: str, tx: Tx) -> None:
    """On an empty deployment: the default roles and, if its password is set, the first user."""
    roles, users = RoleStore(tx.conn), UserStore(tx.conn)
    for role_name, permissions in DEFAULT_ROLES.items():
        if await roles.find(role_name) is None:
            role = Role(
                role_name=role_name,
                permissions=permissions,
                creator="darkroom",
                is_default=True,
                created_at=tx.now,
            )
            await roles.save(role)
            tx.emit(identity.RoleCreated.of(role))
    if password_hash and not await users.list_all(with_deleted=True):
        user = User(
            username=username,
            password_hash=password_hash,
            roles=["IT Operator", "byoc"],
            permissions=[],
            creator=username,
            created_at=tx.now,
        )
        await users.save(user)
        tx.emit(identity.CredentialChanged.of(user))
        tx.emit(identity.UserCreated.of(user))
        log.info("first_user_created", username=username)
