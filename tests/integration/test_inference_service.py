"""The ledger on real NATS, Postgres and S3. The test plays the workers and the other services."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from deploy.local.installation import JOBS_BUCKET
from deploy.local.stack import Stack
from shared.contracts import endpoints, inference, models
from shared.contracts.envelope import Completed, Rejected
from shared.contracts.inference import (
    CancelJob,
    DeleteJobs,
    ReportJobFailed,
    ReportJobStarted,
    ReportJobSucceeded,
    ResyncInference,
)
from shared.objects import params_key
from tests.integration.inference_bus import Bus, until


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="darkroom-inference-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder / "home", services=False, random_ports=True)
    with stack:
        yield stack
    stack.delete()


@pytest.fixture(scope="module")
async def bus(servers: Stack, folder: Path) -> AsyncIterator[Bus]:
    async with Bus(servers, folder).open() as bus:
        await bus.start_ledger()
        yield bus


def succeeded(job_id: str, *names: str, attempt: int = 1) -> ReportJobSucceeded:
    return ReportJobSucceeded(
        job_id=job_id,
        instance_id="i",
        attempt=attempt,
        image_names=list(names) or ["image_0.png"],
        info_name=f"{job_id}_param.json",
        seconds={"render": 1.5},
    )


async def upload(bus: Bus, job_id: str) -> str:
    """The key of a picture, as a worker puts it there before it reports."""
    key = f"out/{job_id}/result/image_0.png"
    await bus.objects.client.put_object(Bucket=JOBS_BUCKET, Key=key, Body=b"png")
    return key


async def test_a_job_goes_from_created_to_succeed(bus: Bus) -> None:
    endpoint, checkpoint = await bus.make_endpoint(), await bus.make_checkpoint()
    job = await bus.make_job(checkpoint)
    started = await bus.start_job(job.job_id, endpoint)
    assert isinstance(started, inference.JobStarted)
    assert (started.status, started.endpoint_id) == ("inprogress", endpoint.endpoint_id)
    await until(lambda: bus.waiting(endpoint.endpoint_id), 1)
    await bus.ask(ReportJobStarted(job_id=job.job_id, instance_id="i", attempt=1))
    done = await bus.ask(succeeded(job.job_id))
    assert isinstance(done, inference.JobSucceeded)
    assert (done.status, done.attempt, done.image_names) == ("succeed", 1, ["image_0.png"])
    assert done.completed_at
    assert [event.version for event in bus.of(job.job_id)] == [1, 2, 3, 4]


async def test_a_job_has_one_result_whoever_reports_another_later(bus: Bus) -> None:
    endpoint, job = await bus.make_endpoint(), await bus.make_job()
    await bus.start_job(job.job_id, endpoint)
    await bus.ask(succeeded(job.job_id, "image_0.png", attempt=2))
    late = [
        succeeded(job.job_id, "image_0.png", "image_1.png"),
        ReportJobFailed(job_id=job.job_id, instance_id="i", attempt=1, reason="too late"),
        ReportJobStarted(job_id=job.job_id, instance_id="i", attempt=3),
        succeeded("unknown"),
    ]
    for report in late:
        assert isinstance(await bus.ask(report), Completed)
    last = bus.of(job.job_id)[-1]
    assert (last.status, last.image_names, last.attempt) == ("succeed", ["image_0.png"], 2)


async def test_both_reports_of_a_short_job_count_though_they_come_together(bus: Bus) -> None:
    endpoint = await bus.make_endpoint()
    for _ in range(5):
        job_id = await bus.run_job(endpoint, b"{}")
        await bus.send(ReportJobStarted(job_id=job_id, instance_id="i", attempt=1))
        await bus.send(succeeded(job_id))
        assert (await bus.end_of(job_id, seconds=2)).status == "succeed"


async def test_the_same_job_is_created_once(bus: Bus) -> None:
    job = await bus.make_job()
    again = await bus.ask(job)
    assert isinstance(again, inference.JobSynced)
    assert again.version == 1
    other = await bus.ask(replace(job, task_type="img2img"))
    assert isinstance(other, Rejected)
    assert other.code == "inference.exists"


async def test_what_can_not_be_started_says_why(bus: Bus) -> None:
    endpoint, job = await bus.make_endpoint(), await bus.make_job()

    async def refusal(job_id: str, *pools: endpoints.Endpoint) -> str:
        answer = await bus.start_job(job_id, *pools)
        assert isinstance(answer, Rejected)
        return f"{answer.code}: {answer.message}"

    assert (await refusal("unknown", endpoint)).startswith("inference.not_found")
    assert await refusal(job.job_id) == (
        'inference.no_endpoint: no available Async endpoints for user "alice"'
    )
    real_time = await bus.make_endpoint(endpoint_type="Real-time")
    assert (await refusal(job.job_id, real_time)).startswith("inference.no_endpoint")
    await bus.start_job(job.job_id, endpoint)
    assert (await refusal(job.job_id, endpoint)).startswith("inference.not_startable")


async def test_jobs_spread_over_the_endpoints(bus: Bus) -> None:
    pools = [await bus.make_endpoint("esd-a"), await bus.make_endpoint("esd-b")]
    for _ in range(4):
        job = await bus.make_job()
        await bus.start_job(job.job_id, *pools)

    async def waiting() -> list[int]:
        return [await bus.waiting(pool.endpoint_id) for pool in pools]

    await until(waiting, [2, 2])


async def test_a_job_without_params_fails_and_says_so(bus: Bus) -> None:
    endpoint, job = await bus.make_endpoint(), await bus.make_job(params=None)
    failed = await bus.start_job(job.job_id, endpoint)
    assert isinstance(failed, inference.JobFailed)
    assert "no params at api_params_s3_upload_url" in (failed.reason or "")
    assert failed.started_at == failed.completed_at is not None
    assert await bus.waiting(endpoint.endpoint_id) == 0


async def test_the_newest_state_of_a_checkpoint_decides_whether_a_job_starts(bus: Bus) -> None:
    endpoint, checkpoint = await bus.make_endpoint(), await bus.make_checkpoint()
    first, second = await bus.make_job(checkpoint), await bus.make_job(checkpoint)
    created = replace(checkpoint, version=1, status="Creating")
    await bus.say(models.CheckpointCreated.of(created), "models")  # late: nothing changes
    assert isinstance(await bus.start_job(first.job_id, endpoint), inference.JobStarted)
    deleted = replace(checkpoint, version=3, deleted=True)
    await bus.say(models.CheckpointDeleted.of(deleted), "models")
    pool = await bus.pool()
    await until(
        lambda: pool.fetchval(
            "SELECT deleted FROM checkpoints WHERE checkpoint_id = $1", checkpoint.checkpoint_id
        )
    )
    await pool.close()
    answer = await bus.start_job(second.job_id, endpoint)
    assert isinstance(answer, Rejected)
    assert answer.code == "inference.checkpoint_gone"


async def test_the_jobs_of_a_deleted_endpoint_fail_at_once(bus: Bus) -> None:
    endpoint = await bus.make_endpoint("esd-short-lived")
    taken = await bus.run_job(endpoint, b"{}")
    await bus.ask(ReportJobStarted(job_id=taken, instance_id="i", attempt=1))
    waiting = await bus.run_job(endpoint, b"{}")
    gone = replace(endpoint, version=3, deleted=True)
    await bus.say(endpoints.EndpointDeleted.of(gone), "endpoints")
    for job_id in (taken, waiting):
        failed = await bus.end_of(job_id, seconds=3)
        assert failed.reason == 'endpoint "esd-short-lived" was deleted'
    await until(lambda: bus.waiting(endpoint.endpoint_id), 0)
    assert isinstance(await bus.ask(succeeded(taken)), Completed)
    assert bus.of(taken)[-1].status == "failed"
    late = await bus.make_job()
    answer = await bus.start_job(late.job_id, endpoint)
    assert isinstance(answer, Rejected), "its deletion is newer than what the caller saw"
    assert answer.code == "inference.no_endpoint"


async def test_no_job_is_left_behind_on_an_endpoint_deleted_while_jobs_start(bus: Bus) -> None:
    endpoint = await bus.make_endpoint()
    jobs = [await bus.make_job() for _ in range(12)]
    gone = endpoints.EndpointDeleted.of(replace(endpoint, version=3, deleted=True))
    starts = [asyncio.create_task(bus.start_job(job.job_id, endpoint)) for job in jobs]
    await asyncio.sleep(0.02)
    await bus.say(gone, "endpoints")
    answers = await asyncio.gather(*starts)
    started = [
        job.job_id
        for job, answer in zip(jobs, answers, strict=True)
        if isinstance(answer, inference.JobStarted)
    ]
    for job_id in started:
        assert (await bus.end_of(job_id, seconds=5)).status == "failed"


async def test_what_a_deleted_job_has_in_s3_goes_with_it_and_so_do_late_results(bus: Bus) -> None:
    endpoint = await bus.make_endpoint()
    job_id = await bus.run_job(endpoint, b"{}")
    await upload(bus, job_id)
    assert len(await bus.keys(job_id)) == 2
    deleted = await bus.ask(DeleteJobs(job_ids=[job_id, "unknown"]))
    assert isinstance(deleted, inference.JobDeleted)
    assert deleted.deleted
    await until(lambda: bus.keys(job_id), [])
    await upload(bus, job_id)  # by the worker that had it all the time
    assert isinstance(await bus.ask(succeeded(job_id)), Completed)
    await until(lambda: bus.keys(job_id), [])
    assert isinstance(await bus.ask(DeleteJobs(job_ids=[job_id])), Completed)


def cancel(job_id: str, username: str = "alice") -> CancelJob:
    return CancelJob(job_id=job_id, username=username)


async def test_a_job_that_nobody_wants_any_more_ends_at_once(bus: Bus) -> None:
    """Waiting for its start, in the queue, or in the hands of a worker."""
    endpoint = await bus.make_endpoint()
    unstarted = (await bus.make_job()).job_id
    queued, taken = [await bus.run_job(endpoint, b"{}") for _ in range(2)]
    await bus.ask(ReportJobStarted(job_id=taken, instance_id="i", attempt=1))
    for job_id in (unstarted, queued, taken):
        before = bus.of(job_id)[-1]
        cancelled = await bus.ask(cancel(job_id, "an administrator"))
        assert isinstance(cancelled, inference.JobCancelled)
        assert (cancelled.status, cancelled.cancelled) == ("failed", True)
        assert cancelled.reason == 'cancelled by "an administrator"'
        assert cancelled.version == before.version + 1
        assert cancelled.started_at
        assert cancelled.completed_at
        start = await bus.start_job(job_id, endpoint)
        assert isinstance(start, Rejected)
        assert start.code == "inference.not_startable"


async def test_who_cancels_twice_gets_the_same_job(bus: Bus) -> None:
    job = await bus.make_job()
    first = await bus.ask(cancel(job.job_id, "alice"))
    again = await bus.ask(cancel(job.job_id, "bob"))
    assert isinstance(first, inference.JobCancelled)
    assert again == inference.JobSynced.of(first)
    await bus.ask(ResyncInference())
    assert bus.of(job.job_id, inference.JobSynced)[-1].cancelled, "and it is remembered"


async def test_what_can_not_be_cancelled_says_why(bus: Bus) -> None:
    endpoint = await bus.make_endpoint()
    done, failed = [await bus.run_job(endpoint, b"{}") for _ in range(2)]
    await bus.ask(succeeded(done))
    await bus.ask(ReportJobFailed(job_id=failed, instance_id="i", attempt=1, reason="no GPU"))
    deleted = (await bus.make_job()).job_id
    await bus.ask(cancel(deleted))
    await bus.ask(DeleteJobs(job_ids=[deleted]))
    only = "only one that has not ended can be cancelled"
    for job_id, code, message in (
        (done, "inference.not_cancellable", f"inference {done} is succeed; {only}"),
        (failed, "inference.not_cancellable", f"inference {failed} is failed; {only}"),
        (deleted, "inference.not_found", f"inference with id {deleted} not found"),
        ("unknown", "inference.not_found", "inference with id unknown not found"),
    ):
        refused = await bus.ask(cancel(job_id))
        assert isinstance(refused, Rejected)
        assert (refused.code, refused.message) == (code, message)
    assert bus.of(failed)[-1].reason == "no GPU"


async def test_nothing_stays_of_a_cancelled_job_but_what_was_asked(bus: Bus) -> None:
    """Whenever its worker uploads, and whatever it reports then; once it is deleted, nothing."""
    job_id = await bus.run_job(await bus.make_endpoint(), b"{}")
    params = params_key("txt2img", job_id)
    await upload(bus, job_id)
    await bus.ask(cancel(job_id))
    await until(lambda: bus.keys(job_id), [params])
    failed = ReportJobFailed(job_id=job_id, instance_id="i", attempt=1, reason="interrupted")
    for late in (succeeded(job_id), failed):
        await upload(bus, job_id)
        assert isinstance(await bus.ask(late), Completed)
        await until(lambda: bus.keys(job_id), [params])
    assert [event.status for event in bus.of(job_id)] == ["created", "inprogress", "failed"]
    await bus.ask(DeleteJobs(job_ids=[job_id]))
    await until(lambda: bus.keys(job_id), [])


async def test_a_job_deleted_right_after_it_was_cancelled_is_gone_as_a_whole(bus: Bus) -> None:
    for _ in range(5):
        job_id = await bus.run_job(await bus.make_endpoint(), b"{}")
        await upload(bus, job_id)
        await bus.send(cancel(job_id))
        await bus.ask(DeleteJobs(job_ids=[job_id]))
        await until(lambda job_id=job_id: bus.keys(job_id), [])  # type: ignore[misc]


async def test_a_result_and_a_cancellation_that_come_together_have_one_outcome(bus: Bus) -> None:
    """Whichever is first: either a picture to fetch, or a cancelled job without one."""
    endpoint = await bus.make_endpoint()
    left: dict[str, list[str]] = {}
    for number in range(12):
        job_id = await bus.run_job(endpoint, b"{}")
        picture = await upload(bus, job_id)
        both = [succeeded(job_id), cancel(job_id)]
        if number % 2:
            both.reverse()
        await asyncio.gather(*map(bus.ask, both))
        (end,) = [event for event in bus.of(job_id) if event.status in ("succeed", "failed")]
        assert end.cancelled == (end.status == "failed")
        pictures = [] if end.cancelled else [picture]
        left[job_id] = [*pictures, params_key("txt2img", job_id)]

    async def there() -> dict[str, list[str]]:
        return {job_id: await bus.keys(job_id) for job_id in left}

    await until(there, left)


async def test_resync_tells_the_current_state_of_every_job(bus: Bus) -> None:
    endpoint = await bus.make_endpoint()
    job_id = await bus.run_job(endpoint, b"{}")
    await bus.ask(succeeded(job_id))
    await bus.ask(ResyncInference())
    (synced,) = bus.of(job_id, inference.JobSynced)
    assert (synced.version, synced.status) == (3, "succeed")
    assert (synced.seconds, synced.models) == ({"render": 1.5}, bus.of(job_id)[0].models)
