"""`GET /api` is the contract that programs read, `/docs` the same for people. That every answer
keeps it is looked at by `StrictClient` in all the other tests here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.e2e.described import Description, StrictClient, description

SEED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("esd-1.4.0.json").read_text())
ALWAYS = {"403", "405", "500", "503"}
ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@pytest.fixture(scope="module")
def described(api: StrictClient) -> Description:
    return description(api.url)


def responses(described: Description) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, (_, _, operation) in described.operations().items():
        for status, response in operation["responses"].items():
            yield name, status, response


def test_it_is_valid_openapi(described: Description) -> None:
    assert described.document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(described.document).validate()


def test_it_is_served_without_a_key_and_holds_only_itself(api: StrictClient) -> None:
    answer = httpx.get(api.url + "/api", trust_env=False)
    assert answer.status_code == 200
    for reference in re.findall(r'"\$ref":\s*"([^"]*)"', answer.text):
        assert reference.startswith("#/components/schemas/")
    assert "services." not in answer.text, "where a class lies is nobody's business"


def look_up(described: Description, name: str) -> dict[str, Any]:
    """As ESD's clients and tests look for what an operation answers."""
    answers: list[dict[str, Any]] = [
        operation["responses"]
        for methods in described.document["paths"].values()
        for operation in methods.values()
        if operation.get("operationId") == name
    ]
    assert len(answers) == 1, name
    return answers[0]


def test_operations_are_found_by_every_name_that_esd_has_for_them(described: Description) -> None:
    for name in (*SEED, "RootAPI", "ListRoles", "ListCheckpoints", "FollowEvents"):
        assert look_up(described, name)
    for name, other in (
        ("ListInferenceJobs", "ListInferences"),
        ("StartInferences", "StartInferenceJob"),
    ):
        assert look_up(described, name) == look_up(described, other)


def test_every_schema_can_be_taken_alone(described: Description) -> None:
    """ESD's clients take the one that an answer refers to, and look at nothing else."""
    schemas = described.document["components"]["schemas"]
    assert not any('"$ref"' in json.dumps(schema) for schema in schemas.values())
    roles = {"roles": [{"role_name": 1}], "page": 1, "per_page": 1, "pages": 1, "total": 1}
    (error, *_) = Draft202012Validator(schemas["RolesAnswer"]).iter_errors(
        {"statusCode": 200, "data": roles}
    )
    assert list(error.absolute_path)[:2] == ["data", "roles"]
    for name, status, response in responses(described):
        for media_type, media in response["content"].items():
            if media_type == "application/json" and name not in ("GetApi", "GetAsyncApi"):
                assert media["schema"]["$ref"].rsplit("/", 1)[1] in schemas, f"{name} {status}"


def test_every_operation_tells_its_errors(described: Description) -> None:
    for name, (method, path, operation) in described.operations().items():
        statuses = set(operation["responses"])
        wanted = set(ALWAYS)
        if name not in ("Ping", "RootAPI", "GetApi", "GetAsyncApi"):
            wanted |= {"400", "401"}
        if "{" in path:
            wanted |= {"404"}
        if method != "GET" and name != "CreateAccessToken":
            wanted |= {"504"}
        if "requestBody" in operation:
            wanted |= {"413"}
        assert wanted <= statuses, f"{name} lacks {wanted - statuses}"
    for name, status, response in responses(described):
        if status >= "400":
            schema = response["content"]["application/json"]["schema"]
            assert schema == ERROR, f"{name} {status}"
        assert response["description"], f"{name} {status}"


def test_every_answer_has_a_schema(described: Description) -> None:
    for name, status, response in responses(described):
        (media,) = response["content"].values()
        assert media["schema"], f"{name} {status}"


@pytest.mark.parametrize("operation", [name for name, op in SEED.items() if op["request"]])
def test_the_requests_of_the_seed_are_as_described(described: Description, operation: str) -> None:
    example = SEED[operation]
    place = ("paths", example["path"], example["method"].lower(), "requestBody", "content")
    validator = described.validator(*place, "application/json", "schema")
    validator.validate(example["request"])
    assert not validator.is_valid([])


def test_streams_are_streams(described: Description) -> None:
    for name in ("FollowEvents", "FollowInferenceJob"):
        _, _, operation = described.operations()[name]
        assert list(operation["responses"]["200"]["content"]) == ["text/event-stream"]


def test_every_operation_says_what_for_and_how_to_come_in(described: Description) -> None:
    document = described.document
    assert set(document["components"]["securitySchemes"]) == {"apiKey", "person"}
    for name, (_, _, operation) in described.operations().items():
        assert len(operation.get("description", "")) > 10, name
        assert operation.get("tags"), name


def test_the_page_for_people_has_every_operation(api: StrictClient, described: Description) -> None:
    page = httpx.get(api.url + "/docs", trust_env=False)
    assert page.headers["content-type"].startswith("text/html")
    assert "script" not in page.headers["content-security-policy"]
    for name, (method, path, _) in described.operations().items():
        assert f"id='{name}'" in page.text
        assert re.search(rf"{method}</b>\s+{re.escape(path)}<", page.text), name
    assert "services." not in page.text
