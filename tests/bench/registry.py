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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Process, Queue
from pathlib import Path
from typing import Any

import boto3
import psutil

from deploy.local.client import PARTS_AT_ONCE, Client
from deploy.local.installation import MODELS_BUCKET
from deploy.local.stack import Stack
from tests.bench.report import Row, watched
from tests.weights import entries_of, with_header

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
            with watched(service, every=SAMPLE_SECONDS) as memory:
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
            with watched(service, every=SAMPLE_SECONDS) as memory:
                seconds = timed(lambda: by_url(client, f"{url}/{file.name}"))
            rows.append(Row(f"{large / GIB:g} GiB by URL", f"{seconds:.1f} s", "", ""))
            rows.append(Row("  memory of models, before / peak", str(memory), "", ""))
    return rows


def write_weights(file: Path, size: int, *, seed: int) -> None:
    """A checkpoint that is whole, of random bytes."""
    entries, end = entries_of("Stable-diffusion", size)
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
    store.upload_file(str(file), MODELS_BUCKET, f"bench/{file.name}", Config=config)
    store.delete_object(Bucket=MODELS_BUCKET, Key=f"bench/{file.name}")


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
