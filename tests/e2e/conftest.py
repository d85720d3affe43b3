from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.stack import Stack
from tests.e2e.described import StrictClient


@pytest.fixture(scope="session")
def api(stack: Stack) -> Iterator[StrictClient]:
    """The first user of the stack at the first gateway; every answer is held against GET /api."""
    with StrictClient.log_in_at(stack.home) as client:
        yield client


@pytest.fixture(scope="session")
def other(stack: Stack, api: StrictClient) -> StrictClient:
    """The same user at the second gateway."""
    return api.at(f"http://127.0.0.1:{stack.installation.ports['gateway-2']}")
