"""The processes of this project and the environment of each: the table to read first.

Each gets its own secrets and nobody else's. `Process` is also what `servers.py` describes NATS,
Postgres and SeaweedFS with; `supervisor.py` starts them all.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.installation import (
    JOBS_BUCKET,
    MAX_GATEWAYS,
    MODELS_BUCKET,
    REPOSITORY,
    ROLES,
    SERVICES,
    Installation,
)
from shared.settings import read_env_file, variables
from shared.webui.settings import WebuiSettings

PASS_THROUGH = (
    # all
    "DARKROOM_LOG_LEVEL",
    "DARKROOM_OTLP_URL",
    "DARKROOM_S3_PUBLIC_URL",
    "DARKROOM_S3_REGION",
    # gateway
    "DARKROOM_TOKEN_SECONDS",
    "DARKROOM_COMMAND_TIMEOUT",
    "DARKROOM_REALTIME_TIMEOUT",
    "DARKROOM_UPLOAD_CHECK_TIMEOUT",
    "DARKROOM_PRESIGN_SECONDS",
    "DARKROOM_UPLOAD_PRESIGN_SECONDS",
    "DARKROOM_MAX_BODY_BYTES",
    "DARKROOM_MAX_PARAMS_BYTES",
    "DARKROOM_ESD_COMPAT",
    "DARKROOM_ENDPOINT_PREFIX",
    "DARKROOM_CORS_ORIGIN",
    # models
    "DARKROOM_UPLOAD_EXPIRES_HOURS",
    "DARKROOM_DOWNLOAD_SCHEMES",
    "DARKROOM_DOWNLOAD_ALLOWED_HOSTS",
    "DARKROOM_DOWNLOAD_MAX_BYTES",
    "DARKROOM_DOWNLOADS_PARALLEL",
    "DARKROOM_DOWNLOAD_LEASE_SECONDS",
    "DARKROOM_CONVERT_PICKLES",
    "DARKROOM_SWEEP_SECONDS",
    # inference
    "DARKROOM_LEFTOVERS_SECONDS",
    # endpoints
    "DARKROOM_WORKER_COMMAND",
    "DARKROOM_WORKER_THREADS",
    "DARKROOM_WORKER_READY_WITHIN",
    "DARKROOM_WORKER_STOP_WITHIN",
    "DARKROOM_WORKER_SILENT_WITHIN",
    "DARKROOM_DRAIN_SECONDS",
    "DARKROOM_SCALE_OUT_AFTER",
    "DARKROOM_SCALE_IN_AFTER",
    "DARKROOM_LAUNCHER",
    "DARKROOM_GPUS",
    "DARKROOM_DOCKER_URL",
    "DARKROOM_DOCKER_NETWORK",
    "DARKROOM_NOMAD_ADDR",
    "DARKROOM_NOMAD_TOKEN",
    "DARKROOM_NOMAD_NAMESPACE",
    "DARKROOM_WORKER_NATS_URL",
    "DARKROOM_WORKER_S3_URL",
    "DARKROOM_INSTANCE_TYPES",
    "DARKROOM_DEFAULT_INSTANCE_TYPE",
    "DARKROOM_CACHE_BYTES",
    "DARKROOM_RAM_BYTES",
    "DARKROOM_GPU_BYTES",
    "DARKROOM_JOB_SECONDS",
    "DARKROOM_JOBS_IN_HAND",
    "DARKROOM_BATCH_ROWS",
    "DARKROOM_PRECISION",
    "DARKROOM_PREVIEW_SECONDS",
    "DARKROOM_SAMPLES_FORMAT",
    "DARKROOM_COMPILE",
    "DARKROOM_COMPILE_MODE",
    *variables(WebuiSettings).values(),
)
"""What `settings.env` or the shell of `just up` may set for the services; the shell wins."""

GATEWAYS = "DARKROOM_GATEWAYS"
"""How many gateways to run; read by the supervisor itself."""

KEPT = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
KEPT_PREFIXES = (
    "LC_",
    "SSL_CERT_",
    "CUDA_",
    "NVIDIA_",
    "ROCR_",
    "OMP_",
    "MKL_",
    "NUMBA_",
    "HF_",
    "OTEL_",
)
"""The rest of the shell's environment stays outside: PG…, AWS_… and proxies change behaviour."""


async def _nothing_to_prepare() -> None:
    pass


@dataclass(frozen=True)
class Process:
    """How to start one process, how to see that it is ready, and how to stop it."""

    name: str
    command: list[str]
    ready: Callable[[], Awaitable[bool]]
    url: str
    environment: Mapping[str, str] = field(repr=False)
    directory: Path = REPOSITORY
    prepare: Callable[[], Awaitable[None]] = _nothing_to_prepare
    user: int | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 20.0


def table(installation: Installation, settings: Mapping[str, str]) -> list[Process]:
    """Our own processes, in the order of their start."""
    gateways = gateway_names(settings)
    return [
        *(_describe(installation, name, name, settings) for name in SERVICES),
        *(_describe(installation, name, "gateway", settings) for name in gateways),
    ]


def gateway_names(settings: Mapping[str, str]) -> list[str]:
    wanted = settings.get(GATEWAYS) or "1"
    if not wanted.isdigit() or not 1 <= int(wanted) <= MAX_GATEWAYS:
        raise ValueError(f"{GATEWAYS} is {wanted}: say 1 to {MAX_GATEWAYS}")
    return ["gateway", *(f"gateway-{n}" for n in range(2, int(wanted) + 1))]


def read_settings(
    installation: Installation, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The settings in force: `settings.env`, overridden by what the shell exports."""
    file = installation.home / "settings.env"
    found = {**(read_env_file(file) if file.exists() else {}), **environ}
    return {name: found[name] for name in (*PASS_THROUGH, GATEWAYS) if name in found}


def base_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or name.startswith(KEPT_PREFIXES)
    }


def _describe(
    installation: Installation, name: str, module: str, settings: Mapping[str, str]
) -> Process:
    port = installation.ports[name]
    url = f"http://127.0.0.1:{port}"

    async def ready() -> bool:
        return await http_status(port, "/readyz") == 200

    return Process(
        name=name,
        command=[sys.executable, "-m", f"services.{module}"],
        ready=ready,
        url=url,
        environment={
            **base_environment(),
            "PYTHONUNBUFFERED": "1",
            **{key: value for key, value in settings.items() if key in PASS_THROUGH},
            **_environment(installation, module),
            **_metrics_port(installation, name, module),
            **_containers(installation, module, settings),
            "DARKROOM_HTTP_HOST": "127.0.0.1",
            "DARKROOM_HTTP_PORT": str(port),
        },
    )


def _metrics_port(installation: Installation, name: str, module: str) -> dict[str, str]:
    """The others show what they count on the port of their health."""
    if module != "gateway":
        return {}
    return {"DARKROOM_METRICS_PORT": str(installation.ports[f"{name}_metrics"])}


def _environment(installation: Installation, module: str) -> dict[str, str]:
    environment = {"DARKROOM_NATS_URL": installation.nats_url, **secrets_of(installation, module)}
    if module != "identity":
        environment["DARKROOM_S3_URL"] = installation.s3_url
        environment["DARKROOM_S3_MODELS_BUCKET"] = MODELS_BUCKET
        environment["DARKROOM_S3_JOBS_BUCKET"] = JOBS_BUCKET
    if module == "endpoints":
        environment["DARKROOM_WORKER_CACHE"] = str(installation.cache)
        environment["DARKROOM_RUN"] = str(installation.run)
        environment["DARKROOM_LOGS"] = str(installation.logs)
    return environment


def secrets_of(installation: Installation, module: str) -> dict[str, str]:
    """What one kind of process must know and nobody else may."""
    secrets = installation.secrets
    known = {"DARKROOM_NATS_USER": module, "DARKROOM_NATS_PASSWORD": secrets.nats[module]}
    if module in ROLES:
        known["DARKROOM_POSTGRES_URL"] = installation.postgres_url(module)
    if module in secrets.s3:
        known["DARKROOM_S3_ACCESS_KEY"] = secrets.s3[module].access_key
        known["DARKROOM_S3_SECRET_KEY"] = secrets.s3[module].secret_key
    if module == "gateway":
        digest = hashlib.sha256(secrets.api_key.encode()).hexdigest()
        known["DARKROOM_API_KEY_SHA256"] = digest
        known["DARKROOM_TOKEN_SECRET"] = secrets.token_secret
    if module == "identity":
        known["DARKROOM_ADMIN_USER"] = "admin"
        known["DARKROOM_ADMIN_PASSWORD_HASH"] = secrets.admin_password_hash
    if module == "endpoints":  # which starts the workers and gives them these
        known["DARKROOM_WORKER_NATS_USER"] = "worker"
        known["DARKROOM_WORKER_NATS_PASSWORD"] = secrets.nats["worker"]
        known["DARKROOM_WORKER_S3_ACCESS_KEY"] = secrets.s3["worker"].access_key
        known["DARKROOM_WORKER_S3_SECRET_KEY"] = secrets.s3["worker"].secret_key
    return known


def _containers(
    installation: Installation, module: str, settings: Mapping[str, str]
) -> dict[str, str]:
    """Workers that are no processes go with this installation all the same, and keep what they
    fetch in a volume: they are other users than its folder has."""
    if module != "endpoints" or settings.get("DARKROOM_LAUNCHER", "process") == "process":
        return {}
    digest = hashlib.sha256(str(installation.home).encode()).hexdigest()
    return {
        "DARKROOM_INSTALLATION": f"local-{digest[:12]}",
        "DARKROOM_KEEP_WORKERS": "false",
        "DARKROOM_WORKER_CACHE": "darkroom-cache",
    }


async def http_status(port: int, path: str, timeout: float = 3.0) -> int | None:
    """The status of a GET on loopback, None if nobody answers."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(
                    f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                status_line = await reader.readline()
            finally:
                writer.close()
        return int(status_line.split()[1])
    except (OSError, TimeoutError, IndexError, ValueError):
        return None
