"""A worker's cache in a process of its own, to be killed, or to be given a small disk:
`python -m tests.integration.cache_process FOLDER BYTES`, S3 in the environment.

Each line of stdin is a job's models as JSON; the answer is a line with its files, or the error.
They are held until the line `release`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

from services.inference.worker.cache import ModelCache
from shared import logs
from shared.contracts.inference import UsedModel
from shared.errors import DarkroomError
from shared.objects import Objects
from shared.settings import ObjectSettings, load


async def main(folder: Path, limit: int) -> None:
    async with Objects(load(ObjectSettings)).open() as objects, contextlib.AsyncExitStack() as held:
        cache = ModelCache(objects, folder, limit)
        print("started", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line.strip() == "release":
                await held.aclose()
                continue
            models = msgspec.json.decode(line, type=list[UsedModel])
            try:
                files = await held.enter_async_context(cache.hold(models))
                answer = {name: str(path) for name, path in files.items()}
            except DarkroomError as error:
                answer = {type(error).__name__: str(error)}
            print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    logs.configure("cache", "error")
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
