"""The ESD compatibility profile: each promise of services/gateway/compat.py, as an unmodified
client of ESD 1.4 to 1.6 would try it, and that without the profile none of it holds."""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from PIL import Image

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
def pool(api: StrictClient) -> Iterator[str]:
    """An Async endpoint whose worker starts while the first tests run."""
    name = api.create_endpoint(unique("pool"))["endpoint_name"]
    yield name
    api.call("DELETE", "/endpoints", {"delete_endpoint_list": [name]})


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


def test_it_is_announced_and_off_by_default(stack: Stack, gateway: str, pool: str) -> None:
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
    person = api.add_person("Designer")
    designer, job_id = person.username, create_job(person)
    job = esd.request("GET", f"/inferences/{job_id}").json()["data"]
    assert job["owner_group_or_role"] == [designer]
    refused = esd.request("PUT", f"/inferences/{job_id}/start")
    assert refused.status_code == 400
    assert refused.json()["message"] == f'no available Async endpoints for user "{designer}"'
    assert esd.request("POST", "/inferences", JOB).status_code == 401, "nobody is named"
    named = esd.request("POST", "/inferences", {**JOB, "user_id": designer})
    assert named.json() == refused.json(), "at once, since nobody could do it"
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
    for field, wish, says in (
        ("service_type", "comfy", "service_type: "),
        ("workflow_name", "mine", "workflow mine not found"),
        ("custom_docker_image_uri", "x.dkr.ecr/y:z", "custom_docker_image_uri: "),
        ("custom_extensions", "https://x.example/y.git", "custom_extensions: "),
    ):
        lacking = admin.request("POST", "/endpoints", {**body, field: wish})
        assert lacking.status_code == 400
        assert lacking.json()["message"].startswith(says)
    nothing = {"service_type": "sd", "workflow_name": "", "custom_extensions": ""}
    made = admin.request("POST", "/endpoints", {**body, **nothing})
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


def picture() -> str:
    """4x2 pixels, in base64."""
    png = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def test_params_may_come_with_the_request(
    esd: EsdClient, plain: EsdClient, api: StrictClient, pool: str
) -> None:
    designer, admin = api.add_person("Designer"), esd.as_14("admin")
    images = [{"data": picture(), "name": name} for name in ("a.png", "b.png")]
    params = json.dumps({"imageList": images, "upscaler_1": "Lanczos", "s_tmax": math.inf})
    body = {**JOB, "task_type": "extra-batch-images", "payload_string": params}
    del body["models"]
    nobody = esd.request("POST", "/inferences", {**body, "user_id": designer.username})
    assert nobody.status_code == 400
    assert "no available Async endpoints" in nobody.json()["message"]
    for wrong in ("string", "x" * 3_000_000, "[" * 100_000, ""):
        refused = admin.request("POST", "/inferences", {**body, "payload_string": wrong})
        assert refused.status_code == 400
        assert refused.json()["message"] == "payload_string must be valid json string"
    assert designer.call("GET", "/inferences")["data"]["inferences"] == [], "nothing was created"
    large = {**body, "payload_string": "x" * 3_000_000}
    assert api.request("POST", "/inferences", large).status_code == 413
    assert designer.request("POST", "/inferences", body).status_code == 400
    api.wait_for_endpoint(pool)
    for more in ({}, {"models": {"Stable-diffusion": ["unknown.safetensors"], "embeddings": []}}):
        started = admin.request("POST", "/inferences", {**body, **more})
        assert started.status_code == 202
        job = api.wait_for_job(started.json()["data"]["inference"]["inference_id"])
        assert (job["status"], job["image_names"]) == ("succeed", ["image_0.png", "image_1.png"])
        sizes = [Image.open(io.BytesIO(api.download(u))).size for u in job["img_presigned_urls"]]
        assert sizes == [(8, 4)] * 2
        assert api.download(job["params"]["input_body_presign_url"]) == params.encode()
    named = {key: value for key, value in {**body, **more}.items() if key != "payload_string"}
    for task_type, status in (("extra-batch-images", 201), ("rembg", 201), ("txt2img", 404)):
        job = {**named, "task_type": task_type}
        assert admin.request("POST", "/inferences", job).status_code == status
        assert api.request("POST", "/inferences", job).status_code == 404
    del named["models"]
    assert admin.request("POST", "/inferences", {**named, "task_type": "rembg"}).status_code == 201


def test_what_is_not_known_yet_of_a_job_is_no_null(esd: EsdClient, api: StrictClient) -> None:
    id_ = create_job(api)
    job = esd.request("GET", f"/inferences/{id_}").json()["data"]
    assert job["startTime"] == job["createTime"]
    for name in ("endpoint_id", "endpoint_name", "instance_type"):
        assert job["params"][f"sagemaker_inference_{name}"] == ""
    assert api.get_job(id_)["startTime"] is None


def test_lists_of_jobs_are_whole_or_go_on_after_a_key(esd: EsdClient, api: StrictClient) -> None:
    person = api.add_person("Designer")
    ids = [create_job(person) for _ in range(12)]
    ids.append(create_job(person, task_type="extra-single-image"))
    ids.reverse()

    def listed(query: str, client: StrictClient = esd) -> tuple[list[str], str | None]:
        answer = client.request("GET", f"/inferences?username={person.username}&{query}")
        data = answer.json()["data"]
        assert data["total"] == (12 if "type=rembg" in query else 13)
        return [job["InferenceJobId"] for job in data["inferences"]], data["last_evaluated_key"]

    for query in ("", "limit=-1", "exclusive_start_key=&status=&page=&type=&limit"):
        assert listed(query) == (ids, None)
    assert listed("per_page=3")[0] == ids[:3]
    assert listed("", person)[0] == ids[:10]
    shown, key = listed("limit=7&type=rembg")
    assert shown == ids[1:8]
    newer = create_job(person, task_type="extra-single-image")
    person.call("DELETE", "/inferences", {"inference_id_list": [newer, shown[-1]]})
    create_job(person, task_type="extra-single-image")
    ids.remove(shown[-1])
    data = esd.request(
        "GET",
        f"/inferences?username={person.username}&limit=7&type=rembg&exclusive_start_key={key}",
    ).json()["data"]
    assert [job["InferenceJobId"] for job in data["inferences"]] == ids[7:]
    assert (data["total"], data["last_evaluated_key"]) == (11, None)
    for query in ("limit=0", "limit=-2", "limit=x", "exclusive_start_key=x"):
        assert esd.request("GET", f"/inferences?{query}").status_code == 400


def test_lists_of_a_user_hold_what_that_user_may_use(esd: EsdClient, api: StrictClient) -> None:
    role, name = unique("role"), unique("e")
    api.call("POST", "/roles", {"role_name": role, "permissions": ["checkpoint:list"]})
    person, stranger = api.add_person(role), api.add_person("Designer")
    ids = []
    for allowed in (["*"], [role], [person.username], ["IT Operator"]):
        body = {
            "checkpoint_type": "VAE",
            "filenames": [{"filename": unique("seen")}],
            "allowed_roles_or_users": allowed,
        }
        ids.append(api.call("POST", "/checkpoints", body)["data"]["checkpoint"]["id"])

    def listed(who: str, query: str) -> set[str]:
        answer = esd.named(who, "GET", f"/checkpoints?per_page=1000&{query}").json()["data"]
        return {one["id"] for one in answer["checkpoints"]} & set(ids)

    assert listed("admin", f"username={person.username}") == set(ids[:3])
    assert listed("admin", "") == listed("admin", "username=admin") == set(ids)
    assert listed(stranger.username, f"username={person.username}") == {ids[0]}
    assert listed(stranger.username, "username=admin") == {ids[0]}
    mine = api.call("GET", f"/checkpoints?username={person.username}")["data"]
    assert mine["total"] == 0, "without the profile: what they made"
    endpoint = api.create_endpoint(name, roles=(role,))["endpoint_name"]
    for username, seen in ((person.username, True), (stranger.username, False)):
        found = esd.named("admin", "GET", f"/endpoints?username={username}").json()["data"]
        assert (endpoint in [e["endpoint_name"] for e in found["endpoints"]]) is seen
    nobody = esd.named("admin", "GET", "/endpoints?username=nobody")
    assert nobody.status_code == 400
    assert nobody.json()["message"] == 'user: "nobody" not exist'
    api.call("DELETE", "/endpoints", {"delete_endpoint_list": [endpoint]})
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": ids})


def test_passwords_are_as_short_as_clients_choose_them(esd: EsdClient, api: StrictClient) -> None:
    admin, name = esd.as_14("admin"), unique("user")
    user = {"username": name, "password": "x", "roles": ["Designer"]}
    refused = api.request("POST", "/users", {**user, "password": "seven77"})
    assert refused.json()["message"] == "password: got 7 characters, allowed are 8 or more"
    assert admin.request("POST", "/users", user).status_code == 201
    login = {"username": name, "password": "x"}
    assert api.request("POST", "/auth/token", login).status_code == 200
    short = api.request("PUT", f"/users/{name}", {"password": "x"})
    assert short.json()["message"] == "password: got 1 characters, allowed are 8 or more"
    empty = admin.request("POST", "/users", {**user, "password": ""})
    assert empty.json()["message"].endswith("(length: 0, required minimum: 1)")


def test_instead_of_a_password_a_text_is_shown_that_opens_nothing(
    esd: EsdClient, api: StrictClient
) -> None:
    admin, names = esd.as_14("admin"), [unique("user"), unique("user")]
    for name in names:
        user = {"username": name, "password": "the same for both", "roles": ["Designer"]}
        assert admin.request("POST", "/users", user).status_code == 201

    def shown(query: str, client: StrictClient = admin) -> list[str]:
        users = client.call("GET", f"/users?{query}")["data"]["users"]
        passwords = {user["username"]: user["password"] for user in users}
        return [passwords[name] for name in names]

    for query in ("", "show_password=0", "show_password=False"):
        assert shown(query) == ["********"] * 2
    assert shown("show_password=1", api) == ["********"] * 2
    texts = shown("show_password=1")
    assert texts == shown("show_password=True")
    assert texts[0] != texts[1]
    for name, text in zip(names, texts, strict=True):
        assert len(text) >= 32
        login = {"username": name, "password": text}
        assert api.request("POST", "/auth/token", login).status_code == 401
    sent_back = {"username": names[0], "password": texts[0], "roles": ["IT Operator"]}
    assert admin.request("POST", "/users", sent_back).status_code == 201
    unchanged = admin.request("PUT", f"/users/{names[0]}", {"password": texts[0]})
    assert unchanged.status_code == 200
    login = {"username": names[0], "password": "the same for both"}
    assert api.request("POST", "/auth/token", login).status_code == 200, "it stays what it was"
    (user,) = api.call("GET", f"/users?username={names[0]}")["data"]["users"]
    assert user["roles"] == ["IT Operator"]
    another = {"username": names[0], "password": texts[1], "roles": ["IT Operator"]}
    assert admin.request("POST", "/users", another).status_code == 201
    assert api.request("POST", "/auth/token", login).status_code == 401, "no text of this user's"
    assert shown("show_password=1")[0] != texts[0]


def test_initial_makes_the_first_user_of_an_empty_place_and_no_other(
    esd: EsdClient, plain: EsdClient, api: StrictClient
) -> None:
    first: dict[str, Any] = {"username": "first", "password": "1", "creator": "first"}
    first["initial"] = True
    takeover = {**first, "username": "admin", "roles": []}
    before = api.call("GET", "/users")
    for body in (first, takeover):
        connected = esd.named(body["username"], "POST", "/users", body)
        assert (connected.status_code, connected.json()["message"]) == (201, "Created")
    assert api.call("GET", "/users") == before, "nothing has changed"
    assert api.request("GET", "/roles").status_code == 200, "nor has the password"
    login = {"username": "admin", "password": "1"}
    assert api.request("POST", "/auth/token", login).status_code == 401
    assert plain.request("POST", "/users", first).status_code == 400
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
        assert client.request("POST", "/users", second).status_code == 201
        assert "second" not in json.dumps(client.as_14("first").call("GET", "/users"))
