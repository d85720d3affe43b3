"""The worker's cache on a real S3, with real processes that share it and die. A proxy in between
counts what comes, lets it wait, and cuts connections."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from deploy.local.installation import MODELS_BUCKET, REPOSITORY
from deploy.local.stack import Stack
from services.inference.worker.cache import OURS, ModelCache
from services.inference.worker.engine import JobFailure
from services.inference.worker.fetching import RANGE
from services.inference.worker.hashes import Hashes
from shared.contracts.envelope import new_id
from shared.contracts.inference import UsedModel
from shared.objects import Objects
from tests.integration.inference_bus import until

MIB = 1024**2
BIG = 5 * RANGE + 12345
NO_LIMIT = 1024**4


class Proxy:
    """Between a worker and S3. `let`: bytes after which nothing more comes, until `open()`.
    `cuts`: counts of bytes after which the connection breaks that carries the next one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self.let = NO_LIMIT
        self.cuts: list[int] = []
        self.came = 0
        self.waits = False

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = "http://127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())

    def open(self) -> None:
        self._open.set()

    async def close(self) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._serving.add(task)
        store_reader, store_writer = await asyncio.open_connection("127.0.0.1", self._port)
        asking = asyncio.create_task(self._pass_on(reader, store_writer))
        try:
            await self._give(store_reader, writer)
        except asyncio.CancelledError:
            pass  # as close() wants it
        finally:
            asking.cancel()
            writer.transport.abort()
            store_writer.transport.abort()
            self._serving.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(MIB):
                writer.write(data)

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                if self.came > self.let:
                    self.waits = True
                    await self._open.wait()
                self.came += len(data)
                if self.cuts and self.came > self.cuts[0]:
                    self.cuts.pop(0)
                    return
                writer.write(data)
                await writer.drain()


class Store:
    """The S3 of the tests, and what a worker needs to read from it by way of a proxy."""

    def __init__(self, stack: Stack, proxy: Proxy) -> None:
        self.installation = stack.installation
        self.proxy = proxy
        self.admin = Objects(self.installation.object_settings("admin"))
        settings = self.installation.object_settings("worker")
        self.objects = Objects(msgspec.structs.replace(settings, s3_url=proxy.url))
        self.processes: list[Process] = []

    async def put(
        self, content: bytes, name: str = "model.safetensors", sha256: str | None = None
    ) -> UsedModel:
        """A checkpoint of its own, registered with the SHA-256 that it has, or another one."""
        checkpoint_id = new_id()
        key = f"Stable-diffusion/checkpoint/custom/{checkpoint_id}/{name}"
        await self.admin.client.put_object(Bucket=MODELS_BUCKET, Key=key, Body=content)
        return UsedModel(
            type="Stable-diffusion",
            name=name,
            checkpoint_id=checkpoint_id,
            bucket=MODELS_BUCKET,
            key=key,
            size=len(content),
            sha256=digest(content) if sha256 is None else sha256,
        )

    def start(self, folder: Path, *before: str, limit: int = NO_LIMIT) -> Process:
        settings = msgspec.structs.asdict(self.objects.settings)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            **{f"DARKROOM_{name.upper()}": value for name, value in settings.items()},
        }
        module = ("-m", "tests.integration.cache_process")
        process = Process(
            subprocess.Popen(
                [*before, sys.executable, *module, str(folder), str(limit)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self.processes.append(process)
        return process


class Process:
    """See `cache_process.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.popen = process

    def send(self, *models: UsedModel) -> None:
        self._write(msgspec.json.encode(models).decode())

    def release(self) -> None:
        self._write("release")

    async def hold(self, *models: UsedModel) -> dict[str, str]:
        self.send(*models)
        return await self.answer()

    async def answer(self) -> dict[str, str]:
        return msgspec.json.decode(await self.line(), type=dict[str, str])

    async def line(self) -> str:
        assert self.popen.stdout
        async with asyncio.timeout(60):
            return await asyncio.to_thread(self.popen.stdout.readline)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def _write(self, line: str) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()


@pytest.fixture
async def store(servers: Stack) -> AsyncIterator[Store]:
    proxy = Proxy(servers.installation.ports["s3"])
    await proxy.start()
    store = Store(servers, proxy)
    async with store.admin.open(), store.objects.open():
        yield store
    for process in store.processes:
        process.kill()
    await proxy.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="darkroom-cache-") as name:
        yield Path(name) / "cache"


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder: Path) -> list[str]:
    """Of all files in a cache but the notes of hashes."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(file) for file in files if file.parts[0] != ".sha256")


async def fetch(cache: ModelCache, *models: UsedModel) -> list[Path]:
    async with cache.hold(models) as files:
        return [files[model.content] for model in models]


async def refused(cache: ModelCache, model: UsedModel) -> str:
    with pytest.raises(JobFailure) as failure:
        await fetch(cache, model)
    return str(failure.value)


async def test_a_file_comes_in_ranges_and_its_hash_is_known_without_reading_it(
    store: Store, folder: Path
) -> None:
    data = content(BIG)
    model = await store.put(data)
    (path,) = await fetch(ModelCache(store.objects, folder, NO_LIMIT), model)
    assert path.read_bytes() == data
    assert names(folder) == [f"{digest(data)}.safetensors"]
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Hashes(folder).sha256(path) == digest(data)


async def test_what_the_registry_has_not_hashed_is_fetched_and_hashed(
    store: Store, folder: Path
) -> None:
    data = content(3000)
    model = await store.put(data, "Model.CKPT", sha256="")
    empty = await store.put(b"", "empty.pt", sha256="")
    cache = ModelCache(store.objects, folder, NO_LIMIT)
    path, nothing = await fetch(cache, model, empty)
    assert (path.read_bytes(), path.suffix, nothing.read_bytes()) == (data, ".ckpt", b"")
    came = store.proxy.came
    assert await fetch(cache, model) == [path]
    assert store.proxy.came == came
    assert len(list((folder / ".sha256").iterdir())) == 2
    assert Hashes(folder).sha256(path) == digest(data)
    assert len(list((folder / ".sha256").iterdir())) == 2, "it was known"


async def test_what_is_not_what_was_registered_is_refused_and_leaves_nothing(
    store: Store, folder: Path
) -> None:
    data = content(BIG)
    cache = ModelCache(store.objects, folder, NO_LIMIT)
    model = await store.put(data)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    await store.admin.client.put_object(Bucket=MODELS_BUCKET, Key=model.key, Body=damaged)
    assert await refused(cache, model) == (
        'model "model.safetensors" is not what was registered: the file in the store has the'
        f" SHA-256 {digest(damaged)}, registered was {digest(data)}"
    )
    assert names(folder) == []
    await store.admin.client.put_object(Bucket=MODELS_BUCKET, Key=model.key, Body=data)
    (path,) = await fetch(cache, model)
    assert path.read_bytes() == data


async def test_a_range_that_breaks_off_is_fetched_again_alone(store: Store, folder: Path) -> None:
    data = content(BIG)
    model = await store.put(data)
    store.proxy.cuts = [RANGE + 77, 2 * RANGE + 1000, 4 * RANGE]
    (path,) = await fetch(ModelCache(store.objects, folder, NO_LIMIT), model)
    assert path.read_bytes() == data
    assert store.proxy.cuts == []
    assert store.proxy.came < BIG + 3 * RANGE + MIB


async def test_a_fetch_that_is_cancelled_leaves_nothing(store: Store, folder: Path) -> None:
    model = await store.put(content(BIG))
    store.proxy.let = RANGE
    fetching = asyncio.create_task(fetch(ModelCache(store.objects, folder, NO_LIMIT), model))
    await until(lambda: waits(store.proxy))
    assert names(folder) == [f".parts/{model.sha256}.safetensors"]
    fetching.cancel()
    await asyncio.wait({fetching})
    assert fetching.cancelled()
    assert names(folder) == []


async def test_two_processes_fetch_a_file_once(store: Store, folder: Path) -> None:
    data = content(BIG)
    model = await store.put(data)
    store.proxy.let = RANGE
    both = [store.start(folder), store.start(folder)]
    for process in both:
        assert await process.line() == "started\n"
        process.send(model)
    await until(lambda: waits(store.proxy))
    await asyncio.sleep(1)
    store.proxy.open()
    files = [await process.answer() for process in both]
    path = folder / f"{model.sha256}.safetensors"
    assert files[0] == files[1] == {model.content: str(path)}
    assert path.read_bytes() == data
    assert names(folder) == [path.name]
    assert BIG < store.proxy.came < BIG + MIB


async def test_what_a_killed_process_has_begun_another_one_completes(
    store: Store, folder: Path
) -> None:
    """Of the same file; of others it clears the parts away when it starts."""
    data = content(BIG)
    model, other = await store.put(data), await store.put(content(BIG, seed=1))
    store.proxy.let = 2 * RANGE
    first, second, waiting = (store.start(folder) for _ in range(3))
    for process in (first, second, waiting):
        assert await process.line() == "started\n"
    first.send(model)
    second.send(other)
    waiting.send(model)
    await until(lambda: waits(store.proxy))
    parts = [f".parts/{one.sha256}.safetensors" for one in (model, other)]
    await until(lambda: listed(folder), sorted(parts))
    first.kill()
    second.kill()
    store.proxy.open()
    await waiting.answer()
    assert (folder / f"{model.sha256}.safetensors").read_bytes() == data
    assert names(folder) == [parts[1], f"{model.sha256}.safetensors"]
    ModelCache(store.objects, folder, NO_LIMIT)
    assert names(folder) == [f"{model.sha256}.safetensors"]


async def test_a_part_that_somebody_works_on_is_not_cleared_away(
    store: Store, folder: Path
) -> None:
    model = await store.put(content(BIG))
    store.proxy.let = RANGE
    process = store.start(folder)
    assert await process.line() == "started\n"
    process.send(model)
    await until(lambda: waits(store.proxy))
    ModelCache(store.objects, folder, limit=1)._make_room()
    assert names(folder) == [f".parts/{model.sha256}.safetensors"]
    store.proxy.open()
    assert model.content in await process.answer()


async def test_what_was_used_longest_ago_makes_room_but_nothing_that_is_in_use(
    store: Store, folder: Path
) -> None:
    a, b, c, d, e = [await store.put(content(1000, seed)) for seed in range(5)]
    cache = ModelCache(store.objects, folder, limit=2500)

    def kept(*models: UsedModel) -> bool:
        return names(folder) == sorted(f"{model.sha256}.safetensors" for model in models)

    await fetch(cache, a)
    await fetch(cache, b)
    await fetch(cache, a)
    await fetch(cache, c)
    assert kept(a, c), "b was used longest ago"
    process = store.start(folder)
    await process.line()
    await process.hold(a)
    await fetch(cache, c)
    await fetch(cache, d)
    assert kept(a, d), "a was used before c, but another process uses it"
    async with cache.hold([d]):
        await fetch(cache, e)
        assert kept(a, d, e), "over the limit, since the jobs that run need so much"
    process.kill()
    await fetch(cache, b)
    assert kept(b, e)


async def test_what_is_evicted_leaves_no_note_of_its_hash(store: Store, folder: Path) -> None:
    a, b = [await store.put(content(1000, seed)) for seed in range(2)]
    cache = ModelCache(store.objects, folder, limit=1500)
    for model in (a, b, a, b):
        (path,) = await fetch(cache, model)
        assert Hashes(folder).sha256(path) == model.sha256
        assert len(list((folder / ".sha256").iterdir())) == 1


async def test_a_note_that_is_no_hash_is_not_believed(store: Store, folder: Path) -> None:
    """After a power cut it may be empty."""
    model = await store.put(content(1000))
    (path,) = await fetch(ModelCache(store.objects, folder, NO_LIMIT), model)
    (note,) = (folder / ".sha256").iterdir()
    note.write_text("")
    assert Hashes(folder).sha256(path) == model.sha256
    assert note.read_text() == model.sha256


async def test_what_is_in_a_folder_by_mistake_is_not_evicted(store: Store, folder: Path) -> None:
    model = await store.put(content(1000))
    cache = ModelCache(store.objects, folder, limit=500)
    (folder / "thesis.pdf").write_bytes(b"x" * 1000)
    await fetch(cache, model)
    assert (folder / "thesis.pdf").exists()


async def test_the_same_content_lies_once_whatever_it_is_called(store: Store, folder: Path) -> None:
    data = content(BIG)
    first, second = await store.put(data), await store.put(data, "renamed.safetensors")
    cache = ModelCache(store.objects, folder, NO_LIMIT)
    async with cache.hold([first, second]) as files:
        assert files == {first.content: folder / f"{digest(data)}.safetensors"}
        assert files[second.content] == files[first.content]
    assert names(folder) == [f"{digest(data)}.safetensors"]
    assert store.proxy.came < BIG + MIB


async def test_files_of_one_checkpoint_are_told_apart(store: Store, folder: Path) -> None:
    both = [content(64), content(64, seed=1)]
    first, second = [await store.put(data) for data in both]
    second = msgspec.structs.replace(second, checkpoint_id=first.checkpoint_id)
    for models in ((first, second), (second, first)):
        paths = await fetch(ModelCache(store.objects, folder, NO_LIMIT), *models)
        told = [both[model is second] for model in models]
        assert [path.read_bytes() for path in paths] == told


@pytest.mark.parametrize(
    "sha256", ["../" * 21 + "x", "/" * 64, "abc", "key-" + "0" * 64, "0" * 64 + ".pt", "g" * 64]
)
async def test_a_hash_that_is_none_is_refused(store: Store, folder: Path, sha256: str) -> None:
    model = await store.put(b"", sha256=sha256)
    reason = await refused(ModelCache(store.objects, folder, NO_LIMIT), model)
    assert reason == 'model "model.safetensors" was registered with a SHA-256 that is none'
    assert names(folder) == []


@pytest.mark.parametrize("name", ["..%2F..%2Fx", ".parts", "x.", "x.a;b", "x." + "y" * 99])
@pytest.mark.parametrize("is_hashed", [True, False])
async def test_no_name_leads_out_of_the_cache(
    store: Store, folder: Path, name: str, is_hashed: bool
) -> None:
    model = await store.put(name.encode(), name, sha256=None if is_hashed else "")
    model = msgspec.structs.replace(model, name="../../x", checkpoint_id="../../y")
    (path,) = await fetch(ModelCache(store.objects, folder, NO_LIMIT), model)
    assert path.parent == folder
    assert OURS.fullmatch(path.name)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.fixture
def small_disk(folder: Path) -> tuple[str, ...]:
    """What to start a process with that is to see a disk of 40 MiB in this folder."""
    script = 'mount -t tmpfs -o size=40m none "$0" && exec "$@"'
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder))
    folder.mkdir()
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    return command


async def test_on_a_full_disk_more_is_evicted_or_the_job_fails(
    store: Store, folder: Path, small_disk: tuple[str, ...]
) -> None:
    a, b, c = [await store.put(content(16 * MIB, seed)) for seed in range(3)]
    large = await store.put(content(41 * MIB))
    process = store.start(folder, *small_disk)
    await process.line()
    for model in (a, b, c, a):
        assert model.content in await process.hold(model)
        process.release()
    assert await process.hold(large) == {
        "JobFailure": f'model "model.safetensors" has {41 * MIB} bytes, and the worker\'s disk has'
        " no room for them"
    }
    assert a.content in await process.hold(a, b)
    assert "Retry" in await process.hold(c), "there will be room when the other job has ended"
    assert "JobFailure" in await process.hold(a, b, c)
    process.release()
    assert c.content in await process.hold(c)


async def waits(proxy: Proxy) -> bool:
    return proxy.waits


async def listed(folder: Path) -> list[str]:
    return names(folder)
