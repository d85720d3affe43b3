"""What a user would see go wrong: a status that lies, a launch that loops, a quota that leaks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from msgspec.structs import replace

from services.endpoints.domain import (
    CRASHES_IN_SERVICE,
    MAX_CRASHES,
    Endpoint,
    Instance,
    InstanceType,
    InstanceTypes,
    Patience,
    Plan,
    Pulse,
    Seen,
    bounds,
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
        "scaled_to": fields.get("max_instance_number", 1),
        "min_instance_number": fields.get("max_instance_number", 1),
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


PATIENCE = Patience(
    ready=timedelta(minutes=5),
    drain=timedelta(minutes=2),
    stop=timedelta(seconds=10),
    silent=timedelta(seconds=15),
)


def make_the_plan(
    endpoint: Endpoint,
    instances: list[Instance],
    *seen: Seen,
    now: datetime = NOW,
    pulses: dict[str, Pulse] | None = None,
) -> Plan:
    observed = {s.instance_id: s for s in seen}
    return make_plan([endpoint], instances, observed, pulses or {}, now=now, patience=PATIENCE)


def plan_for(
    endpoint: Endpoint, instances: list[Instance], *seen: Seen, now: datetime = NOW
) -> tuple[list[tuple[str, str | None]], list[str], int, bool]:
    """(instance, crash) to end, workers to stop, how many to start, whether to release."""
    plan = make_the_plan(endpoint, instances, *seen, now=now)
    ended = [(ending.instance.instance_id, ending.crash) for ending in plan.end]
    return ended, list(plan.stop), sum(count for _, count in plan.start), bool(plan.release)


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


def crash(endpoint: Endpoint, reason: str, *, ready: int = 0) -> tuple[Endpoint, float]:
    """Of an instance that was started as soon as it might be; and the pause before the next."""
    now = endpoint.retry_at or NOW
    crashed = endpoint.note_crash(make_instance(started_at=now), reason, ready=ready, now=now)
    return crashed, ((crashed.retry_at or now) - now).total_seconds()


def test_instances_that_crash_together_count_once() -> None:
    endpoint = make_endpoint(max_instance_number=8)
    for _ in range(8):
        endpoint = endpoint.note_crash(make_instance(), "no GPU", ready=0, now=NOW)
    assert (endpoint.crashes, endpoint.endpoint_status) == (1, "Creating")


def test_crashes_before_the_first_ready_one_back_off_and_then_fail() -> None:
    endpoint, pauses = make_endpoint(), []
    for number in range(1, MAX_CRASHES):
        endpoint, pause = crash(endpoint, f"crash {number}")
        pauses.append(pause)
    assert pauses == [0.5, 1, 2, 4]
    assert (endpoint.endpoint_status, endpoint.version) == ("Creating", 1)

    last = make_instance(started_at=LATER)
    failed = endpoint.note_crash(last, "the last straw", ready=0, now=LATER)
    assert (failed.endpoint_status, failed.error) == ("Failed", "the last straw")
    assert (failed.end_time, failed.wanted_count) == (LATER, 0)
    assert isinstance(event_after(endpoint, failed), endpoints.EndpointFailed)


def test_an_endpoint_that_was_in_service_gets_more_time_before_it_fails() -> None:
    endpoint, pauses = make_endpoint().count_ready(1, now=NOW).count_ready(0, now=NOW), []
    for _ in range(CRASHES_IN_SERVICE - 1):
        endpoint, pause = crash(endpoint, "out of memory")
        pauses.append(pause)
    assert endpoint.endpoint_status == "Updating"
    assert pauses[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30], "it waits between its attempts"
    assert sum(pauses) > 500
    failed, _ = crash(endpoint, "out of memory")
    assert (failed.endpoint_status, failed.error) == ("Failed", "out of memory")


def test_crashes_that_the_endpoint_has_recovered_from_are_forgotten() -> None:
    endpoint = make_endpoint(max_instance_number=3).count_ready(2, now=NOW)
    for _ in range(5):
        endpoint, _pause = crash(endpoint, "killed", ready=2)
    now = endpoint.retry_at or NOW
    young = make_instance(started_at=now)
    again = endpoint.note_crash(young, "killed", ready=2, recovered=True, now=now)
    assert again.crashes == 1


def test_as_long_as_one_instance_works_the_crashes_of_another_end_nothing() -> None:
    endpoint = make_endpoint(max_instance_number=2).count_ready(1, now=NOW)
    for _ in range(3 * CRASHES_IN_SERVICE):
        endpoint, pause = crash(endpoint, "no GPU left", ready=1)
    assert endpoint.endpoint_status == "InService"
    assert pause == 30

    settled = make_instance(ready_at=NOW)
    endpoint = endpoint.note_crash(settled, "killed", ready=1, now=LATER)
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


def test_a_worker_that_fails_has_time_to_end_and_its_last_words_are_kept() -> None:
    """Nobody takes its place before that: how it ends says whether another would do better."""
    broken = make_instance().report("failed", device="", error="no such device", now=NOW)
    assert plan_for(make_endpoint(), [broken], alive("i1")) == ([], [], 0, False)
    assert plan_for(make_endpoint(), [broken], alive("i1"), now=LATER) == ([], ["i1"], 0, False)
    ended = dead("i1", "the worker exited with code 1: Traceback")
    assert plan_for(make_endpoint(), [broken], ended)[0] == [
        ("i1", "no such device; the worker exited with code 1: Traceback")
    ]


def test_a_worker_that_never_gets_ready_is_given_up_alive() -> None:
    ((_, reason),) = plan_for(
        make_endpoint(), [make_instance()], alive("i1"), now=NOW + timedelta(minutes=6)
    )[0]
    assert reason == "the worker was not ready within 300 s"


def test_a_worker_that_falls_silent_is_given_up() -> None:
    ready = make_instance(status="ready", ready_at=NOW)

    def endings(seconds: int) -> list[str | None]:
        pulses = {"i1": Pulse(timedelta(seconds=seconds), 1)}
        plan = make_the_plan(make_endpoint(), [ready], alive("i1"), pulses=pulses)
        return [ending.crash for ending in plan.end]

    assert endings(14) == []
    assert endings(16) == ["the worker said nothing for 15 s"]


def test_what_is_given_up_may_finish_and_is_replaced_within_the_quota() -> None:
    """Until `stop_by`; then it has no more time."""
    endpoint = make_endpoint(max_instance_number=2)
    going = make_instance(status="ready", ready_at=NOW, stop_by=LATER)
    assert make_the_plan(endpoint, [going], alive("i1")).stop == {"i1": PATIENCE.drain}
    late = make_the_plan(endpoint, [going], alive("i1"), now=LATER)
    assert late.stop == {"i1": timedelta(0)}
    assert [count for _, count in late.start] == [1], "the other one has its device still"
    assert plan_for(endpoint, [going], dead("i1", "killed by SIGKILL"))[0] == [("i1", None)]


def test_scaling_in_gives_up_who_has_the_least_to_do() -> None:
    endpoint = make_endpoint(max_instance_number=4).scale(1, now=NOW)
    busy, idle, newer = (
        make_instance(name, status="ready", started_at=NOW + timedelta(seconds=number))
        for number, name in enumerate(("busy", "idle", "newer"))
    )
    starting = make_instance("starting")
    seen = [alive(i.instance_id) for i in (busy, idle, newer, starting)]
    pulses = {"busy": Pulse(jobs=2)}
    plan = make_the_plan(endpoint, [busy, idle, newer, starting], *seen, pulses=pulses)
    assert [i.instance_id for i in plan.retire] == ["starting", "newer", "idle"]
    assert not plan.start


def test_an_endpoint_without_work_sleeps_in_service_and_wakes() -> None:
    one = make_endpoint(autoscaling=True, min_instance_number=0).count_ready(1, now=NOW)
    tired = one.scale(0, now=LATER)
    asleep = tired.count_ready(0, now=LATER)
    assert (asleep.endpoint_status, asleep.current_instance_count) == ("InService", 0)
    waking = asleep.scale(1, now=LATER)
    assert (waking.endpoint_status, waking.wanted_count) == ("Updating", 1)
    assert isinstance(event_after(asleep, waking), endpoints.EndpointChanged)
    assert waking.count_ready(1, now=LATER).endpoint_status == "InService"


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        (("Async", 2, False, 0, 9), (2, 2)),
        (("Async", 2, True, None, None), (0, 2)),
        (("Real-time", 2, True, None, None), (1, 2)),
        (("Async", 1, True, 1, 4), (1, 4)),
        (("Real-time", 1, True, 0, 4), (1, 4)),
    ],
)
def test_bounds_are_those_of_esd_unless_others_are_given(
    asked: tuple[str, int, bool, int | None, int | None], got: tuple[int, int]
) -> None:
    type_, initial, autoscaling, least, most = asked
    found = bounds(type_, initial=initial, autoscaling=autoscaling, least=least, most=most)
    assert found == got


def test_a_deleted_endpoint_is_released_once_its_last_worker_is_gone() -> None:
    deleted = make_endpoint().delete()
    assert plan_for(deleted, [], alive("i1")) == ([], ["i1"], 0, False)
    assert plan_for(deleted, [], dead("i1", None)) == ([], [], 0, True)
    finishing = make_instance(status="stopping", stop_by=LATER)
    assert plan_for(deleted, [finishing], alive("i1")) == ([], ["i1"], 0, False)
    assert plan_for(deleted, [finishing]) == ([("i1", None)], [], 0, False)


def test_deleting_is_told_at_once_and_its_end_by_a_tombstone() -> None:
    before = make_endpoint().count_ready(1, now=NOW)
    deleting = before.delete()
    event = event_after(before, deleting)
    assert isinstance(event, endpoints.EndpointChanged)
    assert (event.endpoint_status, event.current_instance_count) == ("Deleting", 0)
    gone = event_after(deleting, deleting.release())
    assert isinstance(gone, endpoints.EndpointDeleted)
    assert (gone.deleted, gone.endpoint_status, gone.version) == (True, "Deleted", 4)


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
