"""How many instances an endpoint should have, from the jobs that wait for it or are done by it.

It scales out as soon as there is more to do than `target` jobs per instance, and in once fewer
would have done for a whole cool-down, to as many as were needed at most meanwhile. Between two
changes there is a cool-down of the later one's direction; only waking from zero waits for nothing,
and since falling asleep again takes its cool-down, it makes nothing flap.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

TARGETS = {"Async": 3, "Real-time": 5}
"""Jobs per instance that ESD aims at: the backlog of an Async endpoint, the invocations that a
Real-time one has at a time."""

LEAST = {"Async": 0, "Real-time": 1}
"""Instances that stay when there is nothing to do: nobody waits at a Real-time endpoint for one to
start."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`target`: jobs per instance. `out_after`, `in_after`: the cool-downs."""

    minimum: int
    maximum: int
    target: int
    out_after: timedelta
    in_after: timedelta


class Calm(msgspec.Struct, frozen=True):
    """Since when fewer instances would do, and how many would have done all that time."""

    since: datetime
    enough: int


class Decision(msgspec.Struct, frozen=True):
    """`calm` is to be handed in at the next decision. Who forgets it scales in later, not wrong."""

    wanted: int
    calm: Calm | None = None


def decide(
    limits: Limits,
    *,
    wanted: int,
    backlog: int,
    changed_at: datetime | None,
    calm: Calm | None,
    now: datetime,
) -> Decision:
    """`wanted`: instances so far, since `changed_at`. `backlog`: jobs that wait or are in hand."""
    needed = min(max(-(-backlog // limits.target), limits.minimum), limits.maximum)
    rested = timedelta.max if changed_at is None else now - changed_at
    if needed >= wanted:
        may_grow = wanted == 0 or rested >= limits.out_after
        return Decision(needed if may_grow else wanted)
    calm = Calm(calm.since, max(calm.enough, needed)) if calm else Calm(now, needed)
    if now - calm.since >= limits.in_after and rested >= limits.in_after:
        return Decision(calm.enough)
    return Decision(wanted, calm)
