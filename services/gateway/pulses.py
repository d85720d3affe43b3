"""What workers say of themselves, as long as it is fresh."""

from __future__ import annotations

import asyncio

from nats.aio.client import Client

from shared.bus import hear
from shared.contracts.endpoints import InstanceBeat
from shared.contracts.envelope import Message
from shared.contracts.subjects import BEAT, beat_subject

FRESH = 4 * BEAT


class Pulses:
    """One per process, in memory: whoever lives is heard again within seconds."""

    def __init__(self) -> None:
        self._beats: dict[str, tuple[float, InstanceBeat]] = {}

    async def follow(self, client: Client) -> None:
        await hear(client, beat_subject("*"), self._hear)

    def _hear(self, message: Message) -> None:
        if isinstance(message, InstanceBeat):
            self._forget_stale()
            self._beats[message.instance_id] = (asyncio.get_running_loop().time(), message)

    def of(self, endpoint_id: str) -> list[InstanceBeat]:
        """By instance id."""
        return [beat for beat in self.all() if beat.endpoint_id == endpoint_id]

    def all(self) -> list[InstanceBeat]:
        """By instance id."""
        self._forget_stale()
        return sorted((beat for _, beat in self._beats.values()), key=lambda b: b.instance_id)

    def _forget_stale(self) -> None:
        oldest = asyncio.get_running_loop().time() - FRESH
        self._beats = {id_: known for id_, known in self._beats.items() if known[0] >= oldest}
