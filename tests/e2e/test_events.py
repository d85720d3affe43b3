"""Server-Sent Events over HTTP, and what a program outside may hear on the bus."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import nats
import nats.errors
import psutil
import pytest
from nats.aio.client import Client as Nats
from nats.js.api import AckPolicy, ConsumerConfig

from deploy.local.client import Client, Failed, ServerEvent, event_lines, parse_events
from deploy.local.demo import CHECKPOINT
from deploy.local.stack import Stack
from shared.contracts import envelope as cloud
from shared.contracts.envelope import Message
from shared.contracts.identity import RoleChanged
from shared.contracts.inference import JobPreview, JobProgress
from shared.contracts.registry import type_of
from shared.contracts.subjects import EVENTS, REACTS_TO

ENDPOINT = "events"
MODEL = {"Stable-diffusion": [CHECKPOINT.name], "VAE": ["Automatic"]}
STEPS = 8
PARAMS = {"prompt": "a red circle", "steps": STEPS, "width": 64, "height": 64, "seed": 1}
LIFE = [f"inference.job_{what}.v1" for what in ("created", "started", "taken", "succeeded")]


@pytest.fixture(scope="module")
def artist(admin: Client) -> Iterator[Client]:
    """Somebody with a model and a worker."""
    if admin.find_checkpoint("Stable-diffusion", CHECKPOINT.name) is None:
        admin.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    admin.create_endpoint(ENDPOINT)
    admin.wait_for_endpoint(ENDPOINT)
    yield admin
    admin.call("DELETE", "/endpoints", {"delete_endpoint_list": [ENDPOINT], "username": "admin"})


@pytest.fixture
def other(stack: Stack, admin: Client) -> Client:
    """The same person at the second gateway."""
    return at(admin, f"http://127.0.0.1:{stack.installation.ports['gateway-2']}")


def at(client: Client, url: str) -> Client:
    return Client(url, client.headers["x-api-key"], client.headers["Authorization"][7:])


def unique(kind: str) -> str:
    return f"{kind}-{uuid4().hex[:8]}"


def add_person(admin: Client, *roles: str) -> Client:
    name, password = unique("person"), unique("password")
    admin.call("POST", "/users", {"username": name, "password": password, "roles": list(roles)})
    return Client.log_in(admin.url, admin.headers["x-api-key"], name, password)


class Ear:
    """Follows a stream in a thread of its own, and keeps what it hears."""

    def __init__(self, client: Client, path: str, *, last_event_id: str | None = None) -> None:
        self.heard: list[ServerEvent] = []
        self.ended = threading.Event()
        self._begun = threading.Event()
        self._headers = dict(client.headers)
        if last_event_id:
            self._headers["Last-Event-ID"] = last_event_id
        self._url = client.url + path
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        assert self._begun.wait(10)

    def _listen(self) -> None:
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(trust_env=False) as http,
            http.stream("GET", self._url, headers=self._headers, timeout=60) as response,
        ):
            assert response.status_code == 200, response.read()
            lines = event_lines(response)
            assert next(lines).startswith("retry")
            self._begun.set()
            for event in parse_events(lines):
                self.heard.append(event)
        self.ended.set()

    def wait(self, seen: Callable[[list[ServerEvent]], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not seen(self.heard):
            assert time.monotonic() < deadline, [event.name for event in self.heard]
            time.sleep(0.02)

    def subjects(self) -> list[str]:
        return [event.data["subject"] for event in self.heard if event.id]


def ids(events: list[ServerEvent]) -> list[int]:
    return [int(event.id) for event in events if event.id]


def about(subject: str) -> Callable[[list[ServerEvent]], bool]:
    return lambda heard: any(event.data.get("subject") == subject for event in heard)


def test_a_job_is_told_step_by_step_and_then_the_stream_ends(artist: Client, other: Client) -> None:
    job_id = artist.create_job("txt2img", MODEL, PARAMS)
    path = f"/inferences/{job_id}/events"
    ears = [Ear(artist, path), Ear(other, path), Ear(artist, "/events"), Ear(other, "/events")]
    other.start_job(job_id)
    for ear in ears[:2]:
        assert ear.ended.wait(60)
    assert artist.get_job(job_id)["status"] == "succeed"
    for ear in ears[:2]:
        stored = [event for event in ear.heard if event.id]
        assert [event.name for event in stored] == LIFE
        assert ids(stored) == sorted(set(ids(stored)))
        assert [event.data["data"]["version"] for event in stored] == [1, 2, 3, 4]
        assert len({event.data["correlation_id"] for event in stored[1:]}) == 1
        names = [event.name for event in ear.heard]
        progress = [event.data for event in ear.heard if event.name == "progress"]
        assert names.index("progress") > names.index(LIFE[1])
        assert names[-1] == LIFE[-1]
        steps = [report["step"] for report in progress]
        assert steps == sorted(steps)
        assert (steps[-1], progress[-1]["steps"]) == (STEPS, STEPS)
    for ear in ears[2:]:
        ear.wait(lambda heard: any(event.name == LIFE[-1] for event in heard), 5)
        told = [e for e in ear.heard if job_id in (e.data.get("subject"), e.data.get("job_id"))]
        assert [event.name for event in told if event.id] == LIFE[1:]
        assert "progress" in [event.name for event in told]


async def tell(stack: Stack, job_id: str, *telemetry: Message | bytes) -> None:
    """As a worker that has the job."""
    client = await nats.connect(stack.installation.nats_url_as("worker"))
    for message in telemetry:
        if isinstance(message, Message):
            name = type_of(message)
            framed = cloud.wrap(message, type=name, source="worker/1", subject=job_id)
            message = cloud.encode(framed)
        await client.publish(f"progress.{job_id}", message)
    await client.flush()
    await client.close()


def preview_of(job_id: str, step: int = 4, image: str = "/9j/4AAQ") -> JobPreview:
    return JobPreview(
        job_id=job_id, attempt=1, step=step, steps=8, media_type="image/jpeg", image=image
    )


def test_a_picture_is_seen_as_it_comes_to_be(stack: Stack, admin: Client, other: Client) -> None:
    """By those who hear of the job; what else is said where workers speak is passed over."""
    outsider = add_person(admin, "Designer")
    job_id, rival_id = (admin.create_job("rembg", {}, {}) for _ in range(2))
    path = f"/inferences/{job_id}/events"
    ears = [Ear(admin, path), Ear(other, path), Ear(admin, "/events"), Ear(other, "/events")]
    deaf = [Ear(outsider, "/events"), Ear(admin, f"/inferences/{rival_id}/events")]
    unknown = cloud.wrap(preview_of(job_id), type="inference.job_film.v1", source="x", subject="x")
    progress = JobProgress(job_id=job_id, step=5, steps=8)
    asyncio.run(tell(stack, job_id, b"noise", cloud.encode(unknown), preview_of(job_id), progress))
    for ear in ears:
        ear.wait(lambda heard: any(event.name == "progress" for event in heard), 5)
        told = [event for event in ear.heard if not event.id]
        assert [event.name for event in told] == ["preview", "progress"]
        assert told[0].data == {
            "job_id": job_id,
            "attempt": 1,
            "step": 4,
            "steps": 8,
            "media_type": "image/jpeg",
            "image": "/9j/4AAQ",
        }
    admin.cancel_job(job_id)
    for ear in ears[:2]:
        assert ear.ended.wait(5)
        assert ear.heard[-1].name == "inference.job_cancelled.v1"
    for ear in deaf:
        assert not [event for event in ear.heard if not event.id]


def test_who_reads_slowly_gets_fewer_pictures_and_no_fewer_events(
    stack: Stack, admin: Client
) -> None:
    job_id, count = admin.create_job("rembg", {}, {}), 100
    previews = [preview_of(job_id, step, "x" * 150_000) for step in range(count)]
    transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)])
    url = f"{admin.url}/inferences/{job_id}/events"
    with (
        httpx.Client(transport=transport, timeout=30) as http,
        http.stream("GET", url, headers=admin.headers) as slow,
    ):
        lines = event_lines(slow)
        assert next(lines).startswith("retry")
        asyncio.run(tell(stack, job_id, *previews))
        admin.cancel_job(job_id)
        names = [event.name for event in parse_events(lines)]
    assert 0 < names.count("preview") < count
    assert names[-1] == "inference.job_cancelled.v1"


def test_who_knows_the_end_of_a_job_is_told_not_to_come_back(artist: Client) -> None:
    job_id = artist.create_job("txt2img", MODEL, PARAMS)
    artist.start_job(job_id)
    path = f"/inferences/{job_id}/events"
    life = [event for event in artist.events(path) if event.id]
    for known, event in enumerate(life[:-1], 1):
        assert list(artist.events(path, last_event_id=event.id)) == life[known:]
    answer = artist.request("GET", path, last_event_id=str(life[-1].id))
    assert (answer.status_code, answer.content) == (204, b"")


def test_who_comes_back_gets_exactly_what_was_missed(admin: Client, other: Client) -> None:
    """From either gateway, again and again, while events keep coming."""
    begun, done = unique("begun"), threading.Event()
    heard: list[ServerEvent] = []

    def write() -> int:
        with at(other, other.url) as writer:
            for number in itertools.count():
                writer.call("POST", "/roles", {"role_name": f"{begun} {number}", "permissions": []})
                if done.is_set():
                    return number + 1
        raise AssertionError

    first = Ear(admin, "/events")
    admin.call("POST", "/roles", {"role_name": begun, "permissions": []})
    first.wait(about(begun))
    last = first.heard[-1].id
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        for round_ in range(12):
            time.sleep(0.1 * (round_ % 3))
            gateway = (admin, other)[round_ % 2]
            for event in gateway.events("/events", last_event_id=last):
                heard.append(event)
                if len(heard) >= 5 * (round_ + 1):
                    break
            last = heard[-1].id
        done.set()
        written = writing.result(20)
    final = f"{begun} {written - 1}"
    rest = Ear(admin, "/events", last_event_id=last)
    rest.wait(about(final))
    heard += rest.heard
    mine = [e.data["subject"] for e in heard if e.data["subject"].startswith(begun)]
    assert mine == [f"{begun} {number}" for number in range(written)]
    assert ids(heard) == sorted(set(ids(heard)))


def test_nobody_hears_of_what_is_somebody_elses(artist: Client) -> None:
    outsider, stranger = add_person(artist, "Designer"), add_person(artist)
    job_id = artist.create_job("txt2img", MODEL, PARAMS)
    for person in (outsider, stranger):
        with pytest.raises(Failed) as refused:
            list(person.events(f"/inferences/{job_id}/events"))
        assert refused.value.status == 403
    ears = [Ear(outsider, "/events"), Ear(stranger, "/events")]
    artist.start_job(job_id)
    assert artist.wait_for_job(job_id)["status"] == "succeed"
    last = unique("last")
    artist.call("POST", "/roles", {"role_name": last, "permissions": []})
    ears[0].wait(about(last))
    time.sleep(0.3)
    heard = [event for ear in ears for event in ear.heard]
    assert job_id not in str(heard)
    assert not [event for event in heard if event.name == "progress"]
    assert not ears[1].heard  # not even a role


def test_whoever_is_let_go_hears_nothing_more(admin: Client, other: Client) -> None:
    """Deleted, with a new set of rights, or with a revoked token: the stream ends at once, and who
    comes back is judged anew."""
    for let_go in ("user", "role", "token"):
        role = unique("role")
        admin.call("POST", "/roles", {"role_name": role, "permissions": ["role:list"]})
        person = add_person(admin, role)
        token = person.call("POST", "/auth/tokens", {"name": "ear"})["data"]
        ear = Ear(Client(other.url, other.headers["x-api-key"], token["access_token"]), "/events")
        heard = unique("heard")
        admin.call("POST", "/roles", {"role_name": heard, "permissions": []})
        ear.wait(about(heard))
        username = admin.call("GET", "/users")["data"]["users"]
        (me,) = [u["username"] for u in username if u["roles"] == [role]]
        if let_go == "user":
            admin.call("DELETE", "/users", {"user_name_list": [me]})
        elif let_go == "role":
            admin.call("DELETE", "/roles", {"role_name_list": [role]})
        else:
            person.call("DELETE", f"/auth/tokens/{token['token']['id']}")
        assert ear.ended.wait(2), let_go
        secret = unique("secret")
        admin.call("POST", "/roles", {"role_name": secret, "permissions": []})
        assert not about(secret)(ear.heard)


def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(
    stack: Stack, admin: Client
) -> None:
    count = 3000
    options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)]
    transport = httpx.HTTPTransport(socket_options=options)
    quick = Ear(admin, "/events")
    with (
        httpx.Client(transport=transport, timeout=30) as http,
        http.stream("GET", admin.url + "/events", headers=admin.headers) as slow,
    ):
        lines = event_lines(slow)
        assert next(lines).startswith("retry")
        name = unique("flood")
        for first in range(1, count, 300):
            asyncio.run(flood(stack, name, range(first, first + 300), last=count))
            began = time.monotonic()
            admin.call("GET", "/roles?per_page=1")
            assert time.monotonic() - began < 3
            quick.wait(lambda heard, wanted=first + 299: len(heard) >= wanted)  # type: ignore[misc]
        got = [event for event in parse_events(lines) if event.id]  # to its end
    assert ids(quick.heard) == sorted(set(ids(quick.heard)))
    assert 0 < len(got) < count
    rest = Ear(admin, "/events", last_event_id=got[-1].id)
    rest.wait(lambda heard: len(heard) >= count - len(got), 30)
    all_of_it = [e for e in got + rest.heard if e.data["subject"] == name]
    assert [e.data["data"]["version"] for e in all_of_it] == list(range(1, count + 1))


async def flood(stack: Stack, name: str, versions: range, *, last: int) -> None:
    """Events of one role, of 4 KB each, as identity would send them; the last one deletes it."""
    client = await nats.connect(stack.installation.nats_url_as("admin"))
    js = client.jetstream()
    acks = []
    for version in versions:
        event = RoleChanged(
            version=version,
            deleted=version == last,
            role_name=name,
            permissions=["x" * 4000],
            creator="flood",
            is_default=False,
            created_at=datetime.now(UTC),
        )
        framed = cloud.wrap(event, type="identity.role_changed.v1", source="identity", subject=name)
        acks.append(await js.publish_async(f"evt.identity.role.{name}", cloud.encode(framed)))
    await asyncio.gather(*acks)
    await client.close()


def test_a_gateway_stops_in_time_although_streams_are_open(stack: Stack, other: Client) -> None:
    ears = [Ear(other, "/events") for _ in range(5)]
    old = stack.pid("gateway-2")
    began = time.monotonic()
    os.kill(old, signal.SIGTERM)
    while psutil.pid_exists(old) and psutil.Process(old).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert time.monotonic() - began < 5
    for ear in ears:
        assert ear.ended.wait(1)
    stack.wait_ready("gateway-2", other_than=old)


# On the bus, from outside


class Outsider:
    """With the credentials of `local.env`, and what the server said against it."""

    def __init__(self, client: Nats, errors: list[str]) -> None:
        self.client = client
        self.errors = errors

    async def ask(self, subject: str, body: object = b"", **headers: str) -> dict[str, Any]:
        """The answer of the server, {} if there is none."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            answer = await self.client.request(
                subject, data, timeout=0.4, headers=dict(headers) or None
            )
            with contextlib.suppress(ValueError):
                return dict(json.loads(answer.data))
            return {"raw": answer.data, "headers": answer.headers}
        return {}


@contextlib.asynccontextmanager
async def outside(stack: Stack) -> AsyncIterator[Outsider]:
    errors: list[str] = []

    async def note(error: Exception) -> None:
        errors.append(str(error))

    client = await nats.connect(
        stack.environment()["DARKROOM_NATS_URL"],
        inbox_prefix=b"_INBOX_subscriber",
        error_cb=note,
        allow_reconnect=False,
    )
    try:
        yield Outsider(client, errors)
    finally:
        await client.close()


async def test_a_program_outside_can_follow_jobs_on_the_bus(stack: Stack, artist: Client) -> None:
    async with outside(stack) as outsider:
        live: list[Any] = []
        progress: list[Any] = []

        async def hear(message: Any) -> None:
            live.append(cloud.decode(message.data))

        async def hear_progress(message: Any) -> None:
            progress.append(cloud.decode(message.data))

        await outsider.client.subscribe("evt.inference.job.*", cb=hear)
        await outsider.client.subscribe("progress.*", cb=hear_progress)
        await outsider.client.flush()
        job_id = await asyncio.to_thread(artist.create_job, "txt2img", MODEL, PARAMS)
        await asyncio.to_thread(artist.start_job, job_id)
        job = await asyncio.to_thread(artist.wait_for_job, job_id)
        assert job["status"] == "succeed"
        assert [e.type for e in live if e.subject == job_id] == LIFE
        assert [e for e in progress if e.subject == job_id]

        js = outsider.client.jetstream()
        for durable in (None, unique("mine")):
            name = durable or unique("passing")
            config = ConsumerConfig(
                name=name,
                durable_name=durable,
                ack_policy=AckPolicy.EXPLICIT,
                filter_subject="evt.inference.job.>",
                inactive_threshold=None if durable else 30,
            )
            await js.add_consumer(EVENTS, config)
            replay = await js.pull_subscribe_bind(name, EVENTS)
            told: list[str] = []
            while LIFE[-1] not in told:
                for message in await replay.fetch(50, timeout=5):
                    envelope = cloud.decode(message.data)
                    if envelope.subject == job_id:
                        told.append(envelope.type)
                    await message.ack()
            assert told == LIFE
            assert await js.delete_consumer(EVENTS, name)
        assert not outsider.errors


async def test_a_program_outside_can_neither_hear_nor_say_more(stack: Stack, admin: Client) -> None:
    """Above all not the password hashes of evt.identity.credential."""
    async with outside(stack) as outsider:
        leaked: list[str] = []

        async def leak(message: Any) -> None:
            leaked.append(message.subject)

        for subject in (
            ">",
            "evt.>",
            "evt.*.>",
            "evt.identity.>",
            "evt.identity.credential.*",
            "evt.inference.>",
            "cmd.>",
            "jobs.*",
            "dead.*",
            "_INBOX.>",
            "_INBOX_gateway.>",
            "*.>",
            "$JS.>",
            "$SYS.>",
            "*",
            "*.*.*.*",
        ):
            await outsider.client.subscribe(subject, cb=leak)
        await outsider.client.flush()
        name = unique("victim")
        user = {"username": name, "password": "a password", "roles": ["Designer"]}
        await asyncio.to_thread(admin.call, "POST", "/users", user)

        # Consumers of other events, by every way to ask for one
        create = f"$JS.API.CONSUMER.CREATE.{EVENTS}"
        all_, hashes, jobs = "evt.>", "evt.identity.>", "evt.inference.job.>"
        number = itertools.count()

        def wish(**config: Any) -> dict[str, Any]:
            name = f"thief-{next(number)}"
            given = {"name": name, "ack_policy": "none", "deliver_policy": "all", **config}
            return {"stream_name": EVENTS, "config": given}

        wishes: list[tuple[str, dict[str, Any]]] = [
            (create, wish(filter_subject=hashes)),
            (create, wish(filter_subject=jobs)),
            (f"{create}.{{name}}", wish(filter_subject=hashes)),
            (f"{create}.{{name}}", wish(filter_subjects=[hashes, jobs])),
            (f"{create}.{{name}}", wish()),
            (f"{create}.{{name}}.{hashes}", wish(filter_subject=hashes)),
            (f"{create}.{{name}}.{all_}", wish(filter_subject=all_)),
            (f"{create}.{{name}}.{jobs}", wish(filter_subject=hashes)),
            (f"{create}.{{name}}.{jobs}", wish(filter_subject=all_)),
            (f"{create}.{{name}}.{jobs}", wish(filter_subject="")),
            (f"{create}.{{name}}.{jobs}", wish()),
            (f"{create}.{{name}}.{jobs}", wish(filter_subjects=[hashes])),
            (f"{create}.{{name}}.{jobs}", wish(filter_subjects=[jobs, hashes])),
            (f"{create}.{{name}}.{jobs}", wish(filter_subject=jobs, filter_subjects=[hashes])),
            (f"{create}.{{name}}.{jobs}.x", wish(filter_subject=hashes)),
            (f"{create}.{{name}}.{jobs}", {**wish(filter_subject=jobs), "stream_name": "COMMANDS"}),
            ("$JS.API.CONSUMER.CREATE.COMMANDS.{name}.cmd.>", wish(filter_subject="cmd.>")),
            (f"$JS.API.CONSUMER.DURABLE.CREATE.{EVENTS}.{{name}}", wish(filter_subject=hashes)),
        ]

        async def steal(subject: str, body: dict[str, Any]) -> None:
            thief = body["config"]["name"]
            answer = await outsider.ask(subject.format(name=thief), body)
            assert "error" in answer or not answer, (subject, body, answer)
            got = await outsider.ask(
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.{thief}", {"batch": 1, "no_wait": True}
            )
            assert "raw" not in got or not got["raw"], (subject, body)

        await asyncio.gather(*(steal(subject, body) for subject, body in wishes))

        # A consumer of jobs that is changed afterwards
        honest = wish(filter_subject=jobs)
        mine = honest["config"]["name"]
        assert "error" not in await outsider.ask(f"{create}.{mine}.{jobs}", honest)
        for change in (
            {"filter_subject": hashes},
            {"filter_subject": "", "filter_subjects": [all_]},
        ):
            changed = {**honest, "config": {**honest["config"], **change}, "action": "update"}
            answer = await outsider.ask(f"{create}.{mine}.{jobs}", changed)
            assert "error" in answer, answer

        # Without a consumer, and the administration of streams
        requests: list[tuple[str, object]] = [
            (f"$JS.API.DIRECT.GET.{EVENTS}", {"seq": 1}),
            (f"$JS.API.DIRECT.GET.{EVENTS}", {"last_by_subj": f"evt.identity.credential.{name}"}),
            (f"$JS.API.DIRECT.GET.{EVENTS}.evt.identity.credential.{name}", b""),
            (f"$JS.API.DIRECT.GET.{EVENTS}.evt.inference.job.x", b""),
            (f"$JS.API.STREAM.MSG.GET.{EVENTS}", {"seq": 1}),
            (f"$JS.API.STREAM.MSG.DELETE.{EVENTS}", {"seq": 1}),
            (f"$JS.API.STREAM.INFO.{EVENTS}", {"subjects_filter": ">"}),
            (f"$JS.API.STREAM.PURGE.{EVENTS}", b""),
            ("$JS.API.STREAM.NAMES", b""),
            ("$JS.API.STREAM.LIST", b""),
            ("$JS.API.INFO", b""),
            (f"$JS.API.CONSUMER.NAMES.{EVENTS}", b""),
            (f"$JS.API.CONSUMER.LIST.{EVENTS}", b""),
            ("$JS.API.STREAM.CREATE.COPY", {"name": "COPY", "sources": [{"name": EVENTS}]}),
            ("$JS.API.STREAM.CREATE.MIRROR", {"name": "MIRROR", "mirror": {"name": EVENTS}}),
            (f"$JS.API.STREAM.UPDATE.{EVENTS}", {"name": EVENTS, "subjects": ["evt.>"]}),
        ]

        # The places of the services in the log
        for service in REACTS_TO:
            own = {"durable_name": service, "filter_subject": jobs, "ack_policy": "explicit"}
            requests += [
                (f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS}.{service}", {"batch": 1, "no_wait": True}),
                (f"$JS.API.CONSUMER.INFO.{EVENTS}.{service}", b""),
                (f"$JS.API.CONSUMER.DELETE.{EVENTS}.{service}", b""),
                (f"{create}.{service}.{jobs}", {"stream_name": EVENTS, "config": own}),
            ]
        answers = await asyncio.gather(*(outsider.ask(*request) for request in requests))
        assert not [given for given in zip(requests, answers, strict=True) if given[1]]

        # And to say something
        framed = cloud.wrap(
            RoleChanged(
                version=99,
                role_name=name,
                permissions=["user:all"],
                creator="x",
                is_default=False,
                created_at=datetime.now(UTC),
            ),
            type="identity.role_changed.v1",
            source="identity",
            subject=name,
        )
        forged = (
            "cmd.identity.create_user.v1",
            "cmd.inference.report_job_succeeded.v1",
            f"evt.identity.role.{name}",
            "evt.inference.job.x",
            "jobs.x",
            "dead.identity",
            "progress.x",
        )
        body = cloud.encode(framed)
        answers = await asyncio.gather(*(outsider.ask(subject, body) for subject in forged))
        assert not any(answers)
        roles = await asyncio.to_thread(admin.call, "GET", "/roles")
        assert name not in str(roles)
        assert not leaked
        assert "permissions violation" in " ".join(outsider.errors).lower()
