"""What an operator sees of a running system: traces, metrics, and what dashboards ask of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import REGISTRY, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.installation import REPOSITORY
from deploy.local.stack import Stack
from services.gateway import metrics as _of_the_gateway  # noqa: F401  # for its labels
from services.inference import metrics as _of_the_ledger  # noqa: F401
from services.inference.worker import metrics as _of_workers  # noqa: F401
from shared.metrics import message_middleware
from tests.e2e.otlp import Collector, Span, collecting

message_middleware("for its labels")
ENDPOINT = "observed"
MODEL = {"Stable-diffusion": [CHECKPOINT.name], "VAE": ["Automatic"]}
PARAMS = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64, "seed": 1}
STAGES = {"fetch", "line", "load", "encode", "render", "decode", "upload"}
PROCESSES = ("gateway_metrics", "identity", "models", "endpoints", "inference")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def observed(collector: Collector) -> Iterator[Stack]:
    settings = {"DARKROOM_OTLP_URL": collector.url, "DARKROOM_WORKER_THREADS": "1"}
    with Stack.temporary(settings=settings) as stack:
        yield stack


@pytest.fixture(scope="module")
def artist(observed: Stack) -> Iterator[Client]:
    with Client.log_in_at(observed.home) as client:
        client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
        client.create_endpoint(ENDPOINT)
        client.wait_for_endpoint(ENDPOINT)
        yield client


@pytest.fixture(scope="module")
def job_id(artist: Client) -> str:
    """Of a job that has succeeded."""
    job = artist.run_job("txt2img", MODEL, PARAMS)
    assert job["status"] == "succeed"
    return str(job["InferenceJobId"])


def eventually(look: Callable[[], Any], seconds: float = 15) -> Any:
    """What `look` gives, once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.1)
    return found


def trace_of(collector: Collector, job_id: str) -> list[Span]:
    """All spans of the trace in which a worker ran the job."""
    for span in collector.spans:
        if span.name == "run job" and span.attributes["darkroom.job_id"] == job_id:
            return [other for other in collector.spans if other.trace_id == span.trace_id]
    return []


def test_one_trace_leads_from_the_request_to_the_worker_and_back(
    collector: Collector, job_id: str
) -> None:
    def whole() -> list[Span]:
        """Once all processes have sent theirs: then only the first span has no parent here."""
        trace = trace_of(collector, job_id)
        known = {span.span_id for span in trace}
        ended = any(span.name == "apply inference.job_succeeded.v1" for span in trace)
        roots = [span for span in trace if span.parent_id not in known]
        return trace if ended and len(roots) == 1 else []

    trace = eventually(whole)
    by_id = {span.span_id: span for span in trace}
    (root,) = [span for span in trace if span.parent_id not in by_id]
    assert (root.process, root.name, root.parent_id) == (
        "gateway",
        "PUT /inferences/{id}/start",
        "",
    )
    assert {span.process for span in trace} == {"gateway", "inference", "worker"}

    def way(span: Span) -> list[tuple[str, str]]:
        """From the request to a span."""
        above = way(by_id[span.parent_id]) if span.parent_id else []
        return [*above, (span.process, span.name)]

    (end,) = [span for span in trace if span.name == "apply inference.job_succeeded.v1"]
    assert way(end) == [
        ("gateway", "PUT /inferences/{id}/start"),
        ("gateway", "send inference.start_job.v1"),
        ("inference", "handle inference.start_job.v1"),
        ("worker", "run job"),
        ("worker", "report"),
        ("inference", "handle inference.report_job_succeeded.v1"),
        ("gateway", "apply inference.job_succeeded.v1"),
    ]
    (run,) = [span for span in trace if span.name == "run job"]
    stages = [span for span in trace if span.parent_id == run.span_id and span.name != "report"]
    assert {span.name for span in stages} == STAGES
    for stage in stages:
        assert run.began - 0.01 <= stage.began <= stage.ended <= run.ended + 0.01, stage.name


def scrape(url: str) -> list[Sample]:
    return [sample for family in families(url) for sample in family.samples]


def families(url: str) -> list[Metric]:
    text = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    return list(text_string_to_metric_families(text))


def values(samples: list[Sample], name: str, **labels: str) -> list[float]:
    return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]


@pytest.fixture
def addresses(observed: Stack, job_id: str) -> list[str]:
    """Of all processes, the worker found as Prometheus would find it."""
    ports = observed.installation.ports
    listed = f"http://127.0.0.1:{ports['gateway_metrics']}/workers"
    (target,) = eventually(lambda: httpx.get(listed, trust_env=False).json())
    assert target["labels"]["endpoint"] == ENDPOINT
    (address,) = target["targets"]
    return [*(f"http://127.0.0.1:{ports[name]}" for name in PROCESSES), f"http://{address}"]


@pytest.fixture
def samples(addresses: list[str]) -> list[Sample]:
    return [sample for address in addresses for sample in scrape(address)]


@pytest.fixture
def names(addresses: list[str]) -> dict[str, set[str]]:
    """Name -> its labels, as the processes tell them. What has not happened yet (a dead letter) has
    a name, and no labels to see: they are taken from the code."""
    found: dict[str, set[str]] = {}
    for address in addresses:
        for family in families(address):
            for suffix in SUFFIXES[family.type]:
                found.setdefault(family.name + suffix, set())
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    for known in vars(REGISTRY)["_names_to_collectors"].items():
        if known[0] in found:
            found[known[0]].update(getattr(known[1], "_labelnames", ()))
    return found


SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
    "unknown": ("",),
}


def test_every_process_shows_what_it_counts(samples: list[Sample]) -> None:
    def shown(name: str, **labels: str) -> float:
        return sum(values(samples, name, **labels))

    route = {"path": "/inferences/{id}/start", "method": "PUT", "status_code": "202"}
    assert shown("darkroom_http_requests_total", **route) == 1
    assert shown("darkroom_http_request_duration_seconds_count", **route) == 1
    assert shown("darkroom_command_seconds_count", type="inference.start_job.v1") == 1
    start = "cmd.inference.start_job.v1"
    assert shown("darkroom_bus_received_messages_total", handler=start) == 1
    acked = {"handler": start, "status": "acked"}
    assert shown("darkroom_bus_received_processed_messages_total", **acked) == 1
    for owner in ("identity", "models", "endpoints", "inference"):
        assert values(samples, "darkroom_outbox_unsent", owner=owner) == [0.0]
        assert values(samples, "darkroom_consumer_pending", consumer=owner, stream="COMMANDS")
    assert values(samples, "darkroom_consumer_pending", consumer="gateway") == [0.0]
    assert shown("darkroom_jobs_started_total", endpoint=ENDPOINT) == 1
    assert shown("darkroom_jobs_ended_total", endpoint=ENDPOINT, end="succeed") == 1
    assert shown("darkroom_images_total", endpoint=ENDPOINT) == 1
    for stage in {"queue", *STAGES}:
        measured = {"endpoint": ENDPOINT, "stage": stage}
        assert shown("darkroom_job_stage_seconds_count", **measured) == 1, stage
    assert shown("darkroom_worker_images_total") == 1
    assert shown("darkroom_worker_steps_total") >= PARAMS["steps"]  # type: ignore[operator]
    assert shown("darkroom_device_memory_used_bytes", device="cpu") > 50e6
    assert set(values(samples, "darkroom_dependency_up")) == {1.0}


def test_an_id_is_no_label(samples: list[Sample], artist: Client) -> None:
    """A series for every job or checkpoint would fill Prometheus' memory."""
    for sample in samples:
        for name, value in sample.labels.items():
            assert name == "instance_id" or value.count("-") < 4, sample


def test_api_clients_have_no_way_to_the_metrics(observed: Stack, artist: Client) -> None:
    assert artist.request("GET", "/metrics").status_code == 404
    assert artist.request("GET", "/workers").status_code == 404
    assert httpx.get(f"{observed.url}/metrics", trust_env=False).status_code == 403


def test_queues_are_seen_while_they_wait(observed: Stack, artist: Client) -> None:
    url = f"http://127.0.0.1:{observed.installation.ports['inference']}"
    sizes = (512, 448, 384)  # so that they are no batch
    slow = [PARAMS | {"steps": 150, "width": size, "height": size} for size in sizes]
    jobs = [artist.create_job("txt2img", MODEL, params) for params in slow]
    for job in jobs:
        artist.start_job(job)

    def waiting() -> bool:
        seen = scrape(url)
        return (
            sum(values(seen, "darkroom_queue_jobs")) + sum(values(seen, "darkroom_running_jobs"))
            == 3
            and sum(values(seen, "darkroom_queue_oldest_seconds")) > 0
        )

    eventually(waiting, 30)
    for job in jobs:
        artist.cancel_job(job)
    eventually(lambda: not values(scrape(url), "darkroom_queue_jobs"))
    assert sum(values(scrape(url), "darkroom_jobs_ended_total", end="cancelled")) == 3


GRAFANA = REPOSITORY / "deploy" / "grafana" / "dashboard.json"
ALERTS = REPOSITORY / "deploy" / "prometheus" / "alerts.yaml"
RUNBOOK = REPOSITORY / "docs" / "alerts.md"
FROM_PROMETHEUS = {"up"}
LABELS_OF_PROMETHEUS = {"job", "instance", "endpoint", "instance_id", "device"}
"""Given to a target when it is scraped; the last three to workers, by `/workers`."""


def alerts() -> list[dict[str, Any]]:
    return [r for g in yaml.safe_load(ALERTS.read_text())["groups"] for r in g["rules"]]


def panels() -> list[dict[str, Any]]:
    return [p for p in json.loads(GRAFANA.read_text())["panels"] if p["type"] != "row"]


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [alert["expr"] for alert in alerts()]


def metrics_in(expression: str) -> dict[str, set[str]]:
    """Metric -> labels that are asked for, by all names of ours or of Prometheus' client."""
    found: dict[str, set[str]] = {}
    for name, selector in re.findall(
        r"\b((?:darkroom|process)_\w+|up)\b(?:{([^}]*)})?", expression
    ):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*=?[=!~]", selector))
    return found


def test_dashboards_and_alerts_ask_for_what_is_there(
    observed: Stack, samples: list[Sample], names: dict[str, set[str]]
) -> None:
    asked: set[str] = set()
    for expression in expressions():
        for name, labels in metrics_in(expression).items():
            assert name in names or name in FROM_PROMETHEUS, f"nobody exports {name}: {expression}"
            known = names.get(name, set()) | LABELS_OF_PROMETHEUS
            assert labels <= known, f"{name} has no {labels - known}: {expression}"
            asked.add(name)
    ours = {n for n in names if n.startswith("darkroom_") and not n.endswith("_created")}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in ours}
    unseen = {f for f in families if not any(name.startswith(f) for name in asked)}
    assert unseen <= UNSEEN, f"exported and looked at by nobody: {unseen - UNSEEN}"


UNSEEN = {
    # FastStream's, which come with those that are looked at
    "darkroom_bus_received_messages_total",
    "darkroom_bus_received_messages_size_bytes",
    "darkroom_bus_received_messages_in_process",
    "darkroom_bus_received_processed_messages_exceptions_total",
    "darkroom_bus_published_messages_total",
    "darkroom_bus_published_messages_duration_seconds",
    "darkroom_bus_published_messages_exceptions_total",
    "darkroom_http_requests_error_total",
}


def test_every_alert_is_explained() -> None:
    text = RUNBOOK.read_text()
    for alert in alerts():
        told = text.partition(f"\n### {alert['alert']}\n")[2].partition("\n#")[0]
        assert f"**{alert['labels']['severity']}.**" in told, alert["alert"]
        assert alert["annotations"]["summary"]
        for label in re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]):
            wanted = [*LABELS_OF_PROMETHEUS, *re.findall(r"\w+", alert["expr"]), "dependency"]
            assert label in [*wanted, "name"], f"{alert['alert']}: {label}"
    headings = re.findall(r"^### (\w+)$", text, re.M)
    assert headings == [alert["alert"] for alert in alerts()]
    assert len(set(headings)) == len(headings)


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    board = json.loads(GRAFANA.read_text())["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    for panel in board:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_prometheus_is_told_where_the_processes_are() -> None:
    config = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())
    assert config["rule_files"] == [ALERTS.name]
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {"gateway", "identity", "models", "endpoints", "inference", "worker"}
    for expression in expressions():
        for pattern in re.findall(r'job=~?"([^"]*)"', expression):
            assert set(pattern.split("|")) <= jobs, expression


def test_a_job_is_told_in_the_terminal(observed: Stack, job_id: str) -> None:
    def trace(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deploy.local.trace", *arguments],
            env={**os.environ, "DARKROOM_HOME": str(observed.home)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )

    told = trace(job_id)
    assert told.returncode == 0, told.stdout + told.stderr
    words = [line.split()[1] for line in told.stdout.splitlines() if line.strip().startswith("+")]
    assert words == ["created", "params", "queued", "picked", "begun", "done"]
    for stage in {"queue", *STAGES}:
        assert re.search(rf"^ +{stage} +\d+\.\d\d\d s +█", told.stdout, re.M), told.stdout
    nothing = trace("no-such-job")
    assert nothing.returncode == 1
    assert "404" in nothing.stdout
