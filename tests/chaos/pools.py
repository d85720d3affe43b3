"""Pools under fire: `python -m tests.chaos.pools [--jobs 300] [--kills 50] [--instances 3]`.

With `--launcher docker` workers are containers, and dockerd is killed as well: one that the run
starts for itself, in a folder that it removes unless `--engine` names one. It copies `--image` from
the engine at DOCKER_HOST; deploy/Dockerfile says how it is built.

- Tiny jobs run on one endpoint while its workers and the endpoints service are killed with -9 at
  random. Counts jobs that are lost (without an end), doubled (with more than one), stuck (nobody
  has them) or failed, and tells the longest wait from start to end. `--pause`: seconds between two
  kills; a worker needs some to start, and a job fails with the third worker that dies on it.
- Then kills at random come faster than anything recovers. When they stop, what is left over is
  counted: workers that no row knows, engines without a worker, rows without a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
import nats
import psutil

from deploy.local.client import Client, Failed
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from shared.contracts.inference import FINISHED, Job
from shared.contracts.subjects import JOBS
from tests.chaos.calling import Caller
from tests.chaos.engine import Engine
from tests.chaos.looking import all_events, count

ENDPOINT = "pool"
MODELS = {"Stable-diffusion": [CHECKPOINT.name]}
CALLERS_PER_INSTANCE = 4
"""So many jobs are under way at a time: more than an instance's share, less than a rush."""
MOST_SECONDS = 1800.0
SETTLED_WITHIN = 300.0
AWAY = (0.0, 6.0)
"""Seconds that dockerd is gone."""
PROCESSES = [["worker"], ["worker"], ["endpoints"], ["endpoints", "worker"]]
CONTAINERS = [*PROCESSES, ["dockerd"], ["dockerd", "worker"], ["dockerd", "endpoints"]]
"""Who may be killed at a time, all of them as likely."""


class Figures(msgspec.Struct, kw_only=True):
    jobs: int
    kills: Counter[str]
    seconds: float
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    failed: int = 0
    repeated: int = 0
    median_wait: float = 0.0
    longest_wait: float = 0.0


class Left(msgspec.Struct, kw_only=True):
    """After `kills`. `settled`: seconds until all instances were ready again. `forgotten`: what is
    in containers that dockerd itself does not know any more; only a shim, if it had none yet."""

    kills: Counter[str]
    settled: float
    workers: int
    orphan_workers: int
    orphan_engines: int
    orphan_containers: int = 0
    forgotten: list[str] = []
    missing_workers: int


class Killer:
    """Kills a worker, the endpoints service or dockerd, or two of them at once."""

    def __init__(self, stack: Stack, chance: random.Random, engine: Engine | None) -> None:
        self._stack = stack
        self._chance = chance
        self._engine = engine
        self.kills: Counter[str] = Counter()

    def kill(self) -> None:
        for victim in self._chance.choice(CONTAINERS if self._engine else PROCESSES):
            self.kills[victim] += self._kill(victim)

    def _kill(self, victim: str) -> bool:
        if victim == "dockerd":
            assert self._engine
            return self._engine.kill(away=self._chance.uniform(*AWAY))
        pids = [worker.pid for worker in workers_of(self._stack)]
        if victim == "endpoints":
            pids = [self._stack.pid("endpoints")]
        if pids:
            with contextlib.suppress(ProcessLookupError):  # it is just being started again
                os.kill(self._chance.choice(pids), signal.SIGKILL)
                return True
        return False


def workers_of(stack: Stack) -> list[psutil.Process]:
    """Those that live, in containers or not, by looking at the machine itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            told = process.environ()
            mine = told.get("DARKROOM_NATS_URL") == stack.installation.nats_url
            if mine and "DARKROOM_INSTANCE_ID" in told and lives(process):
                found.append(process)
    return found


def engines_of(stack: Stack) -> list[psutil.Process]:
    """Those of workers that are processes."""
    cache = str(stack.installation.cache)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if cache in process.cmdline() and lives(process):
                found.append(process)
    return found


def lives(process: psutil.Process) -> bool:
    return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class PoolCaller(Caller):
    """Insists on an endpoint too that has no instance yet."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, MODELS, seconds=MOST_SECONDS)
        self.repeated = 0
        self.started: list[str] = []

    def will_pass(self, error: Exception) -> bool:
        waking = isinstance(error, Failed) and error.status == 400 and "no available" in str(error)
        return waking or super().will_pass(error)

    def note_repetition(self) -> None:
        self.repeated += 1

    def run_job(self, seed: int) -> None:
        job_id = self.start_job(seed)
        with self.lock:
            self.started.append(job_id)
        # One that does not end is seen in the figures.
        self.wait_for_job(job_id, seconds=MOST_SECONDS, every=0.2)


def deploy(stack: Stack, instances: int) -> Client:
    """Returns when all instances are ready."""
    admin = Client.log_in_at(stack.home)
    admin.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    admin.create_endpoint(ENDPOINT, count=instances)
    wait_for_all(admin, instances)
    return admin


def wait_for_all(admin: Client, instances: int) -> float:
    """Seconds until all of them are ready. Raises RuntimeError if that takes too long."""
    began = time.monotonic()
    while time.monotonic() - began < SETTLED_WITHIN:
        with contextlib.suppress(httpx.TransportError, Failed):
            endpoint = admin.find_endpoint(ENDPOINT)
            if endpoint and endpoint["current_instance_count"] == str(instances):
                return time.monotonic() - began
        time.sleep(0.2)
    raise RuntimeError(f"not all instances are ready: {admin.find_endpoint(ENDPOINT)}")


def run_jobs(
    stack: Stack,
    admin: Client,
    *,
    jobs: int,
    instances: int,
    pause: tuple[float, float],
    seed: int,
    engine: Engine | None = None,
) -> Figures:
    """`pause`: seconds between two kills, at least and at most."""
    chance = random.Random(seed)
    caller, killer = PoolCaller(admin), Killer(stack, chance, engine)
    began = time.monotonic()
    with ThreadPoolExecutor(instances * CALLERS_PER_INSTANCE) as threads:
        running = [threads.submit(caller.run_job, number) for number in range(jobs)]
        while not all(job.done() for job in running):
            time.sleep(chance.uniform(*pause))
            killer.kill()
        for job in running:
            job.result()
    figures = Figures(
        jobs=jobs,
        kills=killer.kills,
        seconds=time.monotonic() - began,
        repeated=caller.repeated,
    )
    return asyncio.run(judge(stack, caller.started, figures))


async def judge(stack: Stack, started: list[str], figures: Figures) -> Figures:
    """By what the stream of events and the ledger say."""
    client = await nats.connect(stack.installation.nats_url_as("admin"))
    js = client.jetstream()
    ends: Counter[str] = Counter()
    async for message in all_events(js):
        if isinstance(message, Job) and message.status in FINISHED:
            ends[message.job_id] += 1
            figures.failed += message.status == "failed"
    queued = await count(js, JOBS)
    await client.close()
    connection = await asyncpg.connect(stack.installation.postgres_url("postgres"))
    rows = await connection.fetch(
        "SELECT status, extract(epoch FROM completed_at - started_at)::float AS wait"
        " FROM inference.jobs WHERE job_id = ANY($1::text[])",
        started,
    )
    await connection.close()
    waits = sorted(row["wait"] for row in rows if row["wait"] is not None)
    figures.lost = sum(ends[job_id] == 0 for job_id in started) + figures.jobs - len(started)
    figures.doubled = sum(number > 1 for number in ends.values())
    figures.stuck = sum(row["status"] not in FINISHED for row in rows) + queued
    figures.median_wait, figures.longest_wait = waits[len(waits) // 2], waits[-1]
    return figures


def kill_fast(
    stack: Stack,
    admin: Client,
    *,
    kills: int,
    instances: int,
    pause: tuple[float, float],
    seed: int,
    engine: Engine | None = None,
) -> Left:
    chance = random.Random(seed)
    killer = Killer(stack, chance, engine)
    while killer.kills.total() < kills:
        killer.kill()
        time.sleep(chance.uniform(*pause))
    stack.wait_ready("endpoints")
    if engine:
        engine.wait()
    return look_around(stack, admin, killer.kills, instances, engine)


def look_around(
    stack: Stack, admin: Client, kills: Counter[str], instances: int, engine: Engine | None
) -> Left:
    """Once all instances are ready again."""
    settled = wait_for_all(admin, instances)
    time.sleep(3)  # for what is told to go
    return asyncio.run(count_left(stack, kills, settled, engine))


async def count_left(
    stack: Stack, kills: Counter[str], settled: float, engine: Engine | None
) -> Left:
    connection = await asyncpg.connect(stack.installation.postgres_url("postgres"))
    rows = await connection.fetch("SELECT instance_id FROM endpoints.instances")
    await connection.close()
    wanted = {row["instance_id"] for row in rows}
    workers = {worker.pid: worker.environ()["DARKROOM_INSTANCE_ID"] for worker in workers_of(stack)}
    engines = engines_of(stack)
    containers = containers_of(engine) if engine else {}
    return Left(
        kills=kills,
        settled=settled,
        workers=len(workers),
        orphan_workers=sum(instance not in wanted for instance in workers.values()),
        orphan_engines=sum(process.ppid() not in workers for process in engines),
        orphan_containers=sum(id_ not in wanted for id_ in containers.values()),
        forgotten=forgotten_by(engine) if engine else [],
        missing_workers=len(wanted - set(workers.values())),
    )


def containers_of(engine: Engine) -> dict[str, str]:
    """Instance ids by container id, whether they live or not."""
    line = '{{.ID}} {{.Label "darkroom.instance_id"}}'
    listed = engine.docker("ps", "--all", "--no-trunc", "--format", line).splitlines()
    return dict(words.split() for words in listed)


def forgotten_by(engine: Engine) -> list[str]:
    known = containers_of(engine)
    found: list[str] = []
    for id_, shim in engine.shims().items():
        if id_ not in known:
            found.append(f"{id_[:12]}: {[' '.join(p.cmdline()) for p in shim.children()]}")
    return found


def told(kills: Counter[str]) -> str:
    return ", ".join(f"{number} x {victim}" for victim, number in sorted(kills.items()))


def show(figures: Figures) -> str:
    return (
        f"{figures.jobs} jobs in {figures.seconds:.0f} s, killed: {told(figures.kills)}\n"
        f"  lost {figures.lost}, doubled {figures.doubled}, stuck {figures.stuck}, "
        f"failed {figures.failed}; calls repeated {figures.repeated}\n"
        f"  wait, median {figures.median_wait:.1f} s, longest {figures.longest_wait:.1f} s"
    )


def show_left(left: Left) -> str:
    return (
        f"{left.kills.total()} kills ({told(left.kills)}), "
        f"all ready {left.settled:.1f} s later\n"
        f"  {left.workers} workers; orphans: {left.orphan_workers} workers, "
        f"{left.orphan_engines} engines, {left.orphan_containers} containers; "
        f"missing: {left.missing_workers}; shims that dockerd forgot: {left.forgotten}"
    )


@contextlib.contextmanager
def engine_in(folder: Path | None, image: str, *, live_restore: bool) -> Iterator[Engine]:
    with contextlib.ExitStack() as stack:
        if folder is None:
            prefix = "darkroom-engine-"
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        engine = stack.enter_context(Engine(folder, live_restore=live_restore))
        engine.fetch(image)
        yield engine


def in_containers(engine: Engine, image: str, instances: int) -> dict[str, str]:
    type_ = {"device": "cpu", "max": instances, "image": image}
    return {
        "DARKROOM_LAUNCHER": "docker",
        "DARKROOM_DOCKER_URL": engine.url,
        "DARKROOM_DOCKER_NETWORK": "host",
        "DARKROOM_INSTANCE_TYPES": json.dumps({"cpu": type_}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.pools")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--pause", type=float, nargs=2, default=(3.0, 12.0))
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    parser.add_argument("--launcher", choices=("process", "docker"), default="process")
    parser.add_argument("--image", default="darkroom/worker-cpu")
    parser.add_argument("--engine", type=Path)
    parser.add_argument("--live-restore", action="store_true")
    asked: Any = parser.parse_args()
    print(f"seed {asked.seed}")
    settings, engine = {"DARKROOM_WORKER_THREADS": "1"}, None
    with contextlib.ExitStack() as opened:
        if asked.launcher == "docker":
            made = engine_in(asked.engine, asked.image, live_restore=asked.live_restore)
            engine = opened.enter_context(made)
            settings |= in_containers(engine, asked.image, asked.instances)
        stack = opened.enter_context(Stack.temporary(settings=settings))
        run(stack, asked, engine)


def run(stack: Stack, asked: Any, engine: Engine | None) -> None:
    admin = deploy(stack, asked.instances)
    if asked.jobs:
        figures = run_jobs(
            stack,
            admin,
            jobs=asked.jobs,
            instances=asked.instances,
            pause=tuple(asked.pause),
            seed=asked.seed,
            engine=engine,
        )
        print(show(figures), flush=True)
        stack.wait_ready("endpoints")
        print(show_left(look_around(stack, admin, figures.kills, asked.instances, engine)))
    if asked.kills:
        left = kill_fast(
            stack,
            admin,
            kills=asked.kills,
            instances=asked.instances,
            pause=(0.1, 1.5),
            seed=asked.seed,
            engine=engine,
        )
        print("without a pause:", show_left(left))


if __name__ == "__main__":
    main()
