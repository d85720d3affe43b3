"""The endpoints service as a process of its own, with real workers that are killed for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import nats
import psutil
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from deploy.local import servers
from deploy.local.installation import REPOSITORY, Installation
from deploy.local.processes import Process
from services.endpoints.launchers.process import Record
from shared.contracts import endpoints
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import Endpoint
from shared.contracts.envelope import Command, Envelope, Message, Rejected, new_id
from shared.contracts.registry import payload, type_of
from shared.contracts.subjects import (
    CONSUMERS,
    EVENTS,
    JOBS,
    STREAMS,
    command_subject,
    jobs_durable,
    run_job_subject,
)
from shared.postgres import migrate

WORKER = Path(__file__).with_name("endpoints_worker.py")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="darkroom-endpoints-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
async def installation(folder: Path) -> AsyncIterator[Installation]:
    """NATS and Postgres with all users, streams, the role and the schema of endpoints."""
    made = Installation.open(folder / "home", random_ports=True)
    servers.write_configuration(made)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for server in (servers.nats(made), servers.postgres(made)):
            await server.prepare()
            running.append(start_server(made, server))
            while not await server.ready():
                assert running[-1].poll() is None, made.log(server.name).read_text()
                await asyncio.sleep(0.05)
        await provision(made)
        yield made
    finally:
        for process in processes_of(made):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for child in running:
            child.send_signal(signal.SIGINT)
        for child in running:
            child.wait(10)
        made.delete()


def start_server(installation: Installation, server: Process) -> subprocess.Popen[bytes]:
    identity: dict[str, Any] = {}
    if server.user is not None:
        identity = {"user": server.user, "group": server.user, "extra_groups": []}
    with installation.log(server.name).open("wb") as log:
        return subprocess.Popen(
            server.command,
            cwd=server.directory,
            env=dict(server.environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            **identity,
        )


async def provision(installation: Installation) -> None:
    admin = await connect_as(installation, "admin")
    for stream in STREAMS:
        await admin.jetstream().add_stream(stream)
    for stream_name, consumer in CONSUMERS:
        await admin.jetstream().add_consumer(stream_name, consumer)
    await admin.close()
    connection = await asyncpg.connect(installation.postgres_url("postgres", "postgres"))
    await connection.execute("CREATE DATABASE darkroom")
    await connection.close()
    connection = await asyncpg.connect(installation.postgres_url("postgres"))
    password = installation.secrets.postgres["endpoints"]
    await connection.execute(f"CREATE ROLE endpoints LOGIN PASSWORD '{password}'")
    await connection.execute("CREATE SCHEMA endpoints AUTHORIZATION endpoints")
    await connection.close()
    migrations = REPOSITORY / "services/endpoints/migrations"
    await migrate(installation.postgres_url("endpoints"), migrations)


def processes_of(installation: Installation) -> list[psutil.Process]:
    """The service, its workers and their engines that live, by looking at the machine itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get("DARKROOM_WORKER_CACHE") == str(installation.cache)
            if mine or process.environ().get("DARKROOM_CACHE") == str(installation.cache):
                found.append(process)
    return found


async def connect_as(installation: Installation, user: str) -> Client:
    return await nats.connect(
        installation.nats_url,
        user=user,
        password=installation.secrets.nats[user],
        inbox_prefix=f"_INBOX_{user}".encode(),
    )


class Endpoints:
    """The service's process, and a client that sends it commands and follows its events."""

    def __init__(self, installation: Installation, client: Client, observer: Client) -> None:
        self.installation = installation
        self.run = installation.run
        self.settings: dict[str, str] = {}
        self.events: list[tuple[Envelope, Message]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._js = client.jetstream()
        self._observer = observer
        self._arrived = asyncio.Event()

    async def follow(self) -> None:
        async def receive(message: Any) -> None:
            envelope = cloud.decode(message.data)
            self.events.append((envelope, payload(envelope)))
            self._arrived.set()

        await self._observer.jetstream().subscribe(
            "evt.endpoints.>", stream=EVENTS, ordered_consumer=True, cb=receive
        )

    def start(self) -> None:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "PYTHONPATH": str(REPOSITORY),
            "DARKROOM_NATS_URL": self.installation.nats_url,
            "DARKROOM_NATS_USER": "endpoints",
            "DARKROOM_NATS_PASSWORD": self.installation.secrets.nats["endpoints"],
            "DARKROOM_POSTGRES_URL": self.installation.postgres_url("endpoints"),
            "DARKROOM_RUN": str(self.run),
            "DARKROOM_S3_URL": "http://127.0.0.1:9",
            "DARKROOM_WORKER_NATS_PASSWORD": self.installation.secrets.nats["worker"],
            "DARKROOM_WORKER_S3_ACCESS_KEY": "key",
            "DARKROOM_WORKER_S3_SECRET_KEY": "secret",
            "DARKROOM_WORKER_CACHE": str(self.installation.cache),
            "DARKROOM_WORKER_COMMAND": f"{{python}} {WORKER}",
            "DARKROOM_WORKER_STOP_WITHIN": "2",
            "DARKROOM_WORKER_SILENT_WITHIN": "4",
            "DARKROOM_DRAIN_SECONDS": "3",
            "DARKROOM_SCALE_OUT_AFTER": "1",
            "DARKROOM_SCALE_IN_AFTER": "3",
            **self.settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.endpoints"],
            env=environment,
            cwd=REPOSITORY,
            stdout=self.installation.log("endpoints").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    async def terminate(self) -> int:
        assert self.process
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, 20)

    async def send(self, command: Command) -> list[Message]:
        """The events that the command led to, the answer last."""
        name = type_of(command)
        framed = cloud.wrap(command, type=name, source="test", subject="test", actor="admin")
        await self._js.publish(command_subject(name), cloud.encode(framed))
        await self.wait(
            lambda: any(envelope.answers == framed.id for envelope, _ in self.events),
            f"an answer to {name}",
        )
        return [event for envelope, event in self.events if envelope.causation_id == framed.id]

    async def create(self, name: str, count: int = 1, type: str = "ml.g4dn.xlarge") -> str:
        endpoint_id = new_id()
        (event,) = await self.send(create_endpoint(name, count, type, endpoint_id))
        assert isinstance(event, endpoints.EndpointCreated), event
        assert (event.endpoint_status, event.current_instance_count) == ("Creating", 0)
        assert (event.instance_type, event.end_time) == (type, None)
        return endpoint_id

    async def delete(self, *names: str) -> list[Message]:
        return await self.send(endpoints.DeleteEndpoints(endpoint_names=list(names)))

    def states(self, endpoint_id: str) -> list[Endpoint]:
        found = [e for _, e in self.events if isinstance(e, Endpoint)]
        return [event for event in found if event.endpoint_id == endpoint_id]

    def history(self, endpoint_id: str) -> list[tuple[str, int]]:
        return [(s.endpoint_status, s.current_instance_count) for s in self.states(endpoint_id)]

    async def wait_status(self, endpoint_id: str, status: str, count: int) -> Endpoint:
        await self.wait(
            lambda: self.history(endpoint_id)[-1:] == [(status, count)],
            lambda: f"{status} with {count}, not {self.history(endpoint_id)}",
        )
        return self.states(endpoint_id)[-1]

    async def wait(
        self, condition: Callable[[], bool], what: str | Callable[[], str], seconds: float = 30
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                log = self.installation.log("endpoints").read_text()[-3000:]
                raise AssertionError(f"no {what if isinstance(what, str) else what()}\n{log}")
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), 0.1)

    def workers(self, endpoint_id: str = "") -> list[psutil.Process]:
        """Those that live, without their engines."""
        found = []
        for process in processes_of(self.installation):
            with contextlib.suppress(psutil.Error):
                of = process.environ().get("DARKROOM_ENDPOINT_ID", "")
                if str(WORKER) in process.cmdline() and endpoint_id in ("", of):
                    found.append(process)
        return found

    def records(self, endpoint_id: str) -> list[Record]:
        found = []
        for file in (self.run / "workers").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found.append(msgspec.json.decode(file.read_bytes(), type=Record))
        return [record for record in found if record.endpoint_id == endpoint_id]

    async def queue_exists(self, endpoint_id: str) -> bool:
        admin = await connect_as(self.installation, "admin")
        try:
            await admin.jetstream().consumer_info(JOBS, jobs_durable(endpoint_id))
        except NotFoundError:
            return False
        finally:
            await admin.close()
        return True

    async def queue(self, endpoint_id: str, jobs: int) -> None:
        """Puts so many jobs into the queue of an endpoint, whose workers leave them there."""
        admin = await connect_as(self.installation, "admin")
        for _ in range(jobs):
            await admin.jetstream().publish(run_job_subject(endpoint_id), b"a job")
        await admin.close()

    async def empty(self, endpoint_id: str) -> None:
        admin = await connect_as(self.installation, "admin")
        await admin.jetstream().purge_stream(JOBS, subject=run_job_subject(endpoint_id))
        await admin.close()

    async def pause(self) -> None:
        """Ends the service and all that a test left behind, for the next one to start clean."""
        names = {s.endpoint_name for _, s in self.events if isinstance(s, Endpoint)}
        await self.delete(*names)
        await self.wait(lambda: not self.workers(), "end of all workers")


def create_endpoint(
    name: str,
    count: int = 1,
    type: str = "cpu",
    endpoint_id: str = "",
    most: int | None = None,
) -> endpoints.CreateEndpoint:
    """`most`: it scales, up to that."""
    return endpoints.CreateEndpoint(
        endpoint_id=endpoint_id or new_id(),
        endpoint_name=name,
        endpoint_type="Async",
        instance_type=type,
        initial_instance_count=count,
        autoscaling=most is not None,
        max_instance_number=most,
        roles=["Designer"],
        creator="admin",
    )


def children(process: subprocess.Popen[bytes] | None) -> list[str]:
    assert process
    return [child.status() for child in psutil.Process(process.pid).children()]


@contextlib.asynccontextmanager
async def running_with(
    installation: Installation, settings: dict[str, str]
) -> AsyncIterator[Endpoints]:
    client = await connect_as(installation, "gateway")
    observer = await connect_as(installation, "admin")
    made = Endpoints(installation, client, observer)
    made.settings = settings
    await made.follow()
    made.start()
    try:
        yield made
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            await made.terminate()
        await observer.close()
        await client.close()


@pytest.fixture(scope="module")
async def running(installation: Installation) -> AsyncIterator[Endpoints]:
    async with running_with(installation, {}) as made:
        yield made


@pytest.fixture
async def service(running: Endpoints) -> AsyncIterator[Endpoints]:
    yield running
    if running.process and running.process.poll() is not None:
        running.start()
    await running.pause()


async def test_create_endpoint_starts_a_worker_and_says_when_it_serves(service: Endpoints) -> None:
    endpoint_id = await service.create("first")
    state = await service.wait_status(endpoint_id, "InService", 1)
    assert state.end_time
    assert state.end_time >= state.start_time
    assert service.history(endpoint_id) == [("Creating", 0), ("InService", 1)]
    assert [s.version for s in service.states(endpoint_id)] == [1, 2]
    assert await service.queue_exists(endpoint_id)

    (worker,) = service.workers(endpoint_id)
    (record,) = service.records(endpoint_id)
    assert record.pid == worker.pid
    assert abs(record.started - worker.create_time()) < 2
    environment = worker.environ()
    assert environment["DARKROOM_NATS_USER"] == "worker"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    secrets = service.installation.secrets
    assert "DARKROOM_POSTGRES_URL" not in environment
    assert secrets.nats["endpoints"] not in environment.values()
    log = service.installation.log(f"worker-{record.instance_id}")
    assert "engine" in log.read_text()


async def test_the_log_of_a_worker_that_runs_for_long_does_not_fill_the_disk(
    service: Endpoints,
) -> None:
    endpoint_id = await service.create("talkative")
    await service.wait_status(endpoint_id, "InService", 1)
    (record,) = service.records(endpoint_id)
    file = service.installation.log(f"worker-{record.instance_id}")
    with file.open("ab") as log:
        log.write(b"x" * 11_000_000)
    await service.wait(lambda: file.stat().st_size < 1_000_000, "end of a long log")
    assert file.with_suffix(".log.1").stat().st_size > 11_000_000
    assert [worker.pid for worker in service.workers(endpoint_id)] == [record.pid]


async def test_create_endpoint_refuses_names_types_and_counts(service: Endpoints) -> None:
    await service.create("taken", 2)
    cases = {
        "endpoints.name_taken": create_endpoint("taken"),
        "endpoints.unknown_instance_type": create_endpoint("other", type="tpu"),
        "endpoints.quota": create_endpoint("other", count=3, type="ml.g5.2xlarge"),
    }
    for code, command in cases.items():
        (answer,) = await service.send(command)
        assert isinstance(answer, Rejected)
        assert answer.code == code
    both = await asyncio.gather(*(service.send(create_endpoint("same")) for _ in range(2)))
    assert sorted(type(answer[-1]).__name__ for answer in both) == ["EndpointCreated", "Rejected"]


def holds_anything(process: psutil.Process) -> bool:
    """What has ended and waits for its new parent to notice holds nothing any more."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_a_killed_worker_is_replaced_with_all_it_left_behind(service: Endpoints) -> None:
    endpoint_id = await service.create("killed")
    await service.wait_status(endpoint_id, "InService", 1)
    (worker,) = service.workers(endpoint_id)
    (engine,) = worker.children()
    worker.kill()
    await service.wait(lambda: len(service.states(endpoint_id)) == 4, "two more changes")
    assert service.history(endpoint_id)[1:] == [("InService", 1), ("Updating", 0), ("InService", 1)]
    (replacement,) = service.workers(endpoint_id)
    assert replacement.pid != worker.pid
    assert not holds_anything(engine), "the engine of a dead worker still holds its GPU"
    assert "zombie" not in children(service.process)
    assert len(service.records(endpoint_id)) == 1


async def test_workers_survive_a_killed_service_and_are_not_doubled(service: Endpoints) -> None:
    endpoint_id = await service.create("adopted", 2)
    await service.wait_status(endpoint_id, "InService", 2)
    before = {worker.pid for worker in service.workers(endpoint_id)}
    service.kill()
    assert {worker.pid for worker in service.workers(endpoint_id)} == before
    service.start()
    await service.send(endpoints.ResyncEndpoints())
    await asyncio.sleep(2)
    assert {worker.pid for worker in service.workers(endpoint_id)} == before
    assert service.history(endpoint_id)[-1] == ("InService", 2)

    service.kill()
    victim = service.workers(endpoint_id)[0]
    victim.kill()  # while nobody watches
    service.start()
    await service.wait_status(endpoint_id, "InService", 1)
    await service.wait_status(endpoint_id, "InService", 2)
    after = {worker.pid for worker in service.workers(endpoint_id)}
    assert len(after) == 2
    assert before - after == {victim.pid}

    service.workers(endpoint_id)[0].kill()  # one that is no child of the service
    await service.wait_status(endpoint_id, "InService", 1)
    await service.wait_status(endpoint_id, "InService", 2)


async def test_a_worker_whose_record_was_not_yet_written_is_found(service: Endpoints) -> None:
    endpoint_id = await service.create("early")
    await service.wait_status(endpoint_id, "InService", 1)
    (worker,) = service.workers(endpoint_id)
    (record,) = service.records(endpoint_id)
    service.kill()
    file = service.run / "workers" / f"{record.instance_id}.json"
    file.rename(file.with_suffix(".starting"))
    service.start()
    await service.wait(lambda: bool(service.records(endpoint_id)), "record")
    await service.send(endpoints.ResyncEndpoints())
    assert [found.pid for found in service.workers(endpoint_id)] == [worker.pid]
    assert service.records(endpoint_id) == [record]


async def test_no_worker_is_lost_or_doubled_by_kills_at_random_moments(service: Endpoints) -> None:
    endpoint_id = await service.create("chaos", 3)
    for _ in range(6):
        await asyncio.sleep(random.uniform(0.3, 1.6))
        service.kill()
        for worker in service.workers(endpoint_id)[:1]:
            if random.random() < 0.5:
                worker.kill()
        service.start()
    await service.wait_status(endpoint_id, "InService", 3)
    await asyncio.sleep(2)
    assert len(service.workers(endpoint_id)) == 3
    assert len(service.records(endpoint_id)) == 3
    versions = [state.version for state in service.states(endpoint_id)]
    assert sorted(set(versions)) == list(range(1, max(versions) + 1)), "an event was lost"


async def test_a_worker_that_keeps_crashing_fails_the_endpoint(service: Endpoints) -> None:
    endpoint_id = await service.create("crash")
    state = await service.wait_status(endpoint_id, "Failed", 0)
    assert state.error
    assert "exited with code 3" in state.error
    assert "CUDA error: no kernel image is available" in state.error
    logs = len(list(service.installation.logs.glob("worker-*.log")))
    await asyncio.sleep(3)
    assert len(list(service.installation.logs.glob("worker-*.log"))) == logs, "it still tries"
    assert not service.records(endpoint_id)


async def test_an_endpoint_whose_workers_say_that_they_fail_says_why(service: Endpoints) -> None:
    """What the worker said, and what its log has of it."""
    endpoint_id = await service.create("broken")
    state = await service.wait_status(endpoint_id, "Failed", 0)
    assert state.error
    assert state.error.startswith("libcuda is older than torch; the worker exited with code 1")
    assert state.error.endswith("RuntimeError: the driver is too old")


async def test_delete_endpoints_ends_worker_and_queue_and_frees_the_name(
    service: Endpoints,
) -> None:
    first = await service.create("stubborn-again")
    await service.wait_status(first, "InService", 1)
    (event,) = await service.delete("stubborn-again", "never-existed")
    assert isinstance(event, endpoints.EndpointChanged)
    assert (event.deleted, event.endpoint_status) == (False, "Deleting")

    second = await service.create("stubborn-again")
    await service.wait_status(second, "InService", 1)
    await service.wait(lambda: not service.workers(first), "end of a worker that ignores SIGTERM")
    gone = await service.wait_status(first, "Deleted", 0)
    assert gone.deleted
    assert not await service.queue_exists(first)
    assert not service.records(first)
    assert await service.queue_exists(second)
    (answer,) = await service.delete("never-existed")
    assert type(answer).__name__ == "Completed"


async def test_what_is_being_finished_delays_the_end_of_an_endpoint_only_so_long(
    service: Endpoints,
) -> None:
    """Also when the service was killed meanwhile."""
    endpoint_id = await service.create("stubborn")
    await service.wait_status(endpoint_id, "InService", 1)
    await service.delete("stubborn")
    deleted = time.monotonic()
    await asyncio.sleep(1.5)
    service.kill()
    assert len(service.workers(endpoint_id)) == 1
    service.start()
    await service.wait_status(endpoint_id, "Deleted", 0)
    assert 2.9 < time.monotonic() - deleted < 3 + 4
    assert not service.workers(endpoint_id)


async def test_a_silent_worker_is_replaced(service: Endpoints) -> None:
    endpoint_id = await service.create("silent")
    await service.wait_status(endpoint_id, "InService", 1)
    (worker,) = service.workers(endpoint_id)
    await service.wait(lambda: len(service.states(endpoint_id)) >= 4, "two more changes")
    assert service.history(endpoint_id)[2:4] == [("Updating", 0), ("InService", 1)]
    await service.wait(lambda: not worker.is_running(), "end of the silent one")


async def test_a_worker_that_hangs_is_replaced_and_one_that_speaks_is_left_alone(
    service: Endpoints,
) -> None:
    endpoint_id = await service.create("spoken", 2)
    await service.wait_status(endpoint_id, "InService", 2)
    hanging, going = service.workers(endpoint_id)
    hanging.send_signal(signal.SIGSTOP)
    await service.wait(lambda: len(service.states(endpoint_id)) >= 5, "two more changes")
    assert service.history(endpoint_id)[-2:] == [("InService", 1), ("InService", 2)]
    await service.wait(lambda: not holds_anything(hanging), "end of the one that hangs")
    assert going.is_running()


async def test_an_endpoint_follows_its_queue_down_to_nothing_and_up_again(
    service: Endpoints,
) -> None:
    endpoint_id = new_id()
    await service.send(create_endpoint("scaling", 1, endpoint_id=endpoint_id, most=3))
    await service.wait_status(endpoint_id, "InService", 1)
    await service.queue(endpoint_id, 7)
    await service.wait_status(endpoint_id, "InService", 3)
    await service.empty(endpoint_id)
    await service.wait_status(endpoint_id, "InService", 0)
    await service.wait(lambda: not service.workers(endpoint_id), "end of all workers")
    assert await service.queue_exists(endpoint_id), "or nothing would wake it"
    await service.queue(endpoint_id, 1)
    slept = time.monotonic()
    await service.wait_status(endpoint_id, "InService", 1)
    assert time.monotonic() - slept < 10
    assert service.history(endpoint_id)[-2:] == [("Updating", 0), ("InService", 1)]


async def test_an_endpoint_that_sleeps_or_is_scaled_does_so_across_kills(
    service: Endpoints,
) -> None:
    endpoint_id = new_id()
    await service.send(create_endpoint("sleeping", 2, endpoint_id=endpoint_id, most=3))
    await service.wait_status(endpoint_id, "InService", 0)
    service.kill()
    service.start()
    await service.send(endpoints.ResyncEndpoints())
    await asyncio.sleep(2)
    assert not service.workers(endpoint_id)
    assert service.history(endpoint_id)[-1] == ("InService", 0)


async def test_workers_go_and_come_back_with_the_service(service: Endpoints) -> None:
    endpoint_id = await service.create("restarted", 2)
    await service.wait_status(endpoint_id, "InService", 2)
    assert await service.terminate() == 0
    assert not service.workers(endpoint_id)
    assert not service.records(endpoint_id)
    await service.wait_status(endpoint_id, "Updating", 0)
    service.start()
    await service.wait_status(endpoint_id, "InService", 2)


async def test_of_two_services_one_reconciles_until_the_other_takes_over(
    service: Endpoints,
) -> None:
    first = service.process
    assert first
    service.run = service.run.with_name("another-machine")
    service.start()
    second = service.process
    assert second
    endpoint_id = await service.create("led", 2)
    await service.wait_status(endpoint_id, "InService", 2)
    await asyncio.sleep(2)
    assert {worker.ppid() for worker in service.workers(endpoint_id)} == {first.pid}
    assert len(service.workers(endpoint_id)) == 2
    first.terminate()
    await asyncio.to_thread(first.wait, 20)
    await service.wait(lambda: len(service.workers(endpoint_id)) == 2, "workers of the second")
    await service.wait_status(endpoint_id, "InService", 2)
    assert {worker.ppid() for worker in service.workers(endpoint_id)} == {second.pid}


async def test_resync_tells_of_deleted_endpoints_too(service: Endpoints) -> None:
    gone = await service.create("gone")
    await service.delete("gone")
    await service.wait_status(gone, "Deleted", 0)
    here = await service.create("here")
    await service.wait_status(here, "InService", 1)
    events = await service.send(endpoints.ResyncEndpoints())
    synced = {e.endpoint_id: e for e in events if isinstance(e, endpoints.EndpointSynced)}
    assert synced[gone].deleted
    assert (synced[here].endpoint_status, synced[here].version) == ("InService", 2)
