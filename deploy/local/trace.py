"""`just trace JOB`: one job's timeline, from its events, through the public API.

A job that has not ended is followed to its end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.local.client import Client, Failed, ServerEvent
from deploy.local.installation import default_home

WIDTH = 36
"""Characters of a bar that is as long as the job took."""
BEFORE_BEGUN = ("fetch", "line")
"""A worker's stages before the engine begins a job."""


class Row(msgspec.Struct, frozen=True):
    """Something that happened at a moment, or a stage that took some `seconds` from then on."""

    at: datetime
    what: str
    detail: str = ""
    seconds: float | None = None


def timeline(events: Iterable[dict[str, Any]]) -> list[Row]:
    """From the envelopes of a job's events, in their order."""
    rows: list[Row] = []
    queued: datetime | None = None
    for event in events:
        job, at = event["data"], datetime.fromisoformat(event["time"])
        what = event["type"].split(".")[1].removeprefix("job_")
        match what:
            case "created":
                rows.append(Row(at, "created", f"{job['task_type']} for {job['owner']}"))
            case "started":
                if job["params_at"]:
                    params_at = datetime.fromisoformat(job["params_at"])
                    params_at = max(params_at, rows[0].at if rows else at)
                    rows.append(Row(params_at, "params uploaded", "within this second"))
                rows.append(Row(at, "queued", f"at endpoint {job['endpoint_name']}"))
                queued = at
            case "moved":
                rows.append(Row(at, "moved", f"to endpoint {job['endpoint_name']}"))
                queued = at
            case "taken":
                rows += _pick_up(job, at, queued)
                queued = None
            case "succeeded":
                rows += _stages_after(job["seconds"], begun=_begun(job, at))
                count = len(job["image_names"])
                rows.append(Row(at, "done", f"{count} picture{'s' if count != 1 else ''}"))
                rows += [Row(at, "warning", text) for text in job["warnings"]]
            case "failed" | "cancelled":
                rows.append(Row(at, what, job["reason"] or ""))
            case "deleted":
                rows.append(Row(at, what))
    return rows


def _pick_up(job: dict[str, Any], at: datetime, queued: datetime | None) -> list[Row]:
    before = {name: job["seconds"].get(name, 0.0) for name in BEFORE_BEGUN}
    came = at - timedelta(seconds=sum(before.values()))
    rows = []
    if queued is not None:
        rows.append(Row(queued, "queue", seconds=max(0.0, (came - queued).total_seconds())))
    worker = f"by worker {job['instance_id'] or '?'} of {job['endpoint_name']}"
    rows.append(Row(came, "picked up", f"{worker}, attempt {job['attempt']}"))
    rows += _one_after_the_other(before, came)
    rows.append(Row(at, "begun"))
    return rows


def _begun(job: dict[str, Any], ended: datetime) -> datetime:
    return datetime.fromisoformat(job["taken_at"]) if job["taken_at"] else ended


def _stages_after(seconds: dict[str, float], *, begun: datetime) -> list[Row]:
    """Those of the engine, and the upload."""
    later = {name: spent for name, spent in seconds.items() if name not in BEFORE_BEGUN}
    return _one_after_the_other(later, begun)


def _one_after_the_other(seconds: dict[str, float], begun: datetime) -> list[Row]:
    rows = []
    for name, spent in seconds.items():
        rows.append(Row(begun, name, seconds=spent))
        begun += timedelta(seconds=spent)
    return rows


def render(events: Sequence[dict[str, Any]]) -> RenderableType:
    rows = timeline(events)
    if not rows:
        return Text("no events of this job are kept any more")
    job = events[-1]["data"]
    first, last = rows[0].at, max(_end(row) for row in rows)
    whole = max((last - first).total_seconds(), 0.001)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        offset = (row.at - first).total_seconds()
        if row.seconds is None:
            table.add_row(f"{offset:+.3f}", Text(row.what, "bold"), "", row.detail)
        else:
            bar = Text(_bar(offset / whole, row.seconds / whole), "cyan")
            table.add_row("", f"  {row.what}", f"{row.seconds:.3f} s", bar)
    status = "cancelled" if job["cancelled"] else job["status"]
    head = f"job {job['job_id']}: {status}, {whole:.3f} s since {first:%Y-%m-%d %H:%M:%S.%f} UTC"
    requests = dict.fromkeys(e["correlation_id"] for e in events if e.get("correlation_id"))
    foot = f"in the logs: correlation_id {', '.join(requests)}"
    return Group(Text(head, "bold"), table, Text(foot, "dim"))


def _end(row: Row) -> datetime:
    return row.at + timedelta(seconds=row.seconds or 0.0)


def _bar(begin: float, length: float) -> str:
    """Both as shares of the whole."""
    left = min(WIDTH - 1, int(begin * WIDTH))
    return " " * left + "█" * max(1, min(WIDTH - left, round(length * WIDTH)))


def follow(client: Client, job_id: str, console: Console) -> None:
    """Raises Failed for a job that there is not, or that is somebody else's."""
    events: list[dict[str, Any]] = []
    stream = client.events(f"/inferences/{job_id}/events")
    if not console.is_terminal:
        events = [event.data for event in stream if _is_event(event)]
        console.print(render(events))
        return
    with Live(console=console, auto_refresh=False) as live:
        for event in stream:
            if _is_event(event):
                events.append(event.data)
                live.update(render(events), refresh=True)
        live.update(render(events), refresh=True)


def _is_event(event: ServerEvent) -> bool:
    """Not progress or a preview."""
    return event.id is not None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="just trace", description=__doc__)
    parser.add_argument("job", help="its id")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        with Client.log_in_at(default_home()) as client:
            follow(client, options.job, console)
    except FileNotFoundError as error:
        console.print(str(error), markup=False)
        return 1
    except httpx.TransportError as error:
        console.print(f"nobody answers ({error}): is it up?")
        return 1
    except Failed as error:
        console.print(str(error), markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
