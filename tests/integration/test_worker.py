"""Workers as processes that are killed for real, on real NATS and S3 and with the real ledger. Only
the engine is a fake one: `fake_engine.py` does in its process what the params tell it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from msgspec.structs import replace

from deploy.local.installation import JOBS_BUCKET, MODELS_BUCKET
from deploy.local.processes import http_status
from deploy.local.stack import Stack
from shared.contracts import endpoints, inference
from shared.contracts.subjects import JOBS, jobs_durable
from tests.integration.inference_bus import Bus, until


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="darkroom-worker-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder / "home", services=False, random_ports=True)
    with stack:
        yield stack
    stack.delete()


@pytest.fixture(scope="module")
async def bus(servers: Stack, folder: Path) -> AsyncIterator[Bus]:
    async with Bus(servers, folder).open() as bus:
        await bus.start_ledger()
        yield bus


class Pool:
    """An endpoint and its workers."""

    def __init__(self, bus: Bus, endpoint: endpoints.Endpoint, cache: Path) -> None:
        self.bus = bus
        self.endpoint = endpoint
        self.cache = cache
        self.workers: list[subprocess.Popen[bytes]] = []

    async def start(self, **settings: object) -> subprocess.Popen[bytes]:
        """Returns once the worker has reported that it is ready."""
        name = f"worker-{self.endpoint.endpoint_id[:8]}-{len(self.workers)}"
        worker = self.bus.start(
            "services.inference.worker",
            "worker",
            name,
            **{
                "endpoint_id": self.endpoint.endpoint_id,
                "instance_id": name,
                "cache": self.cache,
                "engine": "tests.integration.fake_engine:Engine",
                **settings,
            },
        )
        self.workers.append(worker)
        await until(lambda: self._is_ready(worker))
        return worker

    async def _is_ready(self, worker: subprocess.Popen[bytes]) -> bool:
        assert worker.poll() is None
        return any(r.pid == worker.pid and r.status == "ready" for r in self.bus.instances)

    async def run(self, params: dict[str, object], *, seconds: float = 40) -> inference.Job:
        job_id = await self.begin(params)
        return await self.bus.end_of(job_id, seconds=seconds)

    async def begin(self, params: dict[str, object]) -> str:
        return await self.bus.run_job(self.endpoint, msgspec.json.encode(params))

    async def taken(self, job_id: str, attempt: int = 1) -> inference.JobTaken:
        return await self.bus.wait(
            inference.JobTaken, lambda job, _: job.job_id == job_id and job.attempt == attempt
        )

    async def steps_of(self, job_id: str) -> bool:
        return any(report.job_id == job_id for report in self.bus.progress)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


@pytest.fixture
async def pool(bus: Bus, folder: Path) -> AsyncIterator[Pool]:
    pool = Pool(bus, await bus.make_endpoint(), folder / "cache")
    yield pool
    pool.stop()


async def _count(bus: Bus, worker: subprocess.Popen[bytes]) -> int:
    return sum(report.pid == worker.pid for report in bus.instances)


def engine_of(worker: subprocess.Popen[bytes]) -> psutil.Process:
    (engine,) = psutil.Process(worker.pid).children()
    return engine


async def test_a_job_is_fetched_run_uploaded_and_reported(bus: Bus, pool: Pool) -> None:
    await pool.start()
    checkpoint = await bus.make_checkpoint(b"real weights")
    asked = {"images": 2, "steps": 40, "seconds": 0.6, "warnings": 400_000}
    params = msgspec.json.encode(asked)
    job_id = await bus.run_job(pool.endpoint, params, checkpoint)
    done = await bus.end_of(job_id)
    assert (done.status, done.attempt, done.reason) == ("succeed", 1, None)
    assert done.image_names == ["image_0.png", "image_1.png"]
    assert done.info_name == f"{job_id}_param.json"
    assert done.warnings == ["a warning"] * 99 + ["… and 399901 more"]
    assert list(done.seconds) == ["fetch", "line", "render", "upload"]
    assert len(await bus.keys(job_id)) == 4
    stored = await bus.objects.client.get_object(
        Bucket=JOBS_BUCKET, Key=f"out/{job_id}/result/{job_id}_param.json"
    )
    info = msgspec.json.decode(await stored["Body"].read())
    assert list(info["files"].values()) == ["real weights"]
    steps = [report for report in bus.progress if report.job_id == job_id]
    assert 4 <= len(steps) <= 9, "at most ten a second"
    assert (steps[-1].step, steps[-1].steps, steps[-1].eta_seconds) == (40, 40, 0.0)
    (started,) = [envelope for envelope, event in bus.events if event is bus.of(job_id)[1]]
    (ended,) = [envelope for envelope, event in bus.events if event is done]
    assert (ended.actor, started.actor) == ("alice", "alice")
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_a_worker_killed_in_the_middle_of_a_job_costs_nothing_but_time(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    first = await pool.start()
    attempts = tmp_path / "attempts"
    job_id = await pool.begin({"seconds": 9, "steps": 90, "counter": str(attempts), "slow": 1})
    await until(lambda: pool.steps_of(job_id), seconds=10)
    engine = engine_of(first)
    first.send_signal(signal.SIGKILL)
    await pool.start()
    done = await bus.end_of(job_id)
    assert (done.status, done.attempt) == ("succeed", 2)
    assert len(attempts.read_text().splitlines()) == 2
    assert len(bus.of(job_id, inference.JobSucceeded)) == 1
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


async def test_an_engine_that_crashes_costs_one_attempt(pool: Pool, tmp_path: Path) -> None:
    worker = await pool.start()
    for number, how in enumerate((signal.SIGSEGV, signal.SIGKILL, 0)):
        counter = tmp_path / str(number)
        done = await pool.run({"crashes": 1, "signal": how, "counter": str(counter)})
        assert (done.status, done.attempt) == ("succeed", 2)
    assert worker.poll() is None


async def test_a_job_that_kills_every_engine_fails_and_the_next_one_runs(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    await pool.start()
    counter = tmp_path / "attempts"
    failed = await pool.run({"crashes": 9, "counter": str(counter)})
    assert (failed.status, failed.attempt) == ("failed", 3)
    assert failed.reason == "the engine died 3 times on this job: signal 9 (SIGKILL)"
    assert len(counter.read_text().splitlines()) == 3
    assert (await pool.run({})).status == "succeed"
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_a_job_that_kills_every_worker_fails(bus: Bus, pool: Pool, tmp_path: Path) -> None:
    job_id = await pool.begin({"seconds": 60, "steps": 600})
    for attempt in (1, 2, 3):
        worker = await pool.start()
        await pool.taken(job_id, attempt)
        worker.kill()
    await pool.start()
    failed = await bus.end_of(job_id)
    assert failed.reason == "the engine died 3 times on this job: the worker itself was ended"
    assert (await pool.run({})).status == "succeed"


async def test_heartbeats_go_on_while_the_engine_is_deaf(bus: Bus, pool: Pool) -> None:
    """A second worker waits for the job all the time, and must not get it."""
    await pool.start()
    await pool.start()
    job_id = await pool.begin({"deaf_seconds": 10})
    done = await bus.end_of(job_id)
    assert (done.status, done.attempt) == ("succeed", 1)
    assert len(bus.of(job_id, inference.JobTaken)) == 1


async def test_a_job_that_hangs_is_ended(pool: Pool) -> None:
    await pool.start(job_seconds=1)
    failed = await pool.run({"deaf_seconds": 600}, seconds=60)
    assert failed.reason == "the engine died 3 times on this job: no result within 1 s"


async def test_a_job_that_takes_too_long_is_stopped_and_not_tried_again(
    pool: Pool, tmp_path: Path
) -> None:
    worker = await pool.start(job_seconds=1)
    engine = engine_of(worker)
    counter = tmp_path / "attempts"
    failed = await pool.run({"seconds": 60, "steps": 600, "counter": str(counter)}, seconds=10)
    assert (failed.reason, failed.attempt) == ("it took longer than 1 s", 1)
    assert len(counter.read_text().splitlines()) == 1
    assert engine.is_running(), "the others that run on it are not disturbed"


async def test_what_can_not_be_done_fails_with_its_reason_at_once(bus: Bus, pool: Pool) -> None:
    await pool.start()
    failed = await pool.run({"reason": "steps is 9999; at most 150"}, seconds=5)
    assert (failed.reason, failed.attempt) == ("steps is 9999; at most 150", 1)
    checkpoint = await bus.make_checkpoint(None)
    job_id = await bus.run_job(pool.endpoint, b"{}", checkpoint)
    missing = await bus.end_of(job_id, seconds=5)
    assert missing.reason == 'model "model.safetensors" is not in the object store any more'
    checkpoint = await bus.make_checkpoint()
    await bus.objects.client.put_object(
        Bucket=MODELS_BUCKET, Key=checkpoint.files[0].key, Body=b"cut"
    )
    job_id = await bus.run_job(pool.endpoint, b"{}", checkpoint)
    broken = await bus.end_of(job_id, seconds=5)
    assert "has 3 bytes in the store, 7 were registered" in (broken.reason or "")


async def test_a_cancelled_job_ends_within_a_step_and_the_next_one_runs(
    bus: Bus, pool: Pool
) -> None:
    worker = await pool.start()
    engine = engine_of(worker)
    job_id = await pool.begin({"seconds": 60, "steps": 600})
    await until(lambda: pool.steps_of(job_id), seconds=10)
    await bus.send(inference.CancelJob(job_id=job_id, username="alice"))
    cancelled = await bus.wait(inference.JobCancelled, lambda job, _: job.job_id == job_id)
    assert cancelled.status == "failed"
    began = time.monotonic()
    assert (await pool.run({}, seconds=10)).status == "succeed"
    assert time.monotonic() - began < 3, "nobody waits for a job that nobody wants"
    assert engine.is_running()
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_a_job_that_is_cancelled_while_it_waits_never_runs(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    """In the queue, and in the hand of a worker that has begun another one."""
    counter = tmp_path / "attempts"
    queued = await pool.begin({"counter": str(counter)})
    await bus.send(inference.CancelJob(job_id=queued, username="alice"))
    await bus.wait(inference.JobCancelled, lambda job, _: job.job_id == queued)
    await pool.start()
    first = await pool.begin({"seconds": 3, "steps": 30})
    await until(lambda: pool.steps_of(first), seconds=10)
    held = await pool.begin({"counter": str(counter)})
    await asyncio.sleep(1)
    await bus.send(inference.CancelJob(job_id=held, username="alice"))
    assert (await bus.end_of(first)).status == "succeed"
    assert (await pool.run({})).status == "succeed"
    assert not counter.exists()
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_a_deaf_engine_is_killed_when_its_job_is_cancelled(bus: Bus, pool: Pool) -> None:
    await pool.start()
    job_id = await pool.begin({"deaf_seconds": 600})
    await pool.taken(job_id)
    await bus.send(inference.CancelJob(job_id=job_id, username="alice"))
    assert (await pool.run({}, seconds=30)).status == "succeed"
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_a_job_that_kills_the_engine_costs_its_neighbours_a_repetition_at_most(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    """Who ran beside it is tried again alone, and who waited has lost no attempt."""
    await pool.start()
    together, waiting = tmp_path / "together", tmp_path / "waiting"
    slow = {"seconds": 4, "steps": 40, "slow": 1, "group": "a", "counter": str(together)}
    neighbour = await pool.begin(slow)
    await until(lambda: pool.steps_of(neighbour), seconds=10)
    poison = await pool.begin({"crashes": 9, "counter": str(tmp_path / "poison"), "group": "a"})
    waits = await pool.begin({"counter": str(waiting), "group": "b"})
    assert (await bus.end_of(poison, seconds=60)).status == "failed"
    done = await bus.end_of(neighbour)
    assert (done.status, done.attempt) == ("succeed", 2)
    assert [line.split()[1] for line in together.read_text().splitlines()] == ["together", "alone"]
    done = await bus.end_of(waits)
    assert (done.status, done.attempt) == ("succeed", 1)


async def test_a_job_that_can_not_even_be_looked_at_fails_and_costs_others_one_repetition(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    await pool.start()
    counter = tmp_path / "neighbour"
    neighbour = await pool.begin({"seconds": 4, "steps": 40, "slow": 1, "counter": str(counter)})
    await until(lambda: pool.steps_of(neighbour), seconds=10)
    poison = {"poisonous": True, "crashes": 9, "counter": str(tmp_path / "poison")}
    failed = await pool.run(poison, seconds=60)
    assert (failed.status, failed.attempt) == ("failed", 3)
    assert failed.reason == "the engine died 3 times on this job: signal 9 (SIGKILL)"
    done = await bus.end_of(neighbour)
    assert (done.status, done.attempt) == ("succeed", 2)
    assert await bus.waiting(pool.endpoint.endpoint_id) == 0


async def test_jobs_that_fit_run_side_by_side(bus: Bus, pool: Pool) -> None:
    await pool.start()
    first = await pool.begin({"seconds": 2, "steps": 20, "group": "a"})
    await until(lambda: pool.steps_of(first), seconds=10)
    others = [await pool.begin({"seconds": 1, "steps": 10, "group": "a"}) for _ in range(3)]
    for job_id in others:
        assert (await bus.end_of(job_id)).status == "succeed"
    assert not bus.of(first, inference.JobSucceeded), "they did not wait for its end"
    assert (await bus.end_of(first)).status == "succeed"


async def test_a_job_in_hand_goes_to_a_worker_that_has_nothing_to_do(bus: Bus, pool: Pool) -> None:
    await pool.start()
    first = await pool.begin({"seconds": 20, "steps": 200})
    await until(lambda: pool.steps_of(first), seconds=10)
    second = await pool.begin({})
    await asyncio.sleep(1)
    assert await bus.waiting(pool.endpoint.endpoint_id) == 2
    await pool.start()
    done = await bus.end_of(second, seconds=10)
    assert (done.status, done.attempt) == ("succeed", 1)
    assert not bus.of(first, inference.JobSucceeded)


async def test_previews_are_told_on_the_way(bus: Bus, pool: Pool) -> None:
    await pool.start()
    job_id = await pool.begin({"seconds": 1, "steps": 5, "preview": True})
    await bus.end_of(job_id)
    previews = [preview for preview in bus.previews if preview.job_id == job_id]
    assert [(preview.step, preview.attempt) for preview in previews] == [
        (n, 1) for n in range(1, 6)
    ]
    assert previews[0].media_type == "image/png"


async def test_a_stopped_worker_gives_its_job_to_another(
    bus: Bus, pool: Pool, tmp_path: Path
) -> None:
    first = await pool.start(drain_seconds=5)
    attempts = tmp_path / "attempts"
    job_id = await pool.begin({"seconds": 20, "steps": 99, "counter": str(attempts), "slow": 1})
    await until(lambda: pool.steps_of(job_id), seconds=10)
    await pool.start()
    began = time.monotonic()
    first.terminate()
    await pool.taken(job_id, 2)
    assert time.monotonic() - began < 8, "given back, not timed out"
    assert await asyncio.to_thread(first.wait, 10) == 0
    assert (await bus.end_of(job_id)).attempt == 2


async def test_a_stopping_worker_finishes_a_short_job(bus: Bus, pool: Pool) -> None:
    worker = await pool.start()
    job_id = await pool.begin({"seconds": 2, "steps": 2})
    await pool.taken(job_id)
    worker.terminate()
    assert await asyncio.to_thread(worker.wait, 10) == 0
    done = await bus.end_of(job_id)
    assert (done.status, done.attempt) == ("succeed", 1)


async def test_a_draining_worker_finishes_what_it_has_begun_and_leaves_the_rest_to_others(
    bus: Bus, pool: Pool
) -> None:
    first = await pool.start()
    begun = await pool.begin({"seconds": 9, "steps": 9})
    await pool.taken(begun)
    waiting = [await pool.begin({}) for _ in range(4)]
    await until(lambda: pool.steps_of(begun))
    first.terminate()
    await until(lambda: _said(bus, first, "stopping"))
    waiting.append(await pool.begin({}))
    await pool.start()
    stopped = time.monotonic()
    for job_id in waiting:
        done = await bus.end_of(job_id, seconds=8)
        assert (done.status, done.attempt) == ("succeed", 1)
    assert bus.of(begun)[-1].status == "inprogress", "the others have not waited for it"
    assert time.monotonic() - stopped < 8
    assert await asyncio.to_thread(first.wait, 20) == 0
    done = await bus.end_of(begun)
    assert (done.status, done.attempt) == ("succeed", 1)
    assert any(b.jobs == [begun] for b in beats_of(bus, first)), "and is heard of meanwhile"


async def _said(bus: Bus, worker: subprocess.Popen[bytes], status: str) -> bool:
    return any(r.pid == worker.pid and r.status == status for r in bus.instances)


def beats_of(bus: Bus, worker: subprocess.Popen[bytes]) -> list[endpoints.InstanceBeat]:
    ids = {report.instance_id for report in bus.instances if report.pid == worker.pid}
    return [beat for beat in bus.beats if beat.instance_id in ids]


async def test_a_worker_tells_how_it_is(bus: Bus, pool: Pool) -> None:
    """Also while its engine is deaf: whatever it does, nobody takes its worker for dead."""
    worker = await pool.start()
    checkpoint = await bus.make_checkpoint(b"weights of this one")
    job_id = await bus.run_job(
        pool.endpoint, msgspec.json.encode({"seconds": 3, "steps": 6}), checkpoint
    )
    await bus.end_of(job_id)
    assert any(beat.jobs == [job_id] for beat in beats_of(bus, worker))
    assert any(beat.models for beat in beats_of(bus, worker))
    first = beats_of(bus, worker)[0]
    assert (first.device, first.device_name, first.endpoint_id) == (
        "cpu",
        "none",
        pool.endpoint.endpoint_id,
    )
    assert (first.memory, first.memory_total, first.jobs) == (1, 2, [])
    heard = len(beats_of(bus, worker))
    await pool.run({"deaf_seconds": 5})
    assert len(beats_of(bus, worker)) >= heard + 2


async def test_a_job_that_was_moved_is_let_go_of(bus: Bus, pool: Pool) -> None:
    """Whether it waits or has begun: another endpoint has it, and does it there."""
    await pool.start()
    other = Pool(bus, await bus.make_endpoint("esd-other", creator="ines"), pool.cache)
    mine = replace(pool.endpoint, creator="ines")
    pool.endpoint = mine
    await bus.say(endpoints.EndpointInService.of(other.endpoint), "endpoints")
    jobs = []
    for seconds in (30, 0):
        params = msgspec.json.encode({"seconds": seconds, "steps": 30})
        jobs.append(await bus.run_job(mine, params, username="ines"))
    long, short = jobs
    await pool.taken(long)
    await until(lambda: pool.steps_of(long))
    failed = replace(mine, version=3, endpoint_status="Failed", error="no GPU")
    await bus.say(endpoints.EndpointFailed.of(failed), "endpoints")
    await bus.wait(inference.JobMoved, lambda job, _: job.job_id == long)
    await bus.wait(inference.JobMoved, lambda job, _: job.job_id == short)
    await until(lambda: bus.waiting(mine.endpoint_id), 0)
    await other.start()
    taken = await pool.taken(long, 2)
    assert taken.endpoint_name == "esd-other"
    await bus.ask(inference.CancelJob(job_id=long, username="ines"))
    done = await bus.end_of(short)
    assert (done.status, done.attempt, done.endpoint_name) == ("succeed", 1, "esd-other")
    assert [event.status for event in bus.of(short)].count("succeed") == 1
    other.stop()


async def test_a_job_outlives_restarts_of_the_bus_and_of_the_store(
    bus: Bus, pool: Pool, servers: Stack
) -> None:
    worker = await pool.start()
    job_id = await pool.begin({"seconds": 3, "steps": 3})
    await pool.taken(job_id)
    for name in ("nats", "seaweedfs"):
        old = await asyncio.to_thread(servers.kill, name)
        await asyncio.to_thread(servers.wait_ready, name, other_than=old)
    done = await bus.end_of(job_id)
    assert (done.status, done.attempt) == ("succeed", 1)
    assert sum(report.pid == worker.pid for report in bus.instances) >= 2, "ready, once more"


async def test_models_are_fetched_once_and_the_oldest_make_room(bus: Bus, pool: Pool) -> None:
    await pool.start(cache_bytes=25)
    await pool.start(cache_bytes=25)
    checkpoints = [await bus.make_checkpoint(f"weights {n:2}".encode()) for n in range(4)]

    async def use(*used: int) -> None:
        jobs = [await bus.run_job(pool.endpoint, b"{}", checkpoints[n]) for n in used]
        for job_id in jobs:
            assert (await bus.end_of(job_id)).status == "succeed"

    def kept() -> list[int]:
        contents = [path.read_text() for path in pool.cache.glob("*.safetensors")]
        return [n for n in range(4) if f"weights {n:2}" in contents]

    await use(0, 0, 0)
    await use(1)
    await use(0)
    await use(2)
    assert kept() == [0, 2]
    await use(3)
    assert kept() == [2, 3]
    logs = "".join(file.read_text() for file in bus.folder.glob("worker-*.log"))
    zero = [line for line in logs.splitlines() if checkpoints[0].checkpoint_id in line]
    assert [json.loads(line)["event"] for line in zero if "sha256" in line] == ["model_fetched"]


@pytest.mark.parametrize("jobs_in_hand", [1, 8])
async def test_the_model_of_the_next_job_is_fetched_while_one_runs(
    bus: Bus, pool: Pool, jobs_in_hand: int
) -> None:
    await pool.start(jobs_in_hand=jobs_in_hand)
    first = await pool.begin({"seconds": 20, "steps": 200})
    await until(lambda: pool.steps_of(first), seconds=10)
    content = f"weights for {first}"
    checkpoint = await bus.make_checkpoint(content.encode())
    second = await bus.run_job(pool.endpoint, b"{}", checkpoint)

    async def is_there() -> bool:
        return any(path.read_text() == content for path in pool.cache.glob("*.safetensors"))

    await until(is_there, seconds=10)
    assert not bus.of(first, inference.JobSucceeded)
    assert not bus.of(second, inference.JobTaken), "it waits for its turn"
    await bus.send(inference.CancelJob(job_id=first, username="alice"))
    done = await bus.end_of(second, seconds=10)
    assert (done.status, done.attempt) == ("succeed", 1)


async def test_a_worker_ends_with_its_endpoint(bus: Bus, pool: Pool) -> None:
    worker = await pool.start(http_port=bus.installation.ports["endpoints"])
    port = bus.installation.ports["endpoints"]
    assert await http_status(port, "/readyz") == 200
    engine = engine_of(worker)
    engine.kill()
    await until(lambda: http_status(port, "/readyz"), 503)
    assert (await pool.run({})).status == "succeed", "the engine is started again for it"
    await bus.js.delete_consumer(JOBS, jobs_durable(pool.endpoint.endpoint_id))
    assert await asyncio.to_thread(worker.wait, 20) == 0


async def test_a_worker_without_an_engine_says_so_and_ends(bus: Bus, pool: Pool) -> None:
    with pytest.raises(AssertionError):
        await pool.start(engine="tests.integration.fake_engine:Missing")
    assert await asyncio.to_thread(pool.workers[0].wait, 10) == 1
    await until(lambda: _count(bus, pool.workers[0]), 1, seconds=5)
    (report,) = [r for r in bus.instances if r.pid == pool.workers[0].pid]
    assert report.status == "failed"
    assert "has no attribute 'Missing'" in (report.error or "")
