"""The gateway's projection is lost, and made again from what the services know."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import uuid4

import asyncpg
import nats
import pytest

from deploy.local.client import Client
from deploy.local.stack import Stack
from shared.contracts.subjects import EVENTS

PATHS = ("/roles", "/users", "/auth/tokens", "/checkpoints", "/endpoints", "/inferences")


@pytest.mark.parametrize("lost", ["projection", "projection and events"])
def test_a_lost_projection_is_rebuilt(stack: Stack, admin: Client, lost: str) -> None:
    password, name = "correct horse battery", f"anna-{uuid4().hex[:8]}"
    role: dict[str, Any] = {"role_name": f"role-{name}", "permissions": ["checkpoint:all"]}
    user = {"username": name, "password": password, "roles": [role["role_name"], "Designer"]}
    admin.call("POST", "/roles", role)
    admin.call("POST", "/users", user)
    gateways = [admin.url, f"http://127.0.0.1:{stack.installation.ports['gateway-2']}"]
    api_key = stack.environment()["DARKROOM_API_KEY"]
    anna = Client.log_in(admin.url, api_key, name, password)
    token = anna.call("POST", "/auth/tokens", {"name": "ci"})["data"]["access_token"]
    upload: dict[str, Any] = {"filename": f"{name}.safetensors", "parts_number": 1}
    checkpoint = {"checkpoint_type": "Stable-diffusion", "filenames": [upload], "params": {}}
    anna.call("POST", "/checkpoints", checkpoint)
    anna.call(
        "POST", "/inferences", {"inference_type": "Async", "task_type": "rembg", "models": {}}
    )
    admin.call("DELETE", "/roles", {"role_name_list": [role["role_name"]]})
    while "Deleting" in str(admin.call("GET", "/endpoints")):  # left by another test
        time.sleep(0.1)
    before = {who: {path: look(who, path) for path in PATHS} for who in (admin, anna)}
    assert before[anna]["/inferences"]["data"]["inferences"]

    asyncio.run(lose(stack, with_events="events" in lost))
    for gateway in ("gateway", "gateway-2"):
        stack.restart(gateway)

    for url in gateways:
        for who in (admin, anna):
            who.url = url
            assert {path: look(who, path) for path in PATHS} == before[who]
        assert Client(url, api_key, token).call("GET", "/checkpoints")
        with Client.log_in(url, api_key, name, password) as again:
            assert again.call("GET", "/inferences")
    admin.url = gateways[0]
    admin.call("POST", "/roles", role)  # a name that comes back is newer than its tombstone
    assert role["role_name"] in str(admin.call("GET", "/roles"))
    admin.call("DELETE", "/roles", {"role_name_list": [role["role_name"]]})


def test_what_a_crash_of_the_database_took_is_applied_again(stack: Stack, admin: Client) -> None:
    """By gateways that go on running; and nobody hears of it twice."""
    other = f"http://127.0.0.1:{stack.installation.ports['gateway-2']}"
    body = {"inference_type": "Async", "task_type": "rembg", "models": {}}
    for url in (admin.url, other):
        client = Client(url, admin.headers["x-api-key"], admin.headers["Authorization"][7:])
        asyncio.run(remember(stack))
        key = uuid4().hex
        made = client.call("POST", "/inferences", body, idempotency_key=key)["data"]["inference"]
        begun = client.events(f"/inferences/{made['id']}/events")
        assert next(begun).name == "inference.job_created.v1"
        asyncio.run(forget(stack))
        again = client.call("POST", "/inferences", body, idempotency_key=key)["data"]["inference"]
        assert again["id"] == made["id"]
        for gateway in (other, admin.url):
            at = Client(gateway, admin.headers["x-api-key"], admin.headers["Authorization"][7:])
            assert at.get_job(made["id"])["status"] == "created"
        admin.call("DELETE", "/inferences", {"inference_id_list": [made["id"]]})
        assert next(begun).name == "inference.job_deleted.v1"


async def remember(stack: Stack) -> None:
    connection = await asyncpg.connect(stack.installation.postgres_url("postgres"))
    await connection.execute(
        """
        SET search_path = gateway;
        DROP TABLE IF EXISTS was_aggregates, was_position;
        CREATE TABLE was_aggregates AS TABLE aggregates;
        CREATE TABLE was_position AS TABLE position;
        """
    )
    await connection.close()


async def forget(stack: Stack) -> None:
    """As if the commits since `remember` had not reached the disk."""
    connection = await asyncpg.connect(stack.installation.postgres_url("postgres"))
    await connection.execute(
        """
        SET search_path = gateway;
        BEGIN;
        DELETE FROM aggregates;
        INSERT INTO aggregates TABLE was_aggregates;
        UPDATE position SET seq = was.seq FROM was_position AS was;
        UPDATE idempotency_keys SET answer = NULL WHERE created_at > now() - interval '10 seconds';
        DROP TABLE was_aggregates, was_position;
        COMMIT;
        """
    )
    await connection.close()


def look(who: Client, path: str) -> dict[str, Any]:
    """The answer without what is signed anew each time."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items() if "presign" not in key}
        return [bare(item) for item in value] if isinstance(value, list) else value

    answer: dict[str, Any] = bare(who.call("GET", path))
    return answer


async def lose(stack: Stack, *, with_events: bool) -> None:
    installation = stack.installation
    connection = await asyncpg.connect(installation.postgres_url("postgres"))
    await connection.execute("TRUNCATE gateway.aggregates, gateway.position")
    await connection.close()
    if with_events:
        client = await nats.connect(installation.nats_url_as("admin"), inbox_prefix=b"_INBOX_admin")
        await client.jetstream().purge_stream(EVENTS)
        await client.close()
