"""A client that holds every answer against the server's own OpenAPI description."""

from __future__ import annotations

import re
import secrets
from functools import cache
from typing import Any, Self

import httpx
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from deploy.local.client import Client

INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|asyncpg|litestar|msgspec|nats:|object at 0x|SELECT "
)
"""What no message to a client may show."""


class Description:
    """What `GET /api` promises."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._registry: Registry[Any] = Registry().with_resource(
            "urn:api", DRAFT202012.create_resource(document)
        )
        self._templates = {
            path: re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + "/?") for path in document["paths"]
        }

    def operations(self) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """operationId -> method, path, operation."""
        return {
            operation["operationId"]: (method.upper(), path, operation)
            for path, methods in self.document["paths"].items()
            for method, operation in methods.items()
            if not method.startswith("x-")
        }

    def validator(self, *place: str) -> Draft202012Validator:
        """Of the schema at this place in the document."""
        pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in place)
        return Draft202012Validator({"$ref": f"urn:api#/{pointer}"}, registry=self._registry)

    def check(self, method: str, url: str, response: httpx.Response) -> None:
        """Raises AssertionError for an answer that is not described, or not as described."""
        told = f"{method} {url[:200]} -> {response.status_code} {response.text[:500]}"
        assert response.headers["x-api-version"] == "1.4.0", told
        assert response.headers["x-correlation-id"], told
        if response.is_error:
            _check_error(response, told)
        path = url.partition("?")[0]
        found = next((p for p, regex in self._templates.items() if regex.fullmatch(path)), None)
        if found is None:
            assert response.status_code in (400, 403, 404), told
            return
        operation = self.document["paths"][found].get(method.lower())
        if operation is None:
            assert response.status_code in (403, 405), told
            return
        status = str(response.status_code)
        assert status in operation["responses"], f"not described: {told}"
        content = operation["responses"][status]["content"]
        if status == "204":
            assert response.content == b"", told
            return
        (media_type,) = content
        assert response.headers["content-type"].split(";")[0] == media_type, told
        place = ("paths", found, method.lower(), "responses", status, "content", media_type)
        self.validator(*place, "schema").validate(response.json())


def _check_error(response: httpx.Response, told: str) -> None:
    assert response.status_code != 500, told
    answer = response.json()
    assert set(answer) == {"statusCode", "message"}, told
    assert answer["statusCode"] == response.status_code, told
    assert len(answer["message"]) > 5, told
    assert not INTERNALS.search(answer["message"]), told


@cache
def description(url: str) -> Description:
    return Description(httpx.get(url + "/api", trust_env=False).json())


class StrictClient(Client):
    """Every answer must be described, and no error may tell of the inside."""

    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> httpx.Response:
        response = super().request(method, path, body, **headers)
        description(self.url).check(method, path, response)
        return response

    def send(
        self, method: str, path: str, content: Any = None, **headers: str | bytes
    ) -> httpx.Response:
        """A request with any bytes as its body; `x_api_key=…` becomes a header."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        merged: Any = {**self.headers, "content-type": "application/json", **more}
        response = self.http.request(method, self.url + path, content=content, headers=merged)
        description(self.url).check(method, path, response)
        return response

    def at(self, url: str) -> Self:
        """The same person at another gateway."""
        return type(self)(url, self._key["x-api-key"], self.token)

    def bearing(self, token: str | None) -> Self:
        """The same API key with another token."""
        return type(self)(self.url, self._key["x-api-key"], token)

    @property
    def token(self) -> str:
        return self._person["Authorization"].removeprefix("Bearer ")

    def add_person(
        self, *roles: str, permissions: tuple[str, ...] = (), name: str | None = None
    ) -> Person:
        """Creates a user and logs in."""
        username, password = name or f"user-{secrets.token_hex(4)}", secrets.token_urlsafe(12)
        user = {"username": username, "password": password, "roles": list(roles)}
        self.call("POST", "/users", {**user, "permissions": list(permissions)})
        person = Person.log_in(self.url, self._key["x-api-key"], username, password)
        person.username, person.password = username, password
        return person


class Person(StrictClient):
    """A user that a test has made."""

    username: str
    password: str
