"""Endpoints as their users see them: who works there, what they do, and that nothing is lost when
they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy.local.demo import CHECKPOINT
from tests.e2e.described import StrictClient

MODELS = {"Stable-diffusion": [CHECKPOINT.name]}
TINY = {"prompt": "a blue square", "steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module", autouse=True)
def checkpoint(api: StrictClient) -> None:
    if api.find_checkpoint("Stable-diffusion", CHECKPOINT.name) is None:
        api.upload_checkpoint("Stable-diffusion", CHECKPOINT)


@pytest.fixture
def artist(api: StrictClient) -> StrictClient:
    """Who has only the endpoints that a test gives to their role."""
    return api.add_person("byoc", permissions=("inference:all", "sagemaker_endpoint:all"))


@pytest.fixture
def gone_after(api: StrictClient) -> Iterator[list[str]]:
    names: list[str] = []
    yield names
    api.call("DELETE", "/endpoints", {"delete_endpoint_list": names, "username": ""})
    until(lambda: not set(names) & {e["endpoint_name"] for e in listed(api)})


def listed(api: StrictClient) -> list[dict[str, Any]]:
    endpoints: list[dict[str, Any]] = api.call("GET", "/endpoints")["data"]["endpoints"]
    return endpoints


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return seen


def start(client: StrictClient, params: dict[str, Any]) -> str:
    job_id: str = client.create_job("txt2img", MODELS, params)
    client.start_job(job_id)
    return job_id


def test_an_endpoint_shows_its_instances(
    api: StrictClient, other: StrictClient, gone_after: list[str]
) -> None:
    """At any gateway."""
    gone_after.append("shown")
    made = api.create_endpoint("shown")
    api.wait_for_endpoint("shown")
    api.wait_for_job(start(api, TINY))

    def instances() -> list[dict[str, Any]]:
        data = other.call("GET", "/endpoints/shown")["data"]
        assert data["endpoint"]["EndpointDeploymentJobId"] == made["EndpointDeploymentJobId"]
        assert data["min_instance_number"] == "1"
        return [i for i in data["instances"] if CHECKPOINT.name in i["models"] and not i["jobs"]]

    (instance,) = until(instances)
    assert (instance["device"], instance["device_name"]) == ("cpu", "CPU")
    assert 50e6 < instance["memory"] < instance["memory_total"]
    outsider = api.add_person("byoc")
    assert outsider.request("GET", "/endpoints/shown").status_code == 404


def test_the_first_job_wakes_an_endpoint_that_sleeps(
    api: StrictClient, artist: StrictClient, gone_after: list[str]
) -> None:
    gone_after.append("sleepy")
    api.create_endpoint("sleepy", roles=("byoc",), max_instance_number=2)

    def status() -> tuple[str, str]:
        (endpoint,) = [e for e in listed(artist) if e["endpoint_name"] == "sleepy"]
        assert (endpoint["autoscaling"], endpoint["max_instance_number"]) == (True, "2")
        return endpoint["endpoint_status"], endpoint["current_instance_count"]

    until(lambda: status() == ("InService", "1"))
    until(lambda: status() == ("InService", "0"))
    job = artist.wait_for_job(start(artist, TINY))
    assert job["status"] == "succeed", job["error"]


def test_a_deleted_endpoint_finishes_its_job_and_hands_on_the_others(
    api: StrictClient, artist: StrictClient, gone_after: list[str]
) -> None:
    gone_after += ["leaving", "staying"]
    api.create_endpoint("leaving", roles=("byoc",))
    api.wait_for_endpoint("leaving")
    # It goes on for longer than another worker takes to start, on a busy machine too.
    long = {**TINY, "steps": 400, "width": 256, "height": 256}
    jobs = [start(artist, long)]
    until(lambda: api.call("GET", "/endpoints/leaving")["data"]["instances"][0]["jobs"] == jobs)
    # Of another size, so that they wait for the first instead of running beside it.
    jobs += [start(artist, {**TINY, "seed": seed}) for seed in range(6)]
    api.create_endpoint("staying", roles=("byoc",))
    api.wait_for_endpoint("staying")
    artist.call("DELETE", "/endpoints", {"delete_endpoint_list": ["leaving"], "username": ""})
    (leaving,) = [e for e in listed(artist) if e["endpoint_name"] == "leaving"]
    assert (leaving["endpoint_status"], leaving["current_instance_count"]) == ("Deleting", "0")
    ended = [artist.wait_for_job(job_id) for job_id in jobs]
    assert {job["status"] for job in ended} == {"succeed"}
    names = [job["params"]["sagemaker_inference_endpoint_name"] for job in ended]
    assert names == ["leaving"] + ["staying"] * 6
    until(lambda: "leaving" not in {e["endpoint_name"] for e in listed(artist)})


def test_a_job_that_no_other_endpoint_can_take_fails_with_the_reason(
    api: StrictClient, artist: StrictClient, gone_after: list[str]
) -> None:
    """The others are there, but not for its user."""
    gone_after += ["lonely", "foreign"]
    api.create_endpoint("lonely", roles=("byoc",))
    api.create_endpoint("foreign", roles=("IT Operator",))
    for name in gone_after:
        api.wait_for_endpoint(name)
    begun = start(artist, {**TINY, "steps": 150, "width": 256, "height": 256})
    until(lambda: api.call("GET", "/endpoints/lonely")["data"]["instances"][0]["jobs"] == [begun])
    waiting = start(artist, TINY)
    artist.call("DELETE", "/endpoints", {"delete_endpoint_list": ["lonely"], "username": ""})
    job = artist.wait_for_job(waiting, seconds=10)
    assert job["status"] == "failed"
    assert job["error"] == 'endpoint "lonely" was deleted; no other endpoint can take the job'
    artist.cancel_job(begun)
    refused = artist.request(
        "PUT", f"/inferences/{artist.create_job('txt2img', MODELS, TINY)}/start"
    )
    assert refused.status_code == 400
    assert "no available Async endpoints" in refused.json()["message"]
