from __future__ import annotations

import shlex
import sys
from pathlib import Path

import msgspec

from services.endpoints.domain import InstanceType, InstanceTypes
from shared.settings import ServiceSettings

BUILT_IN = {
    "cpu": InstanceType(device="cpu", max=4),
    "gpu": InstanceType(device="cuda", max=8),
}


HANDED_ON = (
    "otlp_url",
    "cache_bytes",
    "job_seconds",
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

    - `run`: where the records of living workers lie; it belongs to one endpoints service.
    - `logs`: where workers write, `logs` beside `run` by default.
    - `worker_command`: `{python}` is this interpreter.
    - `worker_threads`: OMP_NUM_THREADS of a worker; 0 leaves it as it is here.
    - those in HANDED_ON: for the workers, which say what they mean and have the defaults.
    - `worker_ready_within`, `worker_stop_within`: seconds until a worker that is not ready, or not
      gone, is killed.
    - `instance_types`: JSON, or the path of a JSON file: `{"cpu": {"device": "cpu", "max": 4}}`.
    - `default_instance_type`: what an `ml.*` name stands for that `instance_types` does not list.
    """

    run: str
    logs: str = ""
    s3_url: str
    s3_region: str = "us-east-1"
    s3_models_bucket: str = "darkroom-models"
    s3_jobs_bucket: str = "darkroom-jobs"
    worker_nats_user: str = "worker"
    worker_nats_password: str
    worker_s3_access_key: str
    worker_s3_secret_key: str
    worker_cache: str
    worker_command: str = "{python} -m services.inference.worker"
    worker_threads: int = 0
    cache_bytes: str = ""
    job_seconds: str = ""
    jobs_in_hand: str = ""
    batch_rows: str = ""
    precision: str = ""
    preview_seconds: str = ""
    samples_format: str = ""
    compile: str = ""
    compile_mode: str = ""
    worker_ready_within: float = 300.0
    worker_stop_within: float = 10.0
    instance_types: str = ""
    default_instance_type: str = "cpu"

    def run_folder(self) -> Path:
        return Path(self.run).absolute()

    def logs_folder(self) -> Path:
        return Path(self.logs).absolute() if self.logs else self.run_folder().parent / "logs"

    def worker_program(self) -> list[str]:
        return [part.format(python=sys.executable) for part in shlex.split(self.worker_command)]

    def worker_environment(self) -> dict[str, str]:
        """What every worker is told, whatever its endpoint."""
        environment = {
            "DARKROOM_NATS_URL": self.nats_url,
            "DARKROOM_NATS_USER": self.worker_nats_user,
            "DARKROOM_NATS_PASSWORD": self.worker_nats_password,
            "DARKROOM_S3_URL": self.s3_url,
            "DARKROOM_S3_REGION": self.s3_region,
            "DARKROOM_S3_ACCESS_KEY": self.worker_s3_access_key,
            "DARKROOM_S3_SECRET_KEY": self.worker_s3_secret_key,
            "DARKROOM_S3_MODELS_BUCKET": self.s3_models_bucket,
            "DARKROOM_S3_JOBS_BUCKET": self.s3_jobs_bucket,
            "DARKROOM_CACHE": str(Path(self.worker_cache).absolute()),
            "DARKROOM_HTTP_PORT": "0",
            "DARKROOM_LOG_LEVEL": self.log_level,
            # Idle threads that spin steal the cores of whatever else runs on this machine.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        for name in HANDED_ON:
            if value := getattr(self, name):
                environment[f"DARKROOM_{name.upper()}"] = value
        if self.worker_threads:
            environment["OMP_NUM_THREADS"] = str(self.worker_threads)
        return environment

    def known_types(self) -> InstanceTypes:
        """Raises SystemExit that names what is wrong with DARKROOM_INSTANCE_TYPES."""
        text = self.instance_types.strip()
        try:
            if text and not text.startswith("{"):
                text = Path(text).read_text()
            types = msgspec.json.decode(text, type=dict[str, InstanceType]) if text else BUILT_IN
        except (OSError, msgspec.MsgspecError) as error:
            raise SystemExit(f"bad setting DARKROOM_INSTANCE_TYPES: {error}") from None
        if self.default_instance_type not in types:
            raise SystemExit(
                f"DARKROOM_DEFAULT_INSTANCE_TYPE={self.default_instance_type} is none of: "
                + ", ".join(types)
            )
        return InstanceTypes(types=types, default=self.default_instance_type)
