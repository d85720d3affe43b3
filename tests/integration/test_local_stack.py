"""The embedded stack as its owner meets it: private, healing, repeatable, and gone after `down`.

Real NATS, Postgres and SeaweedFS, in homes of their own and on random ports. The services are not
started here; the end-to-end tests do that.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import botocore.session
import httpx
import msgspec
import nats
import nats.errors
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from nats.aio.client import Client
from nats.js.api import StreamConfig
from nats.js.errors import NotFoundError

from deploy.local import processes, provision, supervisor
from deploy.local.installation import (
    ELSEWHERE,
    JOBS_BUCKET,
    MODELS_BUCKET,
    NATS_USERS,
    PREFERRED_PORTS,
    REPOSITORY,
    ROLES,
    Installation,
    InstallationError,
    is_root,
)
from deploy.local.stack import Stack, StackError
from shared.contracts.subjects import (
    COMMANDS,
    EVENTS,
    PERMISSIONS,
    STREAMS,
    job_events_subject,
)

SERVERS = ("nats", "postgres", "seaweedfs")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Unlike pytest's own, one that Postgres can enter when the tests run as root."""
    with tempfile.TemporaryDirectory(prefix="darkroom-stack-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack.temporary(services=False) as running:
        yield running


def alive(installation: Installation) -> list[str]:
    """Command lines of processes that belong to an installation."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            home = str(installation.home)
            # Postgres' children name themselves, and their postmaster names its folder.
            if process.pid != os.getpid() and (
                home in line or process.environ().get("DARKROOM_HOME") == home
            ):
                found.append(line)
    return found


# What lies on disk


def test_everything_secret_is_private_and_differs_per_installation(folder: Path) -> None:
    one = Installation.open(folder / "one", random_ports=True)
    two = Installation.open(folder / "two", random_ports=True)
    for file in ("secrets.json", "local.env", "ports.json"):
        assert (one.home / file).stat().st_mode & 0o777 == 0o600
    for place in (one.config, one.logs, one.run, one.workers, one.cache):
        assert place.stat().st_mode & 0o777 == 0o700
    # Root lets the group of Postgres pass through, and nobody is in that group.
    assert one.home.stat().st_mode & 0o777 == (0o710 if is_root() else 0o700)
    values = [set(_leaves(msgspec.to_builtins(i.secrets))) for i in (one, two)]
    assert len(values[0]) == len(list(_leaves(msgspec.to_builtins(one.secrets))))
    assert not values[0] & values[1]


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    else:
        yield tree


def test_an_installation_stays_the_same_when_it_is_opened_again(folder: Path) -> None:
    first = Installation.open(folder / "home", random_ports=True)
    second = Installation.open(folder / "home")
    assert (second.secrets, second.ports) == (first.secrets, first.ports)
    assert second.client_environment() == first.client_environment()


def test_secrets_that_a_newer_version_needs_are_added(folder: Path) -> None:
    first = Installation.open(folder / "home", random_ports=True)
    file = first.home / "secrets.json"
    older = json.loads(file.read_text())
    del older["nats"]["worker"]
    file.write_text(json.dumps(older))
    second = Installation.open(first.home)
    assert second.secrets.nats["worker"] != first.secrets.nats["worker"]
    assert second.secrets.nats["models"] == first.secrets.nats["models"]


def test_a_usual_port_that_is_taken_is_not_chosen(folder: Path) -> None:
    with socket.socket() as other:
        # Somebody may be listening there already, which serves as well.
        with suppress(OSError):
            other.bind(("127.0.0.1", PREFERRED_PORTS["weed_admin"]))
            other.listen()
        installation = Installation.open(folder / "home")
    assert installation.ports["weed_admin"] != PREFERRED_PORTS["weed_admin"]
    assert len(set(installation.ports.values())) == len(installation.ports)


# Who knows what


def test_each_process_gets_its_own_secrets_only(folder: Path) -> None:
    installation = Installation.open(folder / "home", random_ports=True)
    secrets = installation.secrets
    owners: dict[str, set[str]] = {
        secrets.api_key: set(),
        secrets.admin_password: set(),
        secrets.admin_password_hash: {"identity"},
        secrets.token_secret: {"gateway"},
        secrets.nats["worker"]: {"endpoints"},
        secrets.s3["worker"].secret_key: {"endpoints"},
        **{secrets.nats[user]: {user} for user in (*ROLES, "admin", "sys", "subscriber")},
        **{password: {role} for role, password in secrets.postgres.items()},
        **{secrets.s3[name].secret_key: {name} for name in ("gateway", "models", "inference")},
        secrets.s3["admin"].secret_key: set(),
        **{key: set() for key in secrets.weed.values()},
    }
    for process in processes.table(installation, {}):
        for secret, allowed in owners.items():
            knows = any(secret in value for value in process.environment.values())
            assert knows == (process.name in allowed), (process.name, sorted(process.environment))


def test_settings_reach_the_services_and_the_shell_wins(folder: Path) -> None:
    installation = Installation.open(folder / "home", random_ports=True)
    (installation.home / "settings.env").write_text(
        "# mine\nDARKROOM_ESD_COMPAT=true\nDARKROOM_LOG_LEVEL='debug'\nDARKROOM_TOKEN_SECRET=x\n"
    )
    settings = processes.read_settings(installation, {"DARKROOM_LOG_LEVEL": "warning"})
    gateway = processes.table(installation, settings)[-1].environment
    assert gateway["DARKROOM_ESD_COMPAT"] == "true"
    assert gateway["DARKROOM_LOG_LEVEL"] == "warning"
    assert gateway["DARKROOM_TOKEN_SECRET"] == installation.secrets.token_secret


def test_several_gateways_have_ports_of_their_own(folder: Path) -> None:
    installation = Installation.open(folder / "home", random_ports=True)
    described = processes.table(installation, {processes.GATEWAYS: "2"})
    assert [process.name for process in described[-2:]] == ["gateway", "gateway-2"]
    assert described[-1].url != described[-2].url
    with pytest.raises(ValueError, match="1 to 4"):
        processes.gateway_names({processes.GATEWAYS: "nine"})


# NATS


@asynccontextmanager
async def nats_as(stack: Stack, user: str, errors: list[str]) -> AsyncIterator[Client]:
    async def collect(error: Exception) -> None:
        errors.append(str(error).lower())

    client = await nats.connect(
        stack.installation.nats_url,
        user=user,
        password=stack.installation.secrets.nats[user],
        inbox_prefix=f"_INBOX_{user}".encode(),
        allow_reconnect=False,
        error_cb=collect,
    )
    try:
        yield client
    finally:
        await client.close()


async def denials(
    stack: Stack, user: str, *, publish: str | None = None, read: str | None = None
) -> list[str]:
    """The permission errors that one publish or one subscription of this user earns."""
    errors: list[str] = []
    async with nats_as(stack, user, errors) as client:
        if publish:
            await client.publish(publish, b"{}")
        if read:
            await client.subscribe(read)
        await client.flush()
        await asyncio.sleep(0.05)
    return [error for error in errors if "permissions violation" in error]


def test_every_user_of_the_contracts_has_a_password() -> None:
    assert set(PERMISSIONS) | {"admin", "sys", "route"} == set(NATS_USERS)


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("models", "evt.identity.user.somebody"),
        ("models", "cmd.identity.create_user.v1"),
        ("gateway", "evt.models.checkpoint.1"),
        ("worker", "cmd.identity.create_user.v1"),
        ("worker", f"$JS.API.STREAM.DELETE.{EVENTS}"),
        ("worker", "evt.inference.job.1"),
        ("worker", f"$JS.API.DIRECT.GET.{EVENTS}"),
        ("worker", f"$JS.API.DIRECT.GET.{EVENTS}.evt.identity.credential.somebody"),
        ("worker", f"$JS.API.DIRECT.GET.{EVENTS}.evt.models.checkpoint.1"),
        ("worker", f"$JS.API.DIRECT.GET.{EVENTS}.>"),
        ("worker", f"$JS.API.STREAM.MSG.GET.{EVENTS}"),
        ("subscriber", "evt.inference.job.1"),
        ("subscriber", f"$JS.API.STREAM.PURGE.{EVENTS}"),
        ("inference", f"$JS.API.CONSUMER.MSG.NEXT.{COMMANDS}.models"),
        ("endpoints", "$SYS.REQ.SERVER.PING"),
    ],
)
async def test_a_user_can_not_publish_what_belongs_to_others(
    stack: Stack, user: str, subject: str
) -> None:
    assert await denials(stack, user, publish=subject)


@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("models", "_INBOX_gateway.>"),
        ("models", "cmd.>"),
        ("worker", "evt.>"),
        ("worker", "evt.*.*.*"),
        ("worker", "evt.identity.credential.*"),
        ("worker", "evt.inference.outcome.*"),
        ("subscriber", "evt.identity.>"),
        ("subscriber", "_INBOX.>"),
        ("identity", ">"),
    ],
)
async def test_a_user_can_not_read_what_belongs_to_others(
    stack: Stack, user: str, subject: str
) -> None:
    assert await denials(stack, user, read=subject)


async def test_a_user_may_do_its_own_work(stack: Stack) -> None:
    assert not await denials(stack, "models", publish="evt.models.checkpoint.1")
    assert not await denials(stack, "subscriber", read="evt.inference.job.*")
    assert not await denials(stack, "worker", publish="progress.1")


async def test_a_worker_learns_how_its_job_is_and_of_nothing_else(stack: Stack) -> None:
    """The last event of a job, and those that come."""
    errors: list[str] = []
    job, credential = job_events_subject("1"), "evt.identity.credential.somebody"
    async with nats_as(stack, "admin", errors) as admin, nats_as(stack, "worker", errors) as worker:
        for subject in (job, credential):
            await admin.jetstream().publish(subject, b"before")
        js = worker.jetstream()
        assert (await js.get_last_msg(EVENTS, job, direct=True)).data == b"before"
        with pytest.raises(NotFoundError):
            await js.get_last_msg(EVENTS, job_events_subject("2"), direct=True)
        heard = await worker.subscribe(job)
        await worker.flush()
        for subject in (job, credential):
            await admin.jetstream().publish(subject, b"after")
        assert (await heard.next_msg(2)).data == b"after"
        last = f"$JS.API.DIRECT.GET.{EVENTS}.{job}"
        for wish in ({"last_by_subj": credential}, {"seq": 2}, {"next_by_subj": "evt.>"}):
            answer = await worker.request(last, json.dumps(wish).encode())
            assert answer.headers
            assert answer.headers["Status"] == "408", "its body may not say more than its subject"
    assert not errors


@pytest.mark.parametrize("password", ["", "wrong"])
async def test_nats_lets_nobody_in_without_the_password(stack: Stack, password: str) -> None:
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        await nats.connect(
            stack.installation.nats_url,
            user="models",
            password=password,
            allow_reconnect=False,
            error_cb=_ignore,
        )


async def _ignore(_: Exception) -> None:
    pass


# Postgres


@asynccontextmanager
async def postgres_as(
    stack: Stack, role: str, database: str = "darkroom"
) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(stack.installation.postgres_url(role, database))
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM identity.migrations",
        "CREATE TABLE identity.mine (a int)",
        "DROP SCHEMA identity CASCADE",
        "CREATE TABLE public.mine (a int)",
        "CREATE SCHEMA mine",
        "CREATE ROLE mine",
        "SELECT rolpassword FROM pg_authid",
        "SET ROLE identity",
    ],
)
async def test_a_role_has_no_access_beyond_its_schema(stack: Stack, statement: str) -> None:
    async with postgres_as(stack, "models") as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


@pytest.mark.parametrize("database", ["postgres", "template1"])
async def test_a_role_can_not_enter_another_database(stack: Stack, database: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with postgres_as(stack, "models", database):
            pass


async def test_a_role_owns_the_schema_of_its_name(stack: Stack) -> None:
    for role in ROLES:
        async with postgres_as(stack, role) as connection:
            assert await connection.fetchval("SELECT current_schema()") == role
            await connection.execute("CREATE TABLE own (a int); DROP TABLE own")


async def test_postgres_lets_nobody_in_without_the_password(stack: Stack) -> None:
    url = f"postgresql://postgres:wrong@127.0.0.1:{stack.installation.ports['postgres']}/darkroom"
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url)


@pytest.mark.skipif(not is_root(), reason="only root runs Postgres as somebody else")
def test_postgres_runs_as_a_user_that_nobody_else_is(stack: Stack) -> None:
    uid = psutil.Process(stack.pid("postgres")).uids().effective
    assert uid != 0
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)


# S3


def s3_as(stack: Stack, identity: str) -> Any:
    key = stack.installation.secrets.s3[identity]
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=stack.installation.s3_url,
        aws_access_key_id=key.access_key,
        aws_secret_access_key=key.secret_key,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"max_attempts": 1},
        ),
    )


@pytest.fixture(scope="module")
def objects(stack: Stack) -> None:
    """One object in each bucket."""
    admin = s3_as(stack, "admin")
    for bucket in (MODELS_BUCKET, JOBS_BUCKET):
        admin.put_object(Bucket=bucket, Key="there", Body=b"bytes")


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize(
    ("identity", "call", "arguments"),
    [
        ("worker", "put_object", {"Bucket": MODELS_BUCKET, "Key": "new", "Body": b""}),
        ("worker", "delete_object", {"Bucket": MODELS_BUCKET, "Key": "there"}),
        ("worker", "create_multipart_upload", {"Bucket": MODELS_BUCKET, "Key": "new"}),
        ("worker", "list_objects_v2", {"Bucket": JOBS_BUCKET}),
        ("inference", "get_object", {"Bucket": MODELS_BUCKET, "Key": "there"}),
        ("models", "get_object", {"Bucket": JOBS_BUCKET, "Key": "there"}),
        ("gateway", "get_object", {"Bucket": MODELS_BUCKET, "Key": "there"}),
        ("gateway", "list_objects_v2", {"Bucket": MODELS_BUCKET}),
        ("models", "create_bucket", {"Bucket": "models-own"}),
        ("models", "delete_bucket", {"Bucket": MODELS_BUCKET}),
    ],
)
def test_a_key_can_not_do_more_than_its_work(
    stack: Stack, identity: str, call: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ClientError) as caught:
        getattr(s3_as(stack, identity), call)(**arguments)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


@pytest.mark.usefixtures("objects")
def test_a_key_can_do_its_work(stack: Stack) -> None:
    worker, gateway, models = (s3_as(stack, who) for who in ("worker", "gateway", "models"))
    assert worker.get_object(Bucket=MODELS_BUCKET, Key="there")["Body"].read() == b"bytes"
    worker.put_object(Bucket=JOBS_BUCKET, Key="picture", Body=b"pixels")
    upload = models.create_multipart_upload(Bucket=MODELS_BUCKET, Key="big")["UploadId"]
    where = {"Bucket": MODELS_BUCKET, "Key": "big", "UploadId": upload}
    url = gateway.generate_presigned_url("upload_part", {**where, "PartNumber": 1}, ExpiresIn=60)
    sent = httpx.put(url, content=b"part")
    assert sent.status_code == 200
    parts = [{"PartNumber": 1, "ETag": sent.headers["etag"]}]
    models.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert models.head_object(Bucket=MODELS_BUCKET, Key="big")["ContentLength"] == 4
    models.delete_object(Bucket=MODELS_BUCKET, Key="big")


@pytest.mark.usefixtures("objects")
def test_nobody_reads_or_writes_objects_without_a_key(stack: Stack) -> None:
    url = f"{stack.installation.s3_url}/{MODELS_BUCKET}"
    assert httpx.get(f"{url}/there").status_code == 403
    assert httpx.put(f"{url}/new", content=b"").status_code == 403
    assert httpx.get(url).status_code == 403
    filer = f"http://127.0.0.1:{stack.installation.ports['weed_filer']}/buckets/{MODELS_BUCKET}"
    assert httpx.get(f"{filer}/there").status_code == 401
    assert httpx.put(f"{filer}/new", content=b"").status_code == 401


@pytest.mark.usefixtures("objects")
def test_a_browser_may_read_the_etag_of_a_part(stack: Stack) -> None:
    url = s3_as(stack, "gateway").generate_presigned_url(
        "put_object", {"Bucket": MODELS_BUCKET, "Key": "part"}, ExpiresIn=60
    )
    origin = {"Origin": "https://console.example"}
    asked = httpx.options(url, headers={**origin, "Access-Control-Request-Method": "PUT"})
    assert asked.status_code in (200, 204)
    sent = httpx.put(url, content=b"part", headers=origin)
    assert sent.headers["access-control-allow-origin"]
    assert "etag" in sent.headers["access-control-expose-headers"].lower()


# Provisioning


async def test_provisioning_again_changes_nothing(stack: Stack) -> None:
    await provision.provision(stack.installation)
    await provision.provision(stack.installation)


async def test_a_changed_stream_is_updated_and_keeps_its_messages(stack: Stack) -> None:
    old = StreamConfig(name="TRIAL", subjects=["trial.>"], max_age=60)
    await provision.provision_nats(stack.installation, [old], [])
    errors: list[str] = []
    async with nats_as(stack, "admin", errors) as client:
        jetstream = client.jetstream()
        await jetstream.publish("trial.one", b"kept")
        new = StreamConfig(name="TRIAL", subjects=["trial.>", "more.>"], max_age=120)
        await provision.provision_nats(stack.installation, [new], [])
        info = await jetstream.stream_info("TRIAL")
        assert (info.config.max_age, info.state.messages) == (120, 1)
        assert {config.name for config in STREAMS} <= {
            stream.config.name for stream in await jetstream.streams_info()
        }
        await jetstream.delete_stream("TRIAL")


# Up, down and what goes wrong


def test_up_again_is_quick_and_starts_nothing(stack: Stack) -> None:
    before = {name: stack.pid(name) for name in SERVERS}
    begun = time.monotonic()
    stack.up()
    assert time.monotonic() - begun < 2
    assert {name: stack.pid(name) for name in SERVERS} == before


@pytest.mark.parametrize("name", SERVERS)
def test_a_killed_server_is_started_again(stack: Stack, name: str) -> None:
    stack.wait_ready(name)
    old = stack.kill(name)
    assert stack.wait_ready(name, other_than=old, timeout=30) != old
    assert stack.health()[name]


async def test_what_was_stored_survives_kills_a_restart_and_new_ports() -> None:
    with Stack.temporary(services=False) as stack:
        async with postgres_as(stack, "models") as connection:
            await connection.execute("CREATE TABLE kept (a int); INSERT INTO kept VALUES (7)")
        errors: list[str] = []
        async with nats_as(stack, "identity", errors) as client:
            await client.jetstream().publish("evt.identity.user.kept", b"{}")
        s3_as(stack, "models").put_object(Bucket=MODELS_BUCKET, Key="kept", Body=b"7")
        for name in SERVERS:
            stack.kill(name)
        stack.down()
        assert not alive(stack.installation)
        ports = stack.installation.ports.values()
        # As if other programs had taken every one of them meanwhile.
        taken = [socket.create_server(("127.0.0.1", port)) for port in ports]
        try:
            stack.up()
        finally:
            for listener in taken:
                listener.close()
        async with postgres_as(stack, "models") as connection:
            assert await connection.fetchval("SELECT a FROM kept") == 7
        async with nats_as(stack, "admin", errors) as client:
            message = await client.jetstream().get_last_msg(EVENTS, "evt.identity.user.kept")
            assert message.data == b"{}"
        found = s3_as(stack, "models").get_object(Bucket=MODELS_BUCKET, Key="kept")
        assert found["Body"].read() == b"7"


def test_two_ups_at_once_start_one_stack(folder: Path) -> None:
    home = folder / "home"
    Installation.open(home, random_ports=True)
    command = [sys.executable, "-m", "deploy.local", "up", "--servers-only"]
    environment = {**os.environ, "DARKROOM_HOME": str(home)}
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    stack = Stack(home, services=False)
    try:
        tables = [process.communicate(timeout=120)[0].decode() for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert all(str(stack.pid("nats")) in table for table in tables)
        lines = stack.installation.log("supervisor").read_text().splitlines()
        assert len([line for line in lines if line.endswith("starts")]) == 1
        asked = [sys.executable, "-m", "deploy.local", "status"]
        shown = subprocess.run(asked, cwd=REPOSITORY, env=environment, capture_output=True)
        assert shown.returncode == 0
    finally:
        stack.delete()
    assert not home.exists()


def test_down_leaves_no_process_and_spares_those_of_others(folder: Path) -> None:
    stack = Stack(folder / "home", services=False, random_ports=True)
    stranger = subprocess.Popen(["sleep", "300"], start_new_session=True)
    worker = subprocess.Popen(["sleep", "300"], start_new_session=True)
    threading.Thread(target=worker.wait, daemon=True).start()  # no zombie that looks alive
    try:
        # As if the machine had crashed, and the old process ids were now somebody else's.
        supervisor.lock_file(stack.installation).write_text(f"{stranger.pid} 1.0")
        state = supervisor.State("ready", services=False)
        state.processes["nats"] = supervisor.ProcessState(stranger.pid, started=1.0)
        supervisor.state_file(stack.installation).write_bytes(msgspec.json.encode(state))
        assert stack.state() is None
        stack.up()
        records = {
            "alive": {"pid": worker.pid, "started": psutil.Process(worker.pid).create_time()},
            "recycled": {"pid": stranger.pid, "started": 1.0},
            "gone": {"pid": 2**22 + 1, "started": 1.0},
        }
        for name, record in records.items():
            (stack.installation.workers / f"{name}.json").write_text(json.dumps(record))
        assert stack.workers() == {"alive": worker.pid}
        stack.down()
        assert not alive(stack.installation)
        assert not psutil.pid_exists(worker.pid) or worker.poll() is not None
        assert stranger.poll() is None
        assert stack.state() is None
        stack.down()
    finally:
        stranger.kill()
        stranger.wait()
        worker.kill()
        stack.delete()


def lives(pid: int) -> bool:
    """Who has ended and waits for its new parent to notice does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_up_heals_after_the_supervisor_was_killed() -> None:
    with Stack.temporary(services=False) as stack:
        old = {name: stack.pid(name) for name in SERVERS}
        chief = supervisor.running_supervisor(stack.installation)
        assert chief
        chief.kill()
        chief.wait(10)
        assert stack.state() is None
        stack.up()
        assert all(stack.health().values())
        assert not any(lives(pid) for pid in old.values())


def test_a_failed_start_tells_why_and_leaves_nothing_running(folder: Path) -> None:
    stack = Stack(folder / "home", services=False, random_ports=True)
    stack.up()
    stack.down()
    (stack.installation.data / "postgres" / "postgresql.auto.conf").write_text("no_such = 1\n")
    try:
        with pytest.raises(StackError, match=r'(?s)postgres did not start.*"no_such"'):
            stack.up()
        assert not alive(stack.installation)
        state = stack.state()
        assert state
        assert (state.phase, state.failed) == ("failed", "postgres")
    finally:
        stack.delete()


async def test_a_child_that_keeps_dying_waits_longer_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = Installation.open(folder / "home", random_ports=True)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.05)
    began: list[float] = []
    usual = processes.table(installation, {})[0]

    def describe() -> processes.Process:
        began.append(time.monotonic())
        return replace(usual, command=["sleep", "0.1"], ready=supervisor._always)

    state = supervisor.ProcessState(0, 0.0)
    child = supervisor.Child(describe, state, installation.log("trial"), lambda: None)
    await asyncio.sleep(1.6)
    await child.stop()
    pauses = [later - earlier for earlier, later in pairwise(began)][:4]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 3 * pauses[0] - 0.2
    assert state.restarts >= 3


async def test_a_log_that_has_grown_too_long_is_set_aside_while_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = Installation.open(folder / "home", random_ports=True)
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 1000)
    file = installation.log("trial")
    writer = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(writer, b"old\n" * 300)
    supervisor.rotate_logs(installation)
    os.write(writer, b"new\n")
    os.close(writer)
    assert file.read_text() == "new\n"
    assert file.with_suffix(".log.1").read_text() == "old\n" * 300
    assert file.with_suffix(".log.1").stat().st_mode & 0o077 == 0


# As somebody else


@pytest.mark.skipif(not is_root(), reason="an ordinary user can enter his own folders")
async def test_root_may_keep_it_where_only_root_can_go(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    stack = Stack(closed / "home", services=False, random_ports=True)
    try:
        stack.up()
        place = stack.installation.postgres_home
        assert place.parent == ELSEWHERE
        assert place.stat().st_mode & 0o007 == 0
        assert closed.stat().st_mode & 0o777 == 0o700
        async with postgres_as(stack, "models") as connection:
            assert await connection.fetchval("SELECT current_schema()") == "models"
        stack.down()
        assert Installation.open(stack.home).postgres_home == place
    finally:
        stack.delete()
    assert not place.exists()


@pytest.mark.skipif(not is_root(), reason="we are an ordinary user already")
def test_an_ordinary_user_needs_no_root(folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    folder.chmod(0o755)
    home = folder / "theirs" / "home"
    home.parent.mkdir()
    shutil.chown(home.parent, nobody.pw_uid, nobody.pw_gid)
    environment = {**os.environ, "DARKROOM_HOME": str(home), "HOME": str(home.parent)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deploy.local", *arguments],
            cwd=REPOSITORY,
            env=environment,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=120,
        )

    try:
        usable = run("--help").returncode == 0
    except PermissionError:
        usable = False
    if not usable:
        pytest.skip("this checkout or its Python is closed to ordinary users")
    assert run("setup-secrets", "--random-ports").returncode == 0
    try:
        done = run("up", "--servers-only")
        assert done.returncode == 0, done.stderr
        assert home.stat().st_mode & 0o777 == 0o700
        assert run("status").returncode == 0
        with pytest.raises(InstallationError, match="belongs to user id"):
            Installation.open(home)
    finally:
        assert run("down").returncode == 0
