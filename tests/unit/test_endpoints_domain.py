"""What a user would see go wrong: a status that lies, a launch that loops, a quota that leaks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from msgspec.structs import replace

from services.endpoints.domain import (
    MAX_CRASHES,
    Endpoint,
    Instance,
    InstanceType,
    InstanceTypes,
    Seen,
    event_after,
    make_plan,
)
from services.endpoints.settings import Settings
from shared.contracts import endpoints
from shared.errors import Rejected

NOW = datetime(2024, 1, 30, 8, 0, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
TYPES = InstanceTypes(
    types={"cpu": InstanceType(device="cpu", max=4), "gpu": InstanceType(device="cuda", max=8)},
    default="cpu",
)


def make_endpoint(**fields: object) -> Endpoint:
    given = {
        "endpoint_id": "e1",
        "endpoint_name": "esd-async-test",
        "endpoint_type": "Async",
        "instance_type": "ml.g4dn.xlarge",
        "autoscaling": False,
        "max_instance_number": 1,
        "roles": ["byoc"],
        "creator": "admin",
        "start_time": NOW,
    }
    return Endpoint(**{**given, **fields})  # type: ignore[arg-type]


def make_instance(instance_id: str = "i1", **fields: object) -> Instance:
    given = {"instance_id": instance_id, "endpoint_id": "e1", "started_at": NOW}
    return Instance(**{**given, **fields})  # type: ignore[arg-type]


def alive(instance_id: str, endpoint_id: str = "e1") -> Seen:
    return Seen(instance_id=instance_id, endpoint_id=endpoint_id, alive=True)


def dead(instance_id: str, crash: str | None) -> Seen:
    return Seen(instance_id=instance_id, endpoint_id="e1", alive=False, crash=crash)


def plan_for(
    endpoint: Endpoint, instances: list[Instance], *seen: Seen, now: datetime = NOW
) -> tuple[list[tuple[str, str | None]], list[str], int, bool]:
    """(instance, crash) to end, workers to stop, how many to start, whether to release."""
    plan = make_plan(
        [endpoint],
        instances,
        {s.instance_id: s for s in seen},
        now=now,
        ready_within=timedelta(minutes=5),
    )
    ended = [(ending.instance.instance_id, ending.crash) for ending in plan.end]
    return ended, plan.stop, sum(count for _, count in plan.start), bool(plan.release)


def test_status_follows_the_number_of_ready_instances() -> None:
    created = make_endpoint(max_instance_number=2)
    one = created.count_ready(1, now=NOW)
    two = one.count_ready(2, now=LATER)
    none = two.count_ready(0, now=LATER)
    again = none.count_ready(1, now=LATER)

    steps = [created, one, two, none, again]
    assert [(s.endpoint_status, s.current_instance_count, s.version) for s in steps] == [
        ("Creating", 0, 1),
        ("InService", 1, 2),
        ("InService", 2, 3),
        ("Updating", 0, 4),
        ("InService", 1, 5),
    ]
    assert again.end_time == NOW, "end_time is when the deployment ended, not a later recovery"
    assert created.count_ready(0, now=NOW) is created, "nothing changed: no event, no version"
    events = [type(event_after(a, b)) for a, b in pairwise(steps)]
    assert events == [
        endpoints.EndpointInService,
        endpoints.EndpointChanged,
        endpoints.EndpointChanged,
        endpoints.EndpointInService,
    ]


def test_crashes_before_the_first_ready_one_back_off_and_then_fail() -> None:
    endpoint, pauses = make_endpoint(), []
    for number in range(1, MAX_CRASHES):
        endpoint = endpoint.note_crash(make_instance(), f"crash {number}", now=NOW)
        assert endpoint.retry_at
        pauses.append((endpoint.retry_at - NOW).total_seconds())
    assert pauses == [0.5, 1, 2, 4]
    assert (endpoint.endpoint_status, endpoint.version) == ("Creating", 1)

    failed = endpoint.note_crash(make_instance(), "the last straw", now=LATER)
    assert (failed.endpoint_status, failed.error) == ("Failed", "the last straw")
    assert (failed.end_time, failed.wanted_count) == (LATER, 0)
    assert isinstance(event_after(endpoint, failed), endpoints.EndpointFailed)


def test_an_endpoint_that_was_in_service_never_gives_up() -> None:
    endpoint = make_endpoint().count_ready(1, now=NOW)
    for _ in range(20):
        endpoint = endpoint.note_crash(make_instance(), "out of memory", now=NOW)
    assert endpoint.endpoint_status == "InService"
    assert endpoint.retry_at == NOW + timedelta(seconds=30), "but it waits between its attempts"

    settled = make_instance(ready_at=NOW)
    endpoint = endpoint.note_crash(settled, "killed", now=LATER)
    assert (endpoint.crashes, endpoint.retry_at) == (0, None), "one that worked is replaced at once"


def test_quota_is_shared_by_all_names_of_one_type_and_freed_by_deletion() -> None:
    mine = make_endpoint(max_instance_number=3)
    TYPES.check_quota("cpu", 1, [mine])
    TYPES.check_quota("gpu", 8, [mine])
    with pytest.raises(Rejected) as refused:
        TYPES.check_quota("ml.g5.2xlarge", 2, [mine])
    assert refused.value.code == "endpoints.quota"
    assert "2 instances of ml.g5.2xlarge wanted, 4 allowed, 3 in use" in refused.value.message
    TYPES.check_quota("cpu", 4, [mine.delete()])


def test_an_unknown_type_is_refused_with_those_that_exist() -> None:
    with pytest.raises(Rejected, match=r"tpu is unknown here; known: cpu, gpu"):
        TYPES.check_quota("tpu", 1, [])


def test_what_has_not_changed_is_left_alone() -> None:
    ready = make_instance(status="ready", ready_at=NOW)
    assert plan_for(make_endpoint(), [ready], alive("i1")) == ([], [], 0, False)


def test_missing_instances_are_started_but_not_before_the_pause_is_over() -> None:
    endpoint = make_endpoint(max_instance_number=3, retry_at=LATER)
    assert plan_for(endpoint, [make_instance()], alive("i1"), now=NOW)[2] == 0
    assert plan_for(endpoint, [make_instance()], alive("i1"), now=LATER)[2] == 2


def test_a_worker_that_nobody_wants_is_stopped() -> None:
    assert plan_for(make_endpoint(), [make_instance()], alive("i1"), alive("orphan"))[1] == [
        "orphan"
    ]


def test_only_a_death_that_was_watched_counts_as_a_crash() -> None:
    endpoint, instance = make_endpoint(), make_instance()
    assert plan_for(endpoint, [instance], dead("i1", "exit code 3"))[0] == [("i1", "exit code 3")]
    assert plan_for(endpoint, [instance])[0] == [("i1", None)], "gone with a reboot"
    stopping = replace(instance, status="stopping")
    assert plan_for(endpoint, [stopping], dead("i1", "exit code 0"))[0] == [("i1", None)]


def test_a_worker_that_fails_or_never_gets_ready_is_given_up_alive() -> None:
    broken = make_instance(status="failed", error="no such device")
    assert plan_for(make_endpoint(), [broken], alive("i1"))[0] == [("i1", "no such device")]
    ((_, reason),) = plan_for(
        make_endpoint(), [make_instance()], alive("i1"), now=NOW + timedelta(minutes=6)
    )[0]
    assert reason == "the worker was not ready within 300 s"


def test_a_deleted_endpoint_is_released_once_its_last_worker_is_gone() -> None:
    deleted = make_endpoint().delete()
    assert plan_for(deleted, [], alive("i1")) == ([], ["i1"], 0, False)
    assert plan_for(deleted, [], dead("i1", None)) == ([], [], 0, True)


def test_deleting_tells_the_world_a_tombstone() -> None:
    before = make_endpoint().count_ready(1, now=NOW)
    event = event_after(before, before.delete())
    assert isinstance(event, endpoints.EndpointDeleted)
    assert (event.deleted, event.endpoint_status, event.current_instance_count) == (
        True,
        "Deleting",
        0,
    )


def test_instance_types_come_from_json_or_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def settings(**fields: str) -> Settings:
        return Settings(
            nats_url="",
            nats_user="",
            nats_password="",
            postgres_url="",
            run=str(tmp_path),
            s3_url="",
            worker_nats_password="",
            worker_s3_access_key="",
            worker_s3_secret_key="",
            worker_cache="",
            **fields,  # type: ignore[arg-type]
        )

    file = tmp_path / "types.json"
    file.write_text('{"cpu": {"device": "cpu", "max": 1}, "ml.p4": {"device": "cuda", "max": 2}}')
    types = settings(instance_types=str(file)).known_types()
    assert types.get("ml.p4").device == "cuda"
    assert types.get("ml.g5.2xlarge").max == 1
    assert settings().known_types().get("gpu").device == "cuda"
    with pytest.raises(SystemExit, match="DARKROOM_INSTANCE_TYPES"):
        settings(instance_types='{"cpu": {"devices": "cpu", "max": 1}}').known_types()
    with pytest.raises(SystemExit, match="DARKROOM_DEFAULT_INSTANCE_TYPE"):
        settings(default_instance_type="a100").known_types()
