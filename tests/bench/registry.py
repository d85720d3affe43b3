"""Ways into the registry beside boto3's own multipart upload of the same file to the same store.

Both write the file once to S3. The registry also hashes it and looks at what is in it; an upload by
the client is read back for that.
"""

from __future__ import annotations

import functools
import http.server
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any

import boto3
import psutil

from deploy.local.client import PARTS_AT_ONCE, Client
from deploy.local.stack import Stack
from tests.bench.report import Row
from tests.weights import HEADER, TENSORS, with_header

GIB = 1024**3
BLOCK = 4 * 1024**2
SAMPLE_SECONDS = 0.02


def ways_in(stack: Stack, client: Client, size: int = GIB, large: int = 4 * GIB) -> list[Row]:
    """Needs a stack that may download from this machine. `size`: bytes of the file that is timed;
    `large`: of one that only memory is measured of."""
    rows = []
    service = psutil.Process(stack.pid("models"))
    with tempfile.TemporaryDirectory(dir=stack.home) as name, serving(Path(name)) as url:
        folder = Path(name)
        ways: list[tuple[str, Callable[[Path], Any]]] = [
            ("by URL", lambda file: by_url(client, f"{url}/{file.name}")),
            ("multipart by the client", lambda file: by_parts(client, file)),
        ]
        for number, (what, way) in enumerate(ways):
            file = folder / f"bench-{number}.safetensors"
            write_weights(file, size, seed=number)
            bare = timed(functools.partial(plainly, stack, file))
            with watched(service) as memory:
                seconds = timed(functools.partial(way, file))
            rate = size / GIB
            told = f"{seconds:.1f} s, {rate / seconds:.2f} GiB/s"
            peer = f"{bare:.1f} s, {rate / bare:.2f} GiB/s"
            rows.append(Row(f"{rate:g} GiB {what}", told, peer, f"{seconds / bare:.2f}"))
            rows.append(Row("  memory of models, before / peak", str(memory), "", ""))
            file.unlink()
        if large:
            file = folder / "bench-large.safetensors"
            write_weights(file, large, seed=9)
            with watched(service) as memory:
                seconds = timed(lambda: by_url(client, f"{url}/{file.name}"))
            rows.append(Row(f"{large / GIB:g} GiB by URL", f"{seconds:.1f} s", "", ""))
            rows.append(Row("  memory of models, before / peak", str(memory), "", ""))
    return rows


def write_weights(file: Path, size: int, *, seed: int) -> None:
    """A checkpoint that is whole, of random bytes."""
    entries, at = {}, 0
    for name, shape in TENSORS["Stable-diffusion"].items():
        length = 2 * functools.reduce(int.__mul__, shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": (at, at + length)}
        at += length
    end = size - 8 - HEADER
    entries["filler"] = {"dtype": "U8", "shape": (end - at,), "data_offsets": (at, end)}
    draw = random.Random(seed)
    with file.open("wb") as out:
        out.write(with_header(entries, b""))
        for start in range(0, end, BLOCK):
            out.write(draw.randbytes(min(BLOCK, end - start)))


def by_url(client: Client, url: str) -> None:
    body = {"checkpoint_type": "Stable-diffusion", "urls": [url], "params": {"message": ""}}
    answer = client.call("POST", "/checkpoints", body)
    client.wait_for_checkpoint(answer["data"]["checkpoint"]["id"])


def by_parts(client: Client, file: Path) -> None:
    client.upload_checkpoint("Stable-diffusion", file)


def plainly(stack: Stack, file: Path) -> None:
    """As many parts at once as the registry has."""
    key = stack.installation.secrets.s3["models"]
    store = boto3.client(
        "s3",
        endpoint_url=stack.installation.s3_url,
        region_name="us-east-1",
        aws_access_key_id=key.access_key,
        aws_secret_access_key=key.secret_key,
    )
    config = boto3.s3.transfer.TransferConfig(
        multipart_chunksize=16 * 1024**2, max_concurrency=PARTS_AT_ONCE
    )
    store.upload_file(str(file), "darkroom-models", f"bench/{file.name}", Config=config)
    store.delete_object(Bucket="darkroom-models", Key=f"bench/{file.name}")


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Memory:
    """Resident, in bytes."""

    def __init__(self, before: int) -> None:
        self.before = self.peak = before

    def __str__(self) -> str:
        before, peak = self.before / 1e6, self.peak / 1e6
        return f"{before:.0f} / {peak:.0f} MB, raised by {peak - before:.0f} MB"


@contextmanager
def watched(process: psutil.Process) -> Iterator[Memory]:
    memory, ended = Memory(process.memory_info().rss), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory.peak = max(memory.peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def _serve(folder: Path, ports: Queue[int]) -> None:
    handler = functools.partial(_Quiet, directory=os.fspath(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        ports.put(server.server_port)
        server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL at which the files of a folder can be had; another process has the work of it."""
    ports: Queue[int] = Queue()
    process = Process(target=_serve, args=(folder, ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=30)}"
    finally:
        process.terminate()
        process.join()
