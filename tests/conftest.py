"""Two sets of real servers, each started once for the whole run:

- `servers`: NATS, Postgres and SeaweedFS alone, for tests that run one service of their own
- `stack`: everything, with two gateways, for tests that speak HTTP to the whole product
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.client import Client
from deploy.local.stack import Stack

STACK_SETTINGS = {
    "DARKROOM_GATEWAYS": "2",
    "DARKROOM_REALTIME_TIMEOUT": "10",
    "DARKROOM_WORKER_THREADS": "1",
    "DARKROOM_PREVIEW_SECONDS": "0.2",
    "DARKROOM_SCALE_IN_AFTER": "3",
}


@pytest.fixture(scope="session")
def servers() -> Iterator[Stack]:
    with Stack.temporary(services=False) as stack:
        yield stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with Stack.temporary(settings=STACK_SETTINGS) as stack:
        yield stack


@pytest.fixture(scope="session")
def admin(stack: Stack) -> Iterator[Client]:
    """The first user of the stack, logged in at the first gateway."""
    with Client.log_in_at(stack.home) as client:
        yield client
