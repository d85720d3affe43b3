"""The frame around every message: CloudEvents 1.0 attributes plus four of our own."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Self

import msgspec


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message on the bus.

    `type` is the versioned message name (`models.create_checkpoint.v1`), `subject` the id of the
    aggregate it speaks of, `data` the payload as raw JSON.

    - `correlation_id`: the HTTP request (or job) that everything here began with.
    - `causation_id`: the message that led to this one.
    - `actor`: the user on whose behalf it was sent.
    - `answers`: set on the last event of a command: the id of the command that is now done.
    """

    id: str
    source: str
    type: str
    subject: str
    time: datetime
    data: msgspec.Raw
    specversion: str = "1.0"
    datacontenttype: str = "application/json"
    correlation_id: str | None = None
    causation_id: str | None = None
    actor: str | None = None
    answers: str | None = None
    traceparent: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of an envelope. Fields may only be added, with a default; else it is a new `.vN`."""


class Command(Message, frozen=True, kw_only=True):
    """A wish addressed to one service; answered by its events or by a rejection."""


class State(Message, frozen=True, kw_only=True):
    """The full public state of one aggregate. `version` counts its changes, from 1."""

    version: int
    deleted: bool = False

    @classmethod
    def of(cls, aggregate: msgspec.Struct) -> Self:
        """The event about an aggregate: its public fields, taken over by name."""
        return cls(**{name: getattr(aggregate, name) for name in cls.__struct_fields__})


class Rejected(Message, frozen=True, kw_only=True):
    """A command was refused and changed nothing. `code` is stable: `models.name_taken`."""

    code: str
    message: str
    command_type: str


class Completed(Message, frozen=True, kw_only=True):
    """A command was done and changed nothing that anyone sees (a delete of what is not there)."""

    command_type: str


class DeadLetter(Message, frozen=True, kw_only=True):
    """A message that could not be handled, kept with the reason; whole, unless that is larger than
    the bus takes. Emitter: its consumer."""

    reason: str
    attempts: int
    envelope: msgspec.Raw


HEADER_BYTES = 1024
"""What a message's headers may take of the largest message that the bus accepts."""


def fits(body: bytes, max_payload: int, *, spare: int = 0) -> bool:
    """Whether a bus that takes `max_payload` bytes takes this body, and `spare` bytes more. It
    counts headers too, and breaks the connection for what is larger."""
    return len(body) + HEADER_BYTES + spare <= max_payload


def new_id() -> str:
    return str(uuid.uuid4())


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    return _encoder.encode(envelope)


def decode(body: bytes) -> Envelope:
    """Raises msgspec.DecodeError or msgspec.ValidationError for what is no envelope."""
    return _decoder.decode(body)


def wrap(
    message: Message,
    *,
    type: str,
    source: str,
    subject: str,
    id: str | None = None,
    now: datetime | None = None,
    cause: Envelope | None = None,
    correlation_id: str | None = None,
    actor: str | None = None,
    traceparent: str | None = None,
    answers: str | None = None,
) -> Envelope:
    """Frames a payload. What it does not say about its origin is taken over from `cause`."""
    return Envelope(
        id=id or new_id(),
        source=source,
        type=type,
        subject=subject,
        time=now or datetime.now(UTC),
        data=msgspec.Raw(_encoder.encode(message)),
        correlation_id=correlation_id or (cause.correlation_id if cause else None),
        causation_id=cause.id if cause else None,
        actor=actor or (cause.actor if cause else None),
        traceparent=traceparent or (cause.traceparent if cause else None),
        answers=answers,
    )
