"""One function per command: load, decide, save, emit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from services.inference.domain import (
    Endpoint,
    Job,
    Starter,
    busy_seconds,
    choose_endpoint,
    locate_models,
)
from services.inference.store import (
    CheckpointStore,
    EndpointStore,
    JobStore,
    Leftover,
    LeftoverStore,
    PaceStore,
)
from shared.contracts import inference
from shared.errors import Rejected, Retry
from shared.logs import get_logger
from shared.objects import S3_AWAY, Objects, result_prefix
from shared.unit_of_work import Tx

log = get_logger(__name__)

Wake = Callable[[], None]
"""Says that there is something to do: leftovers to remove, jobs to move."""


async def create_job(cmd: inference.CreateJob, tx: Tx) -> None:
    store = JobStore(tx.conn)
    job = Job(
        job_id=cmd.job_id,
        owner=cmd.owner,
        inference_type=cmd.inference_type,
        task_type=cmd.task_type,
        models=cmd.models,
        bucket=cmd.bucket,
        params_key=cmd.params_key,
        created_at=tx.now,
    )
    await CheckpointStore(tx.conn).merge(cmd.checkpoints)
    if await store.add(job):
        tx.emit(inference.JobCreated.of(job))
        return
    known = await store.find(cmd.job_id)
    if known is None or known.deleted or not known.is_as(job):
        raise Rejected("inference.exists", job_id=cmd.job_id)
    tx.emit(inference.JobSynced.of(known))


async def start_job(cmd: inference.StartJob, tx: Tx, *, objects: Objects) -> None:
    jobs, endpoints = JobStore(tx.conn), EndpointStore(tx.conn)
    job = await jobs.find(cmd.job_id)
    if job is None:
        raise Rejected("inference.not_found", job_id=cmd.job_id)
    job.check_startable()
    await CheckpointStore(tx.conn).merge(cmd.checkpoints)
    job = job.name_more(cmd.models)
    models = await _located(job, tx)
    starter = Starter(username=cmd.username, roles=cmd.roles, administrator=cmd.administrator)
    await endpoints.merge(cmd.endpoints)
    candidates = await endpoints.list_held([endpoint.endpoint_id for endpoint in cmd.endpoints])
    endpoint = await _place(job, starter, candidates, tx)
    if endpoint is None:
        raise Rejected(
            "inference.no_endpoint", inference_type=job.inference_type, username=cmd.username
        )
    params_at = cmd.params_at or await _find_params(job, objects)
    if params_at is None:
        missing = Rejected("inference.params_missing", job_id=job.job_id)
        failed = job.fail(missing.message, now=tx.now)
        await jobs.save(failed)
        tx.emit(inference.JobFailed.of(failed))
        return
    started = job.start(endpoint, starter, params_at=params_at, now=tx.now)
    await jobs.save(started)
    tx.emit(inference.JobStarted.of(started))
    tx.emit(_work_of(started, endpoint, models))
    log.info("job_started", job_id=job.job_id, endpoint_name=endpoint.endpoint_name)


async def _located(job: Job, tx: Tx) -> list[inference.UsedModel]:
    """Raises Rejected for a model that is gone."""
    checkpoint_ids = [model.checkpoint_id for model in job.models if model.checkpoint_id]
    return locate_models(job.models, await CheckpointStore(tx.conn).list_of(checkpoint_ids))


async def _place(job: Job, starter: Starter, candidates: list[Endpoint], tx: Tx) -> Endpoint | None:
    ids = [endpoint.endpoint_id for endpoint in candidates]
    unfinished = await JobStore(tx.conn).count_unfinished(ids)
    paces = await PaceStore(tx.conn).list_of(ids)
    return choose_endpoint(candidates, job.inference_type, starter, unfinished, paces)


def _work_of(job: Job, endpoint: Endpoint, models: list[inference.UsedModel]) -> inference.RunJob:
    return inference.RunJob(
        job_id=job.job_id,
        endpoint_id=endpoint.endpoint_id,
        task_type=job.task_type,
        models=models,
        bucket=job.bucket,
        params_key=job.params_key,
        result_prefix=result_prefix(job.job_id),
        version=job.version,
    )


async def _find_params(job: Job, objects: Objects) -> datetime | None:
    """When they came; None while there are none."""
    try:
        return await objects.written_at(job.bucket, job.params_key)
    except S3_AWAY as error:
        raise Retry(f"object store: {error!r}") from error


async def cancel_job(cmd: inference.CancelJob, tx: Tx, *, wake: Wake) -> None:
    store = JobStore(tx.conn)
    job = await store.find(cmd.job_id)
    if job is None:
        raise Rejected("inference.not_found", job_id=cmd.job_id)
    job.check_cancellable()
    if job.cancelled:
        tx.emit(inference.JobSynced.of(job))
        return
    cancelled = job.cancel(cmd.username, now=tx.now)
    await store.save(cancelled)
    await _leave(cancelled, tx, wake)
    tx.emit(inference.JobCancelled.of(cancelled))
    log.info("job_cancelled", job_id=job.job_id)


async def delete_jobs(cmd: inference.DeleteJobs, tx: Tx, *, wake: Wake) -> None:
    store = JobStore(tx.conn)
    for job_id in sorted(set(cmd.job_ids)):
        job = await store.find(job_id)
        if job is None or job.deleted:
            continue
        deleted = job.delete()
        await store.save(deleted)
        await _leave(deleted, tx, wake)
        tx.emit(inference.JobDeleted.of(deleted))


async def report_job_started(cmd: inference.ReportJobStarted, tx: Tx) -> None:
    store = JobStore(tx.conn)
    job = await store.find(cmd.job_id)
    if job is None or not job.running or cmd.attempt <= job.attempt:
        return
    if cmd.endpoint_id not in ("", job.endpoint_id):
        return  # it was moved meanwhile, which that worker hears
    taken = job.take(cmd.attempt, instance_id=cmd.instance_id, seconds=cmd.seconds, now=tx.now)
    await store.save(taken)
    tx.emit(inference.JobTaken.of(taken))


async def report_job_succeeded(cmd: inference.ReportJobSucceeded, tx: Tx, *, wake: Wake) -> None:
    job = await _find_running(cmd.job_id, tx, wake)
    if job is None:
        return
    done = job.succeed(
        attempt=cmd.attempt,
        image_names=cmd.image_names,
        info_name=cmd.info_name,
        seconds=cmd.seconds,
        warnings=cmd.warnings,
        now=tx.now,
    )
    await _note_pace(job, sum(cmd.seconds.values()), tx)
    await JobStore(tx.conn).save(done)
    tx.emit(inference.JobSucceeded.of(done))


async def _note_pace(job: Job, worked: float, tx: Tx) -> None:
    paces, endpoint_id = PaceStore(tx.conn), job.endpoint_id or ""
    unfinished = await JobStore(tx.conn).count_unfinished([endpoint_id])
    ready = await EndpointStore(tx.conn).count_ready(endpoint_id)
    seconds = busy_seconds(
        job,
        last_end=await paces.find_last_end(endpoint_id),
        busy=max(1, min(ready, unfinished.get(endpoint_id, 0))),
        worked=worked,
        now=tx.now,
    )
    await paces.note(endpoint_id, seconds, tx.now)


async def report_job_failed(cmd: inference.ReportJobFailed, tx: Tx, *, wake: Wake) -> None:
    job = await _find_running(cmd.job_id, tx, wake)
    if job is None or cmd.endpoint_id not in ("", job.endpoint_id):
        return
    failed = job.fail(cmd.reason, now=tx.now, attempt=cmd.attempt)
    await JobStore(tx.conn).save(failed)
    tx.emit(inference.JobFailed.of(failed))


async def resync(_: inference.ResyncInference, tx: Tx) -> None:
    for job in await JobStore(tx.conn).list_all():
        tx.emit(inference.JobSynced.of(job))


async def move_job(job_id: str, tx: Tx) -> None:
    """From an endpoint that has ended to one that can take it, or it fails."""
    jobs, endpoints = JobStore(tx.conn), EndpointStore(tx.conn)
    job = await jobs.find(job_id)
    if job is None or not job.running:
        return
    ids = await endpoints.list_ids(job.inference_type)
    held = await endpoints.list_held(sorted({*ids, job.endpoint_id or ""}))
    left = next((e for e in held if e.endpoint_id == job.endpoint_id), None)
    if left is None or not left.has_left(job):
        return
    endpoint, reason = None, f"{left.end}; no other endpoint can take the job"
    try:
        models = await _located(job, tx)
        if job.starter:
            endpoint = await _place(job, job.starter, held, tx)
    except Rejected as gone:
        reason = f"{left.end}; {gone.message}"
    if endpoint is None:
        failed = job.fail(reason, now=tx.now)
        await jobs.save(failed)
        tx.emit(inference.JobFailed.of(failed))
        log.info("job_failed_with_endpoint", job_id=job.job_id, reason=reason)
        return
    moved = job.move(endpoint)
    await jobs.save(moved)
    tx.emit(inference.JobMoved.of(moved))
    tx.emit(_work_of(moved, endpoint, models))
    log.info("job_moved", job_id=job.job_id, endpoint_name=endpoint.endpoint_name)


async def remove_leftovers(tx: Tx, *, objects: Objects) -> None:
    """Removes what cancelled and deleted jobs left in S3. Raises S3 errors, and then none is
    forgotten."""
    store = LeftoverStore(tx.conn)
    while leftovers := await store.take_some(20):
        for leftover in leftovers:
            removed = 0
            for prefix in leftover.prefixes:
                removed += await objects.delete_prefix(leftover.bucket, prefix)
            log.info("leftovers_removed", job_id=leftover.job_id, objects=removed)


async def _find_running(job_id: str, tx: Tx, wake: Wake) -> Job | None:
    """The job that a worker reports the end of; None if nobody waits for it any more. What was
    uploaded for a cancelled or deleted one goes as well."""
    job = await JobStore(tx.conn).find(job_id)
    if job is not None and job.running:
        return job
    log.info("late_report_ignored", job_id=job_id)
    if job is not None and job.unwanted:
        await _leave(job, tx, wake)
    return None


async def _leave(job: Job, tx: Tx, wake: Wake) -> None:
    async def after_commit() -> None:
        wake()

    await LeftoverStore(tx.conn).add(Leftover(job.job_id, job.bucket, job.unwanted))
    tx.after_commit.append(after_commit)
