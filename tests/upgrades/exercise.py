"""Everything that a client can ask for, once, or a little of it until it is told to stop; and what
both need before.

Runs with the modules of the release in whose folder it is started: it imports that one's client.

    python .../exercise.py HOME prepare
    python .../exercise.py HOME all        exit code 0 if everything was as it should be
    python .../exercise.py HOME loop       until SIGTERM; prints how many rounds, and what failed
"""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from uuid import uuid4

from deploy.local.client import Client, Failed
from deploy.local.demo import CHECKPOINT

MODEL = {"Stable-diffusion": [CHECKPOINT.name]}
PARAMS = {"prompt": "a red circle", "steps": 1, "width": 64, "height": 64, "seed": 1}
ENDPOINT = "standing"
"""There from the first exercise on."""


def unique(kind: str) -> str:
    return f"{kind}-{uuid4().hex[:8]}"


def prepare(client: Client) -> None:
    if client.find_checkpoint("Stable-diffusion", CHECKPOINT.name) is None:
        client.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    if client.find_endpoint(ENDPOINT) is None:
        client.create_endpoint(ENDPOINT)
    client.wait_for_endpoint(ENDPOINT)


def people(client: Client) -> None:
    role, name, password = unique("role"), unique("person"), unique("password")
    client.call("POST", "/roles", {"role_name": role, "permissions": ["inference:all"]})
    body = {"username": name, "password": password, "roles": [role]}
    client.call("POST", "/users", body)
    with Client.log_in(client.url, client.headers["x-api-key"], name, password) as person:
        token = person.call("POST", "/auth/tokens", {"name": "mine"})["data"]["token"]
        assert person.call("GET", "/inferences")["data"]["total"] == 0
        person.call("DELETE", f"/auth/tokens/{token['id']}")
    client.call("DELETE", "/users", {"user_name_list": [name]})
    client.call("DELETE", "/roles", {"role_name_list": [role]})


def checkpoints(client: Client) -> None:
    name = unique("copy") + ".safetensors"
    checkpoint = client.upload_checkpoint("Stable-diffusion", CHECKPOINT, name=name)
    path = f"/checkpoints/{checkpoint['id']}"
    client.call("PUT", path, {"name": f"renamed-{name}"})
    client.call("PUT", path, {"status": "Disabled"})
    client.call("DELETE", "/checkpoints", {"checkpoint_id_list": [checkpoint["id"]]})


def endpoints(client: Client) -> None:
    name = unique("pool")
    client.create_endpoint(name, count=1)
    client.wait_for_endpoint(name)
    client.call("DELETE", "/endpoints", {"delete_endpoint_list": [name], "username": "admin"})
    assert client.find_endpoint(name) is None


def jobs(client: Client) -> None:
    done = client.run_job("txt2img", MODEL, PARAMS)
    assert done["status"] == "succeed", done
    assert client.download(done["img_presigned_urls"][0]).startswith(b"\x89PNG")
    job_id = done["InferenceJobId"]
    told = [e.name for e in client.events(f"/inferences/{job_id}/events") if e.id]
    assert told[0] == "inference.job_created.v1"
    assert told[-1] == "inference.job_succeeded.v1"
    cancelled = client.create_job("txt2img", MODEL, PARAMS)
    client.cancel_job(cancelled)
    ids = {"inference_id_list": [job_id, cancelled]}
    client.call("DELETE", "/inferences", ids)


def everything(client: Client) -> None:
    prepare(client)
    for part in (people, checkpoints, endpoints, jobs):
        part(client)
        print(part.__name__, flush=True)


def loop(client: Client) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    rounds = 0
    while not stopped:
        people(client)
        job = client.run_job("txt2img", MODEL, PARAMS)
        assert job["status"] == "succeed", job
        rounds += 1
    print(rounds, flush=True)


def main() -> int:
    home, what = sys.argv[1:]
    lines = (Path(home) / "local.env").read_text().splitlines()
    known = dict(line.split("=", 1) for line in lines if "=" in line)
    names = ("URL", "API_KEY", "ADMIN_USER", "ADMIN_PASSWORD")
    with Client.log_in(*(known[f"DARKROOM_{name}"] for name in names)) as client:
        try:
            {"prepare": prepare, "all": everything, "loop": loop}[what](client)
        except (AssertionError, Failed, RuntimeError):
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
