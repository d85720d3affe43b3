"""What provisioning declares holds on the servers as containers: the Postgres and the NATS that an
operator brings are other builds and versions than those of the embedded stack."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import asyncpg
import nats
import pytest
from nats.js.errors import NotFoundError
from testcontainers.community.nats import NatsContainer
from testcontainers.community.postgres import PostgresContainer

from deploy.containers.installation import ContainerInstallation, install
from deploy.local.installation import REPOSITORY, ROLES
from deploy.local.provision import migrate_all, provision_nats, provision_postgres
from shared.contracts.subjects import EVENTS, STREAMS
from tests.containers.engine import NATS, POSTGRES, needs_engine

pytestmark = needs_engine


async def test_every_migration_runs_on_postgres_and_no_role_sees_another(tmp_path: Path) -> None:
    secrets = install(tmp_path / "home").secrets
    password = secrets.postgres["postgres"]
    with PostgresContainer(
        POSTGRES, username="postgres", password=password, dbname="postgres"
    ) as up:
        where = {"DARKROOM_POSTGRES": f"127.0.0.1:{up.get_exposed_port(5432)}"}
        installation = ContainerInstallation(tmp_path, secrets, where)
        await provision_postgres(installation)
        applied = await migrate_all(installation)
        files = {
            role: sorted(
                f.name for f in (REPOSITORY / "services" / role / "migrations").glob("*.sql")
            )
            for role in ROLES
        }
        assert applied == files
        assert not any((await migrate_all(installation)).values()), "they ran twice"
        models = await asyncpg.connect(installation.postgres_url("models"))
        with contextlib.suppress(asyncpg.PostgresError):
            assert await models.fetchval("SELECT count(*) FROM checkpoints") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await models.fetchval("SELECT count(*) FROM identity.users")
        await models.close()


async def test_nats_starts_from_the_written_configuration_and_keeps_users_apart(
    tmp_path: Path,
) -> None:
    secrets = install(tmp_path / "home").secrets
    container = (
        NatsContainer(NATS)
        .with_env("NATS_NAME", "nats")
        .with_volume_mapping(str(tmp_path / "home" / "secrets" / "nats.conf"), "/nats.conf")
        .with_command("--config /nats.conf")
    )
    with container as up:
        installation = ContainerInstallation(
            tmp_path, secrets, {"DARKROOM_NATS_URL": up.nats_uri()}
        )
        await provision_nats(installation)
        await provision_nats(installation)
        admin = await nats.connect(up.nats_uri(), user="admin", password=secrets.nats["admin"])
        streams = await admin.jetstream().streams_info()
        assert {s.config.name for s in streams} == {s.name for s in STREAMS}

        denied: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        async def on_error(error: Exception) -> None:
            if not denied.done():
                denied.set_result(error)

        models = await nats.connect(
            up.nats_uri(),
            user="models",
            password=secrets.nats["models"],
            inbox_prefix=b"_INBOX_models",
            error_cb=on_error,
        )
        await models.publish("evt.identity.user.mallory", b"{}")
        assert "permissions violation" in str(await asyncio.wait_for(denied, 5)).lower()
        with pytest.raises(NotFoundError):
            await admin.jetstream().get_last_msg(EVENTS, "evt.identity.user.mallory")
        await models.close()
        await admin.close()
