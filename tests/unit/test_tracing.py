"""Traces cost nothing where nobody collects them, and hold nobody up where the collector is gone.
Each in a process of its own: what is configured there stays."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from deploy.local.installation import REPOSITORY

APPS = ["gateway", "identity", "models", "endpoints", "inference", "inference.worker"]


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("app", APPS)
def test_opentelemetry_is_not_even_imported_without_a_collector(app: str) -> None:
    run(
        f"""
import sys
import services.{app}.app
from shared import tracing
tracing.configure("x", "")
with tracing.span("work", parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
    tracing.record_stages({{"load": 1.0}})
    assert tracing.traceparent() is None
tracing.close()
for name in ("opentelemetry.sdk", "opentelemetry.trace", "opentelemetry.exporter"):
    assert name not in sys.modules, name
"""
    )


def test_a_span_goes_on_from_the_message_and_is_told_to_the_next_one() -> None:
    run(
        """
import re
from shared import tracing
tracing.configure("x", "http://127.0.0.1:9")
parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
assert tracing.traceparent() is None
with tracing.span("handle", kind="consumer", parent=parent):
    mine = tracing.traceparent()
    assert re.fullmatch("00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01", mine)
    assert mine != parent
    with tracing.span("inner"):
        assert tracing.traceparent() not in (mine, parent)
unsampled = parent[:-2] + "00"
with tracing.span("handle", parent=unsampled):
    assert tracing.traceparent().endswith("-00"), "the caller did not want it"
with tracing.span("handle", parent="nonsense"):
    assert tracing.traceparent(), "a new one"
import os; os._exit(0)
"""
    )


def test_a_collector_that_does_not_answer_holds_up_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        began = time.monotonic()
        told = run(
            f"""
import time
from shared import tracing
tracing.configure("x", "http://127.0.0.1:{port}")
began = time.monotonic()
for _ in range(100):
    with tracing.span("work"):
        pass
print(time.monotonic() - began)
tracing.close()
"""
        )
    assert float(told) < 1
    assert time.monotonic() - began < 15
