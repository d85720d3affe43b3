"""What every launcher does, whatever runs its workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.endpoints.domain import Endpoint, InstanceType, Seen
from services.endpoints.launchers import Launcher, LaunchFailed, NoRoomYet, stop_all
from tests.integration.launchers.places import (
    SECRET,
    Containers,
    FakeNomad,
    Place,
    Processes,
    RealNomad,
    read_told,
    until,
)


@pytest.fixture(params=["process", "docker", "nomad fake", "nomad"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    made: Place
    if request.param == "process":
        made = Processes(tmp_path)
    elif request.param == "docker":
        made = await Containers.find(tmp_path)
    elif request.param == "nomad fake":
        made = await FakeNomad.find(tmp_path)
    elif "NOMAD_ADDR" in os.environ:
        made = RealNomad(tmp_path)
    else:
        pytest.skip("NOMAD_ADDR names no agent")
    yield made
    await made.close()


class Watched:
    """A launcher that is open, and whether it says that something changed."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.changed = asyncio.Event()

    async def __aenter__(self) -> Watched:
        await self.launcher.open(self.changed.set)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.launcher.close()

    async def start(self, name: str, type: InstanceType) -> str:
        instance_id = f"i-{name}"
        await self.launcher.start(instance_id, endpoint(name), type)
        return instance_id

    async def see(self, instance_id: str, *, alive: bool) -> Seen:
        for _ in range(200):
            seen = (await self.launcher.observe())[instance_id]
            if seen.alive == alive:
                return seen
            await asyncio.sleep(0.05)
        raise AssertionError(f"{seen} for too long")

    async def stop(self, instance_id: str) -> Seen:
        """As the reconciler does it."""
        for _ in range(200):
            await self.launcher.stop(instance_id, within=1)
            seen = (await self.launcher.observe())[instance_id]
            if not seen.alive:
                return seen
            await asyncio.sleep(0.05)
        raise AssertionError(f"{instance_id} does not stop")


def endpoint(name: str) -> Endpoint:
    return Endpoint(
        endpoint_id=f"e-{name}",
        endpoint_name=name,
        endpoint_type="Async",
        instance_type="cpu",
        autoscaling=False,
        min_instance_number=1,
        max_instance_number=1,
        scaled_to=1,
        roles=[],
        creator="admin",
        start_time=datetime.now(UTC),
    )


async def told(place: Place, instance_id: str) -> dict[str, Any]:
    await until((place.cache / f"{instance_id}.json").exists, f"{instance_id} at work")
    return read_told(place, instance_id)


async def nothing_left(place: Place) -> None:
    for _ in range(100):
        if not (found := await place.leftovers()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(found)


async def test_a_worker_is_told_what_it_needs_and_can_be_stopped(place: Place) -> None:
    async with Watched(place.launcher()) as ours:
        assert await ours.launcher.observe() == {}
        instance_id = await ours.start("polite", place.type())
        seen = await ours.see(instance_id, alive=True)
        assert seen == Seen(instance_id=instance_id, endpoint_id="e-polite", alive=True)
        settings = await told(place, instance_id)
        assert settings["DARKROOM_ENDPOINT_ID"] == "e-polite"
        assert settings["DARKROOM_ENDPOINT_NAME"] == "polite"
        assert settings["DARKROOM_INSTANCE_ID"] == instance_id
        assert settings["DARKROOM_DEVICE"] == "cpu"
        assert settings["DARKROOM_NATS_USER"] == "worker"
        assert settings["DARKROOM_NATS_PASSWORD"] == SECRET

        await ours.stop(instance_id)
        assert read_told(place, instance_id)["finished"], "it could not finish"
        await ours.launcher.forget(instance_id)
        assert await ours.launcher.observe() == {}
        await nothing_left(place)


async def test_an_end_is_told_at_once_with_its_reason(place: Place) -> None:
    async with Watched(place.launcher()) as ours:
        instance_id = await ours.start("crash", place.type())
        seen = (await ours.launcher.observe())[instance_id]
        while seen.alive:
            await asyncio.wait_for(ours.changed.wait(), 10)
            ours.changed.clear()
            seen = (await ours.launcher.observe())[instance_id]
        assert seen.crash
        assert seen.crash.startswith("the worker exited with code 3: ")
        assert seen.crash.endswith("CUDA error: no kernel image is available")
        assert (await ours.launcher.observe())[instance_id] == seen, "until it is forgotten"
        await ours.launcher.forget(instance_id)
        await nothing_left(place)


async def test_who_does_not_stop_is_killed(place: Place) -> None:
    async with Watched(place.launcher()) as ours:
        instance_id = await ours.start("stubborn", place.type())
        await told(place, instance_id)
        started = asyncio.get_running_loop().time()
        await ours.stop(instance_id)
        assert 1 <= asyncio.get_running_loop().time() - started < 10
        assert "finished" not in read_told(place, instance_id)


async def test_workers_are_found_again_after_this_service_was_killed(place: Place) -> None:
    async with Watched(place.launcher()) as before:
        living = await before.start("found", place.type())
        dying = await before.start("crash", place.type())
        await told(place, living)
        await before.see(dying, alive=False)
    async with Watched(place.launcher()) as after:
        seen = await after.launcher.observe()
        assert seen.keys() == {living, dying}
        assert seen[living] == Seen(instance_id=living, endpoint_id="e-found", alive=True)
        assert not seen[dying].alive
        await after.stop(living)
        assert read_told(place, living)["finished"]
        for instance_id in seen:
            await after.launcher.forget(instance_id)
        await nothing_left(place)


async def test_what_can_not_be_started_says_why_and_leaves_nothing(place: Place) -> None:
    broken = place.broken()
    async with Watched(place.launcher()) as ours:
        try:
            instance_id = await ours.start("broken", broken)
        except LaunchFailed as failure:
            reason: str | None = str(failure)
        else:  # it was accepted, and found out later
            reason = (await ours.see(instance_id, alive=False)).crash
            await ours.launcher.forget(instance_id)
        assert place.broken_because in str(reason)
        assert await ours.launcher.observe() == {}
        await nothing_left(place)


async def test_each_worker_has_gpus_of_its_own(place: Place) -> None:
    if place.gpus_are_real:
        pytest.skip("needs two GPUs")
    gpu = place.type(device="cuda")
    async with Watched(place.launcher()) as ours:
        try:
            first = await ours.start("first", gpu)
        except LaunchFailed as failure:
            if "could not select device driver" in str(failure):
                pytest.skip(f"the engine has no GPUs: {failure}")
            raise
        second = await ours.start("second", gpu)
        seen = [place.gpus_of(await told(place, id_)) for id_ in (first, second)]
        assert sorted(seen) == [["0"], ["1"]]
        with pytest.raises(LaunchFailed, match="out of GPUs"):
            await ours.start("third", gpu)
        none = place.gpus_of(await told(place, await ours.start("without", place.type())))
        assert none in ([], ["void"])

    async with Watched(place.launcher()) as ours:  # which has to find out who has which
        with pytest.raises(LaunchFailed, match="out of GPUs"):
            await ours.start("third", gpu)
        await ours.stop(first)
        await ours.launcher.forget(first)
        third = await ours.start("third", gpu)
        assert place.gpus_of(await told(place, third)) == seen[0]
        await stop_all(ours.launcher, within=1)
        both = await ours.start("both", place.type(device="cuda", gpus=2))
        assert place.gpus_of(await told(place, both)) == ["0", "1"]


async def test_a_gpu_that_is_about_to_be_free_is_no_failure(place: Place) -> None:
    if place.gpus_are_real:
        pytest.skip("needs two GPUs")
    both = place.type(device="cuda", gpus=2)
    async with Watched(place.launcher()) as ours:
        try:
            first = await ours.start("stubborn", both)
        except LaunchFailed as failure:
            if "could not select device driver" in str(failure):
                pytest.skip(f"the engine has no GPUs: {failure}")
            raise
        await told(place, first)
        await ours.launcher.stop(first, within=1)
        with pytest.raises(NoRoomYet):
            await ours.start("second", both)
        assert (await ours.launcher.observe()).keys() == {first}
        await ours.stop(first)
        await ours.launcher.forget(first)
        await ours.start("second", both)


async def test_a_worker_that_takes_too_much_memory_is_killed(place: Place) -> None:
    if place.gpus_are_real:
        pytest.skip("raw_exec does not limit memory")
    async with Watched(place.launcher()) as ours:
        instance_id = await ours.start("hungry", place.type(memory="64 MiB"))
        seen = await ours.see(instance_id, alive=False)
        assert seen.crash
        assert seen.crash.startswith("the worker ran out of memory: 64 MiB allowed")


async def test_the_workers_of_others_are_left_alone(place: Place) -> None:
    async with Watched(place.launcher("theirs")) as theirs, Watched(place.launcher()) as ours:
        other = await theirs.start("other", place.type())
        await told(place, other)
        mine = await ours.start("mine", place.type())
        assert (await ours.launcher.observe()).keys() == {mine}
        await stop_all(ours.launcher, within=5)
        assert (await theirs.launcher.observe())[other].alive
        await stop_all(theirs.launcher, within=5)


async def test_stop_all_leaves_nobody(place: Place) -> None:
    async with Watched(place.launcher()) as ours:
        for name in ("one", "stubborn", "crash"):
            await told(place, await ours.start(name, place.type()))
        await stop_all(ours.launcher, within=1)
        assert await ours.launcher.observe() == {}
        assert read_told(place, "i-one")["finished"]
        await nothing_left(place)


async def test_silence_is_not_taken_for_an_end(place: Place) -> None:
    async with Watched(place.launcher()) as ours:
        instance_id = await ours.start("steady", place.type())
        await told(place, instance_id)
        await place.go_away()
        with pytest.raises(place.silence):
            await ours.launcher.observe()
        with pytest.raises(place.silence):
            await ours.start("second", place.type())
        ours.changed.clear()
        await place.come_back()
        assert (await ours.launcher.observe())[instance_id].alive
        await asyncio.sleep(1.5)
        crashing = await ours.start("crash", place.type())
        ours.changed.clear()
        await asyncio.wait_for(ours.changed.wait(), 10)
        await ours.see(crashing, alive=False)
