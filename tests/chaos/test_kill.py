"""kill -9 of everything in turn while commands and jobs go on: none lost, doubled or stuck.

Clients do what README tells them to: send an Idempotency-Key, and repeat what got no answer, a 503
or a 504.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import nats
import nats.errors
import pytest
from nats.js.api import ConsumerConfig, DeliverPolicy

from deploy.local.client import Client, Failed
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from shared.contracts import envelope as cloud

COMMANDS, JOBS = 200, 20
VICTIMS = (
    "gateway",
    "identity",
    "models",
    "endpoints",
    "inference",
    "worker",
    "nats",
    "postgres",
    "seaweedfs",
)
PATIENCE = 120.0
MODELS = {"Stable-diffusion": [CHECKPOINT.name]}


class Pauses:
    """The longest time that anybody had to wait for an answer."""

    def __init__(self) -> None:
        self.longest: dict[str, float] = {}

    def note(self, what: str, seconds: float) -> None:
        self.longest[what] = max(self.longest.get(what, 0.0), seconds)


@pytest.fixture
def stack() -> Iterator[Stack]:
    settings = {"DARKROOM_WORKER_THREADS": "1", "DARKROOM_COMMAND_TIMEOUT": "5"}
    with Stack.temporary(settings=settings) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    settings = stack.environment()
    with Client.log_in(
        settings["DARKROOM_URL"],
        settings["DARKROOM_API_KEY"],
        settings["DARKROOM_ADMIN_USER"],
        settings["DARKROOM_ADMIN_PASSWORD"],
    ) as client:
        client.http.timeout = httpx.Timeout(20.0)
        yield client


def persist(what: str, pauses: Pauses, attempt: Callable[[], Any]) -> Any:
    """Repeats until it is answered. An answer that is final, such as a 400, is raised."""
    began = time.monotonic()
    while True:
        try:
            answer = attempt()
            pauses.note(what, time.monotonic() - began)
            return answer
        except (httpx.HTTPError, Failed) as error:
            if isinstance(error, Failed) and error.status < 500:
                raise
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() - began > PATIENCE:
                raise
            time.sleep(0.3)


def create_role(client: Client, number: int, pauses: Pauses) -> None:
    body = {"role_name": f"chaos {number}", "permissions": ["train:all"]}
    key = f"role {number}"
    time.sleep(0.5)  # spreads the commands over the time in which things are killed
    persist("a command", pauses, lambda: client.call("POST", "/roles", body, idempotency_key=key))


def run_job(client: Client, number: int, pauses: Pauses) -> dict[str, Any]:
    """Creates a job, gives it its params, starts it and returns it when it has ended."""
    body = {"inference_type": "Async", "task_type": "txt2img", "models": MODELS}
    params = {
        "prompt": "a red circle on a white background",
        "steps": 60,
        "seed": number,
        "width": 64,
        "height": 64,
    }
    key = f"job {number}"
    created = persist(
        "creating a job",
        pauses,
        lambda: client.call("POST", "/inferences", body, idempotency_key=key),
    )["data"]["inference"]

    def upload() -> None:
        client.http.put(created["api_params_s3_upload_url"], json=params).raise_for_status()

    def start() -> None:
        client.call("PUT", f"/inferences/{created['id']}/start", idempotency_key=f"start {number}")

    persist("uploading params", pauses, upload)
    persist("starting a job", pauses, start)
    return wait_for_end(client, created["id"], pauses)


def wait_for_end(client: Client, job_id: str, pauses: Pauses) -> dict[str, Any]:
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        job: dict[str, Any] = persist("reading a job", pauses, lambda: client.get_job(job_id))
        if job["status"] in ("succeed", "failed"):
            return job
        time.sleep(0.3)
    raise AssertionError(f"job {job_id} is stuck: {job['status']}")


def kill_in_turn(stack: Stack, pauses: Pauses) -> Counter[str]:
    """Each victim once, the next when the one before is back."""
    kills: Counter[str] = Counter()
    for name in VICTIMS:
        began = time.monotonic()
        if name == "worker":
            for pid in stack.workers().values():
                os.kill(pid, signal.SIGKILL)
        else:
            pid = stack.kill(name)
            stack.wait_ready(name, other_than=pid, timeout=PATIENCE)
        kills[name] += 1
        pauses.note(f"{name} back", time.monotonic() - began)
        time.sleep(1.5)
    return kills


async def read_events(stack: Stack) -> list[cloud.Envelope]:
    """The whole log, by the administrator of the bus."""
    connection = await nats.connect(stack.installation.nats_url_as("admin"))
    js = connection.jetstream()
    total = (await js.stream_info("EVENTS")).state.messages
    subscription = await js.subscribe(
        "evt.>",
        stream="EVENTS",
        ordered_consumer=True,
        config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL),
    )
    events = [cloud.decode((await subscription.next_msg(timeout=10)).data) for _ in range(total)]
    await connection.close()
    return events


@pytest.mark.timeout(900)
def test_nothing_is_lost_doubled_or_stuck_when_everything_is_killed_in_turn(
    stack: Stack, client: Client
) -> None:
    client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    client.create_endpoint("chaos")
    client.wait_for_endpoint("chaos")
    pauses = Pauses()
    began = time.monotonic()
    with (
        ThreadPoolExecutor(1) as chaos,
        ThreadPoolExecutor(3) as some,
        ThreadPoolExecutor(3) as more,
    ):
        killer = chaos.submit(kill_in_turn, stack, pauses)
        roles = [some.submit(create_role, client, n, pauses) for n in range(COMMANDS)]
        jobs = [more.submit(run_job, client, n, pauses) for n in range(JOBS)]
        for future in roles:
            future.result()
        ended = [future.result() for future in jobs]
        kills = killer.result()
    ids = [job["InferenceJobId"] for job in ended]
    seconds = time.monotonic() - began

    listed = client.call("GET", "/roles?per_page=1000")["data"]["roles"]
    names = [role["role_name"] for role in listed if role["role_name"].startswith("chaos ")]
    events = asyncio.run(read_events(stack))
    created = _distinct(events, "identity.role_created.v1", "chaos ")
    succeeded = _distinct(events, "inference.job_succeeded.v1")
    failed = _distinct(events, "inference.job_failed.v1")
    print(f"\n{COMMANDS} commands and {JOBS} jobs in {seconds:.0f} s; kills: {dict(kills)}")
    for what, longest in sorted(pauses.longest.items(), key=lambda item: -item[1]):
        print(f"  longest wait: {longest:5.1f} s  {what}")

    assert sorted(names) == sorted(f"chaos {n}" for n in range(COMMANDS))
    assert created == dict.fromkeys(names, 1)
    assert len(set(ids)) == JOBS
    assert [job["error"] for job in ended if job["status"] != "succeed"] == []
    assert succeeded == dict.fromkeys(ids, 1)
    assert failed == {}
    for job in ended:
        fresh = client.get_job(job["InferenceJobId"])
        assert fresh["image_names"] == ["image_0.png"]
        assert client.download(fresh["img_presigned_urls"][0]).startswith(b"\x89PNG")
    assert set(kills) == set(VICTIMS)


def _distinct(events: list[cloud.Envelope], type_name: str, prefix: str = "") -> dict[str, int]:
    """Aggregate -> how many different events of the type it has. The same event sent twice is one:
    that is what its id is for."""
    ids: dict[str, set[str]] = {}
    for event in events:
        if event.type == type_name and event.subject.startswith(prefix):
            ids.setdefault(event.subject, set()).add(event.id)
    return {subject: len(found) for subject, found in ids.items()}
