"""Who may do what: every route with every way of not being let in, what belongs to others, what
nobody can give themselves, and what is shown to nobody.

The order of checks is fixed: API key 403, body 400, person 401, permission 403."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import time
from typing import Any, NamedTuple

import httpx
import jwt
import pytest

from deploy.local.stack import Stack
from tests.e2e.described import Person, StrictClient, description
from tests.weights import weights

NOTHING = "00000000-0000-0000-0000-000000000000"
ANYBODY = ""

RESOURCES = ("train", "checkpoint", "inference", "sagemaker_endpoint", "user", "role")
PERMISSIONS = {f"{resource}:{action}" for resource in RESOURCES for action in ("create", "list")}


class Route(NamedTuple):
    """`permission`: what a person needs; `{name}` in the body becomes a new name."""

    method: str
    path: str
    permission: str
    body: Any = None


ROUTES: dict[str, Route] = {
    "ListRoles": Route("GET", "/roles", "role:list"),
    "CreateRole": Route(
        "POST", "/roles", "role:create", {"role_name": "{name}", "permissions": []}
    ),
    "DeleteRoles": Route("DELETE", "/roles", "role:all", {"role_name_list": ["{name}"]}),
    "ListUsers": Route("GET", "/users", "user:list"),
    "CreateUser": Route(
        "POST", "/users", "user:create", {"username": "{name}", "password": "long enough"}
    ),
    "ChangeUser": Route("PUT", "/users/{name}", "user:all", {"roles": []}),
    "DeleteUsers": Route("DELETE", "/users", "user:all", {"user_name_list": ["{name}"]}),
    "ListTokens": Route("GET", "/auth/tokens", ANYBODY),
    "CreateToken": Route("POST", "/auth/tokens", ANYBODY, {"name": "{name}"}),
    "RevokeToken": Route("DELETE", f"/auth/tokens/{NOTHING}", ANYBODY),
    "ListCheckpoints": Route("GET", "/checkpoints", "checkpoint:list"),
    "GetCheckpoint": Route("GET", f"/checkpoints/{NOTHING}", "checkpoint:list"),
    "CreateCheckpoint": Route(
        "POST",
        "/checkpoints",
        "checkpoint:create",
        {"checkpoint_type": "VAE", "filenames": [{"filename": "{name}"}]},
    ),
    "UpdateCheckpoint": Route(
        "PUT", f"/checkpoints/{NOTHING}", "checkpoint:create", {"name": "{name}"}
    ),
    "DeleteCheckpoints": Route(
        "DELETE", "/checkpoints", "checkpoint:all", {"checkpoint_id_list": [NOTHING]}
    ),
    "ListEndpoints": Route("GET", "/endpoints", "sagemaker_endpoint:list"),
    "GetEndpoint": Route("GET", f"/endpoints/{NOTHING}", "sagemaker_endpoint:list"),
    "CreateEndpoint": Route(
        "POST",
        "/endpoints",
        "sagemaker_endpoint:create",
        {
            "endpoint_type": "Async",
            "instance_type": "cpu",
            "initial_instance_count": "1",
            "autoscaling_enabled": False,
            "assign_to_roles": ["no such role"],
        },
    ),
    "DeleteEndpoints": Route(
        "DELETE", "/endpoints", "sagemaker_endpoint:all", {"delete_endpoint_list": ["{name}"]}
    ),
    "ListInferenceJobs": Route("GET", "/inferences", "inference:list"),
    "CreateInferenceJob": Route(
        "POST", "/inferences", "inference:create", {"inference_type": "Async", "task_type": "rembg"}
    ),
    "StartInferences": Route("PUT", f"/inferences/{NOTHING}/start", "inference:create"),
    "CancelInferenceJob": Route("PUT", f"/inferences/{NOTHING}/cancel", "inference:create"),
    "GetInferenceJob": Route("GET", f"/inferences/{NOTHING}", "inference:list"),
    "DeleteInferenceJobs": Route(
        "DELETE", "/inferences", "inference:create", {"inference_id_list": [NOTHING]}
    ),
    "FollowEvents": Route("GET", "/events", ANYBODY),
    "FollowInferenceJob": Route("GET", f"/inferences/{NOTHING}/events", "inference:list"),
}
WITHOUT_A_PERSON = {"Ping", "RootAPI", "GetApi", "GetAsyncApi", "CreateAccessToken"}
WITH_BODY = [name for name, route in ROUTES.items() if route.body]
names = itertools.count()


def ask(client: StrictClient, operation: str) -> int:
    route = ROUTES[operation]
    body = json.loads(json.dumps(route.body).replace("{name}", f"authorization-{next(names)}"))
    if route.path != "/events":
        return client.request(route.method, route.path, body).status_code
    with client.http.stream("GET", client.url + "/events", headers=client.headers) as response:
        return response.status_code


def test_every_route_is_looked_at(api: StrictClient) -> None:
    assert set(ROUTES) | WITHOUT_A_PERSON == set(description(api.url).operations())


# Not let in


@pytest.fixture(scope="module")
def designer(api: StrictClient) -> Person:
    return api.add_person("Designer")


@pytest.fixture(scope="module")
def strangers(api: StrictClient, stack: Stack) -> dict[str, StrictClient]:
    """Who holds the API key and yet is nobody."""
    gone = api.add_person("IT Operator")
    script = gone.call("POST", "/auth/tokens", {"name": "of somebody deleted"})["data"]
    api.call("DELETE", "/users", {"user_name_list": [gone.username]})
    known = jwt.decode(api.token, options={"verify_signature": False})
    secret = stack.installation.secrets.token_secret
    past = {**known, "iat": int(time.time()) - 100, "exp": int(time.time()) - 10}
    header = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    changed_password = api.add_person("IT Operator")
    api.call("DELETE", "/users", {"user_name_list": [changed_password.username]})
    api.add_person("IT Operator", name=changed_password.username)
    tokens = {
        "no token": None,
        "garbage": "garbage",
        "garbage with dots": "a.b.c",
        "an unknown personal token": "dkr_" + "x" * 43,
        "expired": jwt.encode(past, secret, "HS256"),
        "signed by somebody else": jwt.encode(known, "0" * 64, "HS256"),
        "signed by nobody": f"{header}.{api.token.split('.')[1]}.",
        "of a user who never was": jwt.encode({**known, "sub": "nobody"}, secret, "HS256"),
        "of a deleted user": gone.token,
        "a personal token of a deleted user": script["access_token"],
        "of a user who was made anew": changed_password.token,
    }
    return {name: api.bearing(token) for name, token in tokens.items()}


@pytest.mark.parametrize("operation", ROUTES)
def test_without_the_api_key_nothing_is_told(api: StrictClient, operation: str) -> None:
    route = ROUTES[operation]
    for key in ({}, {"x-api-key": ""}, {"x-api-key": "wrong"}, {"x-api-key": "ÿ".encode()}):
        headers: Any = {"Authorization": f"Bearer {api.token}", **key}
        for body in (json.dumps(route.body).encode(), b"{broken"):
            response = api.http.request(
                route.method, api.url + route.path, content=body, headers=headers
            )
            assert response.status_code == 403
            assert response.json() == {
                "statusCode": 403,
                "message": "x-api-key is missing or wrong",
            }


@pytest.mark.parametrize("path", ["/ping", "/auth/token", "/no/such/path", "/roles/", "//roles"])
def test_nor_on_any_other_path(api: StrictClient, path: str) -> None:
    for method in ("GET", "POST", "PATCH", "OPTIONS"):
        assert api.http.request(method, api.url + path).status_code == 403


@pytest.mark.parametrize("operation", ROUTES)
def test_who_is_nobody_is_401(strangers: dict[str, StrictClient], operation: str) -> None:
    for name, stranger in strangers.items():
        assert ask(stranger, operation) == 401, name


def test_no_other_form_of_authorization_is_taken(api: StrictClient) -> None:
    for value in (api.token, f"Basic {api.token}", "Bearer", f"Bearer Bearer {api.token}"):
        assert api.bearing(None).send("GET", "/roles", authorization=value).status_code == 401
    assert api.bearing(None).send("GET", "/roles", username="admin").status_code == 401
    encoded = base64.b16encode(b"admin").decode()
    assert api.bearing(encoded).request("GET", "/roles").status_code == 401
    assert api.bearing(None).request("GET", f"/roles?token={api.token}").status_code == 401


@pytest.mark.parametrize("operation", WITH_BODY)
def test_a_wrong_body_is_told_before_who_asks(api: StrictClient, operation: str) -> None:
    route = ROUTES[operation]
    nobody = api.bearing(None)
    assert nobody.send(route.method, route.path, b"{broken").status_code == 400
    assert nobody.request(route.method, route.path, {"surprise": 1}).status_code == 400


# Permissions


@pytest.fixture(scope="module")
def lacking(api: StrictClient) -> dict[str, Person]:
    """For each permission somebody who has all others, but what would include it."""
    people = {}
    for permission in sorted({route.permission for route in ROUTES.values()} - {ANYBODY}):
        resource = permission.partition(":")[0]
        others = PERMISSIONS - {permission}
        others |= {f"{other}:all" for other in RESOURCES if other != resource}
        people[permission] = api.add_person(permissions=tuple(others))
    return people


@pytest.mark.parametrize("operation", [name for name, r in ROUTES.items() if r.permission])
def test_a_route_needs_its_permission_and_no_other(
    lacking: dict[str, Person], operation: str
) -> None:
    permission = ROUTES[operation].permission
    assert ask(lacking[permission], operation) == 403
    resource = permission.partition(":")[0]
    elsewhere = next(p for missing, p in lacking.items() if not missing.startswith(resource))
    assert ask(elsewhere, operation) in (200, 201, 202, 204, 400, 404)
    for missing, person in lacking.items():
        if not missing.startswith(resource) and operation != "CreateUser":  # which takes its time
            assert ask(person, operation) != 403, f"it asks for {missing} as well"


def test_permissions_follow_the_role(api: StrictClient, other: StrictClient) -> None:
    role = {"role_name": "passing", "permissions": ["user:list"]}
    api.call("POST", "/roles", role)
    person = api.add_person("passing")
    assert person.request("GET", "/users").status_code == 200
    assert person.request("GET", "/roles").status_code == 403
    api.call("DELETE", "/roles", {"role_name_list": ["passing"]})
    assert person.at(other.url).request("GET", "/users").status_code == 403
    shown = api.call("GET", f"/users?username={person.username}")["data"]["users"]
    assert (shown[0]["roles"], shown[0]["permissions"]) == ([], [])


# What belongs to others


def test_a_job_of_somebody_else_is_out_of_reach(api: StrictClient, designer: Person) -> None:
    rival = api.add_person("Designer")
    body = {"inference_type": "Async", "task_type": "rembg"}
    job_id = designer.call("POST", "/inferences", body)["data"]["inference"]["id"]
    for method, path, sent in (
        ("GET", f"/inferences/{job_id}", None),
        ("GET", f"/inferences/{job_id}/events", None),
        ("PUT", f"/inferences/{job_id}/start", None),
        ("PUT", f"/inferences/{job_id}/cancel", None),
        ("DELETE", "/inferences", {"inference_id_list": [NOTHING, job_id]}),
        ("GET", f"/inferences?username={designer.username}", None),
        ("POST", "/inferences", {**body, "user_id": designer.username}),
    ):
        response = rival.request(method, path, sent)
        assert response.status_code == 403, f"{method} {path}"
        assert "presign" not in response.text
    assert rival.call("GET", "/inferences")["data"]["total"] == 0
    assert designer.request("GET", f"/inferences/{job_id}").status_code == 200
    assert api.request("GET", f"/inferences/{job_id}").status_code == 200, (
        "an administrator sees it"
    )


def test_a_checkpoint_of_somebody_else_is_out_of_reach(api: StrictClient, designer: Person) -> None:
    rival = api.add_person("Designer")
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": "private.safetensors"}],
        "allowed_roles_or_users": [designer.username],
    }
    new = designer.call("POST", "/checkpoints", body)["data"]
    id_ = new["checkpoint"]["id"]
    sent = designer.http.put(
        new["s3PresignUrl"]["private.safetensors"][0], content=weights("Stable-diffusion")
    )
    tags = {"private.safetensors": [{"ETag": sent.headers["ETag"], "PartNumber": 1}]}
    done = {"status": "Active", "multi_parts_tags": tags}
    assert rival.request("PUT", f"/checkpoints/{id_}", done).status_code == 403
    designer.call("PUT", f"/checkpoints/{id_}", done)
    assert rival.request("PUT", f"/checkpoints/{id_}", {"name": "mine"}).status_code == 403
    body = {"checkpoint_id_list": [NOTHING, id_]}
    assert rival.request("DELETE", "/checkpoints", body).status_code == 403
    assert rival.find_checkpoint("Stable-diffusion", "private.safetensors") is None
    assert designer.find_checkpoint("Stable-diffusion", "private.safetensors")
    models = {"Stable-diffusion": ["private.safetensors"]}
    job = {"inference_type": "Async", "task_type": "txt2img", "models": models}
    assert rival.request("POST", "/inferences", job).status_code == 404
    assert designer.request("POST", "/inferences", job).status_code == 201
    settings = {"override_settings": {"sd_model_checkpoint": "private"}}
    theirs, own = (person.create_job("txt2img", {}, settings) for person in (rival, designer))
    for starter in (rival, api):  # the rights are those of whose job it is
        refused = starter.request("PUT", f"/inferences/{theirs}/start")
        assert refused.status_code == 404
        assert refused.json()["message"].endswith("type Stable-diffusion is not found")
    assert designer.request("PUT", f"/inferences/{own}/start").status_code == 400, "no endpoint"
    designer.call("DELETE", "/checkpoints", {"checkpoint_id_list": [id_]})


def test_nobody_gives_more_than_they_hold(api: StrictClient) -> None:
    clerk = api.add_person(permissions=("user:create", "role:create", "checkpoint:list"))
    user = {"username": "accomplice", "password": "long enough"}
    for path, body in (
        ("/users", {**user, "roles": ["IT Operator"]}),
        ("/users", {**user, "roles": ["Designer"]}),
        ("/users", {**user, "permissions": ["user:all"]}),
        ("/users", {**user, "permissions": ["checkpoint:list", "checkpoint:create"]}),
        ("/roles", {"role_name": "ladder", "permissions": ["role:all"]}),
        ("/roles", {"role_name": "ladder", "permissions": ["checkpoint:all"]}),
    ):
        response = clerk.request("POST", path, body)
        assert response.status_code == 403
        assert "you can't grant" in response.json()["message"]
    assert clerk.request("POST", "/users", {**user, "permissions": ["checkpoint:list"]}).is_success
    manager = api.add_person(permissions=("user:all",))
    gone = {"user_name_list": ["accomplice", "admin"]}
    assert manager.request("DELETE", "/users", gone).status_code == 403
    assert api.call("GET", "/users?username=accomplice")["data"]["users"]
    api.call("DELETE", "/users", {"user_name_list": ["accomplice"]})


def test_nobody_lets_others_into_a_role_that_they_do_not_hold(api: StrictClient) -> None:
    """A role opens endpoints and checkpoints, whatever permissions it has."""
    api.call("POST", "/roles", {"role_name": "secret team", "permissions": []})
    clerk = api.add_person(permissions=("user:create",))
    user = {"username": "accomplice", "password": "long enough", "roles": ["secret team"]}
    refused = clerk.request("POST", "/users", user)
    assert refused.status_code == 403
    assert "you can't give a role" in refused.json()["message"]
    for name in ("secret team", "*"):
        refused = clerk.request("POST", "/users", {**user, "username": name, "roles": []})
        assert refused.status_code == 400, "a list of roles or users would mean this user"
    as_role = {"role_name": clerk.username, "permissions": []}
    assert api.request("POST", "/roles", as_role).status_code == 400
    api.call("DELETE", "/roles", {"role_name_list": ["secret team"]})


def test_the_house_can_not_be_locked_from_inside(api: StrictClient) -> None:
    refused = api.request("DELETE", "/roles", {"role_name_list": ["no such", "IT Operator"]})
    assert refused.status_code == 400
    assert "cannot delete default role" in refused.json()["message"]
    users = api.call("GET", "/users")["data"]["users"]
    managers = [user["username"] for user in users if "user:all" in user["permissions"]]
    refused = api.request("DELETE", "/users", {"user_name_list": managers})
    assert refused.status_code == 400
    assert "nobody would be left" in refused.json()["message"]
    assert api.request("GET", "/users").status_code == 200


# Secrets


@pytest.fixture(scope="module")
def secrets_of_the_house(api: StrictClient, stack: Stack) -> dict[str, str]:
    """What must be nowhere, after requests that had it in hand."""
    person = api.add_person("IT Operator")
    made = person.call("POST", "/auth/tokens", {"name": "seen once"})["data"]["access_token"]
    body = {"checkpoint_type": "VAE", "filenames": [{"filename": person.username}]}
    (urls,) = person.call("POST", "/checkpoints", body)["data"]["s3PresignUrl"].values()
    url = httpx.URL(urls[0])
    api.http.put(url, content=b"part").raise_for_status()
    house = stack.installation.secrets
    return {
        "the API key": house.api_key,
        "the first user's password": house.admin_password,
        "the first user's password hash": house.admin_password_hash,
        "a password": person.password,
        "an access token": person.token.split(".")[2],
        "a personal token": made,
        "the hash of a personal token": hashlib.sha256(made.encode()).hexdigest(),
        "the key of access tokens": house.token_secret,
        "a signature": url.params["X-Amz-Signature"],
        **{f"the NATS password of {name}": value for name, value in house.nats.items()},
        **{f"the Postgres password of {name}": value for name, value in house.postgres.items()},
        **{f"the S3 key of {name}": key.secret_key for name, key in house.s3.items()},
    }


def test_no_secret_is_in_any_answer(
    api: StrictClient, secrets_of_the_house: dict[str, str]
) -> None:
    texts = [
        api.request("GET", path).text
        for path in ("/users", "/roles", "/auth/tokens", "/checkpoints", "/inferences", "/api")
    ]
    api.call("POST", "/roles", {"role_name": "last-of-all", "permissions": []})
    headers = {**api.headers, "Last-Event-ID": "0"}
    with api.http.stream("GET", api.url + "/events", headers=headers, timeout=20) as response:
        for line in response.iter_lines():
            texts.append(line)
            if "last-of-all" in line:
                break
    everything = "\n".join(texts)
    assert "identity.user_created.v1" in everything
    for pattern in (r"\$argon2", r"password_hash", r"token_hash", r"dkr_", r"credential"):
        assert not re.search(pattern, everything), pattern
    for name, secret in secrets_of_the_house.items():
        if name != "a signature":
            assert secret not in everything, name


def test_no_secret_is_in_any_log(
    api: StrictClient, stack: Stack, secrets_of_the_house: dict[str, str]
) -> None:
    assert api.request("GET", "/users").status_code == 200
    logs = [file for file in stack.installation.logs.rglob("*") if file.is_file()]
    assert len(logs) > 5
    for file in logs:
        text = file.read_text(errors="replace")
        for name, secret in secrets_of_the_house.items():
            assert secret not in text, f"{name} is in {file.name}"
        assert "X-Amz-Signature=" not in text, file.name
        assert "$argon2" not in text, file.name
