"""Where every message travels: subjects, the four streams, their consumers, and who may do what.

    cmd.<owner>.<command>.v1            COMMANDS   work queue, one durable consumer per service
    evt.<owner>.<aggregate>.<id>        EVENTS     a log that projections and subscribers follow
    evt.<owner>.outcome.<command id>    EVENTS     rejections and "nothing to change"
    jobs.<endpoint id>                  JOBS       work queue, one durable consumer per endpoint
    dead.<owner>                        DEAD       what could not be handled, with the reason
    progress.<job or checkpoint id>     core NATS  steps, previews, bytes; never stored
    beats.<instance id>                 core NATS  how a worker is, every BEAT seconds; never stored

This is the one place that declares streams; `deploy/` applies it and services only bind.
"""

from __future__ import annotations

import msgspec
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from shared.contracts import endpoints, identity, inference, models
from shared.contracts.envelope import Completed, Message, Rejected
from shared.contracts.registry import TYPES, is_command, type_of

COMMANDS, EVENTS, JOBS, DEAD = "COMMANDS", "EVENTS", "JOBS", "DEAD"

DAY = 86_400.0
ACK_WAIT = 5.0
"""Seconds without a heartbeat after which a command or event is delivered again: so long do those
wait that a killed service had in hand, which is less than callers wait."""
JOB_ACK_WAIT = 6.0
"""Seconds without a heartbeat after which a job goes to another worker."""
JOB_HEARTBEAT = 1.5
BEAT = 2.0
"""Seconds between two words of a worker about itself."""

STREAMS: list[StreamConfig] = [
    StreamConfig(
        name=COMMANDS,
        subjects=["cmd.>"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        duplicate_window=120,
    ),
    StreamConfig(
        name=EVENTS,
        subjects=["evt.>"],
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.OLD,
        storage=StorageType.FILE,
        max_age=14 * DAY,
        max_bytes=4 * 1024**3,
        duplicate_window=120,
        allow_direct=True,
    ),
    StreamConfig(
        name=JOBS,
        subjects=["jobs.*"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        duplicate_window=120,
    ),
    StreamConfig(
        name=DEAD,
        subjects=["dead.*"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        max_age=90 * DAY,
        max_bytes=1024**3,
    ),
]

REACTS_TO: dict[str, list[str]] = {
    "inference": ["evt.models.checkpoint.*", "evt.endpoints.endpoint.*"],
}
"""Foreign events that a service follows with a durable consumer of its own name on EVENTS."""


def _commands_consumer(service: str) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=service,
        filter_subject=f"cmd.{service}.>",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT,
        max_deliver=-1,  # counted by the receiver, which writes the dead letter itself
        max_ack_pending=256,
    )


def _reactions_consumer(service: str, subjects: list[str]) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=service,
        filter_subjects=subjects,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT,
        max_deliver=-1,
        max_ack_pending=256,
    )


CONSUMERS: list[tuple[str, ConsumerConfig]] = [
    *((COMMANDS, _commands_consumer(s)) for s in ("identity", "models", "endpoints", "inference")),
    *((EVENTS, _reactions_consumer(s, subjects)) for s, subjects in REACTS_TO.items()),
]


def jobs_consumer(endpoint_id: str) -> ConsumerConfig:
    """The queue of one endpoint; made and removed by the endpoints service with the endpoint."""
    return ConsumerConfig(
        durable_name=jobs_durable(endpoint_id),
        filter_subject=f"jobs.{endpoint_id}",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=JOB_ACK_WAIT,
        max_deliver=-1,
        max_ack_pending=1000,
    )


def jobs_durable(endpoint_id: str) -> str:
    return f"endpoint-{endpoint_id}"


_AGGREGATES: dict[type[Message], tuple[str, str]] = {
    identity.Role: ("role", "role_name"),
    identity.User: ("user", "username"),
    identity.Credential: ("credential", "username"),
    identity.Token: ("token", "token_id"),
    models.Checkpoint: ("checkpoint", "checkpoint_id"),
    endpoints.Endpoint: ("endpoint", "endpoint_id"),
    inference.Job: ("job", "job_id"),
}


def _token(text: str) -> str:
    """A name as one subject token: what NATS reserves (space . * > and so on) is %-coded."""
    if text.replace("-", "").replace("_", "").isalnum() and text.isascii():
        return text
    return "".join(
        c
        if c.isascii() and (c.isalnum() or c in "-_")
        else "".join(f"%{b:02X}" for b in c.encode())
        for c in text
    )


def aggregate_of(message: Message) -> tuple[str, str]:
    """The kind and id of what an event speaks of: `("checkpoint", "d613…")`."""
    kind, field = aggregate_kind(type(message))
    return kind, getattr(message, field)


def aggregate_kind(struct: type[Message]) -> tuple[str, str]:
    """The kind, and the field that holds its id: `("checkpoint", "checkpoint_id")`."""
    for ancestor in struct.__mro__:
        if ancestor in _AGGREGATES:
            return _AGGREGATES[ancestor]
    raise TypeError(f"{struct.__name__} is no event")


def command_subject(type_name: str) -> str:
    return f"cmd.{type_name}"


def event_subject(message: Message, *, owner: str, command_id: str | None = None) -> str:
    if isinstance(message, Rejected | Completed):
        return f"evt.{owner}.outcome.{_token(command_id or 'none')}"
    kind, id_ = aggregate_of(message)
    return f"evt.{owner}.{kind}.{_token(id_)}"


def job_events_subject(job_id: str) -> str:
    return f"evt.inference.job.{_token(job_id)}"


def run_job_subject(endpoint_id: str) -> str:
    return f"jobs.{_token(endpoint_id)}"


def progress_subject(id_: str) -> str:
    """Of a job, or of a checkpoint that is being downloaded or checked."""
    return f"progress.{_token(id_)}"


def beat_subject(instance_id: str) -> str:
    """`*` stands for all of them."""
    return "beats.*" if instance_id == "*" else f"beats.{_token(instance_id)}"


def dead_subject(owner: str) -> str:
    return f"dead.{owner}"


class Permissions(msgspec.Struct, frozen=True):
    """What one NATS user may do; everything else is denied. `never`: what they may not publish
    although a wildcard in `publish` has it."""

    publish: list[str]
    subscribe: list[str]
    never: list[str] = []


WORKER_COMMANDS: tuple[type[Message], ...] = (
    inference.ReportJobStarted,
    inference.ReportJobSucceeded,
    inference.ReportJobFailed,
    endpoints.ReportInstance,
)
"""What a worker may say; nobody else may."""


def _pull(stream: str, durable: str) -> list[str]:
    return [
        f"$JS.API.CONSUMER.INFO.{stream}.{durable}",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}",
        f"$JS.ACK.{stream}.{durable}.>",
    ]


def _service(name: str, *more: str, hears: tuple[str, ...] = ()) -> Permissions:
    publish = [f"evt.{name}.>", dead_subject(name), *_pull(COMMANDS, name)]
    if name in REACTS_TO:
        publish += _pull(EVENTS, name)
    return Permissions([*publish, *more], [f"_INBOX_{name}.>", *hears])


_JOB_EVENTS = "evt.inference.job.*"
_WORKER_SUBJECTS = [command_subject(type_of(struct)) for struct in WORKER_COMMANDS]

PERMISSIONS: dict[str, Permissions] = {
    "gateway": Permissions(
        [
            *(
                command_subject(name)
                for name in TYPES
                if is_command(name) and command_subject(name) not in _WORKER_SUBJECTS
            ),
            f"$JS.API.STREAM.INFO.{EVENTS}",
            f"$JS.API.STREAM.INFO.{DEAD}",
            f"$JS.API.CONSUMER.CREATE.{EVENTS}",  # the form of an ordered consumer
            f"$JS.API.CONSUMER.CREATE.{EVENTS}.>",
            f"$JS.API.CONSUMER.INFO.{EVENTS}.>",
            f"$JS.API.CONSUMER.DELETE.{EVENTS}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.>",
            f"$JS.API.DIRECT.GET.{EVENTS}",
            f"$JS.API.DIRECT.GET.{EVENTS}.>",
            "$JS.FC.>",
        ],
        ["_INBOX_gateway.>", "progress.*", "beats.*"],
    ),
    "identity": _service("identity"),
    "models": _service("models", "progress.*"),
    "endpoints": _service(
        "endpoints",
        f"$JS.API.CONSUMER.CREATE.{JOBS}.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{JOBS}.>",
        f"$JS.API.CONSUMER.INFO.{JOBS}.>",
        f"$JS.API.CONSUMER.DELETE.{JOBS}.>",
        hears=("beats.*",),
    ),
    "inference": _service("inference", "jobs.*", f"$JS.API.STREAM.PURGE.{JOBS}"),
    "worker": Permissions(
        [
            *_WORKER_SUBJECTS,
            "progress.*",
            "beats.*",
            *_pull(JOBS, "*"),
            # Whether its job is still wanted: get_last_msg(EVENTS, job_events_subject(…), direct)
            f"$JS.API.DIRECT.GET.{EVENTS}.{_JOB_EVENTS}",
        ],
        ["_INBOX_worker.>", _JOB_EVENTS],
    ),
    # For people and programs outside: job events as they happen, or replayed from the stream.
    "subscriber": Permissions(
        [
            f"$JS.API.CONSUMER.CREATE.{EVENTS}.*.evt.inference.job.>",
            f"$JS.API.CONSUMER.INFO.{EVENTS}.*",
            f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.*",
            f"$JS.API.CONSUMER.DELETE.{EVENTS}.*",
            f"$JS.ACK.{EVENTS}.>",
            "$JS.FC.>",
        ],
        ["_INBOX_subscriber.>", _JOB_EVENTS, "progress.*"],
        [  # a service's own place in the log: not to be read from, moved or removed
            subject
            for name in REACTS_TO
            for subject in (
                f"$JS.API.CONSUMER.*.{EVENTS}.{name}",
                f"$JS.API.CONSUMER.CREATE.{EVENTS}.{name}.>",
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.{name}",
                f"$JS.ACK.{EVENTS}.{name}.>",
            )
        ],
    ),
}
