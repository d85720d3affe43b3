"""Every process is killed in turn, with kill -9, while commands and jobs run: none is lost, none is
done twice, and nothing is left stuck."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import nats
import pytest

from deploy.local.client import Client
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from shared.contracts.identity import Role
from shared.contracts.inference import Job
from shared.contracts.models import Checkpoint
from tests.chaos.calling import Caller
from tests.chaos.looking import all_events, check_results, until, until_nothing_waits

VICTIMS = [
    "gateway",
    "identity",
    "models",
    "endpoints",
    "inference",
    "worker",
    "nats",
    "postgres",
    "seaweedfs",
]
TURNS = int(os.environ.get("DARKROOM_CHAOS_TURNS", "1"))
"""How often each is killed."""
COMMANDS_IN_ALL, JOBS_IN_ALL = 200 * TURNS, 20 * TURNS
AT_ONCE = 6
ROUND_SECONDS = 90.0
ENDPOINT = "chaos"
MODEL = {"Stable-diffusion": [CHECKPOINT.name], "VAE": ["Automatic"]}


@pytest.fixture(scope="module")
def chaos() -> Iterator[Stack]:
    with Stack.temporary(settings={"DARKROOM_WORKER_THREADS": "1"}) as stack:
        yield stack


class Round(msgspec.Struct):
    """What happened while one process was killed."""

    victim: str
    commands: int = 0
    jobs: int = 0
    repeated: int = 0
    longest: float = 0.0
    longest_job: float = 0.0
    seconds: float = 0.0


class KillCaller(Caller):
    """Notes in `round` what happens to its calls."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, MODEL, seconds=ROUND_SECONDS)
        self.round = Round("nobody")

    def note_repetition(self) -> None:
        self.round.repeated += 1

    def create(self, name: str) -> str:
        """A checkpoint or a role."""
        began, key = time.monotonic(), str(uuid4())
        path, body = "/roles", {"role_name": name, "permissions": ["role:list"]}
        if name.startswith("checkpoint"):
            files: Any = [{"filename": name, "parts_number": 1}]
            path, body = "/checkpoints", {"checkpoint_type": "Lora", "filenames": files}
        self.insist(lambda: self.client.call("POST", path, body, idempotency_key=key))
        with self.lock:
            self.round.commands += 1
            self.round.longest = max(self.round.longest, time.monotonic() - began)
        return name

    def run_job(self, seed: int) -> str:
        began = time.monotonic()
        job_id = self.start_job(seed)
        left = began + ROUND_SECONDS - time.monotonic()
        job = self.wait_for_job(job_id, seconds=left, every=0.1)
        assert job["status"] == "succeed", job
        with self.lock:
            self.round.jobs += 1
            self.round.longest_job = max(self.round.longest_job, time.monotonic() - began)
        return job_id


def kill(stack: Stack, victim: str) -> None:
    """Returns once it is ready again."""
    if victim != "worker":
        stack.wait_ready(victim, other_than=stack.kill(victim))
        return
    ((instance, pid),) = stack.workers().items()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not set(stack.workers()) - {instance}:
        assert time.monotonic() < deadline, "no other worker was started"
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_doubled_whoever_is_killed(
    chaos: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = Client.log_in_at(chaos.home)
    admin.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    admin.create_endpoint(ENDPOINT)
    admin.wait_for_endpoint(ENDPOINT)
    caller = KillCaller(admin)
    rounds: list[Round] = []
    created: list[str] = []
    jobs: list[str] = []
    names = iter(
        f"{'checkpoint' if number % 4 == 3 else 'role'} {number}"
        for number in range(COMMANDS_IN_ALL)
    )
    seeds = iter(range(JOBS_IN_ALL))
    with ThreadPoolExecutor(AT_ONCE) as threads, ThreadPoolExecutor(AT_ONCE) as job_threads:
        for number, victim in enumerate(VICTIMS * TURNS):
            began = time.monotonic()
            caller.round = Round(victim)
            rounds.append(caller.round)
            left = len(VICTIMS) * TURNS - number
            wanted = -(-(COMMANDS_IN_ALL - len(created)) // left)
            wanted_jobs = -(-(JOBS_IN_ALL - len(jobs)) // left)
            making: list[Future[str]] = [
                job_threads.submit(caller.run_job, next(seeds)) for _ in range(wanted_jobs)
            ]
            creating = [threads.submit(caller.create, next(names)) for _ in range(wanted // 2)]
            wait(creating[:3])  # the others are under way
            killing = threads.submit(kill, chaos, victim)
            for _ in range(wanted - len(creating)):
                creating.append(threads.submit(caller.create, next(names)))
                time.sleep(0.05)
            created += [done.result() for done in creating]
            jobs += [done.result() for done in making]
            killing.result()
            caller.round.seconds = time.monotonic() - began
    with capsys.disabled():
        print(table(rounds))

    assert (len(created), len(jobs)) == (COMMANDS_IN_ALL, JOBS_IN_ALL)
    listed = [role["role_name"] for role in admin.call("GET", "/roles")["data"]["roles"]]
    uploads = admin.call("GET", "/checkpoints?types=Lora&per_page=1000")["data"]["checkpoints"]
    listed += [name for checkpoint in uploads for name in checkpoint["name"]]
    assert Counter(name for name in listed if " " in name and name != "IT Operator") == Counter(
        created
    )
    admin.wait_for_endpoint(ENDPOINT)
    assert len(chaos.workers()) == 1
    asyncio.run(look_inside(chaos, created, jobs))


def table(rounds: list[Round]) -> str:
    head = f"{'killed':<11}{'commands':>9}{'jobs':>6}{'repeated':>10}"
    head += f"{'longest command':>17}{'longest job':>13}{'round':>9}"
    lines = [
        f"{r.victim:<11}{r.commands:>9}{r.jobs:>6}{r.repeated:>10}"
        f"{r.longest:>15.1f} s{r.longest_job:>11.1f} s{r.seconds:>7.1f} s"
        for r in rounds
    ]
    return "\n".join(["", head, *lines])


async def look_inside(stack: Stack, created: list[str], jobs: list[str]) -> None:
    installation = stack.installation
    client = await nats.connect(installation.nats_url_as("admin"))
    js = client.jetstream()
    await until_nothing_waits(js)

    made: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    async for message in all_events(js):
        if isinstance(message, Role) and not message.is_default:
            made[message.role_name] += 1
            assert message.version == 1
        if isinstance(message, Checkpoint) and message.type == "Lora":
            made.update(message.names)
            assert message.version == 1
        if isinstance(message, Job) and message.status in ("succeed", "failed"):
            ended[message.job_id] += 1
            assert message.status == "succeed", message.reason
            assert 1 <= message.attempt <= 3
    await client.close()
    assert made == Counter(created)
    assert ended == Counter(jobs)

    await check_results(installation, jobs)

    connection = await asyncpg.connect(installation.postgres_url("postgres"))
    for schema in ("identity", "models", "endpoints", "inference"):
        unsent = f"SELECT count(*) FROM {schema}.outbox WHERE sent_at IS NULL"
        await until(lambda query=unsent: connection.fetchval(query), 0, f"unsent in {schema}")  # type: ignore[misc]
    unfinished = "SELECT count(*) FROM inference.jobs WHERE status = 'inprogress'"
    assert await connection.fetchval(unfinished) == 0
    behind = """
        SELECT kind, id FROM gateway.aggregates
        LEFT JOIN inference.jobs ON kind = 'job' AND id = job_id
        LEFT JOIN identity.roles ON kind = 'role' AND id = role_name
        LEFT JOIN models.checkpoints ON kind = 'checkpoint' AND id = checkpoint_id::text
        WHERE kind IN ('job', 'role', 'checkpoint') AND aggregates.version IS DISTINCT FROM
            coalesce(jobs.version, roles.version, checkpoints.version)
    """
    assert await connection.fetch(behind) == []
    await connection.close()
