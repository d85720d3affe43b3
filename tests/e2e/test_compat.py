"""The ESD compatibility profile: each promise of services/gateway/compat.py, as an unmodified
client of ESD 1.4 to 1.6 would try it, and that without the profile none of it holds."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from deploy.local import processes
from deploy.local.stack import Stack
from tests.e2e.described import StrictClient
from tests.e2e.gateways import another_gateway, process_of
from tests.weights import weights

NOTHING = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Iterator[str]:
    """One more gateway of the stack, with the profile."""
    with another_gateway(stack, DARKROOM_ESD_COMPAT="true") as url:
        yield url


class EsdClient(StrictClient):
    """Has the API key, and names its user without proof."""

    def as_14(self, username: str) -> StrictClient:
        """1.4: the bearer token is the username in upper-case base16."""
        return self.bearing(base64.b16encode(username.encode()).decode())

    def named(self, username: str, method: str, path: str, body: object = None) -> httpx.Response:
        """Later ones: a `username` header."""
        return self.request(method, path, body, username=username)


@pytest.fixture(scope="module")
def esd(gateway: str, stack: Stack) -> EsdClient:
    return EsdClient(gateway + "/prod", stack.installation.secrets.api_key)


@pytest.fixture(scope="module")
def plain(api: StrictClient, stack: Stack) -> EsdClient:
    """The same client at a gateway without the profile."""
    return EsdClient(api.url, stack.installation.secrets.api_key)


def unique(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(4)}"


JOB: dict[str, Any] = {"inference_type": "Async", "task_type": "rembg", "models": {}}


def create_job(client: StrictClient, **more: object) -> str:
    answer = client.request("POST", "/inferences", {**JOB, **more})
    assert answer.status_code == 201
    return str(answer.json()["data"]["inference"]["id"])


def test_it_is_announced_and_off_by_default(stack: Stack, gateway: str) -> None:
    port = gateway.rpartition(":")[2]
    warning = "esd_compatibility_profile_is_on"
    assert warning in stack.installation.log(f"gateway-{port}").read_text()
    assert warning not in stack.installation.log("gateway").read_text()


def test_every_route_is_also_under_prod(
    gateway: str, esd: EsdClient, api: StrictClient, plain: EsdClient
) -> None:
    assert esd.request("GET", "/ping").json()["message"] == "pong"
    assert api.at(gateway).request("GET", "/roles").status_code == 200
    assert api.at(gateway + "/prod").request("GET", "/roles").status_code == 200
    assert httpx.get(gateway + "/prod/api", trust_env=False).status_code == 200
    assert httpx.get(gateway + "/prod/roles", trust_env=False).status_code == 403
    assert api.request("GET", "/prod/roles").status_code == 404


def test_browsers_may_call_it(gateway: str, plain: EsdClient) -> None:
    for method, path in (("OPTIONS", "/prod/inferences"), ("GET", "/prod/roles")):
        answer = httpx.request(method, gateway + path, trust_env=False)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "DELETE" in answer.headers["access-control-allow-methods"]
        assert answer.headers["x-api-version"] == "1.4.0"
    answer = httpx.options(plain.url + "/inferences", trust_env=False)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_the_person_is_who_the_client_says(esd: EsdClient, plain: EsdClient) -> None:
    for path in ("/roles", "/users", "/checkpoints", "/endpoints", "/inferences"):
        assert esd.as_14("admin").request("GET", path).status_code == 200
        assert esd.named("admin", "GET", path).status_code == 200
        assert plain.as_14("admin").request("GET", path).status_code == 401
        assert plain.named("admin", "GET", path).status_code == 401
        assert plain.request("GET", path).status_code == 401
    for nobody in ("nobody", "ÿ"):
        assert esd.as_14(nobody).request("GET", "/roles").status_code == 401
    assert esd.bearing("XYZ").request("GET", "/roles").status_code == 401
    assert esd.request("GET", "/roles").status_code == 401


def test_a_named_person_has_no_more_than_their_permissions(
    esd: EsdClient, api: StrictClient
) -> None:
    designer = api.add_person("Designer")
    user = {"username": unique("user"), "password": "long enough", "roles": ["IT Operator"]}
    assert esd.named(designer.username, "POST", "/users", user).status_code == 403
    assert esd.named(designer.username, "GET", "/users").status_code == 200


def test_with_the_api_key_alone_it_is_whom_the_body_or_the_job_names(
    esd: EsdClient, plain: EsdClient, api: StrictClient
) -> None:
    designer = api.add_person("Designer").username
    job_id = create_job(esd, user_id=designer)
    job = esd.request("GET", f"/inferences/{job_id}").json()["data"]
    assert job["owner_group_or_role"] == [designer]
    refused = esd.request("PUT", f"/inferences/{job_id}/start")
    assert refused.status_code == 400
    assert refused.json()["message"] == f'no available Async endpoints for user "{designer}"'
    assert esd.request("POST", "/inferences", JOB).status_code == 401, "nobody is named"
    listed = esd.request("GET", f"/inferences?username={designer}").json()["data"]
    assert [one["InferenceJobId"] for one in listed["inferences"]] == [job_id]
    for method, path, body in (
        ("GET", "/inferences", None),
        ("GET", f"/inferences/{job_id}", None),
        ("PUT", f"/inferences/{job_id}/start", None),
        ("PUT", f"/inferences/{job_id}/cancel", None),
        ("DELETE", "/inferences", {"inference_id_list": [job_id]}),
        ("POST", "/inferences", {**JOB, "user_id": "admin"}),
        ("PUT", f"/checkpoints/{NOTHING}", {"status": "Active"}),
        ("DELETE", "/checkpoints", {"checkpoint_id_list": [NOTHING]}),
    ):
        assert plain.request(method, path, body).status_code == 401, f"{method} {path}"
    assert esd.request("GET", "/inferences").status_code == 200
    cancelled = esd.request("PUT", f"/inferences/{job_id}/cancel")
    assert cancelled.status_code == 200
    assert cancelled.json()["data"]["error"] == f'cancelled by "{designer}"'
    gone = {"inference_id_list": [job_id, "99"]}
    assert esd.request("DELETE", "/inferences", gone).status_code == 204
    assert esd.request("DELETE", "/inferences", gone).status_code == 204
    unknown = esd.request("GET", f"/inferences/{job_id}")
    assert unknown.status_code == 404
    assert unknown.json()["message"] == f"inference with id {job_id} not found"
    for what in ("start", "cancel"):
        assert esd.request("PUT", f"/inferences/{job_id}/{what}").status_code == 404


def test_checkpoints_need_no_token_and_are_listed_twice(esd: EsdClient) -> None:
    name = unique("esd")
    body = {
        "checkpoint_type": "VAE",
        "params": {"message": "m", "creator": "admin"},
        "filenames": [{"filename": name, "parts_number": 1}],
    }
    new = esd.request("POST", "/checkpoints", body)
    assert new.status_code == 201
    id_ = new.json()["data"]["checkpoint"]["id"]
    sent = esd.http.put(new.json()["data"]["s3PresignUrl"][name][0], content=weights("VAE"))
    tags = {name: [{"ETag": sent.headers["ETag"], "PartNumber": 1}]}
    done = esd.request("PUT", f"/checkpoints/{id_}", {"status": "Active", "multi_parts_tags": tags})
    assert done.json()["checkpoint"]["status"] == "Active"
    listed = esd.named("admin", "GET", "/checkpoints?types=VAE&per_page=1").json()
    assert listed["checkpoints"] == listed["data"]["checkpoints"]
    assert listed["checkpoints"][0]["id"] == id_
    taken = esd.request("POST", "/checkpoints", body)
    assert taken.json()["message"] == (
        f"{name} already exists, please use another or rename/delete exists"
    )
    gone = {"checkpoint_id_list": [id_]}
    assert esd.request("DELETE", "/checkpoints", gone).status_code == 204
    assert esd.request("DELETE", "/checkpoints", gone).status_code == 204


def test_unknown_keys_are_ignored_and_missing_ones_named_in_its_own_words(
    esd: EsdClient, plain: EsdClient, api: StrictClient
) -> None:
    admin = esd.as_14("admin")
    extra = {"role_name": unique("role"), "permissions": [], "creator": "admin", "extra": 1}
    assert admin.request("POST", "/roles", extra).status_code == 201
    assert api.request("POST", "/roles", extra).status_code == 400
    missing = 'object has missing required properties (["%s"])'
    for method, path, body, name in (
        ("DELETE", "/roles", {}, "role_name_list"),
        ("POST", "/users", {"username": "a", "roles": []}, "password"),
        ("DELETE", "/endpoints", {}, "delete_endpoint_list"),
    ):
        answer = admin.request(method, path, body)
        assert answer.status_code == 400
        assert answer.json()["message"] == missing % name
    empty = admin.request("POST", "/roles", {"role_name": "", "permissions": []})
    assert empty.status_code == 400
    assert "(length: 0, required minimum: 1)" in empty.json()["message"]


def test_creating_what_exists_updates_it(esd: EsdClient, api: StrictClient) -> None:
    admin, role = esd.as_14("admin"), unique("role")
    for permissions in (["train:all"], ["checkpoint:all", "inference:all"]):
        body = {"role_name": role, "creator": "somebody", "permissions": permissions}
        assert admin.request("POST", "/roles", body).status_code == 201
        roles = api.call("GET", "/roles")["data"]["roles"]
        (made,) = (r for r in roles if r["role_name"] == role)
        assert (made["permissions"], made["creator"]) == (permissions, "admin")
    name = unique("user")
    for password in ("first password", "second password"):
        user = {"username": name, "password": password, "creator": "x", "roles": [role]}
        assert admin.request("POST", "/users", user).status_code == 201
        credentials = {"username": name, "password": password}
        assert api.request("POST", "/auth/token", credentials).status_code == 200
    old = {"username": name, "password": "first password"}
    assert api.request("POST", "/auth/token", old).status_code == 401
    wrong = admin.request("POST", "/users", {**user, "roles": ["Painter"]})
    assert wrong.json()["message"] == 'user roles "Painter" not exist'
    default = admin.request("DELETE", "/roles", {"role_name_list": ["Designer"]})
    assert "cannot delete default role" in default.json()["message"]
    assert (
        admin.request("GET", "/users?show_password=1").json()["data"]["users"][0]["password"]
        == "********"
    )
    nobody = admin.request("GET", "/checkpoints?username=nobody")
    assert nobody.json()["message"] == 'user: "nobody" not exist'
    admin.call("DELETE", "/users", {"user_name_list": [name, "nobody"]})
    admin.call("DELETE", "/roles", {"role_name_list": [role, "nothing"]})


def test_taking_over_a_stronger_user_is_refused(esd: EsdClient, api: StrictClient) -> None:
    clerk = api.add_person(permissions=("user:create",))
    takeover = {"username": "admin", "password": "mine from now on", "roles": []}
    assert esd.named(clerk.username, "POST", "/users", takeover).status_code == 403
    ladder = {"role_name": "IT Operator", "permissions": []}
    assert esd.named(clerk.username, "POST", "/roles", ladder).status_code == 403


def test_endpoints_get_their_prefix_and_go_by_either_list(
    esd: EsdClient, plain: EsdClient, api: StrictClient
) -> None:
    admin, name = esd.as_14("admin"), unique("e")
    body = {
        "endpoint_name": name,
        "endpoint_type": "Real-time",
        "instance_type": "ml.g4dn.xlarge",
        "initial_instance_count": 1,
        "autoscaling_enabled": False,
        "assign_to_roles": ["IT Operator"],
        "creator": "admin",
    }
    made = admin.request("POST", "/endpoints", body)
    assert made.status_code == 200
    full = f"esd-real-time-{name}"
    assert made.json()["data"]["endpoint_name"] == full
    assert made.json()["message"] == f"Endpoint deployment started: {full}"
    again = admin.request("POST", "/endpoints", body)
    assert again.json()["message"] == f'Cannot create already existing model "{full}"'
    refused = api.request("DELETE", "/endpoints", {"endpoint_name_list": [full]})
    assert refused.status_code == 400
    gone = esd.named("admin", "DELETE", "/endpoints", {"endpoint_name_list": [full]})
    assert gone.status_code == 204
    seed = admin.request("DELETE", "/endpoints", {"delete_endpoint_list": [full]})
    assert (seed.status_code, seed.json()) == (200, {})
    assert api.find_endpoint(full) is None


def test_params_may_come_with_the_request(esd: EsdClient, api: StrictClient) -> None:
    """There is no endpoint here: that the job is there with its params, and that it was tried to
    start it, is what can be seen."""
    designer = api.add_person("Designer")
    params = '{"input_image": "x", "s_tmax": Infinity}'
    body = {**JOB, "user_id": designer.username, "payload_string": params}
    answer = esd.request("POST", "/inferences", body)
    assert answer.status_code == 400
    assert "no available Async endpoints" in answer.json()["message"]
    (job,) = designer.call("GET", "/inferences")["data"]["inferences"]
    uploaded = api.download(job["params"]["input_body_presign_url"])
    assert uploaded == params.encode()
    large = {**body, "payload_string": "x" * 3_000_000}
    assert esd.request("POST", "/inferences", large).status_code == 400
    assert api.request("POST", "/inferences", large).status_code == 413
    assert designer.request("POST", "/inferences", body).status_code == 400


def test_initial_makes_the_first_user_of_an_empty_place_and_no_other(esd: EsdClient) -> None:
    first = {"username": "first", "password": "long enough", "creator": "first", "initial": True}
    assert esd.request("POST", "/users", first).status_code == 400
    with Stack.temporary(services=False) as empty, ExitStack() as running:
        table = {p.name: p for p in processes.table(empty.installation, {})}
        without_admin = {"DARKROOM_ADMIN_PASSWORD_HASH": "", "DARKROOM_ESD_COMPAT": "true"}
        for name in ("identity", "gateway"):
            starting = process_of(table[name], empty, "/readyz", **without_admin)
            url = running.enter_context(starting)
        client = EsdClient(url + "/prod", empty.installation.secrets.api_key)
        assert client.as_14("first").request("GET", "/users").status_code == 401
        assert client.request("POST", "/users", first).status_code == 201
        users = client.as_14("first").call("GET", "/users")["data"]["users"]
        assert [user["username"] for user in users] == ["first"]
        assert "user:all" in users[0]["permissions"]
        assert {"IT Operator", "Designer", "byoc"} == set(users[0]["roles"])
        second = {**first, "username": "second"}
        assert client.request("POST", "/users", second).status_code == 400
        assert "second" not in json.dumps(client.as_14("first").call("GET", "/users"))
