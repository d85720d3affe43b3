from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.engine import Deployment, deployed


@pytest.fixture(scope="package")
def deployment() -> Iterator[Deployment]:
    """compose.yaml with two gateways and workers on the CPU."""
    with deployed("compose.yaml") as deployment:
        yield deployment
