"""`just simulate-autoscaling`: the decisions of `services.endpoints.autoscaling` on a clock of its
own, beside a fixed pool that costs as many instance hours.

A job takes SECONDS_PER_JOB on one instance, and an instance needs START_SECONDS until it is ready.
One that is given up finishes its job. Plots backlog, instances and waiting time of three loads, and
prints what users and the bill would see.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import msgspec
from matplotlib.axes import Axes

from services.endpoints.autoscaling import TARGETS, Calm, Limits, decide

PLOT = Path(__file__).with_name("autoscaling.png")
START = datetime(2026, 1, 1, tzinfo=UTC)
SECONDS_PER_JOB, START_SECONDS = 8.0, 40.0
LIMITS = Limits(
    minimum=0,
    maximum=8,
    target=TARGETS["Async"],
    out_after=timedelta(seconds=30),
    in_after=timedelta(seconds=300),
)
"""As DARKROOM_SCALE_OUT_AFTER and DARKROOM_SCALE_IN_AFTER are by default."""

Rate = Callable[[float], float]
"""Jobs a second at a time."""


class Load(msgspec.Struct, frozen=True):
    name: str
    hours: float
    rate: Rate


def bursty(second: float) -> float:
    """Somebody starts fifty jobs at a time, every half hour; little happens in between."""
    return 50 / 60 if second % 1800 < 60 else 0.005


def daily(second: float) -> float:
    """Nobody at night, most in the afternoon."""
    hour = second / 3600 % 24
    return 0.6 * max(0.0, math.sin(math.pi * (hour - 7) / 13)) ** 2 if 7 < hour < 20 else 0.0


def spike(second: float) -> float:
    """A quiet day, and ten times as much for twenty minutes."""
    return 0.5 if 3600 < second < 4800 else 0.05


LOADS = [Load("bursty", 3, bursty), Load("daily", 24, daily), Load("spike", 3, spike)]


class Pool(msgspec.Struct):
    """What one way to have instances came to, second by second. `waits`: when a job came, and how
    long it waited for its begin."""

    backlog: list[int] = []
    instances: list[int] = []
    waits: list[tuple[float, float]] = []

    @property
    def instance_hours(self) -> float:
        return sum(self.instances) / 3600


class _Instance(msgspec.Struct):
    ready_at: float
    busy_until: float = 0.0
    retired: bool = False


def arrivals(load: Load, seed: int) -> list[float]:
    chance = random.Random(seed)
    seconds = int(load.hours * 3600)
    return [s + chance.random() for s in range(seconds) for _ in range(_poisson(chance, load, s))]


def _poisson(chance: random.Random, load: Load, second: int) -> int:
    limit, product, count = math.exp(-load.rate(second)), chance.random(), 0
    while product > limit:
        product, count = product * chance.random(), count + 1
    return count


def simulate(load: Load, coming: list[float], *, fixed: int | None = None) -> Pool:
    """With `fixed` instances that are always there, or scaled."""
    pool, waiting, jobs = Pool(), deque[float](), deque(coming)
    instances = [_Instance(0.0) for _ in range(1 if fixed is None else fixed)]
    wanted, changed_at, calm = len(instances), START, None
    for second in range(int(load.hours * 3600)):
        while jobs and jobs[0] <= second:
            waiting.append(jobs.popleft())
        instances = [i for i in instances if not (i.retired and i.busy_until <= second)]
        for instance in instances:
            free = instance.ready_at <= second and instance.busy_until <= second
            if free and not instance.retired and waiting:
                came = waiting.popleft()
                pool.waits.append((came, second - came))
                instance.busy_until = second + SECONDS_PER_JOB
        backlog = len(waiting) + sum(i.busy_until > second for i in instances)
        if fixed is None:
            before = wanted
            wanted, changed_at, calm = _decide(wanted, backlog, changed_at, calm, second)
            if wanted != before:
                _follow(instances, wanted, second)
        pool.backlog.append(backlog)
        pool.instances.append(len(instances))
    return pool


def _decide(
    wanted: int, backlog: int, changed_at: datetime, calm: Calm | None, second: int
) -> tuple[int, datetime, Calm | None]:
    now = START + timedelta(seconds=second)
    decision = decide(
        LIMITS, wanted=wanted, backlog=backlog, changed_at=changed_at, calm=calm, now=now
    )
    changed = decision.wanted != wanted
    return decision.wanted, now if changed else changed_at, decision.calm


def _follow(instances: list[_Instance], wanted: int, second: int) -> None:
    """As the reconciler does: together with those that finish they stay within the maximum."""
    going = [instance for instance in instances if not instance.retired]
    for instance in sorted(going, key=lambda i: i.busy_until)[: max(0, len(going) - wanted)]:
        instance.retired = True
    room = LIMITS.maximum - len(instances)
    missing = min(room, wanted - len(going))
    instances.extend(_Instance(second + START_SECONDS) for _ in range(missing))


def mean_wait(pool: Pool) -> float:
    return sum(wait for _, wait in pool.waits) / max(1, len(pool.waits))


def worst_wait(pool: Pool, share: float) -> float:
    """That `share` of the jobs do not exceed."""
    waits = sorted(wait for _, wait in pool.waits)
    return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else 0.0


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PLOT
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(3, len(LOADS), figsize=(15, 9), sharex="col")
    rows = []
    for column, load in enumerate(LOADS):
        coming = arrivals(load, seed=7)
        scaled = simulate(load, coming)
        size = max(1, round(scaled.instance_hours / load.hours))
        fixed = simulate(load, coming, fixed=size)
        _draw([row[column] for row in axes], load, scaled, fixed, size)
        for name, pool in (("scaled", scaled), (f"fixed at {size}", fixed)):
            waits = f"{mean_wait(pool):.0f} / {worst_wait(pool, 0.99):.0f} s"
            cost = f"{pool.instance_hours:.1f} h, at most {max(pool.instances)}"
            done = f"{len(pool.waits)} of {len(coming)}"
            rows.append(f"{load.name:<8}{name:<12}{waits:>18}{cost:>22}{done:>18}")
    figure.suptitle(
        f"Jobs of {SECONDS_PER_JOB:g} s, instances that need {START_SECONDS:g} s to start; "
        "a fixed pool of as many instance hours beside"
    )
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    print(f"{'':<20}{'wait, mean / 99 %':>18}{'instances':>22}{'jobs begun':>18}")
    print("\n".join([*rows, f"plotted in {target}"]))


def _draw(axes: list[Axes], load: Load, scaled: Pool, fixed: Pool, size: int) -> None:
    hours = [second / 3600 for second in range(len(scaled.backlog))]
    backlog, instances, waiting = axes
    for pool, color, name in (
        (fixed, "tab:gray", f"fixed at {size}"),
        (scaled, "tab:blue", "scaled"),
    ):
        backlog.plot(hours, pool.backlog, color=color, label=name, linewidth=1)
        instances.step(hours, pool.instances, color=color, label=name, linewidth=1)
        came = [came / 3600 for came, _ in pool.waits]
        waits = [wait for _, wait in pool.waits]
        waiting.plot(came, waits, ".", color=color, label=name, markersize=2)
    backlog.set_title(f"{load.name}: {(load.rate.__doc__ or '').rstrip('.')}", fontsize=9)
    backlog.set_ylabel("jobs waiting or in hand")
    instances.set_ylabel("instances")
    instances.set_ylim(0, LIMITS.maximum + 1)
    waiting.set_ylabel("seconds waited")
    waiting.set_xlabel("hours")
    for axis in (backlog, waiting):
        axis.set_yscale("symlog", linthresh=1)
    for axis in axes:
        axis.legend(loc="upper right", fontsize=8)
        axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
