"""Streams and objects into files, and back. Postgres brings its own tools, which the recipes call.

    python -m deploy.containers.backup save-streams FOLDER    # or another of main()'s words

A backup is taken while everything runs, and in this order: streams, Postgres, objects. So Postgres
knows of every command and event that the streams hold, at worst of more: what comes again is known
by its id, and what the streams lack is told anew (`just restore` sees to it). Objects come last,
so that whatever a row names is there.

    streams/EVENTS.json       configuration and state, as the server describes them
    streams/EVENTS.snapshot   its messages and consumers, in the server's own format
    postgres.dump             pg_dump -Fc
    objects/BUCKET.tar        a member for each object, named by its key
    manifest.json             written last: without it a backup is not whole
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from deploy.containers.installation import ContainerInstallation
from deploy.containers.provision import SECRETS
from deploy.local.installation import JOBS_BUCKET, MODELS_BUCKET
from deploy.local.provision import s3_client
from shared.contracts.subjects import STREAMS

CHUNK_BYTES = 128 * 1024
SILENT = 60.0
"""Seconds without a word from the server after which a snapshot has failed."""
CONTENT_TYPE = "DARKROOM.content-type"
"""Of an object, in the header of its member."""


class BackupError(Exception):
    """It can't be saved or restored; says why."""


# NATS


async def _connect(installation: ContainerInstallation) -> Client:
    return await nats.connect(
        installation.nats_url.split(","),
        user="admin",
        password=installation.secrets.nats["admin"],
        inbox_prefix=b"_INBOX_admin",
    )


async def _ask(client: Client, subject: str, body: object) -> dict[str, Any]:
    """Raises BackupError with what the server has against it."""
    answer = await client.request(subject, json.dumps(body).encode(), timeout=SILENT)
    decoded: dict[str, Any] = json.loads(answer.data)
    if "error" in decoded:
        raise BackupError(f"{subject}: {decoded['error']['description']}")
    return decoded


async def save_streams(installation: ContainerInstallation, folder: Path) -> None:
    client = await _connect(installation)
    (folder / "streams").mkdir(exist_ok=True)
    for stream in STREAMS:
        with (folder / "streams" / f"{stream.name}.snapshot").open("wb") as file:
            described = await save_stream(client, str(stream.name), file)
        text = json.dumps(described, indent=1)
        (folder / "streams" / f"{stream.name}.json").write_text(text + "\n")
        print(f"saved {stream.name}: {described['state']['messages']} messages", flush=True)
    await client.close()


async def save_stream(client: Client, name: str, file: IO[bytes]) -> dict[str, Any]:
    """Writes the server's snapshot. Returns the stream's configuration and state."""
    chunks: asyncio.Queue[Msg] = asyncio.Queue()
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, cb=chunks.put)
    request = {"deliver_subject": inbox, "no_consumers": False, "chunk_size": CHUNK_BYTES}
    described = await _ask(client, f"$JS.API.STREAM.SNAPSHOT.{name}", request)
    while True:
        chunk = await asyncio.wait_for(chunks.get(), SILENT)
        if not chunk.data:  # the end, or why there is none
            status = (chunk.headers or {}).get("Status", "204")
            if status not in ("204", "200"):
                raise BackupError(f"snapshot of {name}: {chunk.headers}")
            break
        file.write(chunk.data)
        if chunk.reply:  # the server waits, now and then, until we have kept up
            await chunk.respond(b"")
    await subscription.unsubscribe()
    return {"config": described["config"], "state": described["state"]}


async def load_streams(installation: ContainerInstallation, folder: Path, replicas: int) -> None:
    """What the streams hold now is gone. `replicas` need not be what they had."""
    client = await _connect(installation)
    for stream in STREAMS:
        described = json.loads((folder / "streams" / f"{stream.name}.json").read_text())
        described["config"]["num_replicas"] = replicas
        await client.jetstream().delete_stream(str(stream.name))
        with (folder / "streams" / f"{stream.name}.snapshot").open("rb") as file:
            await load_stream(client, str(stream.name), described, file)
        print(f"restored {stream.name}: {described['state']['messages']} messages", flush=True)
    await client.close()


async def load_stream(
    client: Client, name: str, described: dict[str, Any], file: IO[bytes]
) -> None:
    started = await _ask(client, f"$JS.API.STREAM.RESTORE.{name}", described)
    while chunk := file.read(CHUNK_BYTES):
        answer = await client.request(started["deliver_subject"], chunk, timeout=SILENT)
        if b'"error"' in answer.data:
            raise BackupError(f"restore of {name}: {answer.data.decode()}")
    ended = await client.request(started["deliver_subject"], b"", timeout=SILENT)
    if "error" in (decoded := json.loads(ended.data)):
        raise BackupError(f"restore of {name}: {decoded['error']['description']}")


# S3


def save_objects(installation: ContainerInstallation, folder: Path) -> None:
    client = s3_client(installation)
    (folder / "objects").mkdir(exist_ok=True)
    for bucket in (MODELS_BUCKET, JOBS_BUCKET):
        count = 0
        with tarfile.open(folder / "objects" / f"{bucket}.tar", "w") as archive:
            for key in _keys(client, bucket):
                count += _save_object(client, bucket, key, archive)
        print(f"saved {bucket}: {count} objects", flush=True)


def _keys(client: Any, bucket: str) -> Iterator[str]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        yield from (item["Key"] for item in page.get("Contents", []))


def _save_object(client: Any, bucket: str, key: str, archive: tarfile.TarFile) -> bool:
    """Whether it was still there."""
    try:
        answer = client.get_object(Bucket=bucket, Key=key)
    except client.exceptions.NoSuchKey:
        return False
    member = tarfile.TarInfo(key)
    member.size = answer["ContentLength"]
    member.mtime = answer["LastModified"].timestamp()
    member.pax_headers = {CONTENT_TYPE: answer.get("ContentType", "")}
    archive.addfile(member, answer["Body"])
    return True


def load_objects(installation: ContainerInstallation, folder: Path) -> None:
    """Nothing is deleted: objects that the backup does not know stay."""
    client = s3_client(installation)
    for bucket in (MODELS_BUCKET, JOBS_BUCKET):
        count = 0
        with tarfile.open(folder / "objects" / f"{bucket}.tar") as archive:
            for member in archive:
                extra = {
                    "ContentType": member.pax_headers.get(CONTENT_TYPE) or "binary/octet-stream"
                }
                body = archive.extractfile(member)
                client.upload_fileobj(body, bucket, member.name, ExtraArgs=extra)
                count += 1
        print(f"restored {bucket}: {count} objects", flush=True)


# What is whole


def write_manifest(folder: Path) -> None:
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"bytes": files}, indent=1) + "\n")


def check_manifest(folder: Path) -> None:
    """Raises BackupError unless everything is there that the backup ended with."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        raise BackupError(f"{folder} holds no backup that was finished")
    for name, size in json.loads(manifest.read_text())["bytes"].items():
        file = folder / name
        if not file.exists() or file.stat().st_size != size:
            raise BackupError(f"{file} is not what the backup ended with")


def main(what: str, folder: Path) -> None:
    installation = ContainerInstallation.read(SECRETS)
    replicas = int(os.environ.get("DARKROOM_STREAM_REPLICAS") or 1)
    match what:
        case "save-streams":
            (folder / "manifest.json").unlink(missing_ok=True)
            asyncio.run(save_streams(installation, folder))
        case "save-objects":
            save_objects(installation, folder)
            write_manifest(folder)
        case "check":
            check_manifest(folder)
        case "load-streams":
            asyncio.run(load_streams(installation, folder, replicas))
        case "load-objects":
            load_objects(installation, folder)
        case _:
            raise BackupError(f"{what} is nothing to do with a backup")


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except BackupError as error:
        sys.exit(str(error))
