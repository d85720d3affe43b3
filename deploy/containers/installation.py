"""The secrets of an installation in containers, one file for each process that may know it.

    .darkroom-compose/    0700; what lies here is this installation's, and nowhere else
      local.env           what clients need: URL, API key, admin password
      secrets.json        every password and key: for provisioning, backup and restore only
      secrets/            what compose.yaml mounts: gateway.env, nats.conf, s3.json, …
      secrets/nomad/      the same as Nomad variables

The files below the folder can be read by everybody who gets there, which is the owner of the
folder and, of each file, the container that it is mounted into: those run as other users.

    python -m deploy.containers.installation FOLDER     # makes what is missing, safe to repeat
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from deploy.local.installation import ROLES, ROUTE_USER, Installation, Secrets, load_secrets
from deploy.local.processes import secrets_of
from deploy.local.servers import nats_settings, s3_configuration


class ContainerInstallation(Installation):
    """The same secrets under other addresses: those of `environ`, or of compose.yaml."""

    def __init__(
        self, home: Path, secrets: Secrets, environ: Mapping[str, str] = os.environ
    ) -> None:
        super().__init__(home, {}, secrets)
        self._environ = environ

    @classmethod
    def read(cls, file: Path) -> ContainerInstallation:
        """From a `secrets.json` that exists already."""
        return cls(file.parent, msgspec.json.decode(file.read_bytes(), type=Secrets))

    def _address(self, name: str, usual: str) -> str:
        return self._environ.get(name) or usual

    @property
    def url(self) -> str:
        return self._address("DARKROOM_URL", "http://127.0.0.1:8600")

    @property
    def nats_url(self) -> str:
        return self._address("DARKROOM_NATS_URL", "nats://nats:4222")

    @property
    def s3_url(self) -> str:
        return self._address("DARKROOM_S3_URL", "http://s3:8333")

    def postgres_url(self, role: str, database: str = "darkroom") -> str:
        where = self._address("DARKROOM_POSTGRES", "postgres:5432")
        return f"postgresql://{role}:{self.secrets.postgres[role]}@{where}/{database}"

    def client_environment(self) -> dict[str, str]:
        """As clients on the machine of the containers see it."""
        password = self.secrets.nats["subscriber"]
        nats = self._address("DARKROOM_NATS_PUBLIC", "127.0.0.1:4222")
        return {
            **super().client_environment(),
            "DARKROOM_NATS_URL": f"nats://subscriber:{password}@{nats}",
            "DARKROOM_S3_URL": self._address("DARKROOM_S3_PUBLIC_URL", "http://127.0.0.1:8333"),
        }

    def files(self) -> dict[str, str]:
        """What compose.yaml mounts, each into the one container that may read it."""
        found = {f"{process}.env": _env(secrets_of(self, process)) for process in ROLES}
        found["postgres_password"] = self.secrets.postgres["postgres"] + "\n"
        found["s3.json"] = s3_configuration(self.secrets)
        found["seaweedfs.toml"] = security_configuration(self.secrets)
        found["nats.conf"] = nats_configuration(self.secrets)
        found["nats-cluster.conf"] = nats_configuration(self.secrets) + cluster(self.secrets)
        return found

    def nomad_variables(self) -> dict[str, dict[str, object]]:
        """Files for `nomad var put`: each group may read its own."""
        found: dict[str, dict[str, object]] = {
            f"{process}.json": {
                "Path": f"nomad/jobs/darkroom/{process}",
                "Items": {"env": _env(secrets_of(self, process))},
            }
            for process in ROLES
        }
        installation = msgspec.json.encode(self.secrets).decode()
        found["provision.json"] = {
            "Path": "nomad/jobs/darkroom-provision",
            "Items": {"installation": installation},
        }
        return found


def nats_configuration(secrets: Secrets) -> str:
    return f"""# Written by `just compose-secrets`; changes made here are lost.
server_name: $NATS_NAME
port: 4222
http_port: 8222
{nats_settings(secrets, store="/data")}"""


def cluster(secrets: Secrets) -> str:
    """NATS adds each server's own password to the routes that it opens."""
    password = secrets.nats[ROUTE_USER]
    routes = "\n    ".join(
        f"nats://{ROUTE_USER}:{password}@{server}:6222" for server in ("nats", "nats-2", "nats-3")
    )
    return f"""
cluster {{
  name: darkroom
  port: 6222
  authorization {{ user: {ROUTE_USER}, password: "{password}" }}
  routes: [
    {routes}
  ]
}}
"""


def security_configuration(secrets: Secrets) -> str:
    """Without these keys anybody who reaches SeaweedFS' filer reads and writes every object."""
    keys = secrets.weed
    return f"""[jwt.signing]
key = "{keys["WEED_JWT_SIGNING_KEY"]}"
[jwt.signing.read]
key = "{keys["WEED_JWT_SIGNING_READ_KEY"]}"
[jwt.filer_signing]
key = "{keys["WEED_JWT_FILER_SIGNING_KEY"]}"
[jwt.filer_signing.read]
key = "{keys["WEED_JWT_FILER_SIGNING_READ_KEY"]}"
"""


def _env(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def install(home: Path) -> ContainerInstallation:
    """Makes what is missing, and writes anew what follows from the secrets and this version."""
    folder = home / "secrets"
    for made in (home, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)
    folder.chmod(0o755)
    (folder / "nomad").mkdir(mode=0o700, exist_ok=True)
    installation = ContainerInstallation(home, load_secrets(home / "secrets.json"))
    (home / "secrets.json").chmod(0o644)
    for name, text in installation.files().items():
        _write(folder / name, text)
    for name, variable in installation.nomad_variables().items():
        _write(folder / "nomad" / name, json.dumps(variable, indent=1) + "\n")
    _write(home / "local.env", _env(installation.client_environment()))
    return installation


def _write(file: Path, text: str) -> None:
    """In place: a container that has the file mounted would not see another one of its name."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    file.chmod(0o644)


if __name__ == "__main__":
    install(Path(sys.argv[1]).absolute())
