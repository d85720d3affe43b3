"""What an operator would see go wrong with deploy/nomad, as far as files can tell: syntax, names
that nobody reads, secrets in a description, a canary that is none. Only Nomad knows the rest."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import hcl2
import pytest

from deploy.containers.installation import install
from deploy.local.installation import REPOSITORY, ROLES
from services.endpoints.settings import Settings
from shared.settings import load
from tests.architecture.docs import FOR_PROVISIONING, known_settings

NOMAD = REPOSITORY / "deploy" / "nomad"
FILES = sorted(NOMAD.glob("*.nomad.hcl"))


def parse(file: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = plain(hcl2.loads(file.read_text()))
    return parsed


def plain(value: Any) -> Any:
    """python-hcl2 keeps the quotes of strings and of labels."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items() if key != "__is_block__"}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def groups(file: Path) -> dict[str, Any]:
    """By name, with their one task under `task`."""
    found = {}
    (job,) = parse(file)["job"]
    ((_, body),) = job.items()
    for group in body["group"]:
        ((name, content),) = group.items()
        (task,) = content["task"]
        ((_, content["task"]),) = task.items()
        found[name] = content
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_that_is_used_is_declared_and_the_other_way_round(file: Path) -> None:
    declared = {name for variable in parse(file)["variable"] for name in variable}
    used = {
        word.split("var.")[1].strip('"}], \n')
        for word in file.read_text().split()
        if "var." in word and not word.startswith("#")
    }
    assert declared == used


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_task_runs_a_module_that_exists_with_settings_that_somebody_reads(file: Path) -> None:
    for name, group in groups(file).items():
        task = group["task"]
        (config,) = task["config"]
        assert importlib.util.find_spec(config["args"][1]), name
        (environment,) = task["env"]
        names = {key.removesuffix("_FILE") for key in environment} - {"DARKROOM_SECRETS"}
        assert names <= known_settings() | FOR_PROVISIONING
        assert config["readonly_rootfs"]


def test_each_group_of_the_job_is_a_process_with_its_own_secret(tmp_path: Path) -> None:
    found = groups(NOMAD / "darkroom.nomad.hcl")
    assert set(found) == set(ROLES)
    variables = install(tmp_path).nomad_variables()
    for name, group in found.items():
        (template,) = group["task"]["template"]
        path = f"nomad/jobs/darkroom/{name}"
        assert f'nomadVar \\"{path}\\"' in template["data"]
        (environment,) = group["task"]["env"]
        assert environment["DARKROOM_SECRETS"] == template["destination"]
        assert variables[f"{name}.json"]["Path"] == path
    (provision,) = groups(NOMAD / "provision.nomad.hcl").values()
    (template,) = provision["task"]["template"]
    assert str(variables["provision.json"]["Path"]) in template["data"]
    assert json.loads((tmp_path / "secrets" / "nomad" / "gateway.json").read_text())


def test_a_gateway_comes_as_a_canary_and_endpoints_is_alone() -> None:
    found = groups(NOMAD / "darkroom.nomad.hcl")
    (update,) = found["gateway"]["update"]
    assert (update["canary"], update["auto_promote"]) == (1, True)
    assert {name: group["count"] for name, group in found.items()} == {
        **dict.fromkeys(("gateway", "identity", "models", "inference"), 2),
        "endpoints": 1,
    }
    for group in found.values():
        (service, *_) = group["service"]
        assert service["check"][0]["path"] == "/readyz"
        assert group["task"]["kill_timeout"] == "20s"
        assert "scaling" not in group


def test_the_instance_types_are_what_endpoints_accepts_for_nomad() -> None:
    variables = {
        k: v for item in parse(NOMAD / "darkroom.nomad.hcl")["variable"] for k, v in item.items()
    }
    text = variables["instance_types"]["default"]
    types = text[text.index("{") : text.rindex("}") + 1].replace("$${", "${")
    (environment,) = groups(NOMAD / "darkroom.nomad.hcl")["endpoints"]["task"]["env"]
    settings = load(
        Settings,
        {
            **environment,
            "DARKROOM_INSTANCE_TYPES": types.replace('\\"', '"'),
            "DARKROOM_INSTALLATION": "main",
            "DARKROOM_NOMAD_TOKEN_FILE": "/dev/null",
            "DARKROOM_SECRETS": "/dev/null",
            "DARKROOM_NATS_USER": "endpoints",
            "DARKROOM_NATS_PASSWORD": "x",
            "DARKROOM_POSTGRES_URL": "postgresql://x",
            "DARKROOM_WORKER_NATS_PASSWORD": "x",
            "DARKROOM_WORKER_S3_ACCESS_KEY": "x",
            "DARKROOM_WORKER_S3_SECRET_KEY": "x",
        },
    )
    settings.check_launcher()
    gpu = settings.known_types().get("gpu")
    assert gpu.gpu_count == 1
    assert gpu.nomad.gpu_memory == "20 GiB"
    assert gpu.nomad.constraints == [
        {"LTarget": "${attr.kernel.name}", "Operand": "=", "RTarget": "linux"}
    ]
