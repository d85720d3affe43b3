"""What starts, observes and stops workers. Each launcher finds its workers again by itself after
this service was killed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.endpoints.domain import Endpoint, InstanceType, Seen


class LaunchFailed(Exception):
    """The worker could not even be started; says why."""


class Launcher(Protocol):
    """Not for concurrent use: one call at a time. Any call may raise when what runs the workers
    does not answer: then nothing is known, and the next pass asks again."""

    workers_outlive_service: bool
    """Whether workers go on when this service stops; if not, it calls `stop_all` as it does."""

    async def open(self, changed: Callable[[], None]) -> None:
        """Finds the workers that live already. From now on `changed` is called when one of them may
        have started, ended or been taken away."""

    async def close(self) -> None:
        """Lets go of everything but the workers."""

    async def observe(self) -> dict[str, Seen]:
        """All workers that live, and those that ended until they are forgotten, by instance id."""

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        """Raises LaunchFailed, and leaves nothing behind then."""

    async def stop(self, instance_id: str, *, within: float) -> None:
        """Asks the worker to finish, and kills it `within` seconds after it was first asked. To be
        called until the worker is no longer observed alive."""

    async def forget(self, instance_id: str) -> None:
        """Clears up after a worker that ended."""

    async def stop_all(self, *, within: float) -> None:
        """Stops and forgets all workers; kills those that are not gone `within` seconds."""
