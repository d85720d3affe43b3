"""The ledger's SQL. Who reads a job holds its row until the end of the transaction: the reports
on one job come close together, and are applied one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from services.inference.domain import Checkpoint, Endpoint, Job
from shared.contracts import endpoints, models
from shared.contracts.envelope import State

S = TypeVar("S", bound=State)


class Queue(msgspec.Struct, frozen=True):
    """The unfinished jobs of an endpoint: those that no worker has begun, and the others."""

    endpoint_name: str
    waiting: int
    running: int
    oldest_seconds: float


class JobStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def find(self, job_id: str) -> Job | None:
        """Also finds deleted ones. Locks the row."""
        row = await self._conn.fetchrow(
            """
            SELECT job_id, owner, inference_type, task_type, status, models, bucket, params_key,
                   endpoint_id, endpoint_name, instance_type, starter, created_at, started_at,
                   completed_at, attempt, image_names, info_name, reason, seconds, warnings,
                   cancelled, params_at, taken_at, instance_id, version, deleted
            FROM jobs WHERE job_id = $1 FOR UPDATE
            """,
            job_id,
        )
        return msgspec.convert(dict(row), Job) if row else None

    async def list_all(self) -> list[Job]:
        rows = await self._conn.fetch(
            """
            SELECT job_id, owner, inference_type, task_type, status, models, bucket, params_key,
                   endpoint_id, endpoint_name, instance_type, starter, created_at, started_at,
                   completed_at, attempt, image_names, info_name, reason, seconds, warnings,
                   cancelled, params_at, taken_at, instance_id, version, deleted
            FROM jobs ORDER BY created_at, job_id
            """
        )
        return [msgspec.convert(dict(row), Job) for row in rows]

    async def list_left(self) -> list[str]:
        """Ids of some that no worker of their endpoint does any more: see `Endpoint.has_left`."""
        rows = await self._conn.fetch(
            """
            SELECT job_id FROM jobs JOIN endpoints USING (endpoint_id)
            WHERE jobs.status = 'inprogress' AND NOT jobs.deleted
                AND (endpoints.deleted OR endpoint_status IN ('Failed', 'Deleted')
                    OR (endpoint_status = 'Deleting' AND attempt = 0))
            ORDER BY jobs.started_at, job_id LIMIT 100
            """
        )
        return [row["job_id"] for row in rows]

    async def count_unfinished(self, endpoint_ids: list[str]) -> dict[str, int]:
        rows = await self._conn.fetch(
            """
            SELECT endpoint_id, count(*) AS jobs FROM jobs
            WHERE endpoint_id = ANY($1::text[]) AND status = 'inprogress' AND NOT deleted
            GROUP BY endpoint_id
            """,
            endpoint_ids,
        )
        return {row["endpoint_id"]: row["jobs"] for row in rows}

    async def list_queues(self) -> list[Queue]:
        """One of each endpoint that has unfinished jobs."""
        rows = await self._conn.fetch(
            """
            SELECT endpoint_name, count(*) FILTER (WHERE attempt = 0) AS waiting,
                   count(*) FILTER (WHERE attempt > 0) AS running,
                   coalesce(extract(epoch FROM now() - min(started_at)
                       FILTER (WHERE attempt = 0)), 0)::float8 AS oldest_seconds
            FROM jobs WHERE status = 'inprogress' AND NOT deleted GROUP BY endpoint_name
            """
        )
        return [Queue(**dict(row)) for row in rows]

    async def add(self, job: Job) -> bool:
        """False if there is one of this id."""
        return bool(
            await self._conn.fetchval(
                """
                INSERT INTO jobs
                    (job_id, owner, inference_type, task_type, status, models, bucket, params_key,
                     created_at, attempt, image_names, seconds, warnings, version, deleted)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
                ON CONFLICT (job_id) DO NOTHING RETURNING true
                """,
                job.job_id,
                job.owner,
                job.inference_type,
                job.task_type,
                job.status,
                job.models,
                job.bucket,
                job.params_key,
                job.created_at,
                job.attempt,
                job.image_names,
                job.seconds,
                job.warnings,
                job.version,
                job.deleted,
            )
        )

    async def save(self, job: Job) -> None:
        """Writes what can change of a job that `find` has locked."""
        await self._conn.execute(
            """
            UPDATE jobs SET
                status = $2, endpoint_id = $3, endpoint_name = $4, instance_type = $5,
                started_at = $6, completed_at = $7, attempt = $8, image_names = $9,
                info_name = $10, reason = $11, seconds = $12, warnings = $13, cancelled = $14,
                version = $15, deleted = $16, starter = $17, params_at = $18, taken_at = $19,
                instance_id = $20, models = $21
            WHERE job_id = $1
            """,
            job.job_id,
            job.status,
            job.endpoint_id,
            job.endpoint_name,
            job.instance_type,
            job.started_at,
            job.completed_at,
            job.attempt,
            job.image_names,
            job.info_name,
            job.reason,
            job.seconds,
            job.warnings,
            job.cancelled,
            job.version,
            job.deleted,
            job.starter,
            job.params_at,
            job.taken_at,
            job.instance_id,
            job.models,
        )


class PaceStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def list_of(self, endpoint_ids: list[str]) -> dict[str, float]:
        """Seconds per job, by endpoint, where it has been measured."""
        rows = await self._conn.fetch(
            "SELECT endpoint_id, seconds_per_job FROM paces WHERE endpoint_id = ANY($1::text[])",
            endpoint_ids,
        )
        return {row["endpoint_id"]: row["seconds_per_job"] for row in rows}

    async def find_last_end(self, endpoint_id: str) -> datetime | None:
        """Of a job of that endpoint. Locks the row."""
        last: datetime | None = await self._conn.fetchval(
            "SELECT last_end FROM paces WHERE endpoint_id = $1 FOR UPDATE", endpoint_id
        )
        return last

    async def note(self, endpoint_id: str, seconds: float, ended_at: datetime) -> None:
        """A fifth of the newest measurement: it follows a change within some jobs."""
        await self._conn.execute(
            """
            INSERT INTO paces (endpoint_id, seconds_per_job, last_end) VALUES ($1, $2, $3)
            ON CONFLICT (endpoint_id) DO UPDATE SET
                seconds_per_job = 0.8 * paces.seconds_per_job + 0.2 * excluded.seconds_per_job,
                last_end = greatest(paces.last_end, excluded.last_end)
            """,
            endpoint_id,
            seconds,
            ended_at,
        )


class Leftover(msgspec.Struct, frozen=True):
    """What lies in S3 of a job that was cancelled or deleted. Every prefix ends with `/`."""

    job_id: str
    bucket: str
    prefixes: list[str]


class LeftoverStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def add(self, leftover: Leftover) -> None:
        """What is unwanted of a job only grows, so the newest word replaces an earlier one."""
        await self._conn.execute(
            """
            INSERT INTO leftovers (job_id, bucket, prefixes) VALUES ($1, $2, $3)
            ON CONFLICT (job_id) DO UPDATE SET prefixes = excluded.prefixes
            """,
            leftover.job_id,
            leftover.bucket,
            leftover.prefixes,
        )

    async def take_some(self, most: int) -> list[Leftover]:
        """Removes them from the table; they come back if the transaction fails."""
        rows = await self._conn.fetch(
            """
            DELETE FROM leftovers WHERE job_id IN
                (SELECT job_id FROM leftovers ORDER BY job_id LIMIT $1 FOR UPDATE SKIP LOCKED)
            RETURNING job_id, bucket, prefixes
            """,
            most,
        )
        return [Leftover(**dict(row)) for row in rows]


class CheckpointStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def merge(self, checkpoints: Iterable[models.Checkpoint]) -> None:
        """Takes over foreign state where it is newer than what is here."""
        await self._conn.execute(
            """
            INSERT INTO checkpoints (checkpoint_id, type, status, bucket, files, version, deleted)
            SELECT checkpoint_id, type, status, bucket, files, version, deleted
            FROM jsonb_to_recordset($1::jsonb) AS given
                (checkpoint_id text, type text, status text, bucket text, files jsonb,
                 version integer, deleted boolean)
            ON CONFLICT (checkpoint_id) DO UPDATE SET
                type = excluded.type, status = excluded.status, bucket = excluded.bucket,
                files = excluded.files, version = excluded.version, deleted = excluded.deleted
            WHERE checkpoints.version < excluded.version
            """,
            _newest(checkpoints, "checkpoint_id"),
        )

    async def list_of(self, checkpoint_ids: list[str]) -> dict[str, Checkpoint]:
        rows = await self._conn.fetch(
            """
            SELECT checkpoint_id, type, status, bucket, files, version, deleted
            FROM checkpoints WHERE checkpoint_id = ANY($1::text[])
            """,
            checkpoint_ids,
        )
        found = [msgspec.convert(dict(row), Checkpoint) for row in rows]
        return {checkpoint.checkpoint_id: checkpoint for checkpoint in found}


class EndpointStore:
    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def merge(self, given: Iterable[endpoints.Endpoint]) -> None:
        """Takes over foreign state where it is newer than what is here. Touches (and so locks)
        only such rows: starting jobs on one endpoint must not queue for it."""
        await self._conn.execute(
            """
            INSERT INTO endpoints
                (endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                 current_instance_count, error, roles, creator, version, deleted)
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                   current_instance_count, error, roles, creator, version, deleted
            FROM jsonb_to_recordset($1::jsonb) AS given
                (endpoint_id text, endpoint_name text, endpoint_type text, instance_type text,
                 endpoint_status text, current_instance_count integer, error text, roles text[],
                 creator text, version integer, deleted boolean)
            WHERE NOT EXISTS (
                SELECT FROM endpoints AS known
                WHERE known.endpoint_id = given.endpoint_id AND known.version >= given.version
            )
            ON CONFLICT (endpoint_id) DO UPDATE SET
                endpoint_name = excluded.endpoint_name, endpoint_type = excluded.endpoint_type,
                instance_type = excluded.instance_type, endpoint_status = excluded.endpoint_status,
                current_instance_count = excluded.current_instance_count, error = excluded.error,
                roles = excluded.roles, creator = excluded.creator,
                version = excluded.version, deleted = excluded.deleted
            WHERE endpoints.version < excluded.version
            """,
            _newest(given, "endpoint_id"),
        )

    async def list_held(self, endpoint_ids: list[str]) -> list[Endpoint]:
        """Holds the rows: none of them ends while a job is being started on it, so who looks after
        the end of an endpoint sees every job that it has left."""
        rows = await self._conn.fetch(
            """
            SELECT endpoint_id, endpoint_name, endpoint_type, instance_type, endpoint_status,
                   current_instance_count, error, roles, creator, version, deleted
            FROM endpoints WHERE endpoint_id = ANY($1::text[]) ORDER BY endpoint_id FOR SHARE
            """,
            endpoint_ids,
        )
        return [Endpoint(**dict(row)) for row in rows]

    async def count_ready(self, endpoint_id: str) -> int:
        """Its instances, as far as is known here. Locks nothing."""
        count: int | None = await self._conn.fetchval(
            "SELECT current_instance_count FROM endpoints WHERE endpoint_id = $1", endpoint_id
        )
        return count or 0

    async def list_ids(self, endpoint_type: str) -> list[str]:
        """Of those that have not ended. Locks none: hold them all together, and look again."""
        rows = await self._conn.fetch(
            "SELECT endpoint_id FROM endpoints WHERE endpoint_type = $1 AND NOT deleted",
            endpoint_type,
        )
        return [row["endpoint_id"] for row in rows]


def _newest(states: Iterable[S], key: str) -> list[S]:
    """One state per aggregate, in an order that lets two transactions never wait for each other."""
    newest: dict[str, S] = {}
    for state in sorted(states, key=lambda state: state.version):
        newest[getattr(state, key)] = state
    return [newest[id_] for id_ in sorted(newest)]
