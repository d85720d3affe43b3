"""The ledger on real NATS, Postgres and S3. The test plays the workers and the other services."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

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
    UsedModel,
)
from shared.objects import params_key
from tests.integration.inference_bus import NOW, Bus, until


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


async def test_models_that_only_the_params_name_go_with_the_job_wherever_it_moves(
    bus: Bus,
) -> None:
    """The caller has read the params, so nobody looks for them in S3, where there are none here."""
    listed, named = await bus.make_checkpoint(), await bus.make_checkpoint()
    old = await bus.make_endpoint(endpoint_type="Real-time", creator="nina")
    new = await bus.make_endpoint(endpoint_type="Real-time", creator="nina")
    create = await bus.make_job(listed, params=None, inference_type="Real-time")
    file = named.files[0]
    used = UsedModel(
        type=named.type,
        name=file.filename,
        checkpoint_id=named.checkpoint_id,
        bucket=named.bucket,
        key=file.key,
        size=file.size,
        from_params=True,
    )
    more: dict[str, Any] = {"models": [used], "checkpoints": [named], "params_at": NOW}
    started = await bus.start_job(create.job_id, old, username="nina", **more)
    assert isinstance(started, inference.JobStarted)
    assert started.params_at == NOW
    assert started.models == [*create.models, used]
    assert (await bus.work_of(old)).models == started.models
    assert isinstance(await bus.ask(create), inference.JobSynced), "it is the one created before"
    await bus.say(endpoints.EndpointInService.of(new), "endpoints")
    await delete(bus, old)
    moved = await bus.wait(inference.JobMoved, lambda job, _: job.job_id == create.job_id)
    assert moved.models == started.models
    assert (await bus.work_of(new)).models == started.models


async def test_a_model_of_the_params_that_is_gone_starts_nothing(bus: Bus) -> None:
    endpoint, checkpoint = await bus.make_endpoint(), await bus.make_checkpoint()
    job = await bus.make_job()
    gone = replace(checkpoint, status="Disabled")
    used = UsedModel(
        type=gone.type,
        name="model.safetensors",
        checkpoint_id=gone.checkpoint_id,
        from_params=True,
    )
    refused = await bus.start_job(
        job.job_id, endpoint, models=[used], checkpoints=[gone], params_at=NOW
    )
    assert isinstance(refused, Rejected)
    assert refused.code == "inference.checkpoint_gone"
    assert isinstance(await bus.start_job(job.job_id, endpoint), inference.JobStarted)


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


async def delete(bus: Bus, endpoint: endpoints.Endpoint) -> None:
    """As the endpoints service would tell it when no worker is left."""
    gone = replace(endpoint, version=4, endpoint_status="Deleted", deleted=True)
    await bus.say(endpoints.EndpointDeleted.of(gone), "endpoints")


THEIRS: dict[str, Any] = {"endpoint_name": "esd-theirs", "roles": ["IT Operator"], "creator": "bob"}


async def test_the_jobs_of_a_deleted_endpoint_fail_if_no_other_can_take_them(bus: Bus) -> None:
    """Those that a worker has begun when that worker is gone, the others at once."""
    endpoint = await bus.make_endpoint("esd-short-lived", creator="dora")
    await bus.say(endpoints.EndpointInService.of(await bus.make_endpoint(**THEIRS)), "endpoints")
    taken = await bus.run_job(endpoint, b"{}", username="dora")
    await bus.ask(ReportJobStarted(job_id=taken, instance_id="i", attempt=1))
    waiting = await bus.run_job(endpoint, b"{}", username="dora")
    deleting = replace(endpoint, version=3, endpoint_status="Deleting")
    await bus.say(endpoints.EndpointChanged.of(deleting), "endpoints")
    reason = 'endpoint "esd-short-lived" was deleted; no other endpoint can take the job'
    assert (await bus.end_of(waiting, seconds=3)).reason == reason
    assert bus.of(taken)[-1].status == "inprogress"
    await delete(bus, endpoint)
    assert (await bus.end_of(taken, seconds=3)).reason == reason
    await until(lambda: bus.waiting(endpoint.endpoint_id), 0)
    assert isinstance(await bus.ask(succeeded(taken)), Completed)
    assert bus.of(taken)[-1].status == "failed"
    late = await bus.make_job()
    answer = await bus.start_job(late.job_id, endpoint, username="dora")
    assert isinstance(answer, Rejected), "its deletion is newer than what the caller saw"
    assert answer.code == "inference.no_endpoint"


async def test_waiting_jobs_move_to_another_endpoint_that_their_user_may_use(bus: Bus) -> None:
    """And what their workers had begun, too, if they did not finish it."""
    kind = "Real-time"
    old = await bus.make_endpoint("esd-old", endpoint_type=kind, roles=["Designer"])
    theirs = await bus.make_endpoint(endpoint_type=kind, **THEIRS)
    new = await bus.make_endpoint("esd-new", endpoint_type=kind, roles=["Designer"], creator="bob")
    for pool in (new, theirs):
        await bus.say(endpoints.EndpointInService.of(pool), "endpoints")
    begun, waiting = [await bus.make_job(inference_type=kind) for _ in range(2)]
    for job in (begun, waiting):
        assert await bus.start_job(job.job_id, old, username="emil", roles=["Designer"])
    await bus.ask(ReportJobStarted(job_id=begun.job_id, instance_id="i", attempt=1))
    deleting = replace(old, version=3, endpoint_status="Deleting")
    await bus.say(endpoints.EndpointChanged.of(deleting), "endpoints")

    moved = await bus.wait(inference.JobMoved, lambda job, _: job.job_id == waiting.job_id)
    assert (moved.endpoint_name, moved.status, moved.attempt) == ("esd-new", "inprogress", 0)
    await until(lambda: bus.waiting(new.endpoint_id), 1)
    late = ReportJobStarted(
        job_id=waiting.job_id, instance_id="i", attempt=1, endpoint_id=old.endpoint_id
    )
    await bus.ask(late)
    assert bus.of(waiting.job_id)[-1].attempt == 0, "that worker hears that it was moved"
    assert bus.of(begun.job_id)[-1].endpoint_name == "esd-old"
    await delete(bus, old)
    moved = await bus.wait(inference.JobMoved, lambda job, _: job.job_id == begun.job_id)
    assert (moved.endpoint_name, moved.attempt) == ("esd-new", 1)
    done = await bus.ask(succeeded(begun.job_id, attempt=2))
    assert isinstance(done, inference.JobSucceeded)


async def test_the_jobs_of_a_failed_endpoint_move_and_those_of_two_that_end_together(
    bus: Bus,
) -> None:
    kind = "Real-time"
    first, second, third = [
        await bus.make_endpoint(f"esd-{n}", endpoint_type=kind, creator="carol", roles=["three"])
        for n in ("first", "second", "third")
    ]
    jobs = [await bus.make_job(inference_type=kind) for _ in range(12)]
    for number, job in enumerate(jobs):
        await bus.start_job(
            job.job_id, (first, second)[number % 2], username="frank", roles=["three"]
        )
    await bus.say(endpoints.EndpointInService.of(third), "endpoints")
    failed = replace(first, version=3, endpoint_status="Failed", error="no GPU")
    await asyncio.gather(
        bus.say(endpoints.EndpointFailed.of(failed), "endpoints"), delete(bus, second)
    )
    await until(lambda: bus.waiting(third.endpoint_id), 12)
    assert {bus.of(job.job_id)[-1].endpoint_name for job in jobs} == {"esd-third"}


async def test_who_may_not_use_an_endpoint_can_not_start_on_it_whatever_was_seen(bus: Bus) -> None:
    """Its roles were taken away, and the gateway had not heard of it."""
    seen = await bus.make_endpoint(roles=["Designer"], creator="bob")
    narrowed = replace(seen, version=3, roles=["IT Operator"])
    await bus.say(endpoints.EndpointChanged.of(narrowed), "endpoints")
    await until(lambda: bus.knows(narrowed))
    job = await bus.make_job()
    answer = await bus.start_job(job.job_id, seen, roles=["Designer"])
    assert isinstance(answer, Rejected)
    assert answer.code == "inference.no_endpoint"


async def test_the_faster_endpoint_gets_more_jobs(bus: Bus) -> None:
    slow, fast = await bus.make_endpoint("esd-a"), await bus.make_endpoint("esd-b")
    for pool, seconds in ((slow, 0.8), (fast, 0.1)):
        job_id = await bus.run_job(pool, b"{}")
        await asyncio.sleep(seconds)
        await bus.ask(succeeded(job_id))
    for _ in range(8):
        await bus.start_job((await bus.make_job()).job_id, slow, fast)
    assert await bus.waiting(fast.endpoint_id) - await bus.waiting(slow.endpoint_id) >= 5


async def test_no_job_is_left_behind_on_an_endpoint_deleted_while_jobs_start(bus: Bus) -> None:
    endpoint = await bus.make_endpoint(creator="gina")
    jobs = [await bus.make_job() for _ in range(12)]
    deleting = replace(endpoint, version=3, endpoint_status="Deleting")
    starts = [
        asyncio.create_task(bus.start_job(job.job_id, endpoint, username="gina")) for job in jobs
    ]
    await asyncio.sleep(0.02)
    await bus.say(endpoints.EndpointChanged.of(deleting), "endpoints")
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
