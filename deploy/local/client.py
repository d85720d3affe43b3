"""A client of the public REST API: what the demo, the tests and the benchmarks speak through."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from shared.settings import read_env_file

PART_BYTES = 16 * 1024 * 1024
"""S3 wants at least 5 MiB for every part but the last."""
PARTS_AT_ONCE = 3


class Failed(Exception):
    """An answer that was not a success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class ServerEvent(msgspec.Struct):
    """One Server-Sent Event. `id` is None for progress and previews, which are never stored."""

    name: str
    data: dict[str, Any]
    id: str | None


class Client:
    def __init__(
        self, url: str, api_key: str, token: str | None = None, *, timeout: float = 60.0
    ) -> None:
        self.url = url.rstrip("/")
        self._key = {"x-api-key": api_key}
        self._person = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(timeout=timeout, trust_env=False)

    @classmethod
    def log_in(cls, url: str, api_key: str, username: str, password: str) -> Self:
        client = cls(url, api_key)
        answer = client.call("POST", "/auth/token", {"username": username, "password": password})
        client._person = {"Authorization": f"Bearer {answer['access_token']}"}
        return client

    @classmethod
    def log_in_at(cls, home: Path) -> Self:
        """As the first user of the installation in a folder, which must be up. Raises
        FileNotFoundError if there is none."""
        file = home / "local.env"
        if not file.exists():
            raise FileNotFoundError(f"there is no installation at {home}: `just up` makes it")
        settings = read_env_file(file)
        return cls.log_in(
            settings["DARKROOM_URL"],
            settings["DARKROOM_API_KEY"],
            settings["DARKROOM_ADMIN_USER"],
            settings["DARKROOM_ADMIN_PASSWORD"],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @property
    def headers(self) -> dict[str, str]:
        return {**self._key, **self._person}

    def request(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> httpx.Response:
        """One request as it is, whatever the answer. `idempotency_key=…` becomes a header."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            more["content-type"] = "application/json"
        return self.http.request(
            method, self.url + path, content=content, headers={**self.headers, **more}
        )

    def call(self, method: str, path: str, body: object = None, **headers: str) -> dict[str, Any]:
        """The JSON of a successful answer. Raises Failed."""
        response = self.request(method, path, body, **headers)
        answer: dict[str, Any] = response.json() if response.content else {}
        if response.is_error:
            raise Failed(response.status_code, answer.get("message", response.text))
        return answer

    # Checkpoints

    def find_checkpoint(self, type_: str, name: str) -> dict[str, Any] | None:
        listed = self.call("GET", f"/checkpoints?types={type_}&status=Active&per_page=1000")
        found: list[dict[str, Any]] = listed["data"]["checkpoints"]
        return next((c for c in found if name in c["name"]), None)

    def upload_checkpoint(
        self,
        type_: str,
        file: Path,
        *,
        name: str | None = None,
        message: str = "",
        allowed: Sequence[str] = (),
        on_part: Callable[[int], None] = lambda size: None,
    ) -> dict[str, Any]:
        """Presigned multipart, as any ESD client does it. Returns the active checkpoint. Raises
        Failed if it is refused. `allowed`: roles or users, everybody if empty. `on_part` is told
        the bytes of each part that is there."""
        name = name or file.name
        size = file.stat().st_size
        parts = max(1, -(-size // PART_BYTES))
        body = {
            "checkpoint_type": type_,
            "params": {"message": message},
            "filenames": [{"filename": name, "parts_number": parts}],
            **({"allowed_roles_or_users": list(allowed)} if allowed else {}),
        }
        created = self.call("POST", "/checkpoints", body)["data"]

        def put(numbered: tuple[int, str]) -> dict[str, Any]:
            number, url = numbered
            with file.open("rb") as stream:
                stream.seek((number - 1) * PART_BYTES)
                part = stream.read(PART_BYTES)
            answer = self.http.put(url, content=part)
            answer.raise_for_status()
            on_part(len(part))
            return {"ETag": answer.headers["ETag"], "PartNumber": number}

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            tags = list(pool.map(put, enumerate(created["s3PresignUrl"][name], 1)))
        done = {"status": "Active", "multi_parts_tags": {name: tags}}
        answer_ = self.call("PUT", f"/checkpoints/{created['checkpoint']['id']}", done)
        return self.wait_for_checkpoint(answer_["checkpoint"]["id"])

    def wait_for_checkpoint(self, checkpoint_id: str, *, seconds: float = 3600) -> dict[str, Any]:
        """Returns it once it is active. Raises Failed if it is refused, or fails."""
        deadline = time.monotonic() + seconds
        while True:
            checkpoint: dict[str, Any] = self.call("GET", f"/checkpoints/{checkpoint_id}")["data"]
            if checkpoint["status"] == "Active":
                return checkpoint
            if checkpoint["error"] or time.monotonic() > deadline:
                raise Failed(400, checkpoint["error"] or f"still {checkpoint['status']}")
            time.sleep(0.5)

    # Endpoints

    def find_endpoint(self, name: str) -> dict[str, Any] | None:
        """The one that has the name, so none that is being deleted."""
        endpoints: list[dict[str, Any]] = self.call("GET", "/endpoints")["data"]["endpoints"]
        named = [e for e in endpoints if e["endpoint_name"] == name]
        return next((e for e in named if e["endpoint_status"] != "Deleting"), None)

    def create_endpoint(
        self,
        name: str,
        *,
        type_: str = "Async",
        count: int = 1,
        instance_type: str = "cpu",
        roles: tuple[str, ...] = ("IT Operator",),
        **scaling: int,
    ) -> dict[str, Any]:
        """`scaling`: `max_instance_number` and `min_instance_number`; with either it scales."""
        body = {
            "endpoint_name": name,
            "endpoint_type": type_,
            "instance_type": instance_type,
            "initial_instance_count": str(count),
            "autoscaling_enabled": bool(scaling),
            "assign_to_roles": list(roles),
            **{name: str(number) for name, number in scaling.items()},
        }
        endpoint: dict[str, Any] = self.call("POST", "/endpoints", body)["data"]
        return endpoint

    def wait_for_endpoint(self, name: str, *, seconds: float = 120.0) -> dict[str, Any]:
        """Returns it once it is in service. Raises RuntimeError if it fails or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            endpoint = self.find_endpoint(name)
            if endpoint and endpoint["endpoint_status"] == "InService":
                return endpoint
            if endpoint and endpoint["endpoint_status"] == "Failed":
                raise RuntimeError(f"endpoint {name} failed: {endpoint['error']}")
            time.sleep(0.2)
        raise RuntimeError(f"endpoint {name} was not in service within {seconds:g} s")

    # Inferences

    def create_job(
        self,
        task_type: str,
        models: dict[str, list[str]],
        params: dict[str, Any],
        *,
        inference_type: str = "Async",
    ) -> str:
        """Creates a job and uploads its params. Returns its id; it is not started yet."""
        body = {"inference_type": inference_type, "task_type": task_type, "models": models}
        inference = self.call("POST", "/inferences", body)["data"]["inference"]
        upload = self.http.put(inference["api_params_s3_upload_url"], content=json.dumps(params))
        upload.raise_for_status()
        return str(inference["id"])

    def start_job(self, job_id: str) -> dict[str, Any]:
        return self.call("PUT", f"/inferences/{job_id}/start")

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        """Returns the job, which has failed then. Raises Failed for one that has ended already."""
        job: dict[str, Any] = self.call("PUT", f"/inferences/{job_id}/cancel")["data"]
        return job

    def get_job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.call("GET", f"/inferences/{job_id}")["data"]
        return job

    def wait_for_job(self, job_id: str, *, seconds: float = 120.0) -> dict[str, Any]:
        """Polls until the job has ended. Raises RuntimeError if it takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.get_job(job_id)
            if job["status"] in ("succeed", "failed"):
                return job
            time.sleep(0.1)
        raise RuntimeError(f"job {job_id} did not end within {seconds:g} s")

    def run_job(
        self, task_type: str, models: dict[str, list[str]], params: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        job_id = self.create_job(task_type, models, params)
        self.start_job(job_id)
        return self.wait_for_job(job_id, **more)

    def download(self, url: str) -> bytes:
        answer = self.http.get(url)
        answer.raise_for_status()
        return answer.content

    # Events

    def events(self, path: str, *, last_event_id: str | None = None) -> Iterator[ServerEvent]:
        """Follows `/events` or `/inferences/{id}/events` until the server ends the stream."""
        headers = dict(self.headers)
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        with self.http.stream("GET", self.url + path, headers=headers, timeout=None) as response:
            if response.is_error:
                response.read()
                raise Failed(response.status_code, response.json()["message"])
            yield from parse_events(event_lines(response))


def event_lines(response: httpx.Response) -> Iterator[str]:
    """The whole lines of a stream: httpx's own would end at U+2028 and its like within JSON too."""
    left = ""
    for text in response.iter_text():
        *lines, left = (left + text).split("\n")
        yield from lines


def parse_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    name, data, id_ = "message", "", None
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "" and data:
            yield ServerEvent(name, json.loads(data), id_)
            name, data, id_ = "message", "", None
        elif field == "event":
            name = value
        elif field == "data":
            data += value
        elif field == "id":
            id_ = value
