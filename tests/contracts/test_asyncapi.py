"""The AsyncAPI document is valid, up to date, and true of the messages that are really sent."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import (  # type: ignore[import-untyped]
    Draft7Validator,
    Draft202012Validator,
)

from deploy.docs import FOLDER, written
from shared.contracts import asyncapi
from shared.contracts import envelope as cloud
from shared.contracts.endpoints import InstanceBeat
from shared.contracts.envelope import Completed, DeadLetter, Rejected, State
from shared.contracts.inference import JobPreview, JobProgress, RunJob
from shared.contracts.models import CheckpointProgress
from shared.contracts.registry import TYPES, is_command, payload
from shared.contracts.subjects import (
    PERMISSIONS,
    beat_subject,
    command_subject,
    dead_subject,
    event_subject,
    progress_subject,
    run_job_subject,
)
from tests.contracts.test_contracts import GOLDEN

DOCUMENT = asyncapi.document()
RULES = GOLDEN.with_name("asyncapi-3.0.0.schema.json")


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolve(reference: str) -> Any:
    node: Any = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        node = node[part.replace("~1", "/").replace("~0", "~")]
    return node


def test_it_keeps_the_rules_of_asyncapi() -> None:
    Draft7Validator(json.loads(RULES.read_text())).validate(DOCUMENT)


def test_every_reference_leads_somewhere() -> None:
    found = list(references(DOCUMENT))
    assert len(found) > len(TYPES)
    for reference in found:
        resolve(reference)


def test_operations_use_messages_of_their_own_channel() -> None:
    """A rule of AsyncAPI that no JSON Schema can tell."""
    for operation in DOCUMENT["operations"].values():
        channel = operation["channel"]["$ref"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")


def test_parameters_are_those_of_the_address() -> None:
    for channel in DOCUMENT["channels"].values():
        named = set(re.findall(r"\{(\w+)\}", channel["address"]))
        assert set(channel.get("parameters", {})) == named


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_messages_are_as_described_and_go_where_it_is_said(type_name: str) -> None:
    stored = json.loads((GOLDEN / f"{type_name}.json").read_bytes())
    described = {
        "$ref": f"#/components/messages/{type_name}/payload",
        "components": DOCUMENT["components"],
    }
    validator: Any = Draft202012Validator(described)
    validator.validate(stored)
    assert not validator.is_valid(stored | {"type": "another"})
    assert not validator.is_valid({**stored, "data": None})

    pattern = re.sub(r"\\\{\w+\\\}", r"[^.]+", re.escape(asyncapi.address_of(type_name)))
    assert re.fullmatch(pattern, subject_of(type_name)), subject_of(type_name)


def subject_of(type_name: str) -> str:
    """Where it is really sent."""
    owner = type_name.split(".")[0]
    message = payload(cloud.decode((GOLDEN / f"{type_name}.json").read_bytes()))
    match message:
        case State() | Rejected() | Completed():
            return event_subject(message, owner=owner, command_id="c")
        case RunJob():
            return run_job_subject(message.endpoint_id)
        case JobProgress() | JobPreview():
            return progress_subject(message.job_id)
        case CheckpointProgress():
            return progress_subject(message.checkpoint_id)
        case InstanceBeat():
            return beat_subject(message.instance_id)
        case DeadLetter():
            return dead_subject("models")
    assert is_command(type_name)
    return command_subject(type_name)


def test_it_says_what_a_subscriber_may_read() -> None:
    marked = {
        asyncapi.wildcard_of(channel["address"])
        for channel in DOCUMENT["channels"].values()
        if "tags" in channel
    }
    allowed = PERMISSIONS[asyncapi.SUBSCRIBER].subscribe
    assert marked == {subject for subject in allowed if not subject.startswith("_INBOX")}


def test_what_is_published_is_what_the_code_says() -> None:
    for file, text in written().items():
        assert file.read_text() == text, "run `just docs`"


def test_its_version_is_that_of_the_package() -> None:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == asyncapi.VERSION
