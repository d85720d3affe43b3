"""What can be seen of compose's files without an engine: names that nobody reads, secrets that
travel by environment, processes that nobody restarts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from deploy.containers.installation import install
from deploy.local.installation import REPOSITORY
from tests.architecture.docs import FOR_CLIENTS, FOR_PROVISIONING, known_settings

DEPLOY = REPOSITORY / "deploy"
FILES = sorted(DEPLOY.glob("compose*.yaml"))
FOR_SHELLS = {"DARKROOM_SECRETS", "DARKROOM_NATS_PUBLIC"}


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Compose's own tags, `!override` and `!reset`, change how files merge, not what they hold."""


def _as_it_is(loader: Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return None


Loader.add_multi_constructor("!", _as_it_is)


def services(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.load(file.read_text(), Loader)["services"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_somebody_reads_each_variable_and_none_is_a_secret(file: Path) -> None:
    known = known_settings() | FOR_PROVISIONING | FOR_CLIENTS | FOR_SHELLS
    for name, service in services(file).items():
        variables = {v for v in service.get("environment", {}) if v.startswith("DARKROOM_")}
        assert variables <= known, name
        secret = [v for v in service.get("environment", {}) if re.search("PASSWORD|KEY|TOKEN", v)]
        assert all(v.endswith("_FILE") for v in secret), name


def test_every_secret_is_a_file_that_the_installation_writes(tmp_path: Path) -> None:
    install(tmp_path)
    for file in FILES:
        for name, secret in yaml.load(file.read_text(), Loader).get("secrets", {}).items():
            if name not in ("pip_conf", "ca"):
                path = re.sub(r"\$\{DARKROOM_COMPOSE_HOME[^}]*\}", str(tmp_path), secret["file"])
                assert Path(path).is_file(), name


def test_each_container_is_limited_healthy_restarted_and_unprivileged() -> None:
    for name, service in services(DEPLOY / "compose.yaml").items():
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert service["cap_drop"] == ["ALL"], name
        once = name in ("provision", "install")
        assert service["restart"] == ("no" if once else "unless-stopped"), name
        assert service["logging"]["options"]["max-size"], name
        if not once and "services." not in str(service.get("command")):
            assert service["healthcheck"]["test"], name  # ours have the image's


def test_the_folder_of_secrets_is_the_owners_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = install(home).secrets
    assert home.stat().st_mode & 0o777 == 0o700
    assert install(home).secrets == first, "they change with every start"
