"""endpoints' SQL. Whoever changes an endpoint or its instances has locked the endpoint's row."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from services.endpoints.domain import Endpoint, Instance


class EndpointStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def lock_names(self) -> None:
        """Until the transaction ends: two that create at once must see each other's name and
        instances."""
        await self._conn.execute("SELECT pg_advisory_xact_lock(hashtext('endpoints.names'))")

    async def find(self, endpoint_id: str) -> Endpoint | None:
        """Locks it."""
        row = await self._conn.fetchrow(
            """
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                autoscaling, min_instance_number, max_instance_number, current_instance_count,
                roles, creator, start_time, end_time, error, scaled_to, scaled_at, crashes,
                retry_at, released, version, deleted
            FROM endpoints WHERE endpoint_id = $1 FOR UPDATE
            """,
            endpoint_id,
        )
        return Endpoint(**dict(row)) if row else None

    async def list_named(self, names: Collection[str]) -> list[Endpoint]:
        """Those that have the names now, so none that is being deleted; locks them."""
        rows = await self._conn.fetch(
            """
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                autoscaling, min_instance_number, max_instance_number, current_instance_count,
                roles, creator, start_time, end_time, error, scaled_to, scaled_at, crashes,
                retry_at, released, version, deleted
            FROM endpoints
            WHERE endpoint_name = ANY($1::text[]) AND NOT deleted AND endpoint_status <> 'Deleting'
            ORDER BY endpoint_id FOR UPDATE
            """,
            list(names),
        )
        return [Endpoint(**dict(row)) for row in rows]

    async def list_unreleased(self) -> list[Endpoint]:
        """All that still want or hold something."""
        rows = await self._conn.fetch(
            """
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                autoscaling, min_instance_number, max_instance_number, current_instance_count,
                roles, creator, start_time, end_time, error, scaled_to, scaled_at, crashes,
                retry_at, released, version, deleted
            FROM endpoints WHERE NOT released ORDER BY start_time
            """
        )
        return [Endpoint(**dict(row)) for row in rows]

    async def list_all(self) -> list[Endpoint]:
        """With the deleted ones."""
        rows = await self._conn.fetch(
            """
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                autoscaling, min_instance_number, max_instance_number, current_instance_count,
                roles, creator, start_time, end_time, error, scaled_to, scaled_at, crashes,
                retry_at, released, version, deleted
            FROM endpoints ORDER BY start_time
            """
        )
        return [Endpoint(**dict(row)) for row in rows]

    async def save(self, endpoint: Endpoint) -> None:
        await self._conn.execute(
            """
            INSERT INTO endpoints
                (endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                autoscaling, min_instance_number, max_instance_number, current_instance_count,
                roles, creator, start_time, end_time, error, scaled_to, scaled_at, crashes,
                retry_at, released, version, deleted)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18,
                $19, $20, $21)
            ON CONFLICT (endpoint_id) DO UPDATE SET
                endpoint_status = excluded.endpoint_status,
                max_instance_number = excluded.max_instance_number,
                current_instance_count = excluded.current_instance_count,
                roles = excluded.roles, end_time = excluded.end_time, error = excluded.error,
                scaled_to = excluded.scaled_to, scaled_at = excluded.scaled_at,
                crashes = excluded.crashes, retry_at = excluded.retry_at,
                released = excluded.released, version = excluded.version, deleted = excluded.deleted
            """,
            endpoint.endpoint_id,
            endpoint.endpoint_name,
            endpoint.endpoint_type,
            endpoint.instance_type,
            endpoint.endpoint_status,
            endpoint.autoscaling,
            endpoint.min_instance_number,
            endpoint.max_instance_number,
            endpoint.current_instance_count,
            endpoint.roles,
            endpoint.creator,
            endpoint.start_time,
            endpoint.end_time,
            endpoint.error,
            endpoint.scaled_to,
            endpoint.scaled_at,
            endpoint.crashes,
            endpoint.retry_at,
            endpoint.released,
            endpoint.version,
            endpoint.deleted,
        )


class InstanceStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, instance_id: str) -> Instance | None:
        row = await self._conn.fetchrow(
            """
            SELECT instance_id, endpoint_id, status, device, started_at, ready_at, error, stop_by
            FROM instances WHERE instance_id = $1
            """,
            instance_id,
        )
        return Instance(**dict(row)) if row else None

    async def list_all(self) -> list[Instance]:
        rows = await self._conn.fetch(
            """
            SELECT instance_id, endpoint_id, status, device, started_at, ready_at, error, stop_by
            FROM instances ORDER BY started_at
            """
        )
        return [Instance(**dict(row)) for row in rows]

    async def count(self, endpoint_id: str) -> int:
        """Without those that were given up; what has failed is replaced when it is gone."""
        number: int = await self._conn.fetchval(
            """
            SELECT count(*) FROM instances
            WHERE endpoint_id = $1 AND (stop_by IS NULL OR status = 'failed')
            """,
            endpoint_id,
        )
        return number

    async def count_ready(self, endpoint_id: str) -> int:
        number: int = await self._conn.fetchval(
            """
            SELECT count(*) FROM instances
            WHERE endpoint_id = $1 AND status = 'ready' AND stop_by IS NULL
            """,
            endpoint_id,
        )
        return number

    async def has_settled(self, endpoint_id: str, since: datetime, until: datetime) -> bool:
        """Whether an instance got ready between the two and is so still."""
        settled: bool = await self._conn.fetchval(
            """
            SELECT EXISTS (
                SELECT FROM instances
                WHERE endpoint_id = $1 AND status = 'ready' AND ready_at BETWEEN $2 AND $3
            )
            """,
            endpoint_id,
            since,
            until,
        )
        return settled

    async def save(self, instance: Instance) -> None:
        await self._conn.execute(
            """
            INSERT INTO instances
                (instance_id, endpoint_id, status, device, started_at, ready_at, error, stop_by)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
            ON CONFLICT (instance_id) DO UPDATE SET
                status = excluded.status, device = excluded.device,
                ready_at = excluded.ready_at, error = excluded.error, stop_by = excluded.stop_by
            """,
            instance.instance_id,
            instance.endpoint_id,
            instance.status,
            instance.device,
            instance.started_at,
            instance.ready_at,
            instance.error,
            instance.stop_by,
        )

    async def remove(self, instance_id: str) -> bool:
        """False when it was removed before."""
        removed = await self._conn.fetchval(
            "DELETE FROM instances WHERE instance_id = $1 RETURNING true", instance_id
        )
        return bool(removed)

    async def retire(self, instance_id: str, stop_by: datetime) -> None:
        await self._conn.execute(
            "UPDATE instances SET stop_by = $2 WHERE instance_id = $1 AND stop_by IS NULL",
            instance_id,
            stop_by,
        )

    async def retire_all_of(self, endpoint_id: str, stop_by: datetime) -> None:
        await self._conn.execute(
            "UPDATE instances SET stop_by = $2 WHERE endpoint_id = $1 AND stop_by IS NULL",
            endpoint_id,
            stop_by,
        )

    async def remove_all_of(self, endpoint_id: str) -> None:
        await self._conn.execute("DELETE FROM instances WHERE endpoint_id = $1", endpoint_id)


class Lead:
    """Where several endpoints services run, one has the lead: it holds a lock that ends with its
    connection, however that ends."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._conn: Any = None

    async def take(self) -> bool:
        """Whether this process has the lead by now."""
        if self._conn is not None:
            if not self._conn.is_closed():
                return True
            await self.give_up()
        conn = await self._pool.acquire()
        try:
            taken = await conn.fetchval(
                "SELECT pg_try_advisory_lock(hashtext('endpoints.reconciler'))"
            )
            if taken:
                self._conn, conn = conn, None
            return bool(taken)
        finally:
            if conn is not None:
                await self._pool.release(conn)

    async def give_up(self) -> None:
        """Another may take it from now on."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await self._pool.release(conn)
