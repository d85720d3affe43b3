"""One more gateway beside those of a stack, with settings of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx

from deploy.local import processes
from deploy.local.stack import Stack


@contextlib.contextmanager
def another_gateway(stack: Stack, *, wait_for: str = "/readyz", **settings: str) -> Iterator[str]:
    """Its URL, once `wait_for` answers 200. `DARKROOM_…=value` overrides what a gateway gets."""
    usual = next(p for p in processes.table(stack.installation, {}) if p.name == "gateway")
    with process_of(usual, stack, wait_for, **settings) as url:
        yield url


@contextlib.contextmanager
def process_of(
    usual: processes.Process, stack: Stack, wait_for: str, **settings: str
) -> Iterator[str]:
    """One of the stack's processes, started by hand on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ports = {"DARKROOM_HTTP_PORT": str(port), "DARKROOM_METRICS_PORT": "0"}
    environment = {**usual.environment, **ports, **settings}
    log = stack.installation.log(f"{usual.name}-{port}")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            usual.command,
            cwd=usual.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url + wait_for)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended: {' '.join(map(os.fspath, process.args))}"  # type: ignore[arg-type]
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer 200 within {seconds:g} s")
