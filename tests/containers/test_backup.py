"""A deployment is destroyed with all its data, and comes back from `just backup`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from deploy.local.client import Client, Failed
from deploy.local.demo import CHECKPOINT
from tests.chaos.calling import PARAMS
from tests.chaos.test_kill import MODEL
from tests.containers.engine import Deployment, needs_engine

pytestmark = [needs_engine, pytest.mark.timeout(2400)]

ENDPOINT = "kept"


def test_a_destroyed_deployment_comes_back_whole(deployment: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    with deployment.log_in() as client:
        if not client.find_checkpoint("Stable-diffusion", CHECKPOINT.name):
            client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
        client.create_endpoint(ENDPOINT)
        client.wait_for_endpoint(ENDPOINT)
        client.call("POST", "/roles", {"role_name": "kept", "permissions": ["role:list"]})
        job = client.run_job("txt2img", MODEL, {**PARAMS, "seed": 1})
        picture = client.download(job["img_presigned_urls"][0])

        with Traffic(client) as traffic:
            deployment.just("backup", str(folder))
        client.call("POST", "/roles", {"role_name": "later", "permissions": ["role:list"]})

    deployment.run("down", "--volumes", "--timeout", "30")
    deployment.just("restore", str(folder))

    with deployment.log_in() as client:
        again = client.get_job(job["InferenceJobId"])
        assert again["status"] == "succeed"
        assert client.download(again["img_presigned_urls"][0]) == picture

        listed = {role["role_name"] for role in client.call("GET", "/roles")["data"]["roles"]}
        assert {"kept", *traffic.before} <= listed
        assert "later" not in listed
        for name in traffic.during:  # either it is there, for every part, or it can be made anew
            if name in listed:
                with pytest.raises(Failed, match="exists"):
                    _make_role(client, name)
            else:
                _make_role(client, name)
        behind = """
            SELECT id FROM gateway.aggregates
            FULL JOIN identity.roles ON kind = 'role' AND id = role_name
            WHERE (kind = 'role' OR kind IS NULL)
                AND aggregates.version IS DISTINCT FROM roles.version
        """
        assert deployment.sql(behind) == []

        client.wait_for_endpoint(ENDPOINT)
        repeated = client.run_job("txt2img", MODEL, {**PARAMS, "seed": 1})
        assert repeated["status"] == "succeed"
        assert client.download(repeated["img_presigned_urls"][0]) == picture


def test_a_backup_that_was_not_finished_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    deployment.just("backup", str(folder))
    (folder / "postgres.dump").write_bytes(b"half")
    with pytest.raises(AssertionError, match=r"postgres\.dump is not what the backup ended with"):
        deployment.just("restore", str(folder))
    with deployment.log_in() as client:
        assert client.call("GET", "/ping")["message"] == "pong", "it was stopped all the same"


class Traffic:
    """Makes roles for as long as it is entered. `before`: those that were there when it began."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.before: list[str] = []
        self.during: list[str] = []

    def __enter__(self) -> Traffic:
        for number in range(5):
            self.before.append(_make_role(self._client, f"before {number}"))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            self.during.append(_make_role(self._client, f"during {len(self.during)}"))


def _make_role(client: Client, name: str) -> str:
    client.call("POST", "/roles", {"role_name": name, "permissions": ["role:list"]})
    return name
