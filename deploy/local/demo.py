"""`just demo`: from nothing to a picture, through the public REST API only.

Everything after "Darkroom is up" is what any client would do.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local.client import Client
from deploy.local.installation import REPOSITORY, default_home
from deploy.local.weights import fetch_u2net
from shared.settings import read_env_file

CHECKPOINT = REPOSITORY / "deploy" / "demo_model" / "darkroom-demo.safetensors"
ENDPOINT = "demo"
PROMPT = "a red heart on a yellow background"
PARAMS: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "steps": 20,
    "sampler_name": "Euler a",
    "cfg_scale": 4.0,
    "seed": 7,
    "width": 256,
    "height": 256,
    "batch_size": 1,
    "n_iter": 1,
}
OUTPUT = Path("darkroom-demo")

TRY_NEXT = """\
  . .darkroom/local.env
  curl -s $DARKROOM_URL/auth/token -H "x-api-key: $DARKROOM_API_KEY" -d \\
    '{"username": "'$DARKROOM_ADMIN_USER'", "password": "'$DARKROOM_ADMIN_PASSWORD'"}'"""

console = Console(highlight=False, soft_wrap=True)


class Stages:
    """How long each stage took, for the table at the end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        console.print(f"[bold]{name}[/] …")
        yield
        self.seconds[name] = time.monotonic() - started
        console.print(f"  [dim]{self.seconds[name]:.1f} s[/]")


def main() -> None:
    home = default_home()
    settings = read_env_file(home / "local.env")
    stages = Stages()
    with stages.stage("Logging in"):
        client = Client.log_in_at(home)
    with client:
        _deploy(client, stages)
        _upload(client, stages, "Stable-diffusion", CHECKPOINT)
        picture = _render(client, stages)
        _upload(client, stages, "rembg", fetch_u2net())
        _remove_background(client, stages, picture)
    _finish(settings, stages)


def _deploy(client: Client, stages: Stages) -> None:
    with stages.stage("Deploying an endpoint with one CPU worker"):
        if client.find_endpoint(ENDPOINT) is None:
            client.create_endpoint(ENDPOINT, roles=("IT Operator", "Designer"))
        endpoint = client.wait_for_endpoint(ENDPOINT)
        console.print(f"  endpoint [cyan]{ENDPOINT}[/] is {endpoint['endpoint_status']}")


def _upload(client: Client, stages: Stages, type_: str, file: Path) -> None:
    with stages.stage(f"Uploading {file.name} ({file.stat().st_size / 1e6:.0f} MB)"):
        if client.find_checkpoint(type_, file.name):
            console.print("  is in the registry already")
            return
        checkpoint = client.upload_checkpoint(type_, file, message="demo")
        console.print(f"  checkpoint [cyan]{checkpoint['id']}[/] is {checkpoint['status']}")


def _render(client: Client, stages: Stages) -> bytes:
    with stages.stage(f"txt2img: “{PROMPT}”"):
        models = {"Stable-diffusion": [CHECKPOINT.name], "VAE": ["Automatic"]}
        job_id = client.create_job("txt2img", models, PARAMS)
        client.start_job(job_id)
        job = _follow(client, job_id)
        picture = client.download(job["img_presigned_urls"][0])
        _save(OUTPUT / "heart.png", picture)
    return picture


def _remove_background(client: Client, stages: Stages, picture: bytes) -> None:
    with stages.stage("rembg: removing its background"):
        params = {"input_image": base64.b64encode(picture).decode(), "model": "u2net"}
        job_id = client.create_job("rembg", {"rembg": ["u2net.onnx"]}, params)
        client.start_job(job_id)
        job = _follow(client, job_id)
        _save(OUTPUT / "heart-cut-out.png", client.download(job["img_presigned_urls"][0]))


def _follow(client: Client, job_id: str) -> dict[str, Any]:
    """Prints each status event, and a bar for the progress between them."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(40),
        TextColumn("{task.completed:g}/{task.total:g}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("steps", total=1, visible=False)
        for event in client.events(f"/inferences/{job_id}/events"):
            if event.name == "progress":
                steps = event.data["steps"]
                bar.update(task, completed=event.data["step"], total=steps, visible=True)
            if event.id is None:  # progress, or a preview
                continue
            state = event.data["data"]
            console.print(f"  [green]{event.name}[/] status={state['status']}")
            if state["status"] == "failed":
                raise SystemExit(f"the job failed: {state['reason']}")
    return client.get_job(job_id)


def _save(file: Path, picture: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(picture)
    console.print(f"  saved [cyan]{file}[/]")


def _finish(settings: dict[str, str], stages: Stages) -> None:
    url = settings["DARKROOM_URL"]
    console.print("\n[bold]Times[/]")
    for name, seconds in stages.seconds.items():
        console.print(f"  {seconds:6.1f} s  {name}")
    console.print(f"\nAPI        {url}\nAPI docs   {url}/docs\nEvents     {url}/events")
    console.print("Keys       .darkroom/local.env\n\nTry next:")
    console.print(TRY_NEXT, markup=False)
    console.print("\n`just status` shows what runs, `just down` stops it.")


if __name__ == "__main__":
    main()
