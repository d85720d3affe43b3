"""The registry as its users see it: what is told of a file, who may use it, and its end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from deploy.local import import_checkpoint
from deploy.local.client import PART_BYTES, Client, Failed
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from tests.e2e.described import StrictClient
from tests.e2e.test_events import Ear
from tests.weights import weights

ENDPOINT = "checkpoints"
PARAMS = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64, "seed": 1}


def unique(kind: str) -> str:
    return f"{kind}-{uuid4().hex[:8]}.safetensors"


def upload(
    api: Client, tmp_path: Path, type_: str, data: bytes, name: str = "", **more: Any
) -> dict[str, Any]:
    file = tmp_path / (name or unique(type_))
    file.write_bytes(data)
    return api.upload_checkpoint(type_, file, **more)


def test_all_that_is_known_of_a_file_is_told(api: StrictClient, tmp_path: Path) -> None:
    file = weights("Lora", 2 * PART_BYTES + 1000, uuid4().hex)
    checkpoint = upload(api, tmp_path, "Lora", file)
    (name,) = checkpoint["name"]
    digest = hashlib.sha256(file).hexdigest()
    assert checkpoint["params"]["files"][name] == {
        "size": len(file),
        "sha256": digest,
        "short_hash": digest[:10],
        "format": "safetensors",
        "type": "Lora",
        "title": "a LoRA for SD 1.x",
        "family": "SD 1.x",
        "precision": "u8",
        "parameters": len(file) - 8 - 1024 - 4 * 768,
        "rank": 4,
    }
    listed = api.find_checkpoint("Lora", name)
    assert listed == checkpoint == api.call("GET", f"/checkpoints/{checkpoint['id']}")["data"]
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [checkpoint["id"]]})
    assert api.request("GET", f"/checkpoints/{checkpoint['id']}").status_code == 404


def test_the_way_in_is_told_as_events(api: StrictClient, tmp_path: Path) -> None:
    ear = Ear(api, "/events")
    checkpoint = upload(api, tmp_path, "VAE", weights("VAE", seed=uuid4().hex))
    ear.wait(lambda heard: any(e.name == "models.checkpoint_activated.v1" for e in heard))
    mine = [
        event
        for event in ear.heard
        if event.data.get("subject") == checkpoint["id"]
        or event.data.get("checkpoint_id") == checkpoint["id"]
    ]
    names = [event.name for event in mine]
    assert [name for name in names if name != "progress"] == [
        f"models.checkpoint_{what}.v1" for what in ("created", "uploaded", "activated")
    ]
    last = [event.data for event in mine if event.name == "progress"][-1]
    assert (last["stage"], last["percent"], last["bytes"]) == ("check", 100, 16_384)


def test_what_is_refused_is_said_at_once(api: StrictClient, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"declared as VAE and is a LoRA for SD 1\.x") as wrong:
        upload(api, tmp_path, "VAE", weights("Lora", seed=uuid4().hex))
    assert wrong.value.status == 400

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("I was run",)

    name = unique("evil").replace("safetensors", "pt")
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}, "x": Evil()}, tmp_path / name)
    with pytest.raises(Failed, match=r"is a pickle that would run builtins\.print when"):
        api.upload_checkpoint("embeddings", tmp_path / name)
    shown = api.call("GET", "/checkpoints?types=embeddings&status=Disabled")["data"]["checkpoints"]
    (refused,) = [checkpoint for checkpoint in shown if checkpoint["name"] == [name]]
    assert "builtins.print" in refused["error"]
    on = api.request("PUT", f"/checkpoints/{refused['id']}", {"status": "Active"})
    assert on.status_code == 400
    assert "stays Disabled" in on.json()["message"]
    assert api.find_checkpoint("embeddings", name) is None


def test_an_upload_of_ten_thousand_parts_can_be_begun(api: StrictClient) -> None:
    name = unique("huge")
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": name, "parts_number": 10_000}],
    }
    new = api.call("POST", "/checkpoints", body)["data"]
    assert len(set(new["s3PresignUrl"][name])) == 10_000
    sent = api.http.put(new["s3PresignUrl"][name][9_999], content=b"the last")
    tags = [{"ETag": sent.headers["ETag"], "PartNumber": 10_000}]
    done = {"status": "Active", "multi_parts_tags": {name: tags}}
    answer = api.request("PUT", f"/checkpoints/{new['checkpoint']['id']}", done)
    assert answer.status_code == 400
    assert f"{name} do not match what was uploaded: part 1 of 10000 is missing" in answer.text
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [new["checkpoint"]["id"]]})


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x.safetensors",
        "https://localhost:8600/x.safetensors",
        "https://169.254.169.254/latest/meta-data/iam.safetensors",
        "https://[::1]/x.safetensors",
        "https://[::ffff:127.0.0.1]/x.safetensors",
        "https://0.0.0.0/x.safetensors",
        "https://10.0.0.1/x.safetensors",
    ],
)
def test_downloads_do_not_reach_inside(api: StrictClient, url: str) -> None:
    body = {"checkpoint_type": "VAE", "urls": [url]}
    answer = api.request("POST", "/checkpoints", body)
    assert answer.status_code == 202
    id_ = answer.json()["data"]["checkpoint"]["id"]
    with pytest.raises(Failed, match="at an address that downloads may not reach"):
        api.wait_for_checkpoint(id_, seconds=30)
    again = api.request("PUT", f"/checkpoints/{id_}", {"status": "Creating"})
    assert again.status_code == 202
    assert again.json()["checkpoint"]["status"] == "Creating"
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [id_]})


def test_schemes_are_refused_before_anything_is_made(api: StrictClient) -> None:
    for url in ("file:///etc/passwd", "http://host/x", "ftp://host/x", "gopher://host/x", "//x/y"):
        body = {"checkpoint_type": "VAE", "urls": [url]}
        answer = api.request("POST", "/checkpoints", body)
        assert answer.status_code == 400
        assert "https://" in answer.json()["message"]


def test_a_change_of_roles_counts_from_the_next_call_on(
    api: StrictClient, other: StrictClient, tmp_path: Path
) -> None:
    """Also for a job that was created before, and at another gateway."""
    role = f"painters-{uuid4().hex[:8]}"
    api.call("POST", "/roles", {"role_name": role, "permissions": []})
    name = unique("theirs")
    data = weights("Stable-diffusion", seed=name)
    id_ = upload(api, tmp_path, "Stable-diffusion", data, name, allowed=[role])["id"]
    artist = api.add_person("Designer")
    there = artist.at(other.url)
    models = {"models": {"Stable-diffusion": [name]}}
    job = {"inference_type": "Async", "task_type": "txt2img", **models}

    def may(client: StrictClient) -> tuple[bool, int, int]:
        return (
            client.find_checkpoint("Stable-diffusion", name) is not None,
            client.request("GET", f"/checkpoints/{id_}").status_code,
            client.request("POST", "/inferences", job).status_code,
        )

    def assign(*roles: str) -> None:
        body = {"username": artist.username, "password": artist.password, "roles": list(roles)}
        api.call("POST", "/users", body)

    assert may(artist) == may(there) == (False, 404, 404)
    assign("Designer", role)
    assert may(there) == may(artist) == (True, 200, 201)
    job_id = artist.create_job("txt2img", models["models"], PARAMS)
    assign("Designer")
    assert may(artist) == may(there) == (False, 404, 404)
    started = there.request("PUT", f"/inferences/{job_id}/start")
    assert started.status_code == 404
    assert f"checkpoint with name {name}" in started.json()["message"]


@pytest.fixture(scope="module")
def endpoint(api: StrictClient) -> Iterator[str]:
    api.create_endpoint(ENDPOINT)
    api.wait_for_endpoint(ENDPOINT)
    yield ENDPOINT
    api.call("DELETE", "/endpoints", {"delete_endpoint_list": [ENDPOINT], "username": "admin"})


def test_a_checkpoint_may_be_deleted_while_a_job_runs(
    api: StrictClient, endpoint: str, stack: Stack
) -> None:
    """The job finishes; later ones are refused, those that wait to be started too."""
    name = unique("doomed")
    api.upload_checkpoint("Stable-diffusion", CHECKPOINT, name=name)
    found = api.find_checkpoint("Stable-diffusion", name)
    assert found
    models = {"Stable-diffusion": [name]}
    waiting = api.create_job("txt2img", models, PARAMS)
    job_id = api.create_job("txt2img", models, {**PARAMS, "steps": 100, "width": 256})
    api.start_job(job_id)
    ear = Ear(api, f"/inferences/{job_id}/events")
    ear.wait(lambda heard: any(event.name == "progress" for event in heard))
    api.call("DELETE", "/checkpoints", {"checkpoint_id_list": [found["id"]]})
    body = {"inference_type": "Async", "task_type": "txt2img", "models": models}
    assert api.request("POST", "/inferences", body).status_code == 404
    assert api.request("PUT", f"/inferences/{waiting}/start").status_code == 404
    assert api.wait_for_job(job_id, seconds=60)["status"] == "succeed"


def test_an_operator_imports_what_lies_in_a_folder(
    api: StrictClient,
    stack: Stack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(stack.installation.home))
    good, cut = unique("good"), unique("cut")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / good).write_bytes(weights("Lora", seed=good))
    (tmp_path / cut).write_bytes(weights("Lora", seed=cut)[:-1])
    (tmp_path / "notes.txt").write_text("no weights")
    assert import_checkpoint.main([str(tmp_path), "--type", "Lora", "--allow", "Designer"]) == 1
    told = capsys.readouterr().out
    assert f"✓ {good}: a LoRA for SD 1.x, u8, " in told
    assert f"✗ {cut}: {cut}: it has" in told
    assert "notes" not in told
    found = api.find_checkpoint("Lora", good)
    assert found
    assert found["allowed_roles_or_users"] == ["Designer"]
    assert import_checkpoint.main([str(tmp_path / "deep"), "--type", "Lora"]) == 1
    assert "already exists" in capsys.readouterr().out
    assert import_checkpoint.main([str(tmp_path / "nothing"), "--type", "Lora"]) == 1
    (tmp_path / "empty").mkdir()
    assert import_checkpoint.main([str(tmp_path / "empty"), "--type", "Lora"]) == 1
