"""The models service as a process of its own: commands in, events out, bytes in a real S3."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import nats
import pytest
import safetensors.torch
import torch
from aiohttp import web
from nats.aio.client import Client

from deploy.local.installation import MODELS_BUCKET, REPOSITORY, Installation
from deploy.local.stack import Stack
from shared.contracts import envelope as cloud
from shared.contracts import models
from shared.contracts.envelope import Command, Completed, Envelope, Message, Rejected, new_id
from shared.contracts.models import Checkpoint, PartTag, UploadFile
from shared.contracts.registry import payload, type_of
from shared.contracts.subjects import COMMANDS, EVENTS, command_subject, progress_subject
from shared.objects import Objects
from tests.weights import weights

MIB = 1024**2
T = TypeVar("T", bound=Message)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="darkroom-models-") as folder:
        stack = Stack(Path(folder) / "home", services=False, random_ports=True)
        with stack:
            yield stack
        stack.delete()


class Bucket:
    """The models bucket as somebody of the installation may use it."""

    def __init__(self, objects: Objects) -> None:
        self.client = objects.client

    async def put_part(self, upload: models.MultipartUpload, number: int, body: bytes) -> PartTag:
        answer = await self.client.upload_part(
            Bucket=upload.bucket,
            Key=upload.key,
            UploadId=upload.upload_id,
            PartNumber=number,
            Body=body,
        )
        return PartTag(ETag=answer["ETag"], PartNumber=number)

    async def read(self, key: str) -> bytes:
        answer = await self.client.get_object(Bucket=MODELS_BUCKET, Key=key)
        body: bytes = await answer["Body"].read()
        return body

    async def keys(self, part: str) -> list[str]:
        answer = await self.client.list_objects_v2(Bucket=MODELS_BUCKET)
        return [item["Key"] for item in answer.get("Contents", []) if part in item["Key"]]

    async def uploads(self, part: str) -> list[str]:
        answer = await self.client.list_multipart_uploads(Bucket=MODELS_BUCKET)
        return [item["Key"] for item in answer.get("Uploads", []) if part in item["Key"]]


@contextlib.asynccontextmanager
async def bucket_as(installation: Installation, identity: str) -> AsyncIterator[Bucket]:
    async with Objects(installation.object_settings(identity)).open() as objects:
        yield Bucket(objects)


@pytest.fixture(scope="module")
async def gateway_bucket(stack: Stack) -> AsyncIterator[Bucket]:
    """With the rights that presigned URLs carry."""
    async with bucket_as(stack.installation, "gateway") as bucket:
        yield bucket


@pytest.fixture(scope="module")
async def bucket(stack: Stack) -> AsyncIterator[Bucket]:
    async with bucket_as(stack.installation, "admin") as bucket:
        yield bucket


class Hosts:
    """Three servers on loopback, of which only `allowed` may be downloaded from."""

    def __init__(self, allowed: int, forbidden: int) -> None:
        self.allowed = f"http://127.0.0.1:{allowed}"
        self.forbidden = f"http://127.0.0.1:{forbidden}"
        self.by_name = f"http://localhost:{allowed}"
        self.by_number = f"http://2130706433:{allowed}"
        self.visits_of_forbidden = 0
        self.stalled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.asked: list[tuple[str | None, str | None]] = []
        """Range and If-Range of each request for a file that breaks off."""
        self.version = "one"
        self.works = False


@pytest.fixture(scope="module")
async def hosts() -> AsyncIterator[Hosts]:
    state = Hosts(0, 0)

    async def file(request: web.Request) -> web.Response:
        size = int(request.query.get("size", 0))
        return web.Response(body=weights("Upscaler", size, request.path) if size else b"")

    async def named(request: web.Request) -> web.Response:
        disposition = f'attachment; filename="{request.query["name"]}"'
        body = weights("Upscaler", seed=request.query["name"])
        return web.Response(body=body, headers={"Content-Disposition": disposition})

    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.query["to"]})

    async def hop(request: web.Request) -> web.Response:
        left = int(request.query["left"])
        to = f"/hop?left={left - 1}" if left else "/files/hopped.pth?size=2000"
        return web.Response(status=307, headers={"Location": to})

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>log in</html>", content_type="text/html")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(MIB))

    async def stalling(request: web.Request) -> web.StreamResponse:
        """Stops in the middle until it may go on."""
        response = web.StreamResponse()
        await response.prepare(request)
        whole = weights("Upscaler", 20 * MIB)
        await response.write(whole[: 12 * MIB])
        state.stalled.set()
        await state.go_on.wait()
        await response.write(whole[12 * MIB :])
        return response

    async def breaking(request: web.Request) -> web.StreamResponse:
        """Breaks off after 6 MiB each time; goes on where it is asked to."""
        given = request.headers.get("Range"), request.headers.get("If-Range")
        state.asked.append(given)
        whole = weights("Upscaler", 20 * MIB, state.version)
        start = 0
        if given[0] and given[1] == f'"{state.version}"':
            start = int(given[0].removeprefix("bytes=").removesuffix("-"))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{state.version}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        response.content_length = len(whole) - start
        await response.prepare(request)
        await response.write(whole[start : start + 6 * MIB])
        if start + 6 * MIB < len(whole):
            if request.query.get("changes"):
                state.version = "two"
            assert request.transport
            request.transport.abort()
        return response

    async def failing(_: web.Request) -> web.Response:
        if state.works:
            return web.Response(body=weights("Upscaler", seed="at last"))
        return web.Response(status=404)

    async def secret(_: web.Request) -> web.Response:
        state.visits_of_forbidden += 1
        return web.Response(body=b"secret")

    async with contextlib.AsyncExitStack() as running:
        ports = []
        for routes in (
            {
                "/files/{name}": file,
                "/named": named,
                "/redirect": redirect,
                "/hop": hop,
                "/page.pth": page,
                "/endless.pth": endless,
                "/stalling.pth": stalling,
                "/breaking.pth": breaking,
                "/failing.pth": failing,
            },
            {"/secret.pth": secret},
        ):
            app = web.Application()
            for path, handler in routes.items():
                app.router.add_get(path, handler)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            running.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports.append(runner.addresses[0][1])
        Hosts.__init__(state, *ports)
        yield state


class Models:
    """The service's process, and a client that sends it commands and follows its events."""

    def __init__(self, installation: Installation, client: Client, settings: dict[str, str]):
        self.installation = installation
        self.events: list[tuple[Envelope, Message]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._settings = settings
        self._client = client
        self._js = client.jetstream()
        self._arrived = asyncio.Event()

    async def follow(self) -> None:
        async def receive(message: Any) -> None:
            envelope = cloud.decode(message.data)
            self.events.append((envelope, payload(envelope)))
            self._arrived.set()

        await self._js.subscribe("evt.models.>", stream=EVENTS, ordered_consumer=True, cb=receive)

    def start(self, **more: str) -> None:
        installation = self.installation
        key = installation.secrets.s3["models"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.models"],
            env={
                **{n: os.environ[n] for n in ("PATH", "HOME", "LANG") if n in os.environ},
                "DARKROOM_NATS_URL": installation.nats_url,
                "DARKROOM_NATS_USER": "models",
                "DARKROOM_NATS_PASSWORD": installation.secrets.nats["models"],
                "DARKROOM_POSTGRES_URL": installation.postgres_url("models"),
                "DARKROOM_S3_URL": installation.s3_url,
                "DARKROOM_S3_ACCESS_KEY": key.access_key,
                "DARKROOM_S3_SECRET_KEY": key.secret_key,
                "DARKROOM_DOWNLOAD_SCHEMES": "https,http",
                "DARKROOM_DOWNLOAD_MAX_BYTES": str(32 * MIB),
                "DARKROOM_DOWNLOAD_LEASE_SECONDS": "2",
                "DARKROOM_SWEEP_SECONDS": "1",
                **self._settings,
                **more,
            },
            cwd=REPOSITORY,
            stdout=installation.log("models").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    async def stop(self) -> None:
        assert self.process
        self.process.terminate()
        assert await asyncio.to_thread(self.process.wait, 20) == 0

    async def publish(self, command: Command) -> Envelope:
        name = type_of(command)
        framed = cloud.wrap(command, type=name, source="test", subject="test", actor="admin")
        await self.publish_again(framed)
        return framed

    async def publish_again(self, framed: Envelope) -> None:
        await self._js.publish(command_subject(framed.type), cloud.encode(framed))

    async def send(self, command: Command) -> Message:
        """The answer."""
        framed = await self.publish(command)
        return (await self.answers(framed))[-1]

    async def answers(self, framed: Envelope) -> list[Message]:
        def found() -> list[Message]:
            return [event for envelope, event in self.events if envelope.answers == framed.id]

        await self.wait(lambda: bool(found()), f"answer to {framed.type}")
        return found()

    async def commands_left(self) -> int:
        """How many are not yet acknowledged."""
        info = await self._js.consumer_info(COMMANDS, "models")
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def refused(self, command: Command) -> tuple[str, str]:
        answer = await self.send(command)
        assert isinstance(answer, Rejected), answer
        return answer.code, answer.message

    def last(self, checkpoint_id: str) -> Checkpoint:
        found = [e for _, e in self.events if isinstance(e, Checkpoint)]
        return [event for event in found if event.checkpoint_id == checkpoint_id][-1]

    async def wait_status(self, checkpoint_id: str, status: str, seconds: float = 30) -> Checkpoint:
        await self.wait(lambda: self.last(checkpoint_id).status == status, status, seconds)
        return self.last(checkpoint_id)

    async def listen_to_progress(self, checkpoint_id: str) -> list[models.CheckpointProgress]:
        heard: list[models.CheckpointProgress] = []

        async def receive(message: Any) -> None:
            report = payload(cloud.decode(message.data))
            assert isinstance(report, models.CheckpointProgress)
            heard.append(report)

        await self._client.subscribe(progress_subject(checkpoint_id), cb=receive)
        return heard

    async def looked_at(self, checkpoint_id: str) -> Checkpoint:
        await self.wait(lambda: self.last(checkpoint_id).status != "Creating", "verdict")
        return self.last(checkpoint_id)

    async def wait(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"no {what}\n{self.log()[-5000:]}")
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), 0.1)

    def log(self) -> str:
        return self.installation.log("models").read_text()


@pytest.fixture(scope="module")
async def service(stack: Stack, hosts: Hosts) -> AsyncIterator[Models]:
    installation = stack.installation
    client = await nats.connect(
        installation.nats_url,
        user="admin",
        password=installation.secrets.nats["admin"],
        inbox_prefix=b"_INBOX_admin",
    )
    allowed = hosts.allowed.removeprefix("http://")
    service = Models(installation, client, {"DARKROOM_DOWNLOAD_ALLOWED_HOSTS": allowed})
    await service.follow()
    service.start()
    yield service
    service.kill()
    await client.close()


def upload(
    filename: str, parts: int = 1, type: str = "Stable-diffusion", **more: Any
) -> models.CreateCheckpoint:
    return models.CreateCheckpoint(
        checkpoint_id=new_id(),
        checkpoint_type=type,
        creator="admin",
        filenames=[UploadFile(filename=filename, parts_number=parts)],
        **more,
    )


def download(*urls: str, type: str = "Upscaler") -> models.CreateCheckpoint:
    return models.CreateCheckpoint(
        checkpoint_id=new_id(), checkpoint_type=type, creator="admin", urls=list(urls)
    )


async def made(service: Models, bucket: Bucket, command: models.CreateCheckpoint) -> Checkpoint:
    """An Active checkpoint of small files."""
    files = {
        file.filename: weights(command.checkpoint_type, seed=file.filename)
        for file in command.filenames
    }
    return await uploaded(service, bucket, command, files)


async def uploaded(
    service: Models, bucket: Bucket, command: models.CreateCheckpoint, files: dict[str, bytes]
) -> Checkpoint:
    """As it is once it was looked at."""
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated), created
    tags = {
        filename: [await bucket.put_part(upload, 1, files[filename])]
        for filename, upload in created.multipart_upload.items()
    }
    completed = await service.send(
        models.CompleteCheckpoint(checkpoint_id=command.checkpoint_id, multi_parts_tags=tags)
    )
    assert isinstance(completed, models.CheckpointUploaded), completed
    assert completed.status == "Creating"
    return await service.looked_at(command.checkpoint_id)


async def eventually(look: Callable[[], Any], wanted: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while (found := await look()) != wanted:
        assert time.monotonic() < end, f"{found} and never {wanted}"
        await asyncio.sleep(0.1)


async def test_upload_with_wrong_parts_stays_completable(
    service: Models, gateway_bucket: Bucket
) -> None:
    params = {"note": msgspec.Raw(b'{"b": 1.50, "a": [1e400, "\\u00e9"]}')}
    command = upload("big.safetensors", 2, message="hello", params=params)
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated), created
    assert (created.status, created.names, created.version) == ("Initial", ["big.safetensors"], 1)
    prefix = f"Stable-diffusion/checkpoint/custom/{command.checkpoint_id}"
    assert created.s3_location == f"s3://{MODELS_BUCKET}/{prefix}"
    target = created.multipart_upload["big.safetensors"]
    assert (target.key, target.parts_number) == (f"{prefix}/big.safetensors", 2)

    whole = weights("Stable-diffusion", 5 * MIB + 8)
    bodies = whole[: 5 * MIB], whole[5 * MIB :]
    first = await gateway_bucket.put_part(target, 1, bodies[0])
    second = await gateway_bucket.put_part(target, 2, bodies[1])
    wrong = PartTag(PartNumber=2, ETag=f'"{"0" * 32}"')

    async def complete(**tags: list[PartTag]) -> tuple[str, str]:
        renamed = {name.replace("__", "."): parts for name, parts in tags.items()}
        return await service.refused(
            models.CompleteCheckpoint(checkpoint_id=command.checkpoint_id, multi_parts_tags=renamed)
        )

    code, text = await complete(big__safetensors=[first, wrong])
    assert code == "models.part_mismatch"
    assert "big.safetensors" in text
    assert "part 2" in text
    _, text = await complete(big__safetensors=[second, first])
    assert "part 1 is listed after part 2" in text
    _, text = await complete(big__safetensors=[first])
    assert "part 2 was uploaded but is not listed" in text
    assert (await complete(other=[first]))[0] == "models.unknown_file"
    assert (await complete())[0] == "models.missing_file"

    done = models.CompleteCheckpoint(
        checkpoint_id=command.checkpoint_id,
        multi_parts_tags={"big.safetensors": [first, second]},
    )
    completed = await service.send(done)
    assert isinstance(completed, models.CheckpointUploaded), completed
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert [(f.filename, f.size) for f in active.files] == [("big.safetensors", 5 * MIB + 8)]
    assert (await service.refused(done))[0] == "models.not_uploading"
    # What the client sent comes back from the table as it was, even where no float can hold it.
    assert (active.message, set(active.params)) == ("hello", {"note"})
    assert b'"b": 1.50' in bytes(active.params["note"])


async def test_completed_bytes_are_those_that_were_sent(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    command = upload("two.pt")
    files = [UploadFile(filename="two.safetensors"), UploadFile(filename="models [v1].bin")]
    checkpoint = await made(
        service, gateway_bucket, msgspec.structs.replace(command, filenames=files)
    )
    for file in checkpoint.files:
        assert await bucket.read(file.key) == weights(checkpoint.type, seed=file.filename)
    refusal = await service.refused(
        models.RenameCheckpoint(checkpoint_id=command.checkpoint_id, name="x")
    )
    assert refusal[0] == "models.not_renamable"


async def test_a_name_is_used_once_per_type(service: Models, gateway_bucket: Bucket) -> None:
    sent = [await service.publish(upload("taken.safetensors")) for _ in range(4)]
    answers = [(await service.answers(framed))[0] for framed in sent]
    winners = [a for a in answers if isinstance(a, models.CheckpointCreated)]
    losers = [a for a in answers if isinstance(a, Rejected)]
    assert (len(winners), len(losers)) == (1, 3)
    assert losers[0].code == "models.name_taken"
    assert losers[0].message == (
        "taken.safetensors already exists, please use another or rename/delete exists"
    )
    other = await service.send(upload("taken.safetensors", type="Lora"))
    assert isinstance(other, models.CheckpointCreated)
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[winners[0].checkpoint_id]))
    again = await made(service, gateway_bucket, upload("taken.safetensors"))

    renamed = await service.send(
        models.RenameCheckpoint(checkpoint_id=again.checkpoint_id, name="renamed.safetensors")
    )
    assert isinstance(renamed, models.CheckpointChanged)
    assert renamed.names == ["renamed.safetensors"]
    assert renamed.files[0].key == again.files[0].key
    third = await made(service, gateway_bucket, upload("taken.safetensors"))
    refusal = await service.refused(
        models.RenameCheckpoint(checkpoint_id=third.checkpoint_id, name="renamed.safetensors")
    )
    assert refusal[0] == "models.name_taken"


async def test_bad_requests_say_what_is_wrong_and_leave_nothing(
    service: Models, bucket: Bucket
) -> None:
    for command, told in (
        (upload("../../etc/passwd"), "path"),
        (upload("x", type="Chequepoint"), "Stable-diffusion"),
        (upload("x", parts=0), "parts_number"),
        (download("ftp://host/x"), "https://"),
        (upload("nul", params={"a": msgspec.Raw(b'"\\u0000"')}), "checkpoint"),
        (msgspec.structs.replace(upload("x"), filenames=[]), "urls"),
        (msgspec.structs.replace(upload("x"), checkpoint_id="../x"), "checkpoint_id"),
    ):
        code, text = await service.refused(command)
        assert code == "models.invalid"
        assert told in text
        assert await bucket.uploads(command.checkpoint_id) == []


async def test_set_checkpoint_status(service: Models, gateway_bucket: Bucket) -> None:
    id_ = (await made(service, gateway_bucket, upload("switch.pt"))).checkpoint_id

    async def set_to(status: str) -> Message:
        return await service.send(models.SetCheckpointStatus(checkpoint_id=id_, status=status))

    assert isinstance(await set_to("Disabled"), models.CheckpointChanged)
    assert service.last(id_).status == "Disabled"
    assert isinstance(await set_to("Disabled"), Completed)
    await set_to("Active")
    assert service.last(id_).status == "Active"
    assert (service.last(id_).version, isinstance(await set_to("Creating"), Rejected)) == (5, True)
    code, _ = await service.refused(
        models.SetCheckpointStatus(checkpoint_id="unknown", status="Active")
    )
    assert code == "models.not_found"


async def test_delete_removes_bytes_and_uploads_of_those_named_only(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    gone = await made(service, gateway_bucket, upload("gone.pt"))
    stays = await made(service, gateway_bucket, upload("stays.pt"))
    begun = await service.send(upload("begun.pt"))
    assert isinstance(begun, models.CheckpointCreated)
    await gateway_bucket.put_part(begun.multipart_upload["begun.pt"], 1, b"x")
    assert await bucket.uploads(begun.checkpoint_id)

    ids = [gone.checkpoint_id, "unknown", begun.checkpoint_id]
    await service.send(models.DeleteCheckpoints(checkpoint_ids=ids))
    assert service.last(gone.checkpoint_id).deleted
    assert service.last(begun.checkpoint_id).deleted
    await eventually(lambda: bucket.keys(gone.checkpoint_id), [])
    await eventually(lambda: bucket.uploads(begun.checkpoint_id), [])
    assert await bucket.keys(stays.checkpoint_id)
    again = await service.send(models.DeleteCheckpoints(checkpoint_ids=ids))
    assert isinstance(again, Completed)


async def test_a_message_delivered_twice_is_done_once(service: Models, bucket: Bucket) -> None:
    command = upload("twice.pt")
    framed = await service.publish(command)
    await service.publish_again(framed)
    await eventually(service.commands_left, 0)
    created = [event for envelope, event in service.events if envelope.causation_id == framed.id]
    assert [type(event) for event in created] == [models.CheckpointCreated]
    assert len(await bucket.uploads(command.checkpoint_id)) == 1


async def test_a_command_that_died_half_way_is_done_again_cleanly(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    command = upload("half.pt")
    key = f"Stable-diffusion/checkpoint/custom/{command.checkpoint_id}/half.pt"
    await bucket.client.create_multipart_upload(Bucket=MODELS_BUCKET, Key=key)
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated)
    assert len(await bucket.uploads(command.checkpoint_id)) == 1

    target = created.multipart_upload["half.pt"]
    whole = weights("Stable-diffusion")
    tag = await gateway_bucket.put_part(target, 1, whole)
    await bucket.client.complete_multipart_upload(
        Bucket=target.bucket,
        Key=target.key,
        UploadId=target.upload_id,
        MultipartUpload={"Parts": [{"ETag": tag.ETag, "PartNumber": 1}]},
    )  # … and the service dies before its commit
    completed = await service.send(
        models.CompleteCheckpoint(
            checkpoint_id=command.checkpoint_id, multi_parts_tags={"half.pt": [tag]}
        )
    )
    assert isinstance(completed, models.CheckpointUploaded), completed
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert active.files[0].size == len(whole)


async def test_an_object_store_that_is_away_delays_and_loses_nothing(
    stack: Stack, service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    doomed = await made(service, gateway_bucket, upload("doomed.pt"))
    pid = stack.kill("seaweedfs")
    deleted = await service.send(models.DeleteCheckpoints(checkpoint_ids=[doomed.checkpoint_id]))
    assert isinstance(deleted, models.CheckpointDeleted)
    late = await service.send(upload("late.pt"))
    assert isinstance(late, models.CheckpointCreated), late
    await asyncio.to_thread(stack.wait_ready, "seaweedfs", other_than=pid)
    await eventually(lambda: bucket.keys(doomed.checkpoint_id), [])
    assert len(await bucket.uploads(late.checkpoint_id)) == 1


async def test_download_follows_redirects_and_keeps_every_byte(
    service: Models, hosts: Hosts, bucket: Bucket
) -> None:
    file = f"{hosts.allowed}/files/inner.bin?size={20 * MIB + 7}"
    command = download(
        f"{hosts.allowed}/redirect?to={file}".replace("redirect?", "redirect?n=1&", 1),
        f"{hosts.allowed}/named?name=given name.pth",
        f"{hosts.allowed}/hop?left=4",
    )
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated), created
    assert created.status == "Creating"
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert active.names == ["redirect", "given name.pth", "hop"]
    assert [f.size for f in active.files] == [20 * MIB + 7, 16_384, 2000]
    whole = weights("Upscaler", 20 * MIB + 7, "/files/inner.bin")
    assert await bucket.read(active.files[0].key) == whole
    assert active.files[0].sha256 == hashlib.sha256(whole).hexdigest()
    assert await bucket.uploads(command.checkpoint_id) == []
    code, _ = await service.refused(upload("given name.pth", type="Upscaler"))
    assert code == "models.name_taken"


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        (["{forbidden}/secret.pth"], "may not reach"),
        (["{allowed}/redirect?to={forbidden}/secret.pth"], "may not reach"),
        (["{by_name}/files/x.pth?size=2000"], "may not reach"),
        (["{by_number}/files/x.pth?size=2000"], "no valid URL"),
        (["{allowed}/redirect?to=ftp://host/x"], "only"),
        (["{allowed}/redirect?to=file:///etc/passwd"], "only"),
        (["{allowed}/hop?left=5"], "more than 5 redirects"),
        (["{allowed}/missing.pth?token=abc"], "/missing.pth: answered 404"),
        (["{allowed}/page.pth"], "web page"),
        (["{allowed}/files/big.pth?size=40000000"], "larger than"),
        (["{allowed}/endless.pth"], "larger than"),
        (["{allowed}/files/empty.pth?size=0"], "empty"),
        (["{allowed}/named?name=.."], "can't be used"),
        (["{allowed}/named?name=" + "x" * 4000 + ".pth"], "can't be used"),
        (["{allowed}/files/a.pth?size=2000", "{allowed}/named?name=a.pth"], "two of the URLs"),
        (["{allowed}/files/b.pth?size=2000", "{allowed}/missing.pth"], "answered 404"),
        (["http://nowhere.invalid/x.pth"], "3 times"),
    ],
)
async def test_download_that_can_not_be_done_fails_with_its_reason_and_leaves_nothing(
    service: Models, hosts: Hosts, bucket: Bucket, urls: list[str], told: str
) -> None:
    command = download(*(url.format(**vars(hosts)) for url in urls))
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated), created
    failed = await service.wait_status(command.checkpoint_id, "Failed")
    assert failed.error
    assert told in failed.error
    assert "token" not in failed.error
    assert hosts.visits_of_forbidden == 0
    await eventually(lambda: bucket.keys(command.checkpoint_id), [])
    assert await bucket.uploads(command.checkpoint_id) == []
    # Its name is free again.
    again = await service.send(upload("a.pth", type="Upscaler"))
    assert isinstance(again, models.CheckpointCreated)
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[again.checkpoint_id]))


async def test_download_begins_again_after_a_crash_and_ends_when_it_is_deleted(
    service: Models, hosts: Hosts, bucket: Bucket
) -> None:
    command = download(f"{hosts.allowed}/stalling.pth")
    await service.send(command)
    await asyncio.wait_for(hosts.stalled.wait(), 20)
    await eventually(
        lambda: bucket.uploads(command.checkpoint_id), [f"{key(command)}/stalling.pth"]
    )
    service.kill()
    hosts.stalled.clear()
    service.start()
    await asyncio.wait_for(hosts.stalled.wait(), 20)
    await service.stop()
    assert await bucket.uploads(command.checkpoint_id) == []
    hosts.go_on.set()
    service.start()
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert active.version == 2
    assert await bucket.read(active.files[0].key) == weights("Upscaler", 20 * MIB)
    assert await bucket.uploads(command.checkpoint_id) == []

    hosts.stalled.clear()
    hosts.go_on.clear()
    second = download(f"{hosts.allowed}/stalling.pth?second", type="hypernetworks")
    await service.send(second)
    await asyncio.wait_for(hosts.stalled.wait(), 20)
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[second.checkpoint_id]))
    await eventually(lambda: bucket.uploads(second.checkpoint_id), [])
    hosts.go_on.set()
    await asyncio.sleep(1)
    assert await bucket.keys(second.checkpoint_id) == []
    assert service.last(second.checkpoint_id).deleted


async def test_a_download_that_breaks_off_goes_on_where_it_was(
    service: Models, hosts: Hosts, bucket: Bucket
) -> None:
    command = download(f"{hosts.allowed}/breaking.pth")
    progress = await service.listen_to_progress(command.checkpoint_id)
    await service.send(command)
    active = await service.wait_status(command.checkpoint_id, "Active")
    whole = weights("Upscaler", 20 * MIB, "one")
    assert await bucket.read(active.files[0].key) == whole
    assert active.files[0].sha256 == hashlib.sha256(whole).hexdigest()
    assert hosts.asked[0] == (None, None)
    starts = [int(str(asked[0])[6:-1]) for asked in hosts.asked[1:]]
    assert starts == sorted(set(starts)), "it never went back"
    assert starts[-1] > 12 * MIB
    assert {asked[1] for asked in hosts.asked[1:]} == {'"one"'}
    told = [(report.stage, report.bytes, report.total, report.percent) for report in progress]
    assert told[-1] == ("download", 20 * MIB, 20 * MIB, 100.0)
    assert [t[1] for t in told] == sorted(t[1] for t in told)
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[command.checkpoint_id]))


async def test_a_file_that_changes_meanwhile_is_never_mixed(
    service: Models, hosts: Hosts, bucket: Bucket
) -> None:
    command = download(f"{hosts.allowed}/breaking.pth?changes=1")
    await service.send(command)
    active = await service.wait_status(command.checkpoint_id, "Active", 60)
    assert await bucket.read(active.files[0].key) == weights("Upscaler", 20 * MIB, "two")
    assert await bucket.uploads(command.checkpoint_id) == []


async def test_a_failed_download_can_be_tried_again(
    service: Models, hosts: Hosts, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    command = download(f"{hosts.allowed}/failing.pth?token=hush")
    retry = models.RetryCheckpoint(checkpoint_id=command.checkpoint_id)
    await service.send(command)
    failed = await service.wait_status(command.checkpoint_id, "Failed")
    assert "answered 404" in (failed.error or "")
    again = await service.send(retry)
    assert isinstance(again, models.CheckpointRetried), again
    assert (again.status, again.error, again.names) == ("Creating", None, ["failing.pth"])
    await service.wait_status(command.checkpoint_id, "Failed")
    hosts.works = True
    await service.send(retry)
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert active.names == ["failing.pth"]
    assert await bucket.keys(command.checkpoint_id) == [f"{key(command)}/failing.pth"]
    code, text = await service.refused(retry)
    assert (code, "it is Active" in text) == ("models.not_retriable", True)
    # What was uploaded is gone, so there is nothing to try again.
    broken = upload("broken.pt")
    await uploaded(service, gateway_bucket, broken, {"broken.pt": b"nothing"})
    code, text = await service.refused(models.RetryCheckpoint(checkpoint_id=broken.checkpoint_id))
    assert (code, "upload it once more" in text) == ("models.not_retriable", True)
    told = "".join(bytes(envelope.data).decode() for envelope, _ in service.events)
    assert "failing.pth" in told
    assert "hush" not in told


# Looking at files


def pickled(what: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


async def test_what_a_file_is_stands_beside_it(service: Models, gateway_bucket: Bucket) -> None:
    file = weights("Lora", 8 * MIB, "told")
    lora = await uploaded(
        service, gateway_bucket, upload("told.safetensors", type="Lora"), {"told.safetensors": file}
    )
    assert lora.status == "Active"
    (found,) = lora.files
    assert found.sha256 == hashlib.sha256(file).hexdigest()
    assert found.kind
    assert (found.kind.type, found.kind.title) == ("Lora", "a LoRA for SD 1.x")
    assert (found.kind.rank, found.kind.format) == (4, "safetensors")
    embedding = pickled({"string_to_param": {"*": torch.zeros(3, 768)}})
    told = await uploaded(
        service, gateway_bucket, upload("pickled.pt", type="embeddings"), {"pickled.pt": embedding}
    )
    assert told.files[0].kind
    assert (told.files[0].kind.vectors, told.files[0].kind.format) == (3, "pickle")


@pytest.mark.parametrize(
    ("declared", "file", "told"),
    [
        ("Lora", weights("Stable-diffusion"), "declared as Lora and is a SD 1.x checkpoint"),
        ("Stable-diffusion", weights("Lora"), "is a LoRA for SD 1.x (type Lora)"),
        ("VAE", weights("ControlNet"), "(type ControlNet)"),
        ("ControlNet", weights("Upscaler"), "is no model that is known here"),
        ("Upscaler", weights("VAE"), "declared as Upscaler and is a VAE"),
        ("Upscaler", weights("FaceRestoration"), "restores faces (type FaceRestoration)"),
        ("FaceRestoration", weights("Upscaler"), "is no model that is known here"),
        ("rembg", weights("embeddings"), "(type embeddings)"),
        ("rembg", b"<html>" * 100, "no ONNX model"),
        ("Lora", weights("Lora")[:-1], "upload it again"),
        ("Lora", b"PK" + bytes(100), "its ZIP can't be read"),
    ],
)
async def test_what_is_not_what_it_was_declared_as_fails_and_leaves_nothing(
    service: Models, gateway_bucket: Bucket, bucket: Bucket, declared: str, file: bytes, told: str
) -> None:
    command = upload("wrong.bin", type=declared)
    failed = await uploaded(service, gateway_bucket, command, {"wrong.bin": file})
    assert failed.status == "Failed"
    assert failed.error
    assert failed.error.startswith("wrong.bin: ")
    assert told in failed.error
    await eventually(lambda: bucket.keys(command.checkpoint_id), [])
    again = await service.send(upload("wrong.bin", type=declared))
    assert isinstance(again, models.CheckpointCreated), "its name is free"
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[again.checkpoint_id]))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/darkroom-was-here",)


async def test_a_harmful_file_is_disabled_for_good(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    evil = pickled({"state_dict": {"a": torch.zeros(3)}, "callbacks": Evil()})
    command = upload("evil.ckpt")
    refused = await uploaded(service, gateway_bucket, command, {"evil.ckpt": evil})
    assert isinstance(refused, models.CheckpointRefused)
    assert refused.status == "Disabled"
    assert "evil.ckpt is a pickle that would run posix.system" in (refused.error or "")
    assert not Path("/tmp/darkroom-was-here").exists()
    assert await bucket.keys(command.checkpoint_id), "it can be looked at"
    code, text = await service.refused(
        models.SetCheckpointStatus(checkpoint_id=command.checkpoint_id, status="Active")
    )
    assert code == "models.refused"
    assert "posix.system" in text
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[command.checkpoint_id]))
    await eventually(lambda: bucket.keys(command.checkpoint_id), [])


async def test_empty_parts_are_dropped(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    command = upload("thin.pt", 4)
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated)
    target = created.multipart_upload["thin.pt"]
    whole = weights("Stable-diffusion", 6 * MIB, "thin")
    parts = whole[: 5 * MIB], b"", whole[5 * MIB :], b""
    tags = [await gateway_bucket.put_part(target, n, part) for n, part in enumerate(parts, 1)]
    await service.send(
        models.CompleteCheckpoint(
            checkpoint_id=command.checkpoint_id, multi_parts_tags={"thin.pt": tags}
        )
    )
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert await bucket.read(active.files[0].key) == whole


async def test_the_same_content_is_stored_once_and_outlives_either_name(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    """Whichever of the twins goes first."""

    async def twin(name: str, whole: bytes) -> Checkpoint:
        return await uploaded(service, gateway_bucket, upload(name), {name: whole})

    async def delete(checkpoint: Checkpoint) -> None:
        await service.send(models.DeleteCheckpoints(checkpoint_ids=[checkpoint.checkpoint_id]))

    for first_goes_first in (True, False):
        whole = weights("Stable-diffusion", seed=f"twins {first_goes_first}")
        first, second = await twin("first.pt", whole), await twin("second.pt", whole)
        assert (first.names, second.names) == (["first.pt"], ["second.pt"])
        (key,) = {file.key for file in (*first.files, *second.files)}
        assert first.checkpoint_id in key
        await eventually(partial(bucket.keys, second.checkpoint_id), [])
        one, other = (first, second) if first_goes_first else (second, first)
        await delete(one)
        third = await twin("third.pt", whole)
        assert third.files[0].key == key
        await delete(other)
        await asyncio.sleep(1.5)  # more than a sweep
        assert await bucket.read(key) == whole
        await delete(third)
        await eventually(partial(bucket.keys, first.checkpoint_id), [])
        again = await twin("fourth.pt", whole)
        assert again.checkpoint_id in again.files[0].key
        await delete(again)


async def test_twins_that_come_at_the_same_time_are_one(
    service: Models, hosts: Hosts, bucket: Bucket
) -> None:
    url = f"{hosts.allowed}/files/same.pth?size={9 * MIB}&n="
    types = ("Upscaler", "hypernetworks")
    commands = [download(f"{url}{type_}", type=type_) for type_ in types]
    await asyncio.gather(*(service.send(command) for command in commands))
    active = [await service.wait_status(c.checkpoint_id, "Active") for c in commands]
    (key,) = {checkpoint.files[0].key for checkpoint in active}

    async def keys() -> list[str]:
        return [k for c in commands for k in await bucket.keys(c.checkpoint_id)]

    await eventually(keys, [key])
    await service.send(models.DeleteCheckpoints(checkpoint_ids=[c.checkpoint_id for c in commands]))
    await eventually(keys, [])


async def test_what_a_crash_leaves_of_a_deletion_is_removed_later(
    stack: Stack, service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    """Killed while S3 is away: the commit is done, the bytes are not."""
    whole = weights("Stable-diffusion", seed="half deleted")
    first = await uploaded(service, gateway_bucket, upload("h1.pt"), {"h1.pt": whole})
    second = await uploaded(service, gateway_bucket, upload("h2.pt"), {"h2.pt": whole})
    ids = [first.checkpoint_id, second.checkpoint_id]
    pid = stack.kill("seaweedfs")
    await service.send(models.DeleteCheckpoints(checkpoint_ids=ids[:1]))
    await service.send(models.DeleteCheckpoints(checkpoint_ids=ids[1:]))
    await asyncio.sleep(0.5)
    service.kill()
    await asyncio.to_thread(stack.wait_ready, "seaweedfs", other_than=pid)
    assert await bucket.keys(first.checkpoint_id)
    service.start()
    await eventually(lambda: bucket.keys(first.checkpoint_id), [])


async def test_an_upload_is_looked_at_even_if_the_service_dies_meanwhile(
    service: Models, gateway_bucket: Bucket
) -> None:
    command = upload("survivor.pt")
    created = await service.send(command)
    assert isinstance(created, models.CheckpointCreated)
    target = created.multipart_upload["survivor.pt"]
    whole = weights("Stable-diffusion", 40 * MIB, "survivor")
    parts = [whole[at : at + 10 * MIB] for at in range(0, len(whole), 10 * MIB)]
    tags = [await gateway_bucket.put_part(target, n, part) for n, part in enumerate(parts, 1)]
    await service.publish(
        models.CompleteCheckpoint(
            checkpoint_id=command.checkpoint_id, multi_parts_tags={"survivor.pt": tags}
        )
    )
    await service.wait(lambda: service.last(command.checkpoint_id).version == 2, "completion")
    service.kill()
    service.start()
    active = await service.wait_status(command.checkpoint_id, "Active")
    assert active.files[0].sha256 == hashlib.sha256(whole).hexdigest()


async def test_clean_pickles_can_be_converted(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    tensors = {
        "emb_params": torch.randn(5, 768).half(),
    }
    await service.stop()
    service.start(DARKROOM_CONVERT_PICKLES="true")
    command = upload("word.pt", type="embeddings")
    active = await uploaded(service, gateway_bucket, command, {"word.pt": pickled(tensors)})
    assert active.names == ["word.safetensors"]
    (file,) = active.files
    whole = await bucket.read(file.key)
    assert file.sha256 == hashlib.sha256(whole).hexdigest()
    assert file.kind
    assert file.kind.format == "safetensors"
    (loaded,) = safetensors.torch.load(whole).values()
    assert torch.equal(loaded, tensors["emb_params"])
    await eventually(lambda: bucket.keys(command.checkpoint_id), [file.key])
    again = await uploaded(
        service, gateway_bucket, upload("word.pt", type="embeddings"), {"word.pt": pickled({})}
    )
    assert again.status == "Failed", "the name of what was converted is free, and this is empty"
    # What would take the name of another file of the checkpoint stays what it is.
    other = pickled({"emb_params": torch.ones(2, 768)})
    files = {"a.safetensors": weights("embeddings", seed="a"), "a.pt": other, "a.bin": other}
    several = msgspec.structs.replace(
        upload("a.pt", type="embeddings"),
        filenames=[UploadFile(filename=name, parts_number=1) for name in files],
    )
    active = await uploaded(service, gateway_bucket, several, files)
    assert active.status == "Active"
    assert active.names == list(files)
    assert [await bucket.read(file.key) for file in active.files] == list(files.values())
    # What can't be copied as it is stays what it is: here, a tensor that does not lie in one piece.
    turned = {"emb_params": torch.randn(768, 5).t()}
    kept = await uploaded(
        service, gateway_bucket, upload("t.pt", type="embeddings"), {"t.pt": pickled(turned)}
    )
    assert kept.names == ["t.pt"]
    await service.stop()
    service.start()


def tarred(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return packed.getvalue()


async def test_a_tar_that_is_named_like_its_model_is_unpacked(
    service: Models, gateway_bucket: Bucket, bucket: Bucket
) -> None:
    """What "Upload from WebUI" of ESD's extension sends."""
    model, folder = weights("Stable-diffusion", 9 * MIB, "packed"), "models/Stable-diffusion"
    name = "packed.safetensors"
    sent = tarred({f"{folder}/{name}": model, f"{folder}/packed.yaml": b"model: {}"})
    active = await uploaded(service, gateway_bucket, upload(name), {name: sent})
    assert (active.status, active.names) == ("Active", [name])
    (file,) = active.files
    assert (file.size, file.sha256) == (len(model), hashlib.sha256(model).hexdigest())
    assert file.kind
    assert (file.kind.type, file.kind.format) == ("Stable-diffusion", "safetensors")
    assert await bucket.read(file.key) == model
    await eventually(lambda: bucket.keys(active.checkpoint_id), [file.key])
    # Its name is taken now, also for a file in an archive of another name.
    other = upload("other.safetensors")
    sent = tarred({name: weights("Stable-diffusion", seed="another")})
    failed = await uploaded(service, gateway_bucket, other, {"other.safetensors": sent})
    assert failed.status == "Failed"
    assert f"{name} already exists" in (failed.error or "")
    await eventually(lambda: bucket.keys(other.checkpoint_id), [])
    # What lies in it is judged as if it had come by itself.
    wrong = upload("wrong.tar", type="VAE")
    sent = tarred({"wrong.safetensors": weights("Lora")})
    failed = await uploaded(service, gateway_bucket, wrong, {"wrong.tar": sent})
    assert "wrong.safetensors: it was declared as VAE" in (failed.error or "")


def key(command: models.CreateCheckpoint) -> str:
    return f"{command.checkpoint_type}/checkpoint/custom/{command.checkpoint_id}"


async def test_uploads_that_are_never_completed_expire(service: Models, bucket: Bucket) -> None:
    orphan = f"Lora/checkpoint/custom/{new_id()}/orphan.pt"
    await bucket.client.create_multipart_upload(Bucket=MODELS_BUCKET, Key=orphan)
    foreign = "elsewhere/of/somebody"
    await bucket.client.create_multipart_upload(Bucket=MODELS_BUCKET, Key=foreign)
    command = upload("forgotten.pt")
    await service.send(command)
    active = next(
        event
        for _, event in service.events
        if isinstance(event, models.CheckpointActivated)
        and not service.last(event.checkpoint_id).deleted
    )
    await service.stop()
    service.start(DARKROOM_UPLOAD_EXPIRES_HOURS="0.001")
    await service.wait(lambda: service.last(command.checkpoint_id).deleted, "expiry")
    assert "not completed" in (service.last(command.checkpoint_id).error or "")
    await eventually(lambda: bucket.uploads(""), [foreign])
    assert active.files[0].key in await bucket.keys("")
    await service.stop()
    service.start()


async def test_resync_tells_the_state_of_all_even_of_the_deleted(service: Models) -> None:
    known = {e.checkpoint_id: e for _, e in service.events if isinstance(e, Checkpoint)}
    framed = await service.publish(models.ResyncModels())
    await service.answers(framed)
    synced = {
        event.checkpoint_id: event
        for envelope, event in service.events
        if envelope.causation_id == framed.id and isinstance(event, models.CheckpointSynced)
    }
    assert synced.keys() == known.keys()
    for checkpoint_id, event in synced.items():
        for field in ("version", "deleted", "status", "names", "files", "error"):
            assert getattr(event, field) == getattr(known[checkpoint_id], field)
