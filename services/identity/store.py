"""identity's SQL. A save succeeds only on the version that was read, else it is retried."""

from __future__ import annotations

from typing import Any

from services.identity.domain import Role, Token, User
from shared.errors import Retry


async def hold_users(conn: Any) -> None:
    """Until the transaction ends, no other command decides who is there and what they hold: the
    rules that look at all users (somebody must administrate) see what the one before has done."""
    await conn.execute("SELECT pg_advisory_xact_lock(hashtext('identity.users'))")


class RoleStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, role_name: str) -> Role | None:
        """Also finds deleted ones: a name that comes back goes on counting versions."""
        row = await self._conn.fetchrow(
            """
            SELECT role_name, permissions, creator, is_default, created_at, version, deleted
            FROM roles WHERE role_name = $1
            """,
            role_name,
        )
        return Role(**dict(row)) if row else None

    async def list_all(self, *, with_deleted: bool = False) -> list[Role]:
        rows = await self._conn.fetch(
            """
            SELECT role_name, permissions, creator, is_default, created_at, version, deleted
            FROM roles WHERE $1 OR NOT deleted ORDER BY role_name
            """,
            with_deleted,
        )
        return [Role(**dict(row)) for row in rows]

    async def save(self, role: Role) -> None:
        saved = await self._conn.fetchval(
            """
            INSERT INTO roles
                (role_name, permissions, creator, is_default, created_at, version, deleted)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (role_name) DO UPDATE SET
                permissions = excluded.permissions, creator = excluded.creator,
                version = excluded.version, deleted = excluded.deleted
            WHERE roles.version = excluded.version - 1
            RETURNING true
            """,
            role.role_name,
            role.permissions,
            role.creator,
            role.is_default,
            role.created_at,
            role.version,
            role.deleted,
        )
        if not saved:
            raise Retry(f"role {role.role_name} was changed meanwhile")


class UserStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, username: str) -> User | None:
        """Also finds deleted ones: a name that comes back goes on counting versions."""
        row = await self._conn.fetchrow(
            """
            SELECT username, password_hash, roles, permissions, creator, created_at, version,
                deleted
            FROM users WHERE username = $1
            """,
            username,
        )
        return User(**dict(row)) if row else None

    async def list_all(self, *, with_deleted: bool = False) -> list[User]:
        rows = await self._conn.fetch(
            """
            SELECT username, password_hash, roles, permissions, creator, created_at, version,
                deleted
            FROM users WHERE $1 OR NOT deleted ORDER BY username
            """,
            with_deleted,
        )
        return [User(**dict(row)) for row in rows]

    async def list_with_role(self, role_name: str) -> list[User]:
        rows = await self._conn.fetch(
            """
            SELECT username, password_hash, roles, permissions, creator, created_at, version,
                deleted
            FROM users WHERE NOT deleted AND roles @> ARRAY[$1] ORDER BY username
            """,
            role_name,
        )
        return [User(**dict(row)) for row in rows]

    async def save(self, user: User) -> None:
        saved = await self._conn.fetchval(
            """
            INSERT INTO users
                (username, password_hash, roles, permissions, creator, created_at, version, deleted)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
            ON CONFLICT (username) DO UPDATE SET
                password_hash = excluded.password_hash, roles = excluded.roles,
                permissions = excluded.permissions, creator = excluded.creator,
                version = excluded.version, deleted = excluded.deleted
            WHERE users.version = excluded.version - 1
            RETURNING true
            """,
            user.username,
            user.password_hash,
            user.roles,
            user.permissions,
            user.creator,
            user.created_at,
            user.version,
            user.deleted,
        )
        if not saved:
            raise Retry(f"user {user.username} was changed meanwhile")


class TokenStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, token_id: str) -> Token | None:
        row = await self._conn.fetchrow(
            """
            SELECT token_id, username, name, token_hash, created_at, expires_at, version, deleted
            FROM tokens WHERE token_id = $1 AND NOT deleted
            """,
            token_id,
        )
        return Token(**dict(row)) if row else None

    async def list_of(self, username: str) -> list[Token]:
        rows = await self._conn.fetch(
            """
            SELECT token_id, username, name, token_hash, created_at, expires_at, version, deleted
            FROM tokens WHERE username = $1 AND NOT deleted ORDER BY created_at
            """,
            username,
        )
        return [Token(**dict(row)) for row in rows]

    async def list_all(self) -> list[Token]:
        rows = await self._conn.fetch(
            """
            SELECT token_id, username, name, token_hash, created_at, expires_at, version, deleted
            FROM tokens ORDER BY created_at
            """
        )
        return [Token(**dict(row)) for row in rows]

    async def save(self, token: Token) -> None:
        saved = await self._conn.fetchval(
            """
            INSERT INTO tokens
                (token_id, username, name, token_hash, created_at, expires_at, version, deleted)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
            ON CONFLICT (token_id) DO UPDATE SET
                version = excluded.version, deleted = excluded.deleted
            WHERE tokens.version = excluded.version - 1
            RETURNING true
            """,
            token.token_id,
            token.username,
            token.name,
            token.token_hash,
            token.created_at,
            token.expires_at,
            token.version,
            token.deleted,
        )
        if not saved:
            raise Retry(f"token {token.token_id} was changed meanwhile")
