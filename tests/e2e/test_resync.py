"""The gateway's projection is lost, and made again from what the services know."""

from __future__ import annotations

import asyncio
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
