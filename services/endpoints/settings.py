from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from services.endpoints.domain import InstanceType, InstanceTypes
from services.endpoints.launchers import Program
from services.endpoints.launchers.gpus import visible_gpus
from shared.settings import ServiceSettings, variables
from shared.webui.settings import WebuiSettings
from shared.webui.styles import check_styles

BUILT_IN: Mapping[str, InstanceType | str] = {
    "cpu": InstanceType(device="cpu", max=4, image="darkroom/worker-cpu"),
    "gpu": InstanceType(device="cuda", max=8, image="darkroom/worker-cuda"),
}


ANYWHERE = "0.0.0.0"  # noqa: S104

MAX_STYLES = 60_000
"""Characters: an environment variable has room for twice that."""

HANDED_ON = (
    "otlp_url",
    "cache_bytes",
    "ram_bytes",
    "gpu_bytes",
    "job_seconds",
    "drain_seconds",
    "jobs_in_hand",
    "batch_rows",
    "precision",
    "preview_seconds",
    "samples_format",
    "compile",
    "compile_mode",
)


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """Workers get their own NATS user and S3 key (`worker_…`), never what this service has.

    - `launcher`: where workers run; what starts with its name is for it alone.
    - `run`: where the records of living processes lie; it belongs to one endpoints service.
    - `logs`: where processes write, `logs` beside `run` by default.
    - `installation`: tells our containers and jobs from those of others; never change it.
    - `keep_workers`: containers and jobs go on when this service stops.
    - `gpus`: those that workers may have, as CUDA_VISIBLE_DEVICES names them; by default all that
      are seen here. Nomad knows for itself.
    - `worker_command`: `{python}` is this interpreter, in a container the image's `python`.
    - `worker_nats_url`, `worker_s3_url`: as workers reach them, if it differs from here.
    - `worker_cache`: a folder; for containers that of their machine, or the name of a volume.
    - `worker_threads`: OMP_NUM_THREADS of a worker; 0 leaves it as it is here.
    - those in HANDED_ON: for the workers, which say what they mean and have the defaults.
    - `webui`: for the workers, too; what is wrong in it stops this service as it starts.
    - `worker_ready_within`, `worker_stop_within`, `worker_silent_within`: seconds until a worker
      that is not ready, not gone, or not heard of is given up.
    - `drain_seconds`: for a worker to finish its jobs when its endpoint is deleted or scaled in.
    - `scale_out_after`, `scale_in_after`: the cool-downs of autoscaling.
    - `instance_types`: JSON, or the path of a JSON file: `{"cpu": {"device": "cpu", "max": 4}}`.
      A word instead of a type makes the name an alias: `{"ml.g5.2xlarge": "gpu"}`.
    - `default_instance_type`: what an `ml.*` name stands for that `instance_types` does not list;
      if it is empty, such a name is refused.
    """

    launcher: Literal["process", "docker", "nomad"] = "process"
    run: str = ""
    logs: str = ""
    installation: str = ""
    keep_workers: bool = True
    gpus: str = ""
    docker_url: str = "unix:///var/run/docker.sock"
    docker_network: str = ""
    nomad_addr: str = "http://127.0.0.1:4646"
    nomad_token: str = ""
    nomad_namespace: str = "default"
    s3_url: str
    s3_region: str = "us-east-1"
    s3_models_bucket: str = "darkroom-models"
    s3_jobs_bucket: str = "darkroom-jobs"
    worker_nats_url: str = ""
    worker_nats_user: str = "worker"
    worker_nats_password: str
    worker_s3_url: str = ""
    worker_s3_access_key: str
    worker_s3_secret_key: str
    worker_cache: str
    worker_command: str = "{python} -m services.inference.worker"
    worker_threads: int = 0
    cache_bytes: str = ""
    ram_bytes: str = ""
    gpu_bytes: str = ""
    job_seconds: str = ""
    jobs_in_hand: str = ""
    batch_rows: str = ""
    precision: str = ""
    preview_seconds: str = ""
    samples_format: str = ""
    compile: str = ""
    compile_mode: str = ""
    webui: WebuiSettings = WebuiSettings()
    worker_ready_within: float = 300.0
    worker_stop_within: float = 10.0
    worker_silent_within: float = 15.0
    drain_seconds: float = 120.0
    scale_out_after: float = 30.0
    scale_in_after: float = 300.0
    instance_types: str = ""
    default_instance_type: str = "cpu"

    def check_launcher(self) -> None:
        """Raises SystemExit that names what the chosen launcher lacks."""
        if self.launcher == "process":
            if not self.run:
                raise SystemExit("set DARKROOM_RUN: where the records of workers lie")
            return
        if not re.fullmatch("[a-z0-9-]{1,40}", self.installation):
            raise SystemExit(
                "set DARKROOM_INSTALLATION: a name of a-z, 0-9 and -, which no other installation "
                f"on the same {self.launcher} has"
            )
        for name, type in self.known_types().types.items():
            in_container = self.launcher == "docker" or type.nomad.driver == "docker"
            if in_container and not type.image:
                raise SystemExit(f"DARKROOM_INSTANCE_TYPES: {name} needs an image")
            if self.launcher == "nomad" and not type.memory:
                raise SystemExit(f"DARKROOM_INSTANCE_TYPES: {name} needs a memory, for Nomad")
            if self.launcher == "nomad" and type.share_gpus:
                raise SystemExit(f"DARKROOM_INSTANCE_TYPES: {name}: Nomad shares no GPUs")

    def run_folder(self) -> Path:
        return Path(self.run).absolute()

    def logs_folder(self) -> Path:
        return Path(self.logs).absolute() if self.logs else self.run_folder().parent / "logs"

    def known_gpus(self) -> list[str]:
        named = [name.strip() for name in self.gpus.split(",") if name.strip()]
        return named or visible_gpus()

    def program(self) -> Program:
        python = sys.executable if self.launcher == "process" else "python"
        return Program(
            command=[part.format(python=python) for part in shlex.split(self.worker_command)],
            environment=self._environment(),
            secrets={
                "DARKROOM_NATS_PASSWORD": self.worker_nats_password,
                "DARKROOM_S3_ACCESS_KEY": self.worker_s3_access_key,
                "DARKROOM_S3_SECRET_KEY": self.worker_s3_secret_key,
            },
            stop_within=max(self.drain_seconds, self.worker_stop_within),
        )

    def _environment(self) -> dict[str, str]:
        """What every worker is told, whatever its endpoint."""
        environment = {
            "DARKROOM_NATS_URL": self.worker_nats_url or self.nats_url,
            "DARKROOM_NATS_USER": self.worker_nats_user,
            "DARKROOM_S3_URL": self.worker_s3_url or self.s3_url,
            "DARKROOM_S3_REGION": self.s3_region,
            "DARKROOM_S3_MODELS_BUCKET": self.s3_models_bucket,
            "DARKROOM_S3_JOBS_BUCKET": self.s3_jobs_bucket,
            # In a container of its own a worker is reached by the container's address.
            "DARKROOM_HTTP_HOST": self.http_host if self.launcher == "process" else ANYWHERE,
            "DARKROOM_HTTP_PORT": "0",
            "DARKROOM_LOG_LEVEL": self.log_level,
            # Idle threads that spin steal the cores of whatever else runs on this machine.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.launcher == "process":
            environment["DARKROOM_CACHE"] = str(Path(self.worker_cache).absolute())
        for name in HANDED_ON:
            if value := getattr(self, name):
                environment[f"DARKROOM_{name.upper()}"] = str(value)
        for name, variable in variables(WebuiSettings).items():
            if (told := getattr(self.webui, name)) != getattr(WebuiSettings(), name):
                environment[variable] = self._styles() if name == "styles" else str(told)
        if self.worker_threads:
            environment["OMP_NUM_THREADS"] = str(self.worker_threads)
        return environment

    def _styles(self) -> str:
        """As a worker can read them, wherever it runs. Raises SystemExit that says what is wrong
        with DARKROOM_STYLES."""
        told = self.webui.styles
        table = msgspec.json.encode(check_styles(told)).decode()
        if len(table) <= MAX_STYLES:
            return table
        if self.launcher == "process" and not told.lstrip().startswith("{"):
            return str(Path(told).absolute())
        raise SystemExit(
            f"bad setting DARKROOM_STYLES: its styles have {len(table)} characters, a container's"
            f" environment has room for {MAX_STYLES}"
        )

    def known_types(self) -> InstanceTypes:
        """Raises SystemExit that names what is wrong with DARKROOM_INSTANCE_TYPES."""
        text = self.instance_types.strip()
        try:
            if text and not text.startswith("{"):
                text = Path(text).read_text()
            named = (
                msgspec.json.decode(text, type=dict[str, InstanceType | str]) if text else BUILT_IN
            )
        except (OSError, msgspec.MsgspecError) as error:
            raise SystemExit(f"bad setting DARKROOM_INSTANCE_TYPES: {error}") from None
        types, aliases = {}, {}
        for name, type in named.items():
            if isinstance(type, str):
                aliases[name] = type
            else:
                types[name] = type
        for name in {*aliases.values(), self.default_instance_type} - {*types, ""}:
            raise SystemExit(
                f"DARKROOM_INSTANCE_TYPES has no {name}, which an alias or "
                "DARKROOM_DEFAULT_INSTANCE_TYPE names; it has " + ", ".join(types)
            )
        return InstanceTypes(types=types, aliases=aliases, default=self.default_instance_type)
