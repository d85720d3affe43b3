"""What a user would see go wrong: instances that come and go all the time, more than the quota, a
job that waits for ever at an endpoint without any."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.endpoints.autoscaling import Calm, Decision, Limits, decide
from services.endpoints.domain import Endpoint, InstanceType, InstanceTypes, bounds
from shared.errors import Rejected

NOW = datetime(2024, 1, 30, 8, 0, tzinfo=UTC)
OUT, IN = timedelta(seconds=30), timedelta(seconds=300)
LIMITS = Limits(minimum=0, maximum=4, target=3, out_after=OUT, in_after=IN)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def decided(
    wanted: int, backlog: int, *, rested: float = 1e6, calm: Calm | None = None
) -> Decision:
    changed_at = NOW - timedelta(seconds=rested)
    return decide(LIMITS, wanted=wanted, backlog=backlog, changed_at=changed_at, calm=calm, now=NOW)


def test_there_is_one_instance_for_every_three_jobs() -> None:
    for backlog, wanted in ((3, 1), (4, 2), (9, 3), (10, 4), (100, 4)):
        assert decided(1, backlog).wanted == wanted


def test_the_first_job_wakes_an_endpoint_at_once() -> None:
    assert decided(0, 1, rested=0).wanted == 1
    assert decided(1, 9, rested=29).wanted == 1, "others wait for the cool-down"
    assert decided(1, 9, rested=30).wanted == 3


def test_it_scales_in_to_what_was_enough_for_a_whole_cool_down() -> None:
    first = decided(4, 0)
    assert first == Decision(4, Calm(NOW, 0))
    later = decide(LIMITS, wanted=4, backlog=5, changed_at=None, calm=first.calm, now=after(100))
    assert later == Decision(4, Calm(NOW, 2))
    last = decide(LIMITS, wanted=4, backlog=0, changed_at=None, calm=later.calm, now=after(300))
    assert last == Decision(2)


def test_a_busy_moment_ends_the_calm() -> None:
    assert decided(2, 6, calm=Calm(NOW - IN, 0)) == Decision(2)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Limits, list[tuple[float, int, bool]]]:
    """Limits, and looks at the queue: seconds since the last one, the backlog, and whether the
    service was killed before and has forgotten its calm."""
    minimum = draw(st.integers(0, 3))
    limits = Limits(
        minimum=minimum,
        maximum=draw(st.integers(max(1, minimum), 8)),
        target=draw(st.integers(1, 5)),
        out_after=timedelta(seconds=draw(st.integers(0, 60))),
        in_after=timedelta(seconds=draw(st.integers(0, 300))),
    )
    look = st.tuples(st.floats(0.1, 200), st.integers(0, 60), st.booleans())
    return limits, draw(st.lists(look, max_size=80))


@given(histories())
def test_it_never_flaps_faster_than_its_cool_down_and_stays_within_its_bounds(
    history: tuple[Limits, list[tuple[float, int, bool]]],
) -> None:
    limits, looks = history
    wanted, changed_at, calm, now = max(1, limits.minimum), NOW, None, NOW
    changes = [(NOW, wanted)]
    for seconds, backlog, forgotten in looks:
        now += timedelta(seconds=seconds)
        decision = decide(
            limits,
            wanted=wanted,
            backlog=backlog,
            changed_at=changed_at,
            calm=None if forgotten else calm,
            now=now,
        )
        calm = decision.calm
        assert limits.minimum <= decision.wanted <= limits.maximum
        assert decision.wanted > 0 or backlog == 0, "a job waits at an endpoint without instances"
        if decision.wanted != wanted:
            wanted, changed_at = decision.wanted, now
            changes.append((now, wanted))
    for (before, was), (at, became) in pairwise(changes):
        if became < was:
            assert at - before >= limits.in_after
        elif was > 0:
            assert at - before >= limits.out_after


@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=60),
)
def test_all_endpoints_together_never_exceed_the_quota(
    asked: list[tuple[int, bool]], looks: list[tuple[int, int]]
) -> None:
    """Whatever their backlogs do: an endpoint gets its largest number of instances reserved."""
    endpoints = created(asked, quota=8)
    now = NOW
    for number, backlog in looks:
        now += timedelta(seconds=20)
        if number < len(endpoints) and endpoints[number].scales:
            endpoint = endpoints[number]
            decision = decide(
                endpoint.limits(out_after=timedelta(), in_after=timedelta()),
                wanted=endpoint.scaled_to,
                backlog=backlog,
                changed_at=endpoint.scaled_at,
                calm=None,
                now=now,
            )
            endpoints[number] = endpoint.scale(decision.wanted, now=now)
        assert sum(endpoint.wanted_count for endpoint in endpoints) <= 8


def created(asked: list[tuple[int, bool]], *, quota: int) -> list[Endpoint]:
    types = InstanceTypes(types={"cpu": InstanceType(device="cpu", max=quota)}, default="cpu")
    made: list[Endpoint] = []
    for count, autoscaling in asked:
        least, most = bounds(
            "Async", initial=count, autoscaling=autoscaling, least=None, most=count + 1
        )
        with suppress(Rejected):
            types.check_quota("cpu", most, made)
            endpoint = Endpoint(
                endpoint_id=str(len(made)),
                endpoint_name=str(len(made)),
                endpoint_type="Async",
                instance_type="cpu",
                autoscaling=autoscaling,
                min_instance_number=least,
                max_instance_number=most,
                scaled_to=count,
                roles=[],
                creator="admin",
                start_time=NOW,
            )
            made.append(endpoint.count_ready(1, now=NOW))
    return made
