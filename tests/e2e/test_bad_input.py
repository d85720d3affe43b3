"""Whatever is sent: an ESD envelope with a message that says what to change, and never a 500.

`StrictClient` looks at every answer: the envelope, its status, and that it shows nothing of the
inside. What is away is a 503 with Retry-After, what is late a 504 whose command still completes."""

from __future__ import annotations

import copy
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from deploy.local.client import Failed
from deploy.local.stack import Stack
from tests.e2e.described import StrictClient, description
from tests.e2e.gateways import another_gateway

Body = dict[str, Any]
Place = tuple[str | int, ...]

NOBODY, NOTHING = "no such role", "00000000-0000-0000-0000-000000000000"

GOOD: dict[str, tuple[str, str, Body]] = {
    "CreateRole": ("POST", "/roles", {"role_name": "bad", "permissions": ["train:all"]}),
    "DeleteRoles": ("DELETE", "/roles", {"role_name_list": [NOBODY]}),
    "CreateUser": (
        "POST",
        "/users",
        {"username": "bad", "password": "long enough", "roles": [NOBODY]},
    ),
    "ChangeUser": ("PUT", f"/users/{NOBODY}", {"roles": [NOBODY], "password": "long enough"}),
    "DeleteUsers": ("DELETE", "/users", {"user_name_list": [NOBODY]}),
    "CreateAccessToken": ("POST", "/auth/token", {"username": "bad", "password": "bad"}),
    "CreateToken": ("POST", "/auth/tokens", {"name": "bad", "expires_in": 60}),
    "CreateCheckpoint": (
        "POST",
        "/checkpoints",
        {"checkpoint_type": "VAE", "filenames": [{"filename": "bad", "parts_number": 1}]},
    ),
    "DownloadCheckpoint": (
        "POST",
        "/checkpoints",
        {"checkpoint_type": "VAE", "urls": ["nowhere://at.all/x.pt"], "params": {"message": "m"}},
    ),
    "UpdateCheckpoint": (
        "PUT",
        f"/checkpoints/{NOTHING}",
        {"status": "Active", "multi_parts_tags": {"bad": [{"ETag": "e", "PartNumber": 1}]}},
    ),
    "RenameCheckpoint": ("PUT", f"/checkpoints/{NOTHING}", {"name": "bad"}),
    "DeleteCheckpoints": ("DELETE", "/checkpoints", {"checkpoint_id_list": [NOTHING]}),
    "CreateEndpoint": (
        "POST",
        "/endpoints",
        {
            "endpoint_name": "bad",
            "endpoint_type": "Async",
            "instance_type": "cpu",
            "initial_instance_count": "1",
            "autoscaling_enabled": False,
            "assign_to_roles": [NOBODY],
        },
    ),
    "DeleteEndpoints": ("DELETE", "/endpoints", {"delete_endpoint_list": [NOBODY]}),
    "CreateInferenceJob": (
        "POST",
        "/inferences",
        {
            "inference_type": "Async",
            "task_type": "txt2img",
            "models": {"Stable-diffusion": ["bad"]},
            "user_id": "admin",
            "filters": {},
        },
    ),
    "DeleteInferenceJobs": ("DELETE", "/inferences", {"inference_id_list": [NOTHING]}),
}
"""Bodies of the right form that do no harm, since they speak of what is not there."""

OPTIONAL = {"parts_number", "expires_in", "params", "message", "models", "user_id", "filters"}
OPTIONAL |= {"roles", "multi_parts_tags", "name", "filenames", "urls", "endpoint_name"}
EITHER = {("CreateCheckpoint", "filenames"), ("DownloadCheckpoint", "urls")}
EITHER |= {("RenameCheckpoint", "name")}
"""Optional for the schema, but these bodies say nothing without them."""
NAME_OF_TOKEN = ("CreateToken", ("name",))


def leaves(body: Any, place: Place = ()) -> Iterator[Place]:
    """Every place in a body, containers included."""
    items = body.items() if isinstance(body, dict) else enumerate(body)
    for key, value in items:
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*place, key))


def changed(body: Body, place: Place, value: Any) -> Body:
    body = copy.deepcopy(body)
    parent: Any = body
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return body


def dropped(body: Body, place: Place) -> Body:
    body = copy.deepcopy(body)
    parent: Any = body
    for key in place[:-1]:
        parent = parent[key]
    del parent[place[-1]]
    return body


def value_at(body: Body, place: Place) -> Any:
    value: Any = body
    for key in place:
        value = value[key]
    return value


def of_another_type(value: Any) -> Any:
    return "text" if isinstance(value, bool | int | dict | list) else {"an": "object"}


def is_required(operation: str, place: Place) -> bool:
    name = place[-1]
    if not isinstance(name, str) or name == "bad" or operation == "ChangeUser":
        return False
    if (operation, place) == NAME_OF_TOKEN or (len(place) == 1 and (operation, name) in EITHER):
        return True
    return name not in OPTIONAL and name != "Stable-diffusion"


PLACES = [(name, place) for name, (_, _, body) in GOOD.items() for place in leaves(body)]
FREE_FORM = {"params", "filters"}


def told(place: Place) -> str:
    return ".".join(map(str, place))


def ids(cases: list[tuple[str, Place]]) -> list[str]:
    return [f"{operation}-{told(place)}" for operation, place in cases]


def refuse(api: StrictClient, operation: str, body: Any, *, says: str = "") -> None:
    method, path, _ = GOOD[operation]
    response = api.request(method, path, body)
    assert response.status_code == 400, response.text
    assert says in response.json()["message"]


REQUIRED = [case for case in PLACES if is_required(*case)]


@pytest.mark.parametrize(("operation", "place"), REQUIRED, ids=ids(REQUIRED))
def test_a_missing_field_is_named(api: StrictClient, operation: str, place: Place) -> None:
    says = "" if (operation, str(place[0])) in EITHER else str(place[-1])
    refuse(api, operation, dropped(GOOD[operation][2], place), says=says)


TYPED = [(o, place) for o, place in PLACES if place[0] not in FREE_FORM or len(place) == 1]


@pytest.mark.parametrize(("operation", "place"), TYPED, ids=ids(TYPED))
def test_a_mistyped_field_is_named(api: StrictClient, operation: str, place: Place) -> None:
    body = GOOD[operation][2]
    says = next(str(key) for key in place if isinstance(key, str))
    wrong = of_another_type(value_at(body, place))
    refuse(api, operation, changed(body, place, wrong), says=says)
    if is_required(operation, place) and (operation, place[0]) not in EITHER:
        refuse(api, operation, changed(body, place, None), says=says)


OBJECTS: list[tuple[str, Place]] = [(name, ()) for name in GOOD]
OBJECTS += [
    (name, place)
    for name, place in PLACES
    if isinstance(value_at(GOOD[name][2], place), dict)
    and place[-1] not in FREE_FORM | {"models", "multi_parts_tags"}
]


@pytest.mark.parametrize(("operation", "place"), OBJECTS, ids=ids(OBJECTS))
def test_an_unknown_field_is_named(api: StrictClient, operation: str, place: Place) -> None:
    body = changed(GOOD[operation][2], (*place, "surprise"), 1)
    refuse(api, operation, body, says="surprise")


WEIRD: list[Any] = [None, True, 0, -1, 2**31, 2**63, 2**64, -(2**70), 10**300, 1e308]
WEIRD += ["", " ", "\x7f", "\u2028", "💥" * 40, "x" * 5000, "../../etc/passwd", "%00", "'; DROP"]
WEIRD += [[], {}, [[]], [None], {"a": {"b": []}}]
WITH_NUL: list[Any] = ["\u0000", "a\u0000b", ["\u0000"], {"\u0000": "\u0000"}]


@pytest.mark.parametrize("operation", GOOD)
def test_strange_values_never_break_it(api: StrictClient, operation: str) -> None:
    method, path, good = GOOD[operation]
    for place in leaves(good):
        for value in WEIRD:
            response = api.request(method, path, changed(good, place, value))
            assert response.status_code in (200, 201, 202, 204, 400, 401, 403, 404), response.text
        for value in WITH_NUL:
            response = api.request(method, path, changed(good, place, value))
            assert response.status_code == 400, "Postgres can't hold it"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON object"),
        (b"{", "JSON"),
        (b'{"role_name": "a",}', "JSON"),
        (b"role_name=a&permissions=", "JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff\xfe{\x00}\x00", "JSON"),
        (b'{"role_name": "\xff", "permissions": []}', "JSON"),
        (b'{"role_name": "\xed\xa0\x80", "permissions": []}', "JSON"),
        (b'{"role_name": "\\ud800", "permissions": []}', "JSON"),
        (b'{"role_name": "a\nb", "permissions": []}', "JSON"),
        (b'{"role_name": NaN, "permissions": []}', "JSON"),
        (b'{"role_name": 1e999, "permissions": []}', "JSON"),
        (b'{"role_name": ' + b"9" * 5000 + b', "permissions": []}', ""),
        (b'{"role_name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b'{"role_name": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_000 + b"}", "deep"),
        (b'{"role_name": "a\\u0000b", "permissions": []}', "\\u0000"),
        (b'{"role_name": "a", "permissions": ["train:all\\u0000"]}', "\\u0000"),
        (b'{"role_name": "a", "\\u0000": 1}', "\\u0000"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else None,
)
def test_what_is_no_json_object_is_refused(api: StrictClient, content: bytes, says: str) -> None:
    response = api.send("POST", "/roles", content)
    assert response.status_code == 400
    assert says in response.json()["message"]


@pytest.mark.parametrize("field", ["params", "filters"])
def test_free_form_fields_hold_what_json_can(api: StrictClient, field: str) -> None:
    """Where anything may stand, anything that Postgres can hold comes back, and the rest is 400."""
    operation = "CreateCheckpoint" if field == "params" else "CreateInferenceJob"
    method, path, good = GOOD[operation]
    for value in ({"deep": [[[{"a": None}]]]}, {"huge": 10**300, "tiny": -1e-300}, {"": "💥"}):
        name = secrets.token_hex(4)
        body: Body = {**good, field: value}
        if field == "params":
            body["filenames"] = [{"filename": name}]
        response = api.request(method, path, body)
        if field == "params":
            assert response.status_code == 201
            shown = response.json()["data"]["checkpoint"]["params"]
            assert {key: shown[key] for key in value} == value
            listed = api.call("GET", "/checkpoints?per_page=1")["data"]["checkpoints"]
            assert {key: listed[0]["params"][key] for key in value} == value
        else:
            assert response.status_code == 404, "its model is not there"
    for bad in ({"a": "\u0000"}, {"\u0000": 1}, {"a": [{"b": ["\u0000"]}]}):
        assert api.request(method, path, {**good, field: bad}).status_code == 400


def test_of_a_doubled_key_one_counts(api: StrictClient) -> None:
    name = secrets.token_hex(4)
    body = b'{"role_name": 5, "role_name": "%s", "permissions": []}' % name.encode()
    assert api.send("POST", "/roles", body).status_code in (201, 400)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-msgpack", "multipart/form-data; boundary=x", "nonsense", ""],
)
def test_a_wrong_content_type_never_breaks_it(api: StrictClient, content_type: str) -> None:
    """A body is JSON, whatever it is called: `curl -d` calls it a form."""
    body = b'{"role_name": "%s", "permissions": []}' % secrets.token_hex(4).encode()
    assert api.send("POST", "/roles", body, content_type=content_type).status_code == 201
    assert api.send("POST", "/roles", b"\x81", content_type=content_type).status_code == 400


@pytest.mark.parametrize(
    ("operation", "place"),
    [
        ("CreateRole", ("role_name",)),
        ("CreateUser", ("username",)),
        ("CreateToken", ("name",)),
        ("CreateCheckpoint", ("filenames", 0, "filename")),
        ("RenameCheckpoint", ("name",)),
        ("CreateEndpoint", ("endpoint_name",)),
    ],
    ids=lambda value: value if isinstance(value, str) else told(value),
)
def test_impossible_names_are_refused(api: StrictClient, operation: str, place: Place) -> None:
    names = ["", " ", "a\u0000", "a\nb", "\x1b[31m", "x" * 10_000]
    if operation == "CreateEndpoint":
        names.remove("")  # then it gets one
    if operation in ("CreateCheckpoint", "RenameCheckpoint", "CreateEndpoint"):
        names += ["../up", "a/b", "a\\b", "..", "/etc/passwd", ".hidden"]
    for name in names:
        refuse(api, operation, changed(GOOD[operation][2], place, name))


def test_permissions_that_do_not_exist_are_refused_with_those_that_do(api: StrictClient) -> None:
    body = {"role_name": "bad", "permissions": ["trian:all"]}
    refuse(api, "CreateRole", body, says="sagemaker_endpoint")


# What is not there, or there already


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", f"/inferences/{NOTHING}", None),
        ("GET", "/inferences/" + "x" * 10_000, None),
        ("GET", "/inferences/%F0%9F%92%A5%0A", None),
        ("GET", f"/inferences/{NOTHING}/events", None),
        ("PUT", f"/inferences/{NOTHING}/start", None),
        ("PUT", f"/checkpoints/{NOTHING}", {"status": "Active"}),
        ("PUT", f"/checkpoints/{NOTHING}", {"name": "new"}),
        ("PUT", f"/checkpoints/{NOTHING}", {"status": "Active", "multi_parts_tags": {"a": []}}),
        ("DELETE", f"/auth/tokens/{NOTHING}", None),
        ("GET", "/checkpoints?username=nobody", None),
        ("GET", "/users?username=nobody", None),
        ("POST", "/inferences", GOOD["CreateInferenceJob"][2]),
        ("GET", "/no/such/path", None),
        ("POST", "/inferences/1/2/3", {}),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_not_there_is_404(api: StrictClient, method: str, path: str, body: Any) -> None:
    assert api.request(method, path, body).status_code == 404


def test_a_name_that_is_taken_is_400_and_named(api: StrictClient) -> None:
    name = secrets.token_hex(4)
    bodies: dict[str, Body] = {
        "CreateRole": {"role_name": f"role {name}", "permissions": []},
        "CreateUser": {"username": name, "password": "long enough", "roles": []},
        "CreateCheckpoint": {"checkpoint_type": "VAE", "filenames": [{"filename": name}]},
    }
    for operation, body in bodies.items():
        method, path, _ = GOOD[operation]
        assert api.request(method, path, body).status_code == 201
        refuse(api, operation, body, says=name)


def test_a_checkpoint_that_is_not_complete_can_not_be_used(api: StrictClient) -> None:
    body = {"checkpoint_type": "Stable-diffusion", "filenames": [{"filename": "half.safetensors"}]}
    id_ = api.call("POST", "/checkpoints", body)["data"]["checkpoint"]["id"]
    for change in (
        {"status": "Active"},
        {"name": "another"},
        {"status": "Active", "multi_parts_tags": {"stranger": []}},
        {"status": "Active", "multi_parts_tags": {"half.safetensors": []}},
        {
            "status": "Active",
            "multi_parts_tags": {"half.safetensors": [{"ETag": '"0"', "PartNumber": 1}]},
        },
        {"status": "Disabled", "multi_parts_tags": {"half.safetensors": []}},
        {"status": "Active", "name": "both"},
        {},
    ):
        assert api.request("PUT", f"/checkpoints/{id_}", change).status_code == 400
    job = {"inference_type": "Async", "task_type": "txt2img"}
    models = {"Stable-diffusion": ["half.safetensors"]}
    assert api.request("POST", "/inferences", {**job, "models": models}).status_code == 404
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [id_]})


@pytest.mark.parametrize(
    "change",
    [
        {"filenames": [{"filename": "a"}], "urls": ["https://a.b/c"]},
        {"filenames": [{"filename": "a"}, {"filename": "a"}]},
        {"filenames": [{"filename": "a", "parts_number": 0}]},
        {"filenames": [{"filename": "a", "parts_number": 10_001}]},
        {"urls": ["file:///etc/passwd"]},
        {"urls": ["https://"]},
        {"urls": ["not a url"]},
        {"checkpoint_type": "Checkpoint", "filenames": [{"filename": "a"}]},
        {"filenames": [{"filename": "a"}], "params": {"message": 5}},
    ],
    ids=str,
)
def test_checkpoints_that_can_not_be_are_refused(api: StrictClient, change: Body) -> None:
    refuse(api, "CreateCheckpoint", {"checkpoint_type": "VAE", **change})


@pytest.mark.parametrize(
    "change",
    [
        {"initial_instance_count": "0"},
        {"initial_instance_count": "-1"},
        {"initial_instance_count": "many"},
        {"initial_instance_count": "999"},
        {"instance_type": "quantum"},
        {"assign_to_roles": []},
        {"endpoint_type": "Batch"},
        {"autoscaling_enabled": True, "max_instance_number": "999"},
        {"autoscaling_enabled": True, "initial_instance_count": "2", "max_instance_number": 1},
        {"autoscaling_enabled": True, "min_instance_number": 2},
        {"autoscaling_enabled": True, "min_instance_number": "0", "endpoint_type": "Real-time"},
    ],
    ids=str,
)
def test_endpoints_that_can_not_be_are_refused(api: StrictClient, change: Body) -> None:
    good = {**GOOD["CreateEndpoint"][2], "assign_to_roles": ["IT Operator"]}
    refuse(api, "CreateEndpoint", {**good, **change})


def test_starting_a_job_that_can_not_run_says_why(api: StrictClient) -> None:
    body = {"inference_type": "Real-time", "task_type": "rembg"}
    id_ = api.call("POST", "/inferences", body)["data"]["inference"]["id"]
    response = api.request("PUT", f"/inferences/{id_}/start")
    assert response.status_code == 400
    assert response.json()["message"] == 'no available Real-time endpoints for user "admin"'
    no_model = api.create_job("txt2img", {}, {"prompt": "a red circle"})
    response = api.request("PUT", f"/inferences/{no_model}/start")
    assert response.status_code == 400
    assert 'txt2img needs {"Stable-diffusion": ["NAME"]}' in response.json()["message"]
    inline = {**body, "payload_string": "{}"}
    refuse(api, "CreateInferenceJob", inline, says="api_params_s3_upload_url")


# Queries, headers, methods, sizes


@pytest.mark.parametrize(
    "query",
    [
        "/checkpoints?page=0",
        "/checkpoints?page=-1",
        "/checkpoints?page=one",
        "/checkpoints?page=",
        "/checkpoints?page=1.5",
        "/checkpoints?page=99999999999999999999",
        "/checkpoints?per_page=1001",
        "/checkpoints?types=Picture",
        "/checkpoints?status=%00",
        "/checkpoints?roles=a%00b",
        "/inferences?per_page=0",
        "/inferences?per_page=9223372036854775808",
        "/inferences?status=done",
        "/inferences?task_type=txt2video",
        "/inferences?inference_type=Batch",
        "/inferences?username=%00",
        "/inferences?endpoint_name=%00",
        "/users?username=%00",
        "/inferences/%00",
    ],
)
def test_a_bad_query_is_refused(api: StrictClient, query: str) -> None:
    assert api.request("GET", query).status_code == 400


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "9" * 30, b"\xb2", "1; drop"])
@pytest.mark.parametrize("path", ["/events", "/inferences/ID/events"])
def test_a_last_event_id_is_a_number(api: StrictClient, path: str, value: str | bytes) -> None:
    if "ID" in path:
        body = {"inference_type": "Async", "task_type": "rembg"}
        path = path.replace("ID", api.call("POST", "/inferences", body)["data"]["inference"]["id"])
    assert api.send("GET", path, last_event_id=value).status_code == 400


def test_a_too_long_idempotency_key_is_refused(api: StrictClient) -> None:
    body = {"role_name": "bad", "permissions": []}
    response = api.request("POST", "/roles", body, idempotency_key="k" * 201)
    assert response.status_code == 400
    named = api.request("POST", "/auth/tokens", {"name": "t"}, idempotency_key="k")
    assert named.status_code == 400, "its secret is shown once"


def test_wrong_methods_are_405_on_every_path(api: StrictClient) -> None:
    paths = description(api.url).document["paths"]
    for path, methods in paths.items():
        url = path.replace("{", "").replace("}", "")
        allowed = {method for method in methods if not method.startswith("x-")} | {"options"}
        if "get" in allowed:
            allowed.add("head")
        for method in {"get", "post", "put", "delete", "patch"} - allowed:
            response = api.request(method.upper(), url)
            assert response.status_code == 405, f"{method} {path}"
            assert set(response.headers["allow"].lower().split(", ")) == allowed
        asked = api.http.options(api.url + url, headers=api.headers)
        assert set(asked.headers["allow"].lower().split(", ")) == allowed


def test_head_is_get_without_its_body(api: StrictClient) -> None:
    for path in ("/ping", "/healthz", "/api", "/roles", "/inferences?per_page=1", "/checkpoints/x"):
        head = api.http.head(api.url + path, headers=api.headers)
        got = api.http.get(api.url + path, headers=api.headers)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        assert int(head.headers["content-length"]) == len(got.content)
    stream = api.http.head(api.url + "/events", headers=api.headers)
    assert stream.headers["content-type"].startswith("text/event-stream"), "and it has ended"
    assert api.http.head(api.url + "/auth/token", headers=api.headers).status_code == 405
    assert api.http.head(api.url + "/roles").status_code == 403


def test_a_too_large_body_is_413(api: StrictClient) -> None:
    large = b'{"role_name": "' + b"x" * 2_000_000 + b'"}'
    assert api.send("POST", "/roles", large).status_code == 413
    assert api.send("DELETE", "/inferences", large).status_code == 413
    chunks = (large[n : n + 100_000] for n in range(0, len(large), 100_000))
    assert api.send("POST", "/roles", chunks).status_code == 413


def test_everything_still_works_after_all_that(api: StrictClient, other: StrictClient) -> None:
    for client in (api, other):
        body = {"role_name": secrets.token_hex(4), "permissions": []}
        assert client.request("POST", "/roles", body).status_code == 201


# What is away, and what is late


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack to break: its gateway waits 2 s for an answer."""
    home = tmp_path_factory.mktemp("fragile") / ".darkroom"
    with Stack(home, settings={"DARKROOM_COMMAND_TIMEOUT": "2"}, random_ports=True) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(fragile: Stack) -> Iterator[StrictClient]:
    settings = fragile.environment()
    password = settings["DARKROOM_ADMIN_PASSWORD"]
    key = settings["DARKROOM_API_KEY"]
    with StrictClient.log_in(fragile.url, key, "admin", password) as client:
        yield client


@contextmanager
def frozen(stack: Stack, name: str) -> Iterator[None]:
    """The process is there and does nothing, as behind a broken network."""
    pid = stack.pid(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def create_role(client: StrictClient, name: str, **more: str) -> httpx.Response:
    return client.request("POST", "/roles", {"role_name": name, "permissions": []}, **more)


def has_role(client: StrictClient, name: str) -> bool:
    roles = client.call("GET", "/roles")["data"]["roles"]
    return name in [role["role_name"] for role in roles]


def eventually(check: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)


def test_an_answer_that_is_late_is_504_and_the_command_completes(
    fragile: Stack, client: StrictClient
) -> None:
    with frozen(fragile, "identity"):
        late = create_role(client, "late", idempotency_key="late")
        assert late.status_code == 504
        assert int(late.headers["retry-after"]) > 0
        assert "completed" in late.json()["message"]
        assert not has_role(client, "late")
        assert client.request("GET", "/inferences").status_code == 200
    eventually(lambda: has_role(client, "late"))
    assert create_role(client, "late", idempotency_key="late").status_code == 201
    assert create_role(client, "late").status_code == 400, "it is there once"


def test_a_bus_that_does_not_answer_is_503_until_it_does(
    fragile: Stack, client: StrictClient
) -> None:
    with frozen(fragile, "nats"):
        for _ in range(2):
            began = time.monotonic()
            away = create_role(client, "away", idempotency_key="away")
            assert time.monotonic() - began < 8
            assert away.status_code == 503
            assert int(away.headers["retry-after"]) > 0
        assert client.request("GET", "/roles").status_code == 200, "reads need no bus"
    eventually(lambda: create_role(client, "away", idempotency_key="away").status_code == 201)
    assert create_role(client, "away").status_code == 400, "it is there once"


def test_a_database_that_is_away_is_503_until_it_is_back(
    fragile: Stack, client: StrictClient
) -> None:
    old = fragile.kill("postgres")
    seen = set()

    def is_back() -> bool:
        for path in ("/roles", "/inferences"):
            response = client.request("GET", path)
            seen.add(response.status_code)
            assert response.status_code in (200, 503)
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) > 0
        return response.status_code == 200 and fragile.pid("postgres") != old

    eventually(is_back, 40)
    assert 503 in seen
    eventually(lambda: create_role(client, "back").status_code in (201, 400), 40)


def test_a_gateway_that_waits_for_its_servers_says_so(fragile: Stack, client: StrictClient) -> None:
    nowhere = "nats://127.0.0.1:1"
    with another_gateway(fragile, wait_for="/healthz", DARKROOM_NATS_URL=nowhere) as url:
        early = client.at(url)
        assert early.request("GET", "/ping").status_code == 200
        response = early.request("GET", "/roles")
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert httpx.get(url + "/readyz", trust_env=False).status_code == 503
        with pytest.raises(Failed, match="403"):
            early.__class__(url, "wrong key").call("GET", "/roles")


def test_one_request_gets_so_many_parts_and_no_more(api: StrictClient) -> None:
    """Signing takes time in which nobody else is served."""
    files = [{"filename": f"{n}.safetensors", "parts_number": 10_000} for n in range(2)]
    body = {"checkpoint_type": "Lora", "filenames": files}
    response = api.request("POST", "/checkpoints", body)
    assert response.status_code == 400
    assert "at most 10000 parts" in response.json()["message"]


def test_params_of_a_checkpoint_stay_small_enough_for_an_event(api: StrictClient) -> None:
    body = {
        "checkpoint_type": "Lora",
        "filenames": [{"filename": "large.safetensors"}],
        "params": {"notes": "x" * 70_000},
    }
    response = api.request("POST", "/checkpoints", body)
    assert response.status_code == 400
    assert "params" in response.json()["message"]
