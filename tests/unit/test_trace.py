"""The timeline of a job, from events as the API tells them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.local.trace import Row, main, render, timeline

BEGAN = datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def event(what: str, when: float, **fields: object) -> dict[str, Any]:
    job: dict[str, object] = {
        "job_id": "j",
        "owner": "alice",
        "task_type": "txt2img",
        "status": "inprogress",
        "endpoint_name": "fast",
        "params_at": None,
        "taken_at": None,
        "instance_id": None,
        "attempt": 0,
        "seconds": {},
        "image_names": [],
        "warnings": [],
        "reason": None,
        "cancelled": False,
    }
    return {
        "type": f"inference.job_{what}.v1",
        "time": after(when).isoformat(),
        "correlation_id": f"request of {what}",
        "data": job | fields,
    }


SECOND = {"fetch": 0.1, "line": 0.4}
WHOLE = {**SECOND, "load": 1.0, "render": 3.0, "decode": 0.5, "upload": 0.25}
LIFE = [
    event("created", 0),
    event("started", 2, params_at=after(0.75).replace(microsecond=0).isoformat()),
    event("taken", 4, seconds={"fetch": 1.0, "line": 0.5}, attempt=1, instance_id="one"),
    event("taken", 10, seconds=SECOND, attempt=2, instance_id="two"),
    event(
        "succeeded",
        15,
        seconds=WHOLE,
        attempt=2,
        taken_at=after(10).isoformat(),
        image_names=["a.png"],
        status="succeed",
        warnings=["tiling has no effect"],
    ),
]


def test_it_tells_what_happened_and_how_long_each_stage_took() -> None:
    assert timeline(LIFE) == [
        Row(after(0), "created", "txt2img for alice"),
        Row(after(0.75), "params uploaded", "within this second"),
        Row(after(2), "queued", "at endpoint fast"),
        Row(after(2), "queue", seconds=0.5),
        Row(after(2.5), "picked up", "by worker one of fast, attempt 1"),
        Row(after(2.5), "fetch", seconds=1.0),
        Row(after(3.5), "line", seconds=0.5),
        Row(after(4), "begun"),
        Row(after(9.5), "picked up", "by worker two of fast, attempt 2"),
        Row(after(9.5), "fetch", seconds=0.1),
        Row(after(9.6), "line", seconds=0.4),
        Row(after(10), "begun"),
        Row(after(10), "load", seconds=1.0),
        Row(after(11), "render", seconds=3.0),
        Row(after(14), "decode", seconds=0.5),
        Row(after(14.5), "upload", seconds=0.25),
        Row(after(15), "done", "1 picture"),
        Row(after(15), "warning", "tiling has no effect"),
    ]


def test_params_are_not_older_than_their_job() -> None:
    """S3 tells whole seconds."""
    early = (BEGAN - timedelta(milliseconds=250)).isoformat()
    rows = timeline([event("created", 0), event("started", 1, params_at=early)])
    assert rows[1] == Row(BEGAN, "params uploaded", "within this second")


def test_a_job_can_move_fail_and_be_cancelled() -> None:
    moved = [
        event("created", 0),
        event("started", 1),
        event("moved", 3, endpoint_name="slow"),
        event("taken", 5, attempt=1, instance_id="one", endpoint_name="slow"),
        event("failed", 6, reason="no such sampler", status="failed"),
    ]
    told = [(row.what, row.detail) for row in timeline(moved) if row.seconds is None]
    assert told[2:] == [
        ("moved", "to endpoint slow"),
        ("picked up", "by worker one of slow, attempt 1"),
        ("begun", ""),
        ("failed", "no such sampler"),
    ]
    (queue,) = [row for row in timeline(moved) if row.what == "queue"]
    assert (queue.at, queue.seconds) == (after(3), 2.0), "where it waited last"
    cancelled = [event("created", 0), event("cancelled", 1, reason='cancelled by "bob"')]
    assert timeline(cancelled)[-1] == Row(after(1), "cancelled", 'cancelled by "bob"')


def test_it_is_drawn_as_wide_as_it_took() -> None:
    out = StringIO()
    Console(file=out, width=120).print(render(LIFE))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("job j: succeed, 15.000 s since 2026-01-02 03:04:05.250000 UTC")
    (drawn,) = [line for line in lines if line.strip().startswith("render")]
    assert drawn.count("█") == round(3 / 15 * 36)
    assert any("+9.500" in line and "by worker two" in line for line in lines)
    assert "request of created, request of started" in lines[-1]


def test_a_job_whose_events_are_gone_says_so() -> None:
    out = StringIO()
    Console(file=out).print(render([]))
    assert "no events of this job are kept any more" in out.getvalue()


def test_without_an_installation_it_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "none"))
    assert main(["some-job"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "there is no installation at" in told
    assert "`just up` makes it" in told
