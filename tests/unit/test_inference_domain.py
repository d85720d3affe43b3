"""The rules of the ledger, without servers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.inference.domain import (
    START_SECONDS,
    Checkpoint,
    Endpoint,
    Job,
    Starter,
    bounded,
    busy_seconds,
    choose_endpoint,
    locate_models,
)
from shared.contracts import inference
from shared.contracts.inference import UsedModel
from shared.contracts.models import CheckpointFile
from shared.errors import Rejected

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ALICE = Starter(username="alice", roles=["Designer", "byoc"])


def make_job(**fields: object) -> Job:
    known = {
        "job_id": "j",
        "owner": "alice",
        "inference_type": "Async",
        "task_type": "txt2img",
        "models": [],
        "bucket": "b",
        "params_key": "k",
        "created_at": NOW,
    }
    return Job(**(known | fields))  # type: ignore[arg-type]


def make_endpoint(name: str, **fields: object) -> Endpoint:
    known = {
        "endpoint_id": name,
        "endpoint_name": name,
        "endpoint_type": "Async",
        "instance_type": "local.cpu",
        "endpoint_status": "InService",
        "current_instance_count": 1,
        "error": None,
        "roles": ["byoc"],
        "creator": "admin",
        "version": 1,
        "deleted": False,
    }
    return Endpoint(**(known | fields))  # type: ignore[arg-type]


def make_checkpoint(**fields: object) -> Checkpoint:
    known = {
        "checkpoint_id": "c",
        "type": "Lora",
        "status": "Active",
        "bucket": "models",
        "files": [CheckpointFile(filename="a.safetensors", key="new/a.safetensors", size=7)],
        "version": 1,
        "deleted": False,
    }
    return Checkpoint(**(known | fields))  # type: ignore[arg-type]


def test_a_job_says_when_each_of_its_states_began_and_counts_its_versions() -> None:
    uploaded, begun = NOW - timedelta(seconds=3), NOW + timedelta(seconds=2)
    started = make_job().start(make_endpoint("e"), ALICE, params_at=uploaded, now=NOW)
    taken = started.take(2, instance_id="i", seconds={"fetch": 0.5}, now=begun)
    assert taken.seconds == {"fetch": 0.5}
    done = taken.succeed(
        attempt=1,
        image_names=["image_0.png"],
        info_name="j_param.json",
        seconds={"render": 1.5},
        warnings=[],
        now=NOW + timedelta(seconds=9),
    )
    event = inference.JobSucceeded.of(done)
    assert (event.version, event.status, event.attempt) == (4, "succeed", 2)
    assert (event.started_at, event.completed_at) == (NOW, NOW + timedelta(seconds=9))
    assert (event.params_at, event.taken_at, event.instance_id) == (uploaded, begun, "i")
    assert event.seconds == {"render": 1.5}
    assert (event.endpoint_name, event.instance_type) == ("e", "local.cpu")


def test_a_job_that_fails_before_it_runs_has_all_its_times() -> None:
    failed = make_job().fail("no params", now=NOW)
    assert (failed.started_at, failed.completed_at, failed.reason) == (NOW, NOW, "no params")


@pytest.mark.parametrize(
    "job",
    [
        make_job(),
        make_job(status="succeed"),
        make_job(status="failed"),
        make_job(status="inprogress").cancel("bob", now=NOW),
        make_job(status="inprogress", deleted=True),
    ],
)
def test_reports_count_only_while_a_job_is_in_progress(job: Job) -> None:
    assert not job.running


@pytest.mark.parametrize("status", ["inprogress", "succeed", "failed"])
def test_a_job_starts_once(status: str) -> None:
    with pytest.raises(Rejected, match=f"{status}; only a created one"):
        make_job(status=status).check_startable()


def test_a_deleted_job_is_not_found() -> None:
    deleted = make_job(deleted=True)
    for check in (deleted.check_startable, deleted.check_cancellable):
        with pytest.raises(Rejected, match="not found"):
            check()


@pytest.mark.parametrize("job", [make_job(), make_job(status="inprogress", started_at=NOW)])
def test_a_cancelled_job_has_failed_and_says_who_wanted_it_no_more(job: Job) -> None:
    job.check_cancellable()
    later = NOW + timedelta(seconds=9)
    cancelled = job.cancel("bob", now=later)
    assert (cancelled.status, cancelled.cancelled) == ("failed", True)
    assert cancelled.reason == 'cancelled by "bob"'
    assert (cancelled.started_at, cancelled.completed_at) == (job.started_at or later, later)
    assert cancelled.version == job.version + 1
    assert inference.JobCancelled.of(cancelled).cancelled
    cancelled.check_cancellable()  # once more is no error


@pytest.mark.parametrize("status", ["succeed", "failed"])
def test_what_has_ended_can_not_be_cancelled(status: str) -> None:
    with pytest.raises(Rejected, match=f"j is {status}; only one that has not ended can be"):
        make_job(status=status).check_cancellable()


def test_only_what_nobody_looks_at_is_unwanted() -> None:
    """The owner of a cancelled job may still read what it was asked to do."""
    job = make_job(params_key="txt2img/infer_v2/j/api_param.json")
    cancelled = job.cancel("alice", now=NOW)
    everything = ["out/j/", "txt2img/infer_v2/j/"]
    assert (job.unwanted, job.fail("no GPU", now=NOW).unwanted) == ([], [])
    assert cancelled.unwanted == ["out/j/"]
    assert (job.delete().unwanted, cancelled.delete().unwanted) == (everything, everything)


def chosen(
    endpoints: list[Endpoint], unfinished: dict[str, int], **paces: float
) -> Endpoint | None:
    return choose_endpoint(endpoints, "Async", ALICE, unfinished, paces)


def test_the_endpoint_with_the_fewest_jobs_per_instance_gets_the_next() -> None:
    small, large = make_endpoint("small"), make_endpoint("large", current_instance_count=4)
    assert chosen([small, large], {"small": 1, "large": 3}) is large
    assert chosen([small, large], {"small": 1, "large": 5}) is small


def test_a_fast_endpoint_gets_more_than_a_slow_one() -> None:
    slow, fast = make_endpoint("a-slow"), make_endpoint("fast")
    paces = {"a-slow": 8.0, "fast": 2.0}
    assert chosen([slow, fast], {"a-slow": 1, "fast": 3}, **paces) is fast
    assert chosen([slow, fast], {"a-slow": 1, "fast": 5}, **paces) is slow
    assert chosen([slow, fast], {}, **paces) is fast, "both are free"
    new = make_endpoint("new")
    assert chosen([slow, new], {"a-slow": 1, "new": 1}, **{"a-slow": 8.0}) is slow, "it is usual"


def test_an_endpoint_that_sleeps_is_woken_when_that_is_faster() -> None:
    awake, asleep = make_endpoint("awake"), make_endpoint("asleep", current_instance_count=0)
    many = int(START_SECONDS) + 1
    assert chosen([awake, asleep], {"awake": many - 2}) is awake
    assert chosen([awake, asleep], {"awake": many}) is asleep
    assert chosen([asleep], {}) is asleep


def test_only_who_may_use_an_endpoint_gets_it() -> None:
    theirs = make_endpoint("theirs", roles=["IT Operator"])
    assert chosen([theirs], {}) is None
    assert chosen([make_endpoint("hers", roles=[], creator="alice")], {}) is not None
    administrator = Starter(username="root", administrator=True)
    assert choose_endpoint([theirs], "Async", administrator, {}, {}) is theirs


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_a_job_takes_the_time_since_the_one_before_it() -> None:
    job = make_job(started_at=NOW)

    def seconds(last_end: datetime | None, busy: int = 1, worked: float = 99) -> float:
        return busy_seconds(job, last_end=last_end, busy=busy, worked=worked, now=after(10))

    assert seconds(None) == 10
    assert seconds(after(-60)) == 10, "nothing was done before it was started"
    assert seconds(after(6)) == 4
    assert seconds(after(6), busy=3) == 12, "three instances took turns"
    assert seconds(after(6), busy=3, worked=5) == 5
    assert seconds(after(11)) == 0


@pytest.mark.parametrize(
    "useless",
    [
        make_endpoint("e", deleted=True),
        make_endpoint("e", endpoint_status="Creating"),
        make_endpoint("e", endpoint_status="Failed"),
        make_endpoint("e", endpoint_status="Deleting"),
        make_endpoint("e", endpoint_type="Real-time"),
    ],
)
def test_no_job_goes_to_an_endpoint_that_can_not_do_it(useless: Endpoint) -> None:
    assert chosen([useless], {}) is None


def test_an_endpoint_whose_workers_are_away_is_the_last_choice() -> None:
    away, busy = make_endpoint("away", endpoint_status="Updating"), make_endpoint("busy")
    assert chosen([away, busy], {"busy": 50}) is busy
    assert chosen([away], {}) is away


def test_a_renamed_checkpoint_is_found_at_its_new_place() -> None:
    model = UsedModel(type="Lora", name="old.safetensors", checkpoint_id="c", key="old")
    (found,) = locate_models([model], {"c": make_checkpoint()})
    assert (found.name, found.bucket, found.key, found.size) == (
        "old.safetensors",
        "models",
        "new/a.safetensors",
        7,
    )


@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"c": make_checkpoint(deleted=True)},
        {"c": make_checkpoint(status="Disabled")},
        {"c": make_checkpoint(files=[])},
    ],
)
def test_a_job_can_not_start_with_a_checkpoint_that_is_gone(gone: dict[str, Checkpoint]) -> None:
    model = UsedModel(type="Lora", name="old.safetensors", checkpoint_id="c")
    with pytest.raises(Rejected, match=r"old.safetensors, type Lora is not found"):
        locate_models([model], gone)


def test_models_without_a_file_need_no_checkpoint() -> None:
    automatic = UsedModel(type="VAE", name="Automatic")
    assert locate_models([automatic], {}) == [automatic]


def test_an_endpoint_that_ended_says_why() -> None:
    assert make_endpoint("e").end is None
    assert make_endpoint("e", deleted=True).end == 'endpoint "e" was deleted'
    failed = make_endpoint("e", endpoint_status="Failed", error="no GPU")
    assert failed.end == 'endpoint "e" failed: no GPU'


def test_what_was_begun_stays_with_an_endpoint_that_is_being_deleted() -> None:
    waiting, begun = make_job(), make_job(attempt=1)
    for endpoint, left in (
        (make_endpoint("e"), (False, False)),
        (make_endpoint("e", endpoint_status="Deleting"), (True, False)),
        (make_endpoint("e", endpoint_status="Deleted", deleted=True), (True, True)),
        (make_endpoint("e", endpoint_status="Failed"), (True, True)),
    ):
        assert (endpoint.has_left(waiting), endpoint.has_left(begun)) == left


def test_a_moved_job_keeps_its_attempts() -> None:
    moved = make_job(attempt=2, status="inprogress").move(make_endpoint("other"))
    event = inference.JobMoved.of(moved)
    assert (event.endpoint_name, event.attempt, event.version) == ("other", 2, 2)


# Warnings


def test_a_job_keeps_as_many_warnings_as_an_event_holds() -> None:
    few = [f"field_{number}: no effect here" for number in range(100)]
    assert bounded(few) == few
    many = bounded([*few, *few, "x"])
    assert many == [*few[:99], "… and 102 more"]
    assert bounded(many) == many
    (long,) = bounded(["猫" * 1000])
    assert long == "猫" * 299 + "…"
    assert bounded([]) == []
