"""The API as ESD 1.4.0 describes it: `esd-1.4.0.json` holds its 16 operations with their examples,
word for word. Beyond them what it leaves out: lists, tokens, idempotency, replicas, events."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from deploy.local.client import parse_events
from deploy.local.demo import CHECKPOINT
from tests.e2e.described import Person, StrictClient
from tests.weights import weights

SEED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("esd-1.4.0.json").read_text())
MODEL = "v1-5-pruned-emaonly.safetensors"
PART_BYTES = 5 * 1024 * 1024
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}")
PARAMS = {"prompt": "a red heart", "steps": 2, "width": 64, "height": 64, "s_tmax": float("inf")}


def unique(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(4)}"


class World:
    """Makes what the seed's examples speak of, each thing once, when it is first asked for."""

    def __init__(self, api: StrictClient) -> None:
        self.api = api

    def play(self, operation: str, body: object = None, **ids: str) -> httpx.Response:
        """Sends the seed's example, or `body` where it speaks of ids that only we know."""
        example = SEED[operation]
        path = re.sub(r"\{(\w+)\}", lambda found: ids[found[1]], example["path"])
        return self.api.request(example["method"], path, body or example["request"])

    @cached_property
    def endpoint(self) -> httpx.Response:
        return self.play("CreateEndpoint")

    @cached_property
    def job(self) -> httpx.Response:
        if self.api.find_checkpoint("Stable-diffusion", MODEL) is None:
            self.api.upload_checkpoint("Stable-diffusion", CHECKPOINT, name=MODEL)
        return self.play("CreateInferenceJob")

    @property
    def job_id(self) -> str:
        return str(self.job.json()["data"]["inference"]["id"])

    @cached_property
    def started(self) -> httpx.Response:
        url = self.job.json()["data"]["inference"]["api_params_s3_upload_url"]
        self.api.http.put(url, content=json.dumps(PARAMS)).raise_for_status()
        assert self.endpoint.is_success
        self.api.wait_for_endpoint("test")
        return self.play("StartInferenceJob", jobId=self.job_id)

    @cached_property
    def finished(self) -> httpx.Response:
        assert self.started.is_success
        job = self.api.wait_for_job(self.job_id)
        assert job["status"] == "succeed", job["error"]
        return self.play("GetInferenceJob", jobId=self.job_id)


@pytest.fixture(scope="module")
def world(api: StrictClient) -> Iterator[World]:
    world = World(api)
    assert world.endpoint.is_success  # its worker starts while the first tests run
    yield world
    world.play("DeleteEndpoints", {"delete_endpoint_list": ["test"], "username": "admin"})


# Beside the seed: who may come in


def test_logging_in_gives_a_token_that_expires(api: StrictClient) -> None:
    person = api.add_person("Designer")
    credentials = {"username": person.username, "password": person.password}
    answer = api.call("POST", "/auth/token", credentials)
    assert answer["token_type"] == "Bearer"
    assert answer["expires_in"] > 0
    assert api.bearing(answer["access_token"]).request("GET", "/roles").status_code == 200
    for wrong in ({"password": "wrong"}, {"username": unique("nobody")}):
        assert api.request("POST", "/auth/token", {**credentials, **wrong}).status_code == 401


def test_a_personal_token_works_until_it_is_revoked(api: StrictClient, other: StrictClient) -> None:
    person = api.add_person("Designer")
    made = person.call("POST", "/auth/tokens", {"name": "for a script", "expires_in": 3600})
    kept = person.call("POST", "/auth/tokens", {"name": "for ever"})["data"]
    token = made["data"]["token"]
    secret = made["data"]["access_token"]
    assert TIME.fullmatch(token["created"])
    assert TIME.fullmatch(token["expires"])
    assert kept["token"]["expires"] is None
    listed = person.call("GET", "/auth/tokens")["data"]["tokens"]
    assert listed == [token, kept["token"]]
    assert token["id"] not in json.dumps(api.call("GET", "/auth/tokens"))
    script = api.bearing(secret)
    assert script.request("GET", "/roles").status_code == 200
    assert other.bearing(secret).request("GET", "/roles").status_code == 200
    stranger = api.request("DELETE", f"/auth/tokens/{token['id']}")
    assert stranger.status_code == 404, "somebody else's token is nobody's business"
    assert person.request("DELETE", f"/auth/tokens/{token['id']}").status_code == 204
    assert other.bearing(secret).request("GET", "/roles").status_code == 401
    assert script.request("GET", "/roles").status_code == 401
    assert api.bearing(kept["access_token"]).request("GET", "/roles").status_code == 200


# Beside the seed: lists


def test_roles_are_listed(api: StrictClient) -> None:
    roles = {role["role_name"]: role for role in api.call("GET", "/roles")["data"]["roles"]}
    assert {"IT Operator", "Designer", "byoc"} <= set(roles)
    assert "checkpoint:all" in roles["Designer"]["permissions"]
    assert set(roles["byoc"]) == {"role_name", "creator", "permissions"}


def test_checkpoints_are_listed_by_filter_and_page(api: StrictClient) -> None:
    person = api.add_person("Designer")
    ids: list[str] = []
    for kind in ("VAE", "VAE", "Lora", "Lora", "ControlNet"):
        allowed = {"allowed_roles_or_users": ["Designer"]} if kind == "Lora" else {}
        body = {"checkpoint_type": kind, "filenames": [{"filename": unique("listed")}], **allowed}
        ids.insert(0, person.call("POST", "/checkpoints", body)["data"]["checkpoint"]["id"])

    def listed(query: str) -> list[str]:
        data = api.call("GET", f"/checkpoints?username={person.username}&{query}")["data"]
        return [checkpoint["id"] for checkpoint in data["checkpoints"]]

    assert listed("") == ids, "newest first"
    assert listed("types=Lora") == ids[1:3]
    assert listed("types=VAE&types=ControlNet") == [ids[0], *ids[3:]]
    assert listed("status=Initial") == ids
    assert listed("status=Active&status=Disabled") == []
    assert listed("roles=Designer") == ids[1:3]
    page = api.call("GET", f"/checkpoints?username={person.username}&per_page=2&page=3")["data"]
    assert [checkpoint["id"] for checkpoint in page["checkpoints"]] == ids[4:]
    assert (page["page"], page["per_page"], page["pages"], page["total"]) == (3, 2, 3, 5)
    beyond = api.call("GET", f"/checkpoints?username={person.username}&per_page=2&page=9")["data"]
    assert (beyond["checkpoints"], beyond["pages"], beyond["total"]) == ([], 3, 5)
    person.call("DELETE", "/checkpoints", {"checkpoint_id_list": ids})
    assert listed("") == []


def create_cutting_job(
    person: StrictClient, inference_type: str = "Async", task_type: str = "rembg", **more: str
) -> str:
    """A job that needs no checkpoint to be created."""
    body = {"inference_type": inference_type, "task_type": task_type, "models": {}}
    answer = person.call("POST", "/inferences", body, **more)
    return str(answer["data"]["inference"]["id"])


def test_jobs_are_listed_by_filter_and_page(api: StrictClient, world: World) -> None:
    person = api.add_person("Designer")
    ids = [create_cutting_job(person) for _ in range(3)]
    ids = [create_cutting_job(person, "Real-time", "extra-single-image"), *reversed(ids)]

    def listed(query: str, client: StrictClient = person) -> list[str]:
        data = client.call("GET", f"/inferences?{query}")["data"]
        return [job["InferenceJobId"] for job in data["inferences"]]

    assert listed("") == ids, "newest first, and one's own only"
    assert listed(f"username={person.username}", api) == ids
    assert listed("inference_type=Real-time") == ids[:1]
    assert listed("status=created&status=failed") == ids
    assert listed("status=succeed") == []
    assert listed("task_type=txt2img&task_type=img2img") == []
    assert listed("task_type=extra-single-image") == ids[:1]
    assert listed("task_type=rembg") == ids[1:]
    assert listed("endpoint_name=test") == []
    assert world.started.is_success
    assert world.job_id in listed("endpoint_name=test", api)
    page = person.call("GET", "/inferences?per_page=3&page=2")["data"]
    assert [job["InferenceJobId"] for job in page["inferences"]] == ids[3:]
    assert (page["page"], page["per_page"], page["pages"], page["total"]) == (2, 3, 2, 4)
    assert person.call("GET", "/inferences?per_page=3&page=7")["data"]["total"] == 4
    person.call("DELETE", "/inferences", {"inference_id_list": ids})
    assert listed("") == []


# Beside the seed: a kind of job that it leaves out and its clients send


def test_a_picture_can_be_enlarged_with_an_upscaler_or_without_any_model(
    api: StrictClient, tmp_path: Path
) -> None:
    upscaler = tmp_path / f"{unique('upscaler')}.safetensors"
    upscaler.write_bytes(weights("Upscaler"))
    api.upload_checkpoint("Upscaler", upscaler)
    body = {"inference_type": "Async", "task_type": "extra-single-image"}
    for models in ({}, {"Upscaler": [upscaler.name]}):
        job = api.call("POST", "/inferences", {**body, "models": models})["data"]["inference"]
        assert job["type"] == "extra-single-image"
        assert {model["type"]: model["name"] for model in job["models"]} == models
        key = f"/extra-single-image/infer_v2/{job['id']}/api_param.json"
        assert job["api_params_s3_location"].endswith(key)
        params = b'{"image": "", "upscaling_resize": 2, "upscaler_1": "Lanczos"}'
        api.http.put(job["api_params_s3_upload_url"], content=params).raise_for_status()
        shown = api.get_job(job["id"])
        assert shown["taskType"] == "extra-single-image"
        assert api.download(shown["params"]["input_body_presign_url"]) == params
    unknown = {**body, "models": {"Upscaler": ["no such"]}}
    assert api.request("POST", "/inferences", unknown).status_code == 404


# Beside the seed: a job that nobody wants any more


def test_a_cancelled_job_has_failed_at_once_at_every_gateway(
    api: StrictClient, other: StrictClient
) -> None:
    person = api.add_person("Designer")
    for client, canceller in ((person, person.username), (api, "admin")):
        id_ = create_cutting_job(person)
        job = client.cancel_job(id_)
        assert (job["InferenceJobId"], job["status"]) == (id_, "failed")
        assert job["error"] == f'cancelled by "{canceller}"'
        assert TIME.fullmatch(job["completeTime"])
        for gateway in (api, other):
            seen = person.at(gateway.url).get_job(id_)
            assert (seen["status"], seen["error"]) == ("failed", job["error"])
        again = api.at(other.url).cancel_job(id_)
        assert (again["status"], again["error"]) == ("failed", job["error"])
        started = person.request("PUT", f"/inferences/{id_}/start")
        assert started.status_code == 400, "it does not run after all"
        told = [event.name for event in person.events(f"/inferences/{id_}/events") if event.id]
        assert told == ["inference.job_created.v1", "inference.job_cancelled.v1"]


def test_a_job_that_has_ended_can_not_be_cancelled(api: StrictClient, world: World) -> None:
    assert world.finished.is_success
    refused = api.request("PUT", f"/inferences/{world.job_id}/cancel")
    assert refused.status_code == 400
    assert refused.json()["message"] == (
        f"inference {world.job_id} is succeed; only one that has not ended can be cancelled"
    )
    assert api.get_job(world.job_id)["img_presigned_urls"]
    unknown = api.request("PUT", "/inferences/99/cancel")
    assert unknown.status_code == 404
    assert unknown.json()["message"] == "inference with id 99 not found"


# Beside the seed: the same request twice, and two gateways


def new_role(client: StrictClient, name: str, **more: str) -> str:
    client.call("POST", "/roles", {"role_name": name, "permissions": []}, **more)
    return name


def new_checkpoint(client: StrictClient, name: str, **more: str) -> str:
    body = {"checkpoint_type": "VAE", "filenames": [{"filename": name}]}
    return str(client.call("POST", "/checkpoints", body, **more)["data"]["checkpoint"]["id"])


def new_job(client: StrictClient, name: str, **more: str) -> str:
    return create_cutting_job(client, **more)


@pytest.mark.parametrize("create", [new_role, new_checkpoint, new_job])
def test_a_repeated_post_does_its_work_once(
    api: StrictClient, other: StrictClient, create: Callable[..., str]
) -> None:
    def count_jobs() -> int:
        return int(api.call("GET", "/inferences?task_type=rembg")["data"]["total"])

    name, key, before = unique("once"), unique("key"), count_jobs()
    with ThreadPoolExecutor(6) as threads:
        both = [api, other] * 3
        ids = list(threads.map(lambda client: create(client, name, idempotency_key=key), both))
    ids.append(create(other, name, idempotency_key=key))
    assert len(set(ids)) == 1
    assert count_jobs() == before + (create is new_job)


def test_a_repeated_refusal_is_the_same_refusal(api: StrictClient, other: StrictClient) -> None:
    name, key = new_role(api, unique("taken")), unique("key")
    body = {"role_name": name, "permissions": []}
    first = api.request("POST", "/roles", body, idempotency_key=key)
    api.call("DELETE", "/roles", {"role_name_list": [name]})
    again = other.request("POST", "/roles", body, idempotency_key=key)
    assert (first.status_code, first.json()) == (again.status_code, again.json())
    assert api.request("POST", "/roles", body).status_code == 201


def test_a_key_for_another_body_is_refused(api: StrictClient) -> None:
    name, key = unique("keyed"), unique("key")
    new_role(api, name, idempotency_key=key)
    body = {"role_name": unique("keyed"), "permissions": []}
    refused = api.request("POST", "/roles", body, idempotency_key=key)
    assert refused.status_code == 400
    assert "Idempotency-Key" in refused.json()["message"]
    person = api.add_person("IT Operator")
    assert person.request("POST", "/roles", body, idempotency_key=key).status_code == 201


def test_a_write_is_seen_at_once_at_the_other_gateway(
    api: StrictClient, other: StrictClient
) -> None:
    """What needs no table (roles, tokens) is kept in memory by each gateway: that is harder."""
    here, there = api, other
    for _ in range(50):
        name = new_role(here, unique("seen"))
        roles = there.call("GET", "/roles")["data"]["roles"]
        assert name in [role["role_name"] for role in roles]
        assert there.request("DELETE", "/roles", {"role_name_list": [name]}).status_code == 204
        roles = here.call("GET", "/roles")["data"]["roles"]
        assert name not in [role["role_name"] for role in roles]
        here, there = there, here
    for _ in range(10):
        made = here.call("POST", "/auth/tokens", {"name": "short"})["data"]
        script = there.bearing(made["access_token"])
        assert script.request("GET", "/roles").status_code == 200
        here.call("DELETE", f"/auth/tokens/{made['token']['id']}")
        assert script.request("GET", "/roles").status_code == 401
        id_ = new_checkpoint(here, unique("seen"))
        listed = there.call("GET", "/checkpoints?types=VAE&per_page=1")["data"]["checkpoints"]
        assert listed[0]["id"] == id_
        here.call("DELETE", "/checkpoints", {"checkpoint_id_list": [id_]})
        here, there = there, here


# The seed


def create_role(world: World) -> httpx.Response:
    answer = world.play("CreateRole")
    roles = world.api.call("GET", "/roles")["data"]["roles"]
    made = next(role for role in roles if role["role_name"] == "new_role_name")
    assert made["permissions"] == ["checkpoint:all", "train:all"]
    assert world.play("CreateRole").status_code == 400
    world.api.call("DELETE", "/roles", {"role_name_list": ["new_role_name"]})
    return answer


def delete_roles(world: World) -> httpx.Response:
    new_role(world.api, "role_name_1")
    answer = world.play("DeleteRoles")
    roles = world.api.call("GET", "/roles")["data"]["roles"]
    assert "role_name_1" not in [role["role_name"] for role in roles]
    assert world.play("DeleteRoles").status_code == 204
    return answer


def usernames(world: World) -> list[str]:
    return [user["username"] for user in world.api.call("GET", "/users")["data"]["users"]]


def create_user(world: World) -> httpx.Response:
    answer = world.play("CreateUser")
    example = SEED["CreateUser"]["request"]
    credentials = {"username": example["username"], "password": example["password"]}
    assert world.api.call("POST", "/auth/token", credentials)["access_token"]
    assert world.play("CreateUser").status_code == 400
    return answer


def list_users(world: World) -> httpx.Response:
    if "username" not in usernames(world):
        world.play("CreateUser")
    answer = world.play("ListUsers")
    users = {user["username"]: user for user in answer.json()["data"]["users"]}
    example = {user["username"]: user for user in SEED["ListUsers"]["answer"]["data"]["users"]}
    assert users["admin"] == example["admin"], "the seed's first user, to the letter"
    assert users["username"]["permissions"] == example["username"]["permissions"]
    assert {user["password"] for user in users.values()} == {"********"}
    return answer


def delete_users(world: World) -> httpx.Response:
    person = world.api.add_person(name="string")
    answer = world.play("DeleteUsers")
    assert "string" not in usernames(world)
    assert person.request("GET", "/auth/tokens").status_code == 401
    world.api.call("DELETE", "/users", {"user_name_list": ["username"]})
    return answer


def create_checkpoint(world: World) -> httpx.Response:
    """The address leads nowhere here, so the download fails a moment later, with a reason."""
    answer = world.play("CreateCheckpoint")
    checkpoint = answer.json()["data"]["checkpoint"]
    assert set(checkpoint) == {"id", "type", "s3_location", "status", "params"}
    assert checkpoint["type"] == "ControlNet"
    assert checkpoint["params"]["message"] == "placeholder for chkpts upload test"
    assert checkpoint["params"]["creator"] == "admin"
    assert TIME.fullmatch(checkpoint["params"]["created"])
    world.api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [checkpoint["id"]]})
    return answer


def update_checkpoint(world: World) -> httpx.Response:
    """Five parts, as in the seed, and then the bytes are what was sent."""
    (example,) = SEED["UpdateCheckpoint"]["request"]["multi_parts_tags"].values()
    body = {
        "checkpoint_type": "VAE",
        "params": {"message": "api-test-message", "creator": "admin"},
        "filenames": [{"filename": MODEL, "parts_number": len(example)}],
    }
    created = world.api.request("POST", "/checkpoints", body)
    assert created.json()["message"] == "Created"
    new = created.json()["data"]
    like(new["checkpoint"], SEED["UpdateCheckpoint"]["answer"]["checkpoint"], "checkpoint", set())
    tags = []
    whole = weights("VAE", PART_BYTES * (len(example) - 1) + 1000)
    for part, url in zip(example, new["s3PresignUrl"][MODEL], strict=True):
        start = (part["PartNumber"] - 1) * PART_BYTES
        sent = world.api.http.put(url, content=whole[start : start + PART_BYTES])
        tags.append({"ETag": sent.headers["ETag"], "PartNumber": part["PartNumber"]})
    id_ = new["checkpoint"]["id"]
    short = {"status": "Active", "multi_parts_tags": {MODEL: tags[:-1]}}
    assert world.play("UpdateCheckpoint", short, id=id_).status_code == 400
    body = {"status": "Active", "multi_parts_tags": {MODEL: tags}}
    answer = world.play("UpdateCheckpoint", body, id=id_)
    assert answer.json()["checkpoint"]["status"] == "Active"
    assert answer.json()["data"]["checkpoint"] == answer.json()["checkpoint"]
    assert world.api.find_checkpoint("VAE", MODEL)
    renamed = world.play("UpdateCheckpoint", {"name": unique("renamed")}, id=id_)
    assert renamed.status_code == 202
    off = world.play("UpdateCheckpoint", {"status": "Disabled"}, id=id_)
    assert off.json()["checkpoint"]["status"] == "Disabled"
    world.api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [id_]})
    return answer


def delete_checkpoints(world: World) -> httpx.Response:
    id_ = new_checkpoint(world.api, unique("gone"))
    answer = world.play("DeleteCheckpoints", {"checkpoint_id_list": [id_, "string"]})
    assert id_ not in json.dumps(world.api.call("GET", "/checkpoints?per_page=1000"))
    return answer


def create_endpoint(world: World) -> httpx.Response:
    data = world.endpoint.json()["data"]
    assert (data["endpoint_name"], data["endpoint_status"]) == ("test", "Creating")
    assert data["owner_group_or_role"] == ["Designer", "IT Operator"]
    again = world.play("CreateEndpoint")
    assert again.status_code == 400
    assert again.json()["message"].startswith("Cannot create already existing model")
    return world.endpoint


def list_endpoints(world: World) -> httpx.Response:
    world.api.wait_for_endpoint("test")
    answer = world.play("ListEndpoints")
    (endpoint,) = [e for e in answer.json()["data"]["endpoints"] if e["endpoint_name"] == "test"]
    assert endpoint["current_instance_count"] == "1"
    assert endpoint["instance_type"] == "ml.g5.2xlarge"
    outsider = world.api.add_person("byoc")
    assert "test" not in json.dumps(outsider.call("GET", "/endpoints"))
    body = {"delete_endpoint_list": ["test"], "username": "admin"}
    assert outsider.request("DELETE", "/endpoints", body).status_code == 403
    return answer


def delete_endpoints(world: World) -> httpx.Response:
    world.api.create_endpoint("infer-endpoint-test")
    answer = world.play("DeleteEndpoints")
    assert world.api.find_endpoint("infer-endpoint-test") is None
    return answer


def create_job(world: World) -> httpx.Response:
    inference = world.job.json()["data"]["inference"]
    example = SEED["CreateInferenceJob"]["answer"]["data"]["inference"]
    assert inference["type"] == "txt2img"
    assert inference["models"][1] == example["models"][1], "VAE Automatic is no checkpoint"
    assert inference["models"][0]["name"] == example["models"][0]["name"]
    key = f"txt2img/infer_v2/{inference['id']}/api_param.json"
    assert inference["api_params_s3_location"].endswith(key)
    return world.job


def start_job(world: World) -> httpx.Response:
    inference = world.started.json()["data"]["inference"]
    assert inference["inference_id"] == world.job_id
    assert (inference["status"], inference["endpoint_name"]) == ("inprogress", "test")
    assert world.play("StartInferenceJob", jobId=world.job_id).status_code == 400
    return world.started


def get_job(world: World) -> httpx.Response:
    job = world.finished.json()["data"]
    assert (job["status"], job["owner_group_or_role"]) == ("succeed", ["admin"])
    assert job["createTime"] <= job["startTime"] <= job["completeTime"]
    (picture,) = (world.api.download(url) for url in job["img_presigned_urls"])
    assert picture.startswith(b"\x89PNG")
    info = json.loads(world.api.download(job["output_presigned_urls"][0]))
    assert json.loads(info["info"])["infotexts"]
    uploaded = world.api.download(job["params"]["input_body_presign_url"])
    assert json.loads(uploaded) == PARAMS
    return world.finished


def delete_jobs(world: World) -> httpx.Response:
    id_ = create_cutting_job(world.api)
    answer = world.play("DeleteInferenceJobs", {"inference_id_list": [id_, "99"]})
    assert world.play("GetInferenceJob", jobId=id_).status_code == 404
    return answer


ANSWERS: dict[str, Callable[[World], httpx.Response]] = {
    "Ping": lambda world: world.play("Ping"),
    "DeleteRoles": delete_roles,
    "CreateRole": create_role,
    "CreateUser": create_user,
    "ListUsers": list_users,
    "DeleteUsers": delete_users,
    "CreateCheckpoint": create_checkpoint,
    "DeleteCheckpoints": delete_checkpoints,
    "UpdateCheckpoint": update_checkpoint,
    "CreateEndpoint": create_endpoint,
    "ListEndpoints": list_endpoints,
    "CreateInferenceJob": create_job,
    "StartInferenceJob": start_job,
    "GetInferenceJob": get_job,
    "DeleteInferenceJobs": delete_jobs,
    "DeleteEndpoints": delete_endpoints,
}

ADDED = {
    "CreateCheckpoint": {"data"},
    "UpdateCheckpoint": {"data", "message"},
    "CreateEndpoint": {"data.instance_type", "data.endpoint_type"},
    "GetInferenceJob": {
        "data.sagemakerRaw",
        "data.error",
        "data.warnings",
        "data.seconds",
        "data.params.output_path",
    },
}
"""What we answer beside the example: the seed's own schema tables have some of it."""
MAY_BE_EMPTY = {"data.users[].roles", "data.users[].permissions"}


@pytest.mark.parametrize("operation", ANSWERS)
def test_an_operation_answers_as_in_the_seed(world: World, operation: str) -> None:
    answer, example = ANSWERS[operation](world), SEED[operation]
    assert answer.status_code == example["status"]
    if answer.status_code == 204:
        assert answer.content == b""
        return
    body = answer.json()
    if "message" in example["answer"]:
        text = example["answer"]["message"].replace("infer-endpoint-prod", "test")
        assert body["message"] == text
    assert body.get("statusCode", 200) == example["status"]
    like(body, example["answer"], "", ADDED.get(operation, set()))


def test_every_operation_of_the_seed_is_covered() -> None:
    assert len(SEED) == 16
    assert set(ANSWERS) == set(SEED)


def like(value: Any, example: Any, where: str, added: set[str]) -> None:
    """The same field names, JSON types, and kinds of text (a time, an S3 or HTTP address)."""
    assert type(value) is type(example), f"{where}: {value!r} is not like {example!r}"
    if isinstance(example, dict):
        here = f"{where}." if where else ""
        extra = {name for name in set(value) - set(example) if here + name not in added}
        assert not extra, f"{where} has more than the seed: {extra}"
        assert set(example) <= set(value), f"{where} lacks {set(example) - set(value)}"
        for name in example:
            like(value[name], example[name], here + name, added)
    elif isinstance(example, list) and example:
        assert value or where in MAY_BE_EMPTY, f"{where} is empty"
        for n, item in enumerate(value):
            like(item, example[min(n, len(example) - 1)], f"{where}[]", added)
    elif isinstance(example, str):
        for kind in (TIME.pattern, r"s3://[^/]+/.+", r"https?://.+", r"\d+", r"\S+\.png"):
            if re.fullmatch(kind, example):
                assert re.fullmatch(kind, value), f"{where}: {value!r} is not like {example!r}"


# Beside the seed: events


def test_a_job_tells_its_life_from_the_beginning(world: World) -> None:
    assert world.finished.is_success
    path = f"/inferences/{world.job_id}/events"
    events = list(world.api.events(path))
    stored = [event for event in events if event.id]
    assert [event.name for event in stored] == [
        "inference.job_created.v1",
        "inference.job_started.v1",
        "inference.job_taken.v1",
        "inference.job_succeeded.v1",
    ]
    assert all(event.data["data"]["job_id"] == world.job_id for event in stored)
    assert not {"answers", "traceparent"} & set(stored[-1].data)
    later = list(world.api.events(path, last_event_id=stored[1].id))
    assert later == stored[2:]


def test_events_tell_only_what_one_may_see(api: StrictClient) -> None:
    insider, outsider = api.add_person("Designer"), api.add_person("Designer")
    heard: dict[str, list[str]] = {insider.username: [], outsider.username: []}
    last, listening = unique("last"), Barrier(3, timeout=20)

    def follow(person: Person) -> None:
        url = person.url + "/events"
        with person.http.stream("GET", url, headers=person.headers, timeout=20) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("retry")
            listening.wait()
            for event in parse_events(lines):
                heard[person.username].append(event.data["subject"])
                if event.data["subject"] == last:
                    return

    with ThreadPoolExecutor(2) as threads:
        following = [threads.submit(follow, person) for person in (insider, outsider)]
        listening.wait()
        insider.call("POST", "/auth/tokens", {"name": "secret"})
        api.add_person(name=(newcomer := unique("newcomer")))
        job_id = create_cutting_job(insider)
        new_role(api, last)
        for future in following:
            future.result(20)
    assert job_id in heard[insider.username]
    assert job_id not in heard[outsider.username]
    assert heard[outsider.username].count(newcomer) == 1, "the user, and not the credential"
