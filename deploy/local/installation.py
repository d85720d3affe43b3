"""One installation: where its files lie, which ports it uses, and its secrets.

    .darkroom/            0700; state of this installation, `just reset` removes it
      local.env           what clients need: URL, API key, admin password
      settings.env        yours: DARKROOM_… settings for the services, one KEY=value a line
      ports.json          chosen once, moved only when somebody else has taken one
      secrets.json        every password and key, random per installation
      config/ data/ logs/ run/ cache/

Run as root, `.darkroom` and `data` are 0710 with a group of their own, so that Postgres, which
refuses root, reaches its data as an otherwise unused user id and nobody else gets in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import random
import secrets as random_secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
from argon2 import PasswordHasher

from shared.settings import ObjectSettings

REPOSITORY = Path(__file__).resolve().parents[2]

SERVICES = ("identity", "models", "endpoints", "inference")
ROLES = ("gateway", *SERVICES)
"""Who has a role and a schema of its own in Postgres."""

ROUTE_USER = "route"
"""As whom the servers of a NATS cluster know each other."""
NATS_USERS = (*ROLES, "worker", "subscriber", "admin", "sys", ROUTE_USER)
"""`route`: as whom the servers of a cluster know each other."""
S3_IDENTITIES = ("gateway", "models", "inference", "worker", "admin")
WEED_KEYS = (
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)

MODELS_BUCKET = "darkroom-models"
JOBS_BUCKET = "darkroom-jobs"

MAX_GATEWAYS = 4

PREFERRED_PORTS = {
    "gateway": 8600,
    "gateway-2": 8601,
    "gateway-3": 8602,
    "gateway-4": 8603,
    "gateway_metrics": 8620,
    "gateway-2_metrics": 8621,
    "gateway-3_metrics": 8622,
    "gateway-4_metrics": 8623,
    "identity": 8611,
    "models": 8612,
    "endpoints": 8613,
    "inference": 8614,
    "nats": 4222,
    "nats_monitor": 8222,
    "postgres": 54329,
    "s3": 8333,
    "s3_grpc": 8334,
    "weed_master": 8335,
    "weed_master_grpc": 8336,
    "weed_volume": 8337,
    "weed_volume_grpc": 8338,
    "weed_filer": 8339,
    "weed_filer_grpc": 8340,
    "weed_admin": 8341,
    "weed_admin_grpc": 8342,
}

RANDOM_PORTS = range(20_000, 32_000)
"""Below the range that systems take outgoing ports from, so that a port stays free while down."""

POSTGRES_UIDS = range(60_706, 61_184)
"""User ids that neither distributions nor systemd hand out."""

ELSEWHERE = Path("/var/lib/darkroom")
"""Where root keeps Postgres when the installation lies under a folder that only root can enter."""

PASSWORD_HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


class InstallationError(Exception):
    """This installation can't be used as it is; the message says what to do."""


class S3Key(msgspec.Struct):
    access_key: str
    secret_key: str


class Secrets(msgspec.Struct):
    api_key: str
    admin_password: str
    admin_password_hash: str
    token_secret: str
    nats: dict[str, str] = {}
    postgres: dict[str, str] = {}
    s3: dict[str, S3Key] = {}
    weed: dict[str, str] = {}

    @classmethod
    def generate(cls) -> Secrets:
        password = random_secrets.token_urlsafe(16)
        return cls(
            api_key=random_secrets.token_urlsafe(32),
            admin_password=password,
            admin_password_hash=PASSWORD_HASHER.hash(password),
            token_secret=random_secrets.token_hex(32),
        )

    def complete(self) -> None:
        """Adds what a newer version needs and an older one did not make."""
        for user in NATS_USERS:
            self.nats.setdefault(user, random_secrets.token_urlsafe(24))
        for role in ("postgres", *ROLES):
            self.postgres.setdefault(role, random_secrets.token_urlsafe(24))
        for identity in S3_IDENTITIES:
            key = S3Key(random_secrets.token_hex(10).upper(), random_secrets.token_urlsafe(30))
            self.s3.setdefault(identity, key)
        for name in WEED_KEYS:
            self.weed.setdefault(name, random_secrets.token_hex(32))


class Installation:
    """Use `Installation.open()`; it makes what is missing and never changes what is there."""

    def __init__(self, home: Path, ports: dict[str, int], secrets: Secrets) -> None:
        self.home = home
        self.ports = ports
        self.secrets = secrets

    @classmethod
    def open(cls, home: Path | None = None, *, random_ports: bool = False) -> Installation:
        """Makes the installation on first use. `random_ports` counts only then.

        Raises InstallationError if the folder belongs to somebody else."""
        home = (home or default_home()).absolute()
        _make_private_folder(home, 0o710 if is_root() else 0o700)
        _make_private_folder(home / "data", 0o710 if is_root() else 0o700)
        if is_root():
            _open_to_postgres(home)
        installation = cls(home, {}, load_secrets(home / "secrets.json"))
        for folder in ("config", "logs", "run", "run/workers", "cache"):
            _make_private_folder(home / folder)
        installation._load_ports(random_ports)
        installation.write_local_env()
        return installation

    @staticmethod
    def exists(home: Path | None = None) -> bool:
        return ((home or default_home()) / "secrets.json").exists()

    # Files

    @property
    def config(self) -> Path:
        return self.home / "config"

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def workers(self) -> Path:
        """Where the endpoints service keeps one `{"pid", "started"}` file per worker."""
        return self.run / "workers"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    # Addresses

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    @property
    def nats_url(self) -> str:
        return f"nats://127.0.0.1:{self.ports['nats']}"

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    def postgres_url(self, role: str, database: str = "darkroom") -> str:
        password = self.secrets.postgres[role]
        return f"postgresql://{role}:{password}@127.0.0.1:{self.ports['postgres']}/{database}"

    def nats_url_as(self, user: str) -> str:
        return self.nats_url.replace("nats://", f"nats://{user}:{self.secrets.nats[user]}@")

    def object_settings(self, identity: str) -> ObjectSettings:
        """Of one of the identities of the object store."""
        key = self.secrets.s3[identity]
        return ObjectSettings(
            s3_url=self.s3_url,
            s3_access_key=key.access_key,
            s3_secret_key=key.secret_key,
            s3_models_bucket=MODELS_BUCKET,
            s3_jobs_bucket=JOBS_BUCKET,
        )

    def client_environment(self) -> dict[str, str]:
        """What a client of this installation needs; also written to `local.env`."""
        return {
            "DARKROOM_URL": self.url,
            "DARKROOM_API_KEY": self.secrets.api_key,
            "DARKROOM_ADMIN_USER": "admin",
            "DARKROOM_ADMIN_PASSWORD": self.secrets.admin_password,
            "DARKROOM_NATS_URL": self.nats_url_as("subscriber"),
            "DARKROOM_S3_URL": self.s3_url,
        }

    def write_local_env(self) -> None:
        lines = (f"{name}={value}\n" for name, value in self.client_environment().items())
        write_private(self.home / "local.env", "".join(lines))

    # Ports

    def _load_ports(self, random_ports: bool) -> None:
        file = self.home / "ports.json"
        known: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
        self.ports = dict(known)
        for name, preferred in PREFERRED_PORTS.items():
            if name not in self.ports:
                self.ports[name] = self._choose_port(None if random_ports else preferred)
        if self.ports != known:
            self._save_ports()

    def _save_ports(self) -> None:
        write_private(self.home / "ports.json", json.dumps(self.ports, indent=1) + "\n")

    def _choose_port(self, preferred: int | None) -> int:
        taken = set(self.ports.values())
        if preferred and preferred not in taken and port_is_free(preferred):
            return preferred
        while True:
            port = random.choice(RANDOM_PORTS)
            if port not in taken and port_is_free(port):
                return port

    def move_taken_ports(self) -> dict[str, int]:
        """Chooses anew where somebody else listens by now. Only while nothing of ours runs."""
        moved = {}
        for name, port in self.ports.items():
            if not port_is_free(port):
                moved[name] = self._choose_port(None)
        if moved:
            self.ports.update(moved)
            self._save_ports()
            self.write_local_env()
        return moved

    # Postgres as an unprivileged user when we are root

    @property
    def postgres_uid(self) -> int | None:
        """The user (and group) id of Postgres; None when it runs as we do."""
        return self.home.stat().st_gid if is_root() else None

    @property
    def postgres_home(self) -> Path:
        """Where its data and, if need be, its binaries lie; `data/postgres` leads there."""
        link = self.data / "postgres"
        if link.exists():
            return link.resolve().parent
        uid = self.postgres_uid
        if uid is None or can_reach(self.data, uid):
            return self.data
        return ELSEWHERE / hashlib.sha256(str(self.home).encode()).hexdigest()[:16]

    # Removal

    def delete(self) -> None:
        """Removes everything, with the data. Stop the stack first."""
        elsewhere = self.postgres_home
        if elsewhere.parent == ELSEWHERE:
            shutil.rmtree(elsewhere, ignore_errors=True)
        shutil.rmtree(self.home)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """One `up`, `down` or `reset` of a home at a time; the others wait."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def default_home() -> Path:
    return Path(os.environ.get("DARKROOM_HOME") or REPOSITORY / ".darkroom")


def is_root() -> bool:
    return os.geteuid() == 0


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def can_reach(path: Path, uid: int) -> bool:
    """Whether a user whose group has the same id may pass through every folder down to `path`."""
    for folder in (path, *path.parents):
        status = folder.stat()
        if status.st_uid == uid:
            allowed = status.st_mode & 0o100
        elif status.st_gid == uid:
            allowed = status.st_mode & 0o010
        else:
            allowed = status.st_mode & 0o001
        if not allowed:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Readable by the owner only from its first byte on, and never half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def _make_private_folder(folder: Path, mode: int = 0o700) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        raise InstallationError(
            f"{folder} belongs to user id {owner} and you are {os.geteuid()}:"
            " run as its owner, or choose another place with DARKROOM_HOME"
        )
    folder.chmod(mode)


def _open_to_postgres(home: Path) -> None:
    """Gives the group of `.darkroom` and `data` to the user id that Postgres runs as."""
    if home.stat().st_gid not in POSTGRES_UIDS:
        os.chown(home, 0, _unused_uid())
    os.chown(home / "data", 0, home.stat().st_gid)


def load_secrets(file: Path) -> Secrets:
    if file.exists():
        known = file.read_bytes()
        secrets = msgspec.json.decode(known, type=Secrets)
    else:
        known = b""
        secrets = Secrets.generate()
    secrets.complete()
    text = msgspec.json.format(msgspec.json.encode(secrets), indent=1) + b"\n"
    if text != known:
        write_private(file, text.decode())
    return secrets


def _unused_uid() -> int:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return random_secrets.choice([uid for uid in POSTGRES_UIDS if uid not in taken])
