"""The ledger as a process of its own, with real servers, and a client that plays everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import nats
import nats.errors

from deploy.local.installation import JOBS_BUCKET, MODELS_BUCKET, REPOSITORY
from deploy.local.processes import http_status
from deploy.local.stack import Stack
from shared.contracts import endpoints, inference, models
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Envelope, Message, State, new_id
from shared.contracts.inference import CreateJob, StartJob, UsedModel
from shared.contracts.registry import payload, type_of
from shared.contracts.subjects import (
    EVENTS,
    JOBS,
    command_subject,
    event_subject,
    jobs_consumer,
)
from shared.objects import Objects, params_key

M = TypeVar("M", bound=Message)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Bus:
    """Sends commands and foreign events, and remembers every event that the ledger emits."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.installation = stack.installation
        self.folder = folder
        self.objects = Objects(self.installation.object_settings("admin"))
        self.events: list[tuple[Envelope, Message]] = []
        self.progress: list[inference.JobProgress] = []
        self.previews: list[inference.JobPreview] = []
        self.instances: list[endpoints.ReportInstance] = []
        self.beats: list[endpoints.InstanceBeat] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = 0
        self._arrived = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Bus]:
        self.client = await nats.connect(
            self.installation.nats_url,
            user="admin",
            password=self.installation.secrets.nats["admin"],
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
        )
        self.js = self.client.jetstream()
        await self.js.subscribe("evt.>", stream=EVENTS, ordered_consumer=True, cb=self._on_event)
        await self.client.subscribe("progress.*", cb=self._on_progress)
        await self.client.subscribe("beats.*", cb=self._on_beat)
        reports = asyncio.create_task(self._take_reports())
        async with self.objects.open():
            try:
                yield self
            finally:
                reports.cancel()
                for process in self.processes:
                    process.kill()
                    process.wait()
                await self.client.close()

    def start(self, module: str, who: str, name: str, **more: object) -> subprocess.Popen[bytes]:
        """A process of ours, as the user `who`; its log is `<folder>/<name>.log`."""
        key = self.installation.secrets.s3[who]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "DARKROOM_NATS_URL": self.installation.nats_url,
            "DARKROOM_NATS_USER": who,
            "DARKROOM_NATS_PASSWORD": self.installation.secrets.nats[who],
            "DARKROOM_S3_URL": self.installation.s3_url,
            "DARKROOM_S3_ACCESS_KEY": key.access_key,
            "DARKROOM_S3_SECRET_KEY": key.secret_key,
            **{f"DARKROOM_{name.upper()}": str(value) for name, value in more.items()},
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module], env=environment, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    async def start_ledger(self) -> subprocess.Popen[bytes]:
        self.port = self.installation.ports["inference"]
        process = self.start(
            "services.inference",
            "inference",
            "inference",
            postgres_url=self.installation.postgres_url("inference"),
            http_port=self.port,
        )
        await until(lambda: http_status(self.port, "/readyz"), 200)
        return process

    async def pool(self) -> asyncpg.Pool[Any]:
        return await asyncpg.create_pool(self.installation.postgres_url("inference"), min_size=1)

    # Messages

    async def _on_event(self, message: Any) -> None:
        envelope = cloud.decode(message.data)
        async with self._arrived:
            self.events.append((envelope, payload(envelope)))
            self._arrived.notify_all()

    async def _on_progress(self, message: Any) -> None:
        report = payload(cloud.decode(message.data))
        if isinstance(report, inference.JobPreview):
            self.previews.append(report)
            return
        assert isinstance(report, inference.JobProgress)
        self.progress.append(report)

    async def _on_beat(self, message: Any) -> None:
        beat = payload(cloud.decode(message.data))
        assert isinstance(beat, endpoints.InstanceBeat)
        assert message.subject == f"beats.{beat.instance_id}"
        self.beats.append(beat)

    async def _take_reports(self) -> None:
        """In the place of the endpoints service."""
        queue = await self.js.pull_subscribe_bind("endpoints", "COMMANDS")
        while not self.client.is_closed:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                (message,) = await queue.fetch(1, timeout=1)
                report = payload(cloud.decode(message.data))
                assert isinstance(report, endpoints.ReportInstance)
                self.instances.append(report)
                await message.ack()

    async def say(self, event: State, owner: str) -> None:
        """Publishes a foreign event."""
        envelope = cloud.wrap(event, type=type_of(event), source=owner, subject="x")
        await self.js.publish(event_subject(event, owner=owner), cloud.encode(envelope))

    async def send(self, command: Message, *, id: str | None = None) -> None:
        name = type_of(command)
        envelope = cloud.wrap(
            command, type=name, source="test", subject="x", id=id or new_id(), actor="alice"
        )
        await self.js.publish(command_subject(name), cloud.encode(envelope))

    async def ask(self, command: Message) -> Message:
        """The event that answers a command."""
        id_ = new_id()
        await self.send(command, id=id_)
        return await self.wait(Message, lambda _, envelope: envelope.answers == id_)

    async def wait(
        self,
        kind: type[M],
        wanted: Callable[[M, Envelope], bool] = lambda message, envelope: True,
        *,
        seconds: float = 20,
    ) -> M:
        async with asyncio.timeout(seconds), self._arrived:
            while True:
                for envelope, message in self.events:
                    if isinstance(message, kind) and wanted(message, envelope):
                        return message
                await self._arrived.wait()

    async def end_of(self, job_id: str, *, seconds: float = 30) -> inference.Job:
        """The job as the event of its end tells it."""
        return await self.wait(
            inference.Job,
            lambda job, _: job.job_id == job_id and job.status in ("succeed", "failed"),
            seconds=seconds,
        )

    def of(self, job_id: str, *kinds: type[inference.Job]) -> list[inference.Job]:
        """All events so far about a job."""
        return [
            message
            for _, message in self.events
            if isinstance(message, kinds or inference.Job) and message.job_id == job_id
        ]

    # Things

    async def make_endpoint(self, name: str = "", **fields: object) -> endpoints.Endpoint:
        """An endpoint in service with a queue, as the endpoints service would leave it."""
        endpoint_id = new_id()
        known: dict[str, Any] = {
            "version": 2,
            "endpoint_id": endpoint_id,
            "endpoint_name": name or f"esd-async-{endpoint_id[:8]}",
            "endpoint_type": "Async",
            "instance_type": "local.cpu",
            "endpoint_status": "InService",
            "autoscaling": False,
            "max_instance_number": 1,
            "current_instance_count": 1,
            "roles": ["byoc"],
            "creator": "alice",
            "start_time": NOW,
            "end_time": None,
        }
        await self.js.add_consumer(JOBS, jobs_consumer(endpoint_id))
        return endpoints.Endpoint(**(known | fields))

    async def make_checkpoint(self, content: bytes | None = b"weights") -> models.Checkpoint:
        checkpoint_id = new_id()
        key = f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/model.safetensors"
        if content is not None:
            await self.objects.client.put_object(Bucket=MODELS_BUCKET, Key=key, Body=content)
        return models.Checkpoint(
            version=2,
            checkpoint_id=checkpoint_id,
            type="Stable-diffusion",
            names=["model.safetensors"],
            status="Active",
            s3_location=f"s3://{MODELS_BUCKET}/{key}",
            bucket=MODELS_BUCKET,
            files=[
                models.CheckpointFile(
                    filename="model.safetensors", key=key, size=len(content or b"weights")
                )
            ],
            multipart_upload={},
            creator="alice",
            message="",
            params={},
            allowed_roles_or_users=["*"],
            created_at=NOW,
        )

    async def make_job(
        self,
        *checkpoints: models.Checkpoint,
        params: bytes | None = b"{}",
        job_id: str | None = None,
        inference_type: str = "Async",
    ) -> CreateJob:
        """Created, and its params uploaded."""
        job_id = job_id or new_id()
        command = CreateJob(
            job_id=job_id,
            owner="alice",
            inference_type=inference_type,
            task_type="txt2img",
            models=[
                *(
                    UsedModel(
                        type=checkpoint.type,
                        name="model.safetensors",
                        checkpoint_id=checkpoint.checkpoint_id,
                        bucket=checkpoint.bucket,
                        key=checkpoint.files[0].key,
                        size=checkpoint.files[0].size,
                    )
                    for checkpoint in checkpoints
                ),
                UsedModel(type="VAE", name="Automatic"),
            ],
            checkpoints=list(checkpoints),
            params_key=params_key("txt2img", job_id),
            bucket=JOBS_BUCKET,
        )
        assert isinstance(await self.ask(command), inference.JobCreated)
        if params is not None:
            await self.objects.client.put_object(
                Bucket=JOBS_BUCKET, Key=command.params_key, Body=params
            )
        return command

    async def start_job(
        self,
        job_id: str,
        *pools: endpoints.Endpoint,
        username: str = "alice",
        roles: Sequence[str] = (),
        **more: Any,
    ) -> Message:
        command = StartJob(
            job_id=job_id, username=username, endpoints=list(pools), roles=list(roles), **more
        )
        return await self.ask(command)

    async def run_job(
        self,
        endpoint: endpoints.Endpoint,
        params: bytes,
        *checkpoints: models.Checkpoint,
        username: str = "alice",
    ) -> str:
        """Created and started; its id."""
        job = await self.make_job(*checkpoints, params=params)
        answer = await self.start_job(job.job_id, endpoint, username=username)
        assert isinstance(answer, inference.JobStarted)
        return job.job_id

    async def knows(self, endpoint: endpoints.Endpoint) -> bool:
        """Whether the ledger has heard of it."""
        pool = await self.pool()
        version = await pool.fetchval(
            "SELECT version FROM endpoints WHERE endpoint_id = $1", endpoint.endpoint_id
        )
        await pool.close()
        return bool(version == endpoint.version)

    async def waiting(self, endpoint_id: str) -> int:
        """Messages in the queue of an endpoint."""
        info = await self.js.stream_info(JOBS, subjects_filter=f"jobs.{endpoint_id}")
        return sum((info.state.subjects or {}).values())

    async def work_of(self, endpoint: endpoints.Endpoint) -> inference.RunJob:
        """All that is in the queue of an endpoint."""
        await until(lambda: self.waiting(endpoint.endpoint_id), 1)
        message = await self.js.get_last_msg(JOBS, f"jobs.{endpoint.endpoint_id}")
        work = payload(cloud.decode(message.data or b""))
        assert isinstance(work, inference.RunJob)
        return work

    async def keys(self, job_id: str) -> list[str]:
        """Everything that lies in S3 for a job."""
        found = []
        for prefix in (f"out/{job_id}/", params_key("txt2img", job_id).rpartition("/")[0] + "/"):
            listed = await self.objects.client.list_objects_v2(Bucket=JOBS_BUCKET, Prefix=prefix)
            found += [item["Key"] for item in listed.get("Contents", [])]
        return found


async def until(look: Callable[[], Any], wanted: object = True, *, seconds: float = 30) -> None:
    """Waits until `look()` gives what is wanted."""
    deadline = time.monotonic() + seconds
    while (seen := await look()) != wanted:
        assert time.monotonic() < deadline, f"{wanted} wanted, still {seen}"
        await asyncio.sleep(0.1)
