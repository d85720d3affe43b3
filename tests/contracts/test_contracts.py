"""What was once sent can be read for ever: a stored example of every message, decoded and compared.

A new message gets its file from `python -m tests.contracts.test_contracts`, and so does one that
fields have joined (`TYPE+1.json`). It never changes a file that exists: a test that fails here says
that old messages would be misread, so make a `.v2`.
"""

from __future__ import annotations

import types
import typing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.gateway.errors import STATUS
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Command, Completed, Rejected, State
from shared.contracts.registry import REJECTIONS, TYPES, payload, type_of
from shared.contracts.subjects import PERMISSIONS, command_subject, event_subject

GOLDEN = Path(__file__).with_name("golden")
NOW = datetime(2026, 11, 23, 20, 48, 0, 123456, tzinfo=UTC)


def example_of(hint: Any, name: str = "") -> Any:
    """A value of a type, every field filled, so that the file shows the whole message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = typing.get_type_hints(hint, include_extras=True)
        return hint(**{field: example_of(hints[field], field) for field in hint.__struct_fields__})
    if origin in (types.UnionType, typing.Union):
        return example_of(next(a for a in arguments if a is not type(None)), name)
    if origin is list:
        return [example_of(arguments[0], name)]
    if origin is dict:
        return {f"some {name}": example_of(arguments[1], name)}
    if hint is msgspec.Raw:
        return msgspec.Raw(b'{"any":"json"}')
    examples = {str: f"some {name}", int: 3, float: 0.25, bool: True, datetime: NOW}
    return examples[hint]


def framed(type_name: str) -> cloud.Envelope:
    return cloud.Envelope(
        id="0c4ff7ce-2f3c-4c1e-8f0c-0d3e6f0a9a11",
        source="somebody",
        type=type_name,
        subject="an id",
        time=NOW,
        data=msgspec.Raw(msgspec.json.encode(example_of(TYPES[type_name]))),
        correlation_id="a request",
        causation_id="a command",
        actor="admin",
        answers="a command",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def stored_of(type_name: str) -> list[Path]:
    """The examples of a message, the oldest first."""
    first = GOLDEN / f"{type_name}.json"
    return [*([first] if first.exists() else []), *sorted(GOLDEN.glob(f"{type_name}+*.json"))]


def fields_of(data: Any, at: str = "") -> set[str]:
    """The paths to everything that a message says: `models[].name`."""
    if isinstance(data, dict):
        return {at}.union(*(fields_of(value, f"{at}.{key}") for key, value in data.items()))
    if isinstance(data, list):
        return {at}.union(*(fields_of(value, f"{at}[]") for value in data))
    return {at}


def is_told(type_name: str) -> bool:
    """Whether the newest example has all that the message can say today."""
    newest = msgspec.json.decode(cloud.encode(framed(type_name)))["data"]
    files = stored_of(type_name)
    if not files:
        return False
    return fields_of(newest) <= fields_of(msgspec.json.decode(files[-1].read_bytes())["data"])


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_a_stored_message_still_reads_as_what_it_said(type_name: str) -> None:
    assert is_told(type_name), "write it with: python -m tests.contracts.test_contracts"
    for file in stored_of(type_name):
        stored = file.read_bytes()
        envelope = cloud.decode(stored)
        message = payload(envelope)
        assert envelope.type == type_name
        # Everything that was said is still there; a newer field may have joined with its default.
        said = msgspec.json.decode(stored)["data"]
        heard = msgspec.json.decode(msgspec.json.encode(message))
        assert_contains(heard, said)


def assert_contains(whole: Any, part: Any) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            assert key in whole
            assert_contains(whole[key], value)
    elif isinstance(part, list):
        assert len(whole) == len(part)
        for one, other in zip(whole, part, strict=True):
            assert_contains(one, other)
    else:
        assert whole == part


@pytest.mark.parametrize("type_name", sorted(TYPES))
def test_a_field_unknown_to_this_version_is_passed_over(type_name: str) -> None:
    """A newer sender may add a field with a default."""
    stored = msgspec.json.decode((GOLDEN / f"{type_name}.json").read_bytes())
    stored["data"]["from_the_future"] = 1
    stored["another_attribute"] = "x"
    payload(cloud.decode(msgspec.json.encode(stored)))


def test_no_golden_file_is_left_without_its_message() -> None:
    assert {file.stem.partition("+")[0] for file in GOLDEN.glob("*.json")} == set(TYPES)


def test_names_say_owner_verb_and_version() -> None:
    for type_name, struct in TYPES.items():
        owner, action, version = type_name.split(".")
        assert version == "v1"
        assert owner in {"identity", "models", "endpoints", "inference", "darkroom"}
        if issubclass(struct, Command) and action != "resync":
            words = "".join(word.capitalize() for word in action.split("_"))
            assert struct.__name__ == words
        if struct not in (Rejected, Completed):
            assert type_of(struct) == type_name


def test_every_rejection_has_an_http_status_and_no_status_is_left_over() -> None:
    assert set(STATUS) == {*REJECTIONS, "darkroom.failed"}


def test_subjects_are_safe_whatever_a_name_holds() -> None:
    role = example_of(TYPES["identity.role_created.v1"])
    for name in ("a.b", "a b", "*", ">", "Ünïcode", "new\nline"):
        subject = event_subject(msgspec.structs.replace(role, role_name=name), owner="identity")
        assert subject.startswith("evt.identity.role.")
        assert len(subject.split(".")) == 4
        assert not set(subject) & set(" *>\n")


def test_only_a_worker_may_say_what_a_worker_says() -> None:
    """A gateway that is broken into can't report jobs as done; a worker can't create users."""
    reports = {
        command_subject(name)
        for name, struct in TYPES.items()
        if issubclass(struct, Command) and ".report_" in name
    }
    assert len(reports) == 4
    assert not reports & set(PERMISSIONS["gateway"].publish)
    worker = {s for s in PERMISSIONS["worker"].publish if s.startswith("cmd.")}
    assert worker == reports
    for user, permissions in PERMISSIONS.items():
        if user not in ("gateway", "worker"):
            assert not [s for s in permissions.publish if s.startswith("cmd.")], user
        assert f"_INBOX_{user}.>" in permissions.subscribe


def test_states_carry_a_version_and_no_password() -> None:
    for type_name, struct in TYPES.items():
        if issubclass(struct, State):
            assert "version" in struct.__struct_fields__
            if not type_name.startswith("identity.credential"):
                assert not [f for f in struct.__struct_fields__ if "password" in f]


def write_missing() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for type_name in TYPES:
        known = stored_of(type_name)
        file = GOLDEN / f"{type_name}{f'+{len(known)}' if known else ''}.json"
        if not is_told(type_name):
            file.write_bytes(msgspec.json.format(cloud.encode(framed(type_name)), indent=1) + b"\n")
            print("wrote", file.name)


if __name__ == "__main__":
    write_missing()
