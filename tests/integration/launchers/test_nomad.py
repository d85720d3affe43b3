"""What only Nomad does: it moves, blocks, refuses and has no leader now and then."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.endpoints.domain import NomadNeeds
from services.endpoints.launchers import LaunchFailed
from services.endpoints.launchers.nomad import NomadError
from tests.integration.launchers.places import SECRET, FakeNomad, until
from tests.integration.launchers.test_launchers import Watched, endpoint, nothing_left, told


@pytest.fixture
async def nomad(tmp_path: Path) -> AsyncIterator[FakeNomad]:
    made = await FakeNomad.find(tmp_path)
    yield made
    await made.close()


async def test_who_may_read_jobs_reads_no_secret(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher()) as ours:
        settings = await told(nomad, await ours.start("quiet", nomad.type()))
        assert settings["DARKROOM_NATS_PASSWORD"] == SECRET
        assert json.dumps(SECRET)[1:-1] not in json.dumps(nomad.fake.jobs)


async def test_a_worker_on_a_lost_node_has_ended(nomad: FakeNomad) -> None:
    """Nomad starts it again elsewhere, as if it were the same."""
    small, large = nomad.fake.nodes
    async with Watched(nomad.launcher()) as ours:
        instance_id = await ours.start("moved", nomad.type())
        await told(nomad, instance_id)
        await nomad.fake.lose(small)
        seen = await ours.see(instance_id, alive=False)
        assert seen.crash == "the worker's node was lost"
        await until(lambda: any(a.node is large for a in nomad.fake.allocations.values()))
        await ours.launcher.forget(instance_id)
        await nothing_left(nomad)


async def test_a_registration_whose_answer_got_lost_is_no_second_worker(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher()) as ours:
        instance_id = await ours.start("once", nomad.type())
        assert instance_id == await ours.start("once", nomad.type())
        assert len(nomad.fake.allocations) == 1
        assert (await ours.launcher.observe())[instance_id].alive


async def test_no_room_says_what_is_missing_where(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher()) as ours:
        with pytest.raises(LaunchFailed) as memory:
            await ours.start("big", nomad.type(memory="64 GiB"))
        assert str(memory.value) == "none of 2 Nomad nodes has room (memory exhausted on 2)"
        gpus = nomad.type(device="cuda", nomad=NomadNeeds(gpu_memory="141 GiB"))
        with pytest.raises(LaunchFailed) as devices:
            await ours.start("h200", gpus)
        assert str(devices.value) == (
            "out of GPUs: none of 2 Nomad nodes has room (missing devices on 2)"
        )
        with pytest.raises(LaunchFailed, match="none of 0 Nomad nodes"):
            await ours.start("far", nomad.type(nomad=NomadNeeds(datacenters=["mars"])))
        await nothing_left(nomad)


async def test_refusals_are_the_endpoints_and_outages_nobodys(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher(token="wrong")) as stranger:
        with pytest.raises(LaunchFailed, match="Permission denied"):
            await stranger.start("denied", nomad.type())
        with pytest.raises(NomadError, match="Permission denied"):
            await stranger.launcher.observe()
    async with Watched(nomad.launcher()) as ours:
        with pytest.raises(LaunchFailed, match="minimum MemoryMB"):
            await ours.start("tiny", nomad.type(memory="1 MiB"))
        await nothing_left(nomad)
        nomad.fake.leader = False
        with pytest.raises(NomadError, match="No cluster leader"):
            await ours.start("later", nomad.type())
        nomad.fake.leader = True
        await told(nomad, await ours.start("later", nomad.type()))


async def test_secrets_that_a_killed_service_left_are_removed(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher()) as before:
        kept = await before.start("kept", nomad.type())
    nomad.fake.variables["nomad/jobs/darkroom-ours-gone"] = {"DARKROOM_NATS_PASSWORD": SECRET}
    nomad.fake.variables["nomad/jobs/darkroom-theirs-1"] = {}
    async with Watched(nomad.launcher()) as after:
        await after.launcher.observe()
        assert nomad.fake.variables.keys() == {
            f"nomad/jobs/darkroom-ours-{kept}",
            "nomad/jobs/darkroom-theirs-1",
        }


async def test_a_worker_that_ends_well_is_not_started_again_by_nomad(nomad: FakeNomad) -> None:
    async with Watched(nomad.launcher()) as ours:
        instance_id = await ours.start("crash", nomad.type())
        await ours.see(instance_id, alive=False)
        assert len(nomad.fake.allocations) == 1
        assert endpoint("crash").endpoint_id == (
            (await ours.launcher.observe())[instance_id].endpoint_id
        )
