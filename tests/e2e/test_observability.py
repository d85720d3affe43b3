"""What an operator sees of a running system: traces, metrics, and what dashboards ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from tests.e2e.otlp import Collector, Span, collecting

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
    text = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def values(samples: list[Sample], name: str, **labels: str) -> list[float]:
    return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]


@pytest.fixture
def samples(observed: Stack, job_id: str) -> list[Sample]:
    """Of all processes, the worker found as Prometheus would find it."""
    ports = observed.installation.ports
    found = [s for name in PROCESSES for s in scrape(f"http://127.0.0.1:{ports[name]}")]
    listed = f"http://127.0.0.1:{ports['gateway_metrics']}/workers"
    (target,) = eventually(lambda: httpx.get(listed, trust_env=False).json())
    assert target["labels"]["endpoint"] == ENDPOINT
    (address,) = target["targets"]
    return found + scrape(f"http://{address}")


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
    artist.create_endpoint("stuck")
    artist.wait_for_endpoint("stuck")
    (endpoint,) = [artist.find_endpoint("stuck")]
    assert endpoint
    ports = observed.installation.ports
    url = f"http://127.0.0.1:{ports['inference']}"
    slow = PARAMS | {"steps": 150, "width": 512, "height": 512}
    jobs = [artist.create_job("txt2img", MODEL, slow) for _ in range(3)]
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
