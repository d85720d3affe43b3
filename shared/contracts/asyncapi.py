"""The contracts as an AsyncAPI 3.0 document: every subject, who sends on it, and the JSON Schema of
each message. `just docs` writes it to docs/asyncapi.json, the gateway serves it as GET /asyncapi.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from typing import Any

import msgspec
from nats.js.api import StreamConfig

from shared.contracts import endpoints, inference, models
from shared.contracts.envelope import (
    Command,
    Completed,
    DeadLetter,
    Envelope,
    Message,
    Rejected,
    State,
)
from shared.contracts.registry import TYPES, is_command
from shared.contracts.subjects import (
    PERMISSIONS,
    STREAMS,
    aggregate_kind,
    command_subject,
)

VERSION = "0.1.0"
SUBSCRIBER = "subscriber"
"""The NATS user for people and programs outside."""

_TELEMETRY: dict[type[Message], str] = {
    inference.JobProgress: "progress.{id}",
    inference.JobPreview: "progress.{id}",
    models.CheckpointProgress: "progress.{id}",
    endpoints.InstanceBeat: "beats.{instance_id}",
}
_EMITTERS = {
    "progress.{id}": "worker (of a job), models (of a checkpoint)",
    "beats.{instance_id}": "worker",
    "jobs.{endpoint_id}": "inference",
    "dead.{owner}": "the service that gave the message up",
}
_PARAMETERS = {
    "id": "Of a job or a checkpoint",
    "command_id": "Of the command that this is the outcome of",
    "owner": "The service: identity, models, endpoints, inference",
}
_ABOUT = f"""What travels on Darkroom's NATS. Every message is a CloudEvents 1.0 envelope in JSON: \
its `type` names the message and its version, `data` is the payload. A field may join with a \
default, so pass over what you do not know; anything else is a new `.vN`. An event holds the whole \
state of what it speaks of, and its `version`: delivery is at least once, so keep the highest. \
Channels with the tag `{SUBSCRIBER}` are open to the NATS user in DARKROOM_NATS_URL, the others \
are described for whoever works on Darkroom. docs/subscribe.py is an example."""
_REF = "#/components/schemas/{name}"


def address_of(type_name: str) -> str:
    """The subject of a message type, with `{parameters}`."""
    struct, owner = TYPES[type_name], type_name.split(".")[0]
    if is_command(type_name):
        return command_subject(type_name)
    if struct in (Rejected, Completed):
        return f"evt.{owner}.outcome.{{command_id}}"
    if struct is inference.RunJob:
        return "jobs.{endpoint_id}"
    if struct is DeadLetter:
        return "dead.{owner}"
    if issubclass(struct, State):
        kind, field = aggregate_kind(struct)
        return f"evt.{owner}.{kind}.{{{field}}}"
    return _TELEMETRY[struct]


def wildcard_of(address: str) -> str:
    """What a subscriber asks NATS for: `evt.inference.job.*`."""
    return re.sub(r"\{\w+\}", "*", address)


def stream_of(address: str) -> StreamConfig | None:
    """The stream that keeps what is sent there; None for telemetry, which nobody keeps."""
    first = address.split(".")[0]
    for stream in STREAMS:
        if any(subject.split(".")[0] == first for subject in stream.subjects or ()):
            return stream
    return None


def is_open(address: str) -> bool:
    """Whether the subscriber's user may read it."""
    return wildcard_of(address) in PERMISSIONS[SUBSCRIBER].subscribe


def document() -> dict[str, Any]:
    by_address: dict[str, list[str]] = defaultdict(list)
    for type_name in TYPES:
        by_address[address_of(type_name)].append(type_name)
    _, schemas = msgspec.json.schema_components([Envelope, *TYPES.values()], ref_template=_REF)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Darkroom's events",
            "version": VERSION,
            "description": _ABOUT,
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "localhost:4222",
                "protocol": "nats",
                "description": "DARKROOM_NATS_URL of local.env",
                "security": [{"$ref": "#/components/securitySchemes/user"}],
            }
        },
        "channels": {
            _id(address): _channel(address, by_address[address]) for address in by_address
        },
        "operations": {
            _operation_id(address): _operation(address, by_address[address])
            for address in by_address
        },
        "components": {
            "messages": {type_name: _message(type_name) for type_name in TYPES},
            "schemas": schemas,
            "securitySchemes": {"user": {"type": "userPassword"}},
        },
    }


def _id(address: str) -> str:
    return re.sub(r"\{(\w+)\}", r"\1", address)


def _operation_id(address: str) -> str:
    return ("receive." if address.startswith("cmd.") else "send.") + _id(address)


def _channel(address: str, type_names: list[str]) -> dict[str, Any]:
    stream = stream_of(address)
    kept = f"Kept in the stream {stream.name}." if stream else "Core NATS: heard live, never kept."
    days = int((stream.max_age or 0) / 86_400) if stream else 0
    channel: dict[str, Any] = {
        "address": address,
        "messages": {n: {"$ref": f"#/components/messages/{n}"} for n in type_names},
        "description": kept + (f" For {days} days." if days else ""),
    }
    if names := re.findall(r"\{(\w+)\}", address):
        channel["parameters"] = {
            name: {"description": _PARAMETERS.get(name, f"The {name}, %-coded where need be")}
            for name in names
        }
    if is_open(address):
        channel["tags"] = [{"name": SUBSCRIBER}]
    if stream:
        channel["x-stream"] = stream.name
    return channel


def _operation(address: str, type_names: list[str]) -> dict[str, Any]:
    """As Darkroom does it: who subscribes receives what is sent here."""
    owner = address.split(".")[1]
    receives = address.startswith("cmd.")
    emitter = _EMITTERS.get(address, owner)
    return {
        "action": "receive" if receives else "send",
        "channel": {"$ref": f"#/channels/{_id(address)}"},
        "summary": f"Handled by {owner}" if receives else f"Emitter: {emitter}",
        "messages": [{"$ref": f"#/channels/{_id(address)}/messages/{n}"} for n in type_names],
    }


def _message(type_name: str) -> dict[str, Any]:
    struct = TYPES[type_name]
    said = {"type": {"const": type_name}, "data": {"$ref": _REF.format(name=struct.__name__)}}
    message: dict[str, Any] = {
        "name": type_name,
        "title": struct.__name__,
        "contentType": "application/json",
        "headers": {"type": "object", "properties": {"Nats-Msg-Id": {"type": "string"}}},
        "correlationId": {"location": "$message.payload#/correlation_id"},
        "payload": {"allOf": [{"$ref": _REF.format(name="Envelope")}, {"properties": said}]},
    }
    if text := description_of(struct):
        message["summary"] = text
    return message


def description_of(struct: type[Message]) -> str:
    """Its own words, or those of the state that it is an event of."""
    for ancestor in struct.__mro__:
        if ancestor in (State, Command, Message):
            break
        if ancestor.__doc__:
            return " ".join(inspect.cleandoc(ancestor.__doc__).split())
    return ""
