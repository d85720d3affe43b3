"""Settings come from the environment, once, at start: `DARKROOM_NAME`, or `DARKROOM_NAME_FILE` for
a file that holds the value, or a `DARKROOM_NAME=value` line in the file that `DARKROOM_SECRETS`
names (container secrets). The first of these that is there counts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

PREFIX = "DARKROOM_"
SECRETS = "DARKROOM_SECRETS"


class BusSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`nats_url`: of one server, or of several of a cluster, separated by commas. `otlp_url`: where
    traces go, such as http://tempo:4318; there are none without it."""

    nats_url: str
    nats_user: str
    nats_password: str
    http_host: str = "127.0.0.1"
    http_port: int = 0
    log_level: str = "info"
    otlp_url: str = ""

    @property
    def nats_servers(self) -> list[str]:
        return [url.strip() for url in self.nats_url.split(",")]


class ServiceSettings(BusSettings, frozen=True, kw_only=True):
    postgres_url: str


class ObjectSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`s3_public_url` is what presigned URLs carry, where clients reach S3 by another address."""

    s3_url: str
    s3_access_key: str
    s3_secret_key: str
    s3_public_url: str = ""
    s3_models_bucket: str = "darkroom-models"
    s3_jobs_bucket: str = "darkroom-jobs"
    s3_region: str = "us-east-1"


def variables(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The names of fields, those of structs within it included -> their variables."""
    found: dict[str, str] = {}
    for field in msgspec.structs.fields(struct):
        if _is_struct(field.type):
            found |= variables(field.type)
        else:
            found[field.name] = PREFIX + field.name.upper()
    return found


def load(struct: type[T], environ: Mapping[str, str] = os.environ) -> T:
    """Reads every field of `struct`, and those of structs within it. Raises SystemExit that names
    what is missing or wrong."""
    values: dict[str, Any] = {}
    secrets = read_env_file(Path(environ[SECRETS])) if SECRETS in environ else {}
    for field in msgspec.structs.fields(struct):
        name = PREFIX + field.name.upper()
        if _is_struct(field.type):
            values[field.name] = load(field.type, environ)
        elif name in environ:
            values[field.name] = environ[name]
        elif name + "_FILE" in environ:
            values[field.name] = Path(environ[name + "_FILE"]).read_text().strip()
        elif name in secrets:
            values[field.name] = secrets[name]
        elif field.required:
            raise SystemExit(f"set {name} (or {name}_FILE)")
    try:
        return msgspec.convert(values, struct, strict=False)
    except msgspec.ValidationError as error:
        raise SystemExit(f"bad setting: {error}") from None


def _is_struct(type_: object) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def read_env_file(path: Path) -> dict[str, str]:
    """`KEY=value` lines; blank lines and # comments are skipped, quotes around values removed."""
    values = {}
    for line in path.read_text().splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and not name.startswith("#"):
            values[name.strip()] = value.strip().strip("'\"")
    return values
