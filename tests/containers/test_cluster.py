"""Three NATS servers, two gateways and two of every service: one of each is stopped in turn while
jobs run. What it holds stays down until the jobs of its round have ended without it."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import nats
import pytest

from deploy.local.demo import CHECKPOINT
from shared.contracts.inference import Job
from shared.contracts.subjects import EVENTS
from tests.chaos.looking import all_events, check_results, until_nothing_waits
from tests.chaos.test_kill import ENDPOINT, KillCaller, Round
from tests.containers.engine import Deployment, deployed, inspect, needs_engine, run, wait_healthy

pytestmark = [needs_engine, pytest.mark.timeout(1800)]

VICTIMS = ("nats", "gateway", "identity", "models", "inference", "endpoints-cpu")
JOBS_IN_ALL = int(os.environ.get("DARKROOM_CLUSTER_JOBS", "200"))
ROLES_A_ROUND = 10
AT_ONCE = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Deployment]:
    with deployed("compose.yaml", "compose.cluster.yaml") as deployment:
        yield deployment


class Ends:
    """When jobs ended: how long was nothing done?"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: list[float] = [time.monotonic()]

    def add(self) -> None:
        with self._lock:
            self._times.append(time.monotonic())

    def longest_pause(self) -> float:
        return max(later - sooner for sooner, later in itertools.pairwise(sorted(self._times)))


def test_one_of_everything_may_stop(
    cluster: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = cluster.log_in()
    admin.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    admin.create_endpoint(ENDPOINT)
    admin.wait_for_endpoint(ENDPOINT)
    caller = KillCaller(admin)
    seeds = iter(range(JOBS_IN_ALL))
    jobs: list[str] = []
    roles: list[str] = []
    lines = []
    for number, service in enumerate(VICTIMS):
        victim = asyncio.run(leader(cluster)) if service == "nats" else service
        wanted = (JOBS_IN_ALL - len(jobs)) // (len(VICTIMS) - number)
        caller.round = Round(victim)
        pause = stop_one(cluster, victim, caller, [next(seeds) for _ in range(wanted)], jobs, roles)
        lines.append((caller.round, pause))
    with capsys.disabled():
        print(table(lines))

    assert len(jobs) == JOBS_IN_ALL == len(set(jobs))
    listed = [role["role_name"] for role in admin.call("GET", "/roles")["data"]["roles"]]
    assert Counter(name for name in listed if name.startswith("role ")) == Counter(roles)
    admin.wait_for_endpoint(ENDPOINT)
    asyncio.run(look_inside(cluster, jobs))


def stop_one(
    cluster: Deployment,
    service: str,
    caller: KillCaller,
    seeds: list[int],
    jobs: list[str],
    roles: list[str],
) -> float:
    """Returns the longest pause between the ends of two jobs."""
    ends = Ends()

    def job(seed: int) -> str:
        job_id = caller.run_job(seed)
        ends.add()
        return job_id

    names = [f"role {service} {n}" for n in range(ROLES_A_ROUND)]
    with ThreadPoolExecutor(AT_ONCE) as threads, ThreadPoolExecutor(1) as other:
        half = len(seeds) // 2
        making = [threads.submit(job, seed) for seed in seeds[:half]]
        wait(making[:3])  # the others are under way
        container = busiest(cluster, service)
        creating = [other.submit(caller.create, name) for name in names]
        grace = inspect(container)["Config"]["StopTimeout"]
        run("docker", "stop", "--time", str(grace), container)
        assert inspect(container)["State"]["ExitCode"] in (0, 1, 143), "it was killed"
        making += [threads.submit(job, seed) for seed in seeds[half:]]
        jobs += [done.result() for done in making]
        roles += [done.result() for done in creating]
    run("docker", "start", container)
    wait_healthy(container, seconds=90)
    return ends.longest_pause()


def busiest(cluster: Deployment, service: str) -> str:
    """The container that it hurts most to stop: of two endpoints, the one with the workers."""
    containers = cluster.containers(service)
    if service == "endpoints-cpu":
        found = [c for c in containers if "services.inference.worker" in run("docker", "top", c)]
        assert len(found) == 1
        return found[0]
    return containers[0]


async def leader(cluster: Deployment) -> str:
    """Of EVENTS: the service of the NATS server that does most of the work."""
    client = await nats.connect(cluster.installation.nats_url_as("admin"))
    info = await client.jetstream().stream_info(EVENTS)
    await client.close()
    assert info.config.num_replicas == 3
    assert info.cluster
    assert info.cluster.leader
    return info.cluster.leader


def table(lines: list[tuple[Round, float]]) -> str:
    head = f"{'stopped':<15}{'commands':>9}{'jobs':>6}{'repeated':>10}"
    head += f"{'longest command':>17}{'longest job':>13}{'longest pause':>15}"
    rows = [
        f"{r.victim:<15}{r.commands:>9}{r.jobs:>6}{r.repeated:>10}"
        f"{r.longest:>15.1f} s{r.longest_job:>11.1f} s{pause:>13.1f} s"
        for r, pause in lines
    ]
    return "\n".join(["", head, *rows])


async def look_inside(cluster: Deployment, jobs: list[str]) -> None:
    """Each job ended once, in the log, in the database and in the object store."""
    installation = cluster.installation
    client = await nats.connect(installation.nats_url_as("admin"))
    js = client.jetstream()
    await until_nothing_waits(js)
    ended: Counter[str] = Counter()
    versions: set[tuple[str, int]] = set()
    async for message in all_events(js):
        if isinstance(message, Job) and (message.job_id, message.version) not in versions:
            versions.add((message.job_id, message.version))  # told again after a lost connection
            if message.status in ("succeed", "failed"):
                ended[message.job_id] += 1
                assert message.status == "succeed", message.reason
    await client.close()
    assert ended == Counter(jobs)

    await check_results(installation, jobs)

    assert cluster.sql("SELECT status, count(*) FROM inference.jobs GROUP BY 1") == [
        f"succeed|{len(jobs)}"
    ]
    for schema in ("identity", "models", "endpoints", "inference"):
        assert cluster.sql(f"SELECT count(*) FROM {schema}.outbox WHERE sent_at IS NULL") == ["0"]
    behind = """
        SELECT kind, id FROM gateway.aggregates
        LEFT JOIN inference.jobs ON kind = 'job' AND id = job_id
        LEFT JOIN identity.roles ON kind = 'role' AND id = role_name
        WHERE kind IN ('job', 'role')
            AND aggregates.version IS DISTINCT FROM coalesce(jobs.version, roles.version)
    """
    assert cluster.sql(behind) == []
