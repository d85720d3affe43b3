"""Which object has the bytes of which content, and which objects nobody needs any more.

Who changes one of these tables, or relies on what they say until the commit, holds their lock."""

from __future__ import annotations

from typing import Any

from services.models.domain import Checkpoint
from shared.contracts.models import CheckpointFile
from shared.objects import checkpoint_prefix


class ContentStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def _lock(self) -> None:
        await self._conn.execute("SELECT pg_advisory_xact_lock(hashtext('models.contents'))")

    async def claim(self, file: CheckpointFile) -> str:
        """The key under which its content lies: its own, or that of the first who had it."""
        await self._lock()
        key: str = await self._conn.fetchval(
            """
            INSERT INTO contents (sha256, key, size) VALUES ($1, $2, $3)
            ON CONFLICT (sha256) DO UPDATE SET key = contents.key
            RETURNING key
            """,
            file.sha256,
            file.key,
            file.size,
        )
        return key

    async def release(self, checkpoint: Checkpoint) -> set[str]:
        """Dooms what only this checkpoint, deleted or failed, had. Returns the keys under its
        prefix that another one still has."""
        await self._lock()
        prefix = f"{checkpoint_prefix(checkpoint.type, checkpoint.checkpoint_id)}/"
        rows = await self._conn.fetch(
            """
            SELECT key, EXISTS (
                SELECT FROM checkpoints
                WHERE NOT deleted AND checkpoint_id <> $1
                    AND files @> jsonb_build_array(jsonb_build_object('key', contents.key))
            ) AS needed
            FROM contents WHERE key = ANY($2::text[]) OR starts_with(key, $3)
            """,
            checkpoint.checkpoint_id,
            [file.key for file in checkpoint.files],
            prefix,
        )
        free = [row["key"] for row in rows if not row["needed"]]
        await self._conn.execute("DELETE FROM contents WHERE key = ANY($1::text[])", free)
        await self.doom(*free)
        return {row["key"] for row in rows if row["needed"] and row["key"].startswith(prefix)}

    async def doom(self, *keys: str) -> None:
        await self._conn.execute(
            "INSERT INTO doomed_keys (key) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING",
            list(keys),
        )

    async def list_doomed(self, limit: int) -> list[str]:
        rows = await self._conn.fetch("SELECT key FROM doomed_keys ORDER BY key LIMIT $1", limit)
        return [row["key"] for row in rows]

    async def forget_doomed(self, key: str) -> None:
        await self._conn.execute("DELETE FROM doomed_keys WHERE key = $1", key)
