"""models' SQL. Who reads a checkpoint in order to change it holds its row until the commit, so that
nobody puts its files together while somebody else deletes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from services.models.domain import Checkpoint
from shared.contracts.models import CheckpointFile, MultipartUpload
from shared.errors import Rejected, Retry

_params = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _checkpoint(row: Any) -> Checkpoint:
    values = dict(row)
    values["files"] = msgspec.convert(values["files"], list[CheckpointFile])
    values["multipart_upload"] = msgspec.convert(
        values["multipart_upload"], dict[str, MultipartUpload]
    )
    values["params"] = _params.decode(values["params"])
    return Checkpoint(**values)


class CheckpointStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, checkpoint_id: str) -> Checkpoint | None:
        """Also finds deleted ones."""
        row = await self._conn.fetchrow(
            """
            SELECT checkpoint_id, type, names, status, s3_location, bucket, files,
                multipart_upload, urls, creator, message, params::text AS params,
                allowed_roles_or_users, created_at, error, version, deleted
            FROM checkpoints WHERE checkpoint_id = $1 FOR UPDATE
            """,
            checkpoint_id,
        )
        return _checkpoint(row) if row else None

    async def get(self, checkpoint_id: str) -> Checkpoint:
        checkpoint = await self.find(checkpoint_id)
        if checkpoint is None or checkpoint.deleted:
            raise Rejected("models.not_found", checkpoint_id=checkpoint_id)
        return checkpoint

    async def list_all(self, *, with_deleted: bool = False) -> list[Checkpoint]:
        rows = await self._conn.fetch(
            """
            SELECT checkpoint_id, type, names, status, s3_location, bucket, files,
                multipart_upload, urls, creator, message, params::text AS params,
                allowed_roles_or_users, created_at, error, version, deleted
            FROM checkpoints WHERE $1 OR NOT deleted ORDER BY created_at, checkpoint_id
            """,
            with_deleted,
        )
        return [_checkpoint(row) for row in rows]

    async def save(self, checkpoint: Checkpoint) -> None:
        try:
            saved = await self._conn.fetchval(
                """
                INSERT INTO checkpoints
                    (checkpoint_id, type, names, status, s3_location, bucket, files,
                    multipart_upload, urls, creator, message, params, allowed_roles_or_users,
                    created_at, error, version, deleted)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
                ON CONFLICT (checkpoint_id) DO UPDATE SET
                    names = excluded.names, status = excluded.status, files = excluded.files,
                    urls = excluded.urls, error = excluded.error, version = excluded.version,
                    deleted = excluded.deleted
                WHERE checkpoints.version = excluded.version - 1
                RETURNING true
                """,
                checkpoint.checkpoint_id,
                checkpoint.type,
                checkpoint.names,
                checkpoint.status,
                checkpoint.s3_location,
                checkpoint.bucket,
                checkpoint.files,
                checkpoint.multipart_upload,
                checkpoint.urls,
                checkpoint.creator,
                checkpoint.message,
                checkpoint.params,
                checkpoint.allowed_roles_or_users,
                checkpoint.created_at,
                checkpoint.error,
                checkpoint.version,
                checkpoint.deleted,
            )
        except asyncpg.DataError as error:  # NUL characters, numbers that no database can hold
            raise Rejected("models.invalid", field="checkpoint", detail=str(error)) from error
        if not saved:
            raise Retry(f"checkpoint {checkpoint.checkpoint_id} was changed meanwhile")

    # Names.

    async def claim_names(
        self, checkpoint_type: str, names: Collection[str], checkpoint_id: str
    ) -> None:
        """Raises Rejected if another checkpoint has one. Two who want the same name at the same
        time: the second waits here for the first's commit."""
        await self._conn.execute(
            """
            INSERT INTO checkpoint_names (type, name, checkpoint_id)
            SELECT $1, name, $3 FROM unnest($2::text[]) AS name ORDER BY name
            ON CONFLICT DO NOTHING
            """,
            checkpoint_type,
            list(names),
            checkpoint_id,
        )
        await self.check_names_free(checkpoint_type, names, checkpoint_id)

    async def check_names_free(
        self, checkpoint_type: str, names: Collection[str], checkpoint_id: str
    ) -> None:
        taken = await self._conn.fetchval(
            """
            SELECT name FROM checkpoint_names
            WHERE type = $1 AND name = ANY($2::text[]) AND checkpoint_id <> $3
            ORDER BY name LIMIT 1
            """,
            checkpoint_type,
            list(names),
            checkpoint_id,
        )
        if taken is not None:
            raise Rejected("models.name_taken", name=taken)

    async def release_names(self, checkpoint_id: str, *, keep: Sequence[str] = ()) -> None:
        await self._conn.execute(
            "DELETE FROM checkpoint_names WHERE checkpoint_id = $1 AND NOT name = ANY($2::text[])",
            checkpoint_id,
            list(keep),
        )

    # Taking in: each belongs to one process at a time, by a lease that it keeps renewing.

    async def lease_intake(
        self, holder: str, *, seconds: float, limit: int, running: Collection[str]
    ) -> list[Checkpoint]:
        """Takes over checkpoints that nobody works on: new ones, and those of a dead process."""
        rows = await self._conn.fetch(
            """
            UPDATE checkpoints SET
                lease_by = $1, lease_until = now() + make_interval(secs => $2)
            WHERE checkpoint_id IN (
                SELECT checkpoint_id FROM checkpoints
                WHERE status = 'Creating' AND NOT deleted
                    AND (lease_until IS NULL OR lease_until < now())
                    AND NOT checkpoint_id = ANY($4::text[])
                ORDER BY created_at LIMIT $3 FOR UPDATE SKIP LOCKED
            )
            RETURNING checkpoint_id, type, names, status, s3_location, bucket, files,
                multipart_upload, urls, creator, message, params::text AS params,
                allowed_roles_or_users, created_at, error, version, deleted
            """,
            holder,
            seconds,
            limit,
            list(running),
        )
        return [_checkpoint(row) for row in rows]

    async def renew_leases(
        self, holder: str, checkpoint_ids: Collection[str], *, seconds: float
    ) -> set[str]:
        """Returns those that are still to be taken in, and by this holder."""
        rows = await self._conn.fetch(
            """
            UPDATE checkpoints SET lease_until = now() + make_interval(secs => $3)
            WHERE checkpoint_id = ANY($2::text[]) AND lease_by = $1
                AND status = 'Creating' AND NOT deleted
            RETURNING checkpoint_id
            """,
            holder,
            list(checkpoint_ids),
            seconds,
        )
        return {row["checkpoint_id"] for row in rows}

    async def holds_lease(self, holder: str, checkpoint_id: str) -> bool:
        return bool(
            await self._conn.fetchval(
                """
                SELECT lease_by = $1 AND status = 'Creating' AND NOT deleted
                FROM checkpoints WHERE checkpoint_id = $2 FOR UPDATE
                """,
                holder,
                checkpoint_id,
            )
        )

    async def end_lease(self, holder: str, checkpoint_id: str, *, pause: float = 0.0) -> None:
        """`pause`: seconds before anybody tries again."""
        await self._conn.execute(
            """
            UPDATE checkpoints SET lease_by = NULL, lease_until = now() + make_interval(secs => $3)
            WHERE checkpoint_id = $2 AND lease_by = $1
            """,
            holder,
            checkpoint_id,
            pause,
        )

    # What is to be cleared away.

    async def list_leftovers(self, limit: int) -> list[Checkpoint]:
        """Deleted and failed checkpoints that may have bytes left and are not being written to."""
        rows = await self._conn.fetch(
            """
            SELECT checkpoint_id, type, names, status, s3_location, bucket, files,
                multipart_upload, urls, creator, message, params::text AS params,
                allowed_roles_or_users, created_at, error, version, deleted
            FROM checkpoints
            WHERE (deleted OR status = 'Failed') AND NOT bytes_deleted
                AND (lease_until IS NULL OR lease_until < now())
            ORDER BY checkpoint_id LIMIT $1
            """,
            limit,
        )
        return [_checkpoint(row) for row in rows]

    async def mark_bytes_deleted(self, checkpoint_id: str) -> None:
        await self._conn.execute(
            "UPDATE checkpoints SET bytes_deleted = true WHERE checkpoint_id = $1", checkpoint_id
        )

    async def begin_again(self, checkpoint_id: str) -> bool:
        """False while bytes of a failed attempt are left, which are about to be removed."""
        return bool(
            await self._conn.fetchval(
                """
                UPDATE checkpoints SET bytes_deleted = false, lease_by = NULL, lease_until = NULL
                WHERE checkpoint_id = $1 AND bytes_deleted RETURNING true
                """,
                checkpoint_id,
            )
        )

    async def lock_expired(self, before: datetime, limit: int) -> list[Checkpoint]:
        rows = await self._conn.fetch(
            """
            SELECT checkpoint_id, type, names, status, s3_location, bucket, files,
                multipart_upload, urls, creator, message, params::text AS params,
                allowed_roles_or_users, created_at, error, version, deleted
            FROM checkpoints
            WHERE status = 'Initial' AND NOT deleted AND created_at < $1
            ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
            """,
            before,
            limit,
        )
        return [_checkpoint(row) for row in rows]

    async def list_in_work(self, checkpoint_ids: Collection[str]) -> set[str]:
        """Those of the given that are being uploaded or downloaded."""
        rows = await self._conn.fetch(
            """
            SELECT checkpoint_id FROM checkpoints
            WHERE checkpoint_id = ANY($1::text[]) AND status IN ('Initial', 'Creating')
                AND NOT deleted
            """,
            list(checkpoint_ids),
        )
        return {row["checkpoint_id"] for row in rows}
