"""What starts, observes and stops workers. Each launcher finds its workers again by itself after
this service was killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Protocol

import msgspec

from services.endpoints.domain import Endpoint, InstanceType, Seen

CONTAINER_CACHE = "/var/lib/darkroom/cache"
"""Where a worker in a container has its cache; the images have that folder."""

LAST_LINES = 6
LAST_BYTES = 4096
"""What of a worker's log says how it ended."""


class LaunchFailed(Exception):
    """The worker could not even be started; says why."""


class NoRoomYet(Exception):
    """A worker that is on its way out still holds what this one needs; says what."""


class Launcher(Protocol):
    """Not for concurrent use: one call at a time. Any call may raise when what runs the workers
    does not answer: then nothing is known, and the next pass asks again."""

    workers_outlive_service: bool
    """Whether workers go on when this service stops; if not, it stops them all as it does."""

    async def open(self, changed: Callable[[], None]) -> None:
        """Finds the workers that live already. From now on `changed` is called when one of them may
        have started, ended or been taken away."""

    async def close(self) -> None:
        """Lets go of everything but the workers."""

    async def observe(self) -> dict[str, Seen]:
        """All workers that live, and those that ended until they are forgotten, by instance id."""

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        """Raises LaunchFailed or NoRoomYet, and leaves nothing behind then."""

    async def stop(self, instance_id: str, *, within: float) -> None:
        """Asks the worker to finish, and kills it `within` seconds after it was first asked. To be
        called until the worker is no longer observed alive."""

    async def forget(self, instance_id: str) -> None:
        """Clears up after a worker that ended."""


async def stop_all(launcher: Launcher, *, within: float) -> None:
    """Stops and forgets all workers; kills those that are not gone `within` seconds."""
    while living := [id_ for id_, seen in (await launcher.observe()).items() if seen.alive]:
        for instance_id in living:
            await launcher.stop(instance_id, within=within)
        await asyncio.sleep(0.1)
    for instance_id in await launcher.observe():
        await launcher.forget(instance_id)


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker runs and is told, whatever its endpoint. `secrets` are settings of the
    worker, too, which a launcher keeps from those who may look at its workers. `stop_within`:
    the most seconds that a worker ever has to finish when it is asked to."""

    command: list[str]
    environment: dict[str, str]
    secrets: dict[str, str]
    stop_within: float

    def variables(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> dict[str, str]:
        """The environment of one worker, without the secrets."""
        return {
            **self.environment,
            "DARKROOM_ENDPOINT_ID": endpoint.endpoint_id,
            "DARKROOM_ENDPOINT_NAME": endpoint.endpoint_name,
            "DARKROOM_INSTANCE_ID": instance_id,
            "DARKROOM_DEVICE": type.device,
        }


def describe_end(code: int, log: str, *, out_of_memory: int | None = None) -> str:
    """`code` as shells have it: 128 and the number of the signal that killed it. `out_of_memory`:
    how many bytes it was allowed, if that is why."""
    if out_of_memory is not None:
        reason = f"the worker ran out of memory: {out_of_memory / 1024**2:.0f} MiB allowed"
    elif code > 128 and code - 128 in set(signal.Signals):
        reason = f"the worker was killed by {signal.Signals(code - 128).name}"
    else:
        reason = f"the worker exited with code {code}"
    lines = [line.rstrip() for line in log.splitlines() if line.strip()][-LAST_LINES:]
    return ": ".join([reason, "\n".join(lines)]) if lines else reason
