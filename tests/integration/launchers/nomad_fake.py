"""Nomad's HTTP API as far as a launcher uses it, with nodes that really run the tasks as processes.

Copied from Nomad's behaviour: errors are text/plain; a create-only registration of what exists is
a 500; an accepted job has an evaluation, which is decided later and says in FailedTGAllocs why
there is no node; what is blocked is placed when something ends; deleting what is unknown is a 200;
a batch task that ends is not run again unless its policies say so, but a lost node's is; a job's
variables are for that job alone; queries may block on X-Nomad-Index; the event stream is NDJSON
with `{}` as its heartbeat.

Stricter than Nomad in one thing: keys that it does not know are refused, since Nomad ignores them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

HEARTBEAT = 0.5
DECIDES_AFTER = 0.02
LOOKS_EVERY = 0.05
GONE = ("complete", "failed", "lost")

KEYS = {
    "Job": "ID Name Type Namespace Datacenters NodePool Constraints Meta TaskGroups",
    "Group": "Name Count RestartPolicy ReschedulePolicy Tasks",
    "RestartPolicy": "Attempts Interval Delay Mode",
    "ReschedulePolicy": "Attempts Interval Delay DelayFunction MaxDelay Unlimited",
    "Task": "Name Driver Config Env Templates KillSignal KillTimeout Resources",
    "Template": "EmbeddedTmpl DestPath Envvars ChangeMode",
    "Resources": "CPU MemoryMB MemoryMaxMB Devices",
    "Device": "Name Count Constraints Affinities",
}
CONFIGURATION = {
    "docker": "image command args mount cap_drop network_mode",
    "raw_exec": "command args",
}


class Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Node:
    """`gpus` of one kind with `gpu_memory` GiB each."""

    name: str
    cpu: int = 8000
    memory: int = 16_384
    gpus: int = 0
    gpu_memory: int = 80
    datacenter: str = "dc1"
    node_pool: str = "default"
    up: bool = True


@dataclass
class Allocation:
    id: str
    job: dict[str, Any]
    node: Node
    index: int
    gpus: list[int]
    status: str = "pending"
    desired: str = "run"
    events: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    running: asyncio.Task[None] | None = None
    process: asyncio.subprocess.Process | None = None

    @property
    def task(self) -> dict[str, Any]:
        task: dict[str, Any] = self.job["TaskGroups"][0]["Tasks"][0]
        return task

    def note(self, kind: str, text: str, **details: str) -> None:
        self.events.append({"Type": kind, "DisplayMessage": text, "Details": details})


class NomadFake:
    """`images`: those that can be pulled, which all hold `worker`; `cache` is their volume."""

    def __init__(
        self, nodes: list[Node], *, images: list[str], worker: Path, cache: Path, token: str = ""
    ) -> None:
        self.nodes = nodes
        self.jobs: dict[str, dict[str, Any]] = {}
        self.allocations: dict[str, Allocation] = {}
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.variables: dict[str, dict[str, str]] = {}
        self.leader = True
        self._images = images
        self._worker = worker
        self._cache = cache
        self._token = token
        self._index = 10
        self._events: list[dict[str, Any]] = []
        self._moved = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._logs = tempfile.TemporaryDirectory(prefix="nomad-fake-")
        self._runner: web.AppRunner | None = None
        self._port = 0

    # The agent

    async def serve(self) -> str:
        """Its address, the same again after `stop_serving`."""
        application = web.Application(middlewares=[self._as_text])
        application.add_routes(
            [
                web.post("/v1/jobs", self._register),
                web.get("/v1/jobs", self._list_jobs),
                web.get("/v1/job/{id}/allocations", self._list_allocations),
                web.delete("/v1/job/{id}", self._deregister),
                web.get("/v1/evaluation/{id}", self._get_evaluation),
                web.get("/v1/client/fs/logs/{id}", self._get_logs),
                web.post("/v1/client/allocation/{id}/signal", self._signal),
                web.put("/v1/var/{path:.+}", self._put_variable),
                web.delete("/v1/var/{path:.+}", self._delete_variable),
                web.get("/v1/vars", self._list_variables),
                web.get("/v1/event/stream", self._stream),
            ]
        )
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{self._port}"

    async def stop_serving(self) -> None:
        """The nodes go on without it."""
        if self._runner:
            await self._runner.cleanup()

    async def close(self) -> None:
        await self.stop_serving()
        for allocation in self.allocations.values():
            if allocation.process and allocation.process.returncode is None:
                allocation.process.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._logs.cleanup()

    @web.middleware
    async def _as_text(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            if self._token and request.headers.get("X-Nomad-Token") != self._token:
                raise Refused(403, "Permission denied")
            if not self.leader:
                raise Refused(500, "No cluster leader")
            response = await handler(request)
        except Refused as error:
            response = web.Response(status=error.status, text=error.text)
        if not response.prepared:
            response.headers["X-Nomad-Index"] = str(self._index)
        return response

    async def _move(self, topic: str, key: str, payload: dict[str, Any]) -> int:
        self._index += 1
        event = {"Topic": topic, "Type": f"{topic}Updated", "Key": key, "Payload": payload}
        self._events.append({"Index": self._index, "Events": [event]})
        async with self._moved:
            self._moved.notify_all()
        return self._index

    # Jobs

    async def _register(self, request: web.Request) -> web.Response:
        body = await request.json()
        job = body["Job"]
        _check(job)
        existing = self.jobs.get(job["ID"])
        if body.get("EnforceIndex"):
            wanted = body["JobModifyIndex"]
            has = existing["JobModifyIndex"] if existing else 0
            if wanted == 0 and existing:
                raise Refused(
                    500,
                    "Enforcing job modify index 0: job exists with conflicting job modify index: "
                    f"{has}",
                )
            if wanted and wanted != has:
                raise Refused(500, f"Enforcing job modify index {wanted}: job does not exist")
        index = await self._move("Job", job["ID"], {"Job": job})
        self.jobs[job["ID"]] = {**job, "Stop": False, "JobModifyIndex": index}
        return _json({**self._evaluate(job["ID"]), "JobModifyIndex": index, "Warnings": ""})

    def _evaluate(self, job_id: str) -> dict[str, Any]:
        evaluation_id = str(uuid.uuid4())
        self.evaluations[evaluation_id] = {
            "ID": evaluation_id,
            "JobID": job_id,
            "Status": "pending",
            "StatusDescription": "",
            "ModifyIndex": self._index,
        }
        self._spawn(self._decide(evaluation_id, job_id))
        return {"EvalID": evaluation_id, "EvalCreateIndex": self._index, "Index": self._index}

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _decide(self, evaluation_id: str, job_id: str) -> None:
        await asyncio.sleep(DECIDES_AFTER)
        evaluation = self.evaluations[evaluation_id]
        if failed := await self._place(job_id):
            blocked = str(uuid.uuid4())
            self.evaluations[blocked] = {
                **evaluation,
                "ID": blocked,
                "Status": "blocked",
            }
            evaluation |= {"FailedTGAllocs": failed, "BlockedEval": blocked}
        evaluation |= {"Status": "complete"}
        evaluation["ModifyIndex"] = await self._move("Evaluation", evaluation_id, {})

    async def _place(self, job_id: str) -> dict[str, Any] | None:
        """What would be FailedTGAllocs, if there is no node."""
        job = self.jobs.get(job_id)
        if job is None or job["Stop"]:
            return None
        group = job["TaskGroups"][0]
        if any(a.status not in GONE for a in self._of(job_id) if a.desired == "run"):
            return None
        metric: dict[str, Any] = {
            "NodesEvaluated": 0,
            "NodesFiltered": 0,
            "NodesExhausted": 0,
            "ConstraintFiltered": None,
            "DimensionExhausted": None,
        }
        for node in self.nodes:
            if not node.up or node.node_pool != job.get("NodePool", "default"):
                continue
            if not {"*", node.datacenter} & set(job["Datacenters"]):
                continue
            metric["NodesEvaluated"] += 1
            kind, cause = self._why_not(node, group["Tasks"][0]["Resources"])
            if kind:
                metric["NodesFiltered" if kind == "ConstraintFiltered" else "NodesExhausted"] += 1
                counted = metric[kind] = metric[kind] or {}
                counted[cause] = counted.get(cause, 0) + 1
                continue
            await self._run_on(node, job)
            return None
        return {group["Name"]: metric}

    def _why_not(self, node: Node, wanted: dict[str, Any]) -> tuple[str, str]:
        here = [a for a in self.allocations.values() if a.node is node and a.status not in GONE]
        gpus = sum(device["Count"] for device in wanted.get("Devices") or [])
        for device in wanted.get("Devices") or []:
            fits = all(
                node.gpu_memory >= float(constraint["RTarget"].split()[0])
                for constraint in device.get("Constraints") or []
            )
            if device["Name"] != "nvidia/gpu" or node.gpus < gpus or not fits:
                return "ConstraintFiltered", "missing devices"
        if sum(len(a.gpus) for a in here) + gpus > node.gpus:
            return "DimensionExhausted", "devices: no devices match request"
        for name, has in (("CPU", node.cpu), ("MemoryMB", node.memory)):
            if sum(a.task["Resources"][name] for a in here) + wanted[name] > has:
                return "DimensionExhausted", "cpu" if name == "CPU" else "memory"
        return "", ""

    async def _run_on(self, node: Node, job: dict[str, Any]) -> None:
        here = [a for a in self.allocations.values() if a.node is node and a.status not in GONE]
        used = {gpu for allocation in here for gpu in allocation.gpus}
        devices = job["TaskGroups"][0]["Tasks"][0]["Resources"].get("Devices") or []
        free = [gpu for gpu in range(node.gpus) if gpu not in used]
        gpus = free[: sum(device["Count"] for device in devices)]
        allocation = Allocation(str(uuid.uuid4()), job, node, self._index + 1, gpus)
        self.allocations[allocation.id] = allocation
        allocation.note("Received", "Task received by client")
        await self._tell(allocation)
        allocation.running = self._spawn(self._run(allocation))

    def _of(self, job_id: str) -> list[Allocation]:
        return [a for a in self.allocations.values() if a.job["ID"] == job_id]

    async def _tell(self, allocation: Allocation) -> None:
        payload = {"Allocation": {"ID": allocation.id, "JobID": allocation.job["ID"]}}
        await self._move("Allocation", allocation.id, payload)

    async def _list_jobs(self, request: web.Request) -> web.Response:
        stubs = []
        for job_id, job in self.jobs.items():
            if not job_id.startswith(request.query.get("prefix", "")):
                continue
            dead = job["Stop"] or any(a.status in GONE for a in self._of(job_id))
            stub = {"ID": job_id, "Stop": job["Stop"], "Status": "dead" if dead else "running"}
            stubs.append(stub | ({"Meta": job["Meta"]} if "meta" in request.query else {}))
        return _json(stubs)

    async def _list_allocations(self, request: web.Request) -> web.Response:
        return _json(
            [
                {
                    "ID": allocation.id,
                    "JobID": allocation.job["ID"],
                    "NodeID": allocation.node.name,
                    "CreateIndex": allocation.index,
                    "ClientStatus": allocation.status,
                    "DesiredStatus": allocation.desired,
                    "TaskStates": {
                        allocation.task["Name"]: {
                            "State": "dead" if allocation.status in GONE else allocation.status,
                            "Failed": allocation.failed,
                            "Events": allocation.events,
                        }
                    }
                    if allocation.events
                    else None,
                }
                for allocation in self._of(request.match_info["id"])
            ]
        )

    async def _deregister(self, request: web.Request) -> web.Response:
        job_id = request.match_info["id"]
        job = self.jobs.get(job_id)
        if job is None:
            return _json({"EvalID": "", "EvalCreateIndex": 0, "JobModifyIndex": 0})
        job["Stop"] = True
        for allocation in self._of(job_id):
            allocation.desired = "stop"
        if request.query.get("purge") == "true":
            del self.jobs[job_id]
        index = await self._move("Job", job_id, {"Job": job})
        return _json({**self._evaluate(job_id), "JobModifyIndex": index})

    async def _get_evaluation(self, request: web.Request) -> web.Response:
        evaluation = self.evaluations.get(request.match_info["id"])
        if evaluation is None:
            raise Refused(404, "eval not found")
        wait = float(request.query.get("wait", "0s").removesuffix("s"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait), self._moved:
                while evaluation["ModifyIndex"] <= int(request.query.get("index", 0)):
                    await self._moved.wait()
        return _json(evaluation)

    # Nodes

    async def _run(self, allocation: Allocation) -> None:
        try:
            command, environment = self._prepare(allocation)
        except Refused as error:
            allocation.note(error.args[0], error.text, fails_task="true")
            return await self._end(allocation, failed=True)
        with self._log(allocation).open("wb") as output:
            allocation.process = process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        allocation.status = "running"
        allocation.note("Started", "Task started by client")
        await self._tell(allocation)
        too_big = await self._watch(allocation, process)
        code = process.returncode or 0
        number = -code if code < 0 else 0
        allocation.note(
            "Terminated",
            f"Exit Code: {128 + number if number else code}",
            exit_code=str(128 + number if number else code),
            signal=str(number),
            oom_killed=str(too_big).lower(),
        )
        stopped = allocation.desired == "stop"
        await self._end(allocation, failed=bool(code) and not stopped)

    async def _watch(self, allocation: Allocation, process: asyncio.subprocess.Process) -> bool:
        """Until it ends. Whether it had to because it took more memory than it may."""
        loop, kill_at, too_big = asyncio.get_running_loop(), 0.0, False
        limit = allocation.task["Resources"]["MemoryMB"] * 1024**2
        while process.returncode is None:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if allocation.task["Driver"] == "docker":
                    too_big = psutil.Process(process.pid).memory_info().rss > limit
                if too_big:
                    process.kill()
                if allocation.desired == "stop" and not kill_at:
                    process.send_signal(signal.Signals[allocation.task["KillSignal"]])
                    kill_at = loop.time() + allocation.task["KillTimeout"] / 1e9
                if kill_at and loop.time() > kill_at:
                    process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LOOKS_EVERY)
        return too_big

    def _prepare(self, allocation: Allocation) -> tuple[list[str], dict[str, str]]:
        task, job = allocation.task, allocation.job
        environment = {**task["Env"], "NOMAD_ALLOC_ID": allocation.id}
        for template in task.get("Templates") or []:
            environment |= self._render(template["EmbeddedTmpl"], job["ID"])
        command = [task["Config"]["command"], *task["Config"]["args"]]
        if task["Driver"] == "docker":
            image = task["Config"]["image"]
            if image not in self._images:
                raise _failure(
                    "Driver Failure",
                    f"Failed to pull `{image}`: Error response from daemon: pull access denied",
                )
            targets = [mount["target"] for mount in task["Config"]["mount"]]
            assert environment["DARKROOM_CACHE"] in targets
            environment["DARKROOM_CACHE"] = str(self._cache)
            command = [sys.executable if part == "python" else part for part in command]
            command = [str(self._worker) if part == "/worker.py" else part for part in command]
            environment["NVIDIA_VISIBLE_DEVICES"] = ",".join(map(str, allocation.gpus))
        return command, {"PATH": os.environ["PATH"], **environment}

    def _render(self, template: str, job_id: str) -> dict[str, str]:
        """The part of the template language that is used; a job reads its own variables only."""
        match = re.fullmatch(r'\{\{ with nomadVar "(.*)" \}\}\n(.*)\n\{\{ end \}\}', template, re.S)
        if not match or match[1] not in ("nomad/jobs", f"nomad/jobs/{job_id}"):
            raise _failure("Template", f"Missing: nomad.var.get({match[1] if match else '?'})")
        items = self.variables.get(match[1])
        if items is None:
            raise _failure("Template", f"Missing: nomad.var.get({match[1]})")
        rendered = re.sub(
            r"\{\{ \.(\w+) \| toJSON \}\}", lambda name: json.dumps(items[name[1]]), match[2]
        )
        pairs = (line.split("=", 1) for line in rendered.splitlines())
        return {name: json.loads(value) for name, value in pairs}

    async def _end(self, allocation: Allocation, *, failed: bool) -> None:
        if allocation.status == "lost":
            return
        allocation.status = "failed" if failed else "complete"
        allocation.failed = failed
        await self._tell(allocation)
        group = allocation.job["TaskGroups"][0]
        again = group.get("ReschedulePolicy") or {"Attempts": 1}
        batch_is_done = allocation.job["Type"] == "batch" and not (
            failed and (again["Attempts"] or again.get("Unlimited"))
        )
        if not batch_is_done:
            self._evaluate(allocation.job["ID"])
        await self._unblock()

    async def _unblock(self) -> None:
        for evaluation in list(self.evaluations.values()):
            if evaluation["Status"] == "blocked" and not await self._place(evaluation["JobID"]):
                evaluation["Status"] = "complete"

    async def lose(self, node: Node) -> None:
        """Its network is gone: what it runs is replaced elsewhere, whatever the job's policies."""
        node.up = False
        for allocation in list(self.allocations.values()):
            if allocation.node is node and allocation.status not in GONE:
                allocation.status = "lost"
                await self._tell(allocation)
                self._evaluate(allocation.job["ID"])

    def _log(self, allocation: Allocation) -> Path:
        return Path(self._logs.name) / f"{allocation.id}.log"

    async def _get_logs(self, request: web.Request) -> web.Response:
        allocation = self.allocations.get(request.match_info["id"])
        if allocation is None or request.query["task"] != allocation.task["Name"]:
            raise Refused(404, "unknown allocation or task")
        assert request.query["plain"] == "true"
        assert request.query["origin"] == "end"
        text = self._log(allocation).read_bytes() if request.query["type"] == "stdout" else b""
        return web.Response(body=text[-int(request.query["offset"]) :])

    async def _signal(self, request: web.Request) -> web.Response:
        allocation, body = self.allocations.get(request.match_info["id"]), await request.json()
        if allocation is None or body["Task"] != allocation.task["Name"]:
            raise Refused(404, "unknown allocation or task")
        if allocation.process is None or allocation.process.returncode is not None:
            raise Refused(500, "Task not running")
        allocation.process.send_signal(signal.Signals[body["Signal"]])
        return _json({})

    # Variables

    async def _put_variable(self, request: web.Request) -> web.Response:
        path, body = request.match_info["path"], await request.json()
        if not re.fullmatch(r"[a-zA-Z0-9-_~/]{1,128}", path) or body["Path"] != path:
            raise Refused(400, f"invalid path: {path}")
        if not body["Items"]:
            raise Refused(400, "variable missing required Items object")
        self.variables[path] = body["Items"]
        return _json(body)

    async def _list_variables(self, request: web.Request) -> web.Response:
        """Without what is in them."""
        prefix = request.query.get("prefix", "")
        return _json([{"Path": path} for path in self.variables if path.startswith(prefix)])

    async def _delete_variable(self, request: web.Request) -> web.Response:
        self.variables.pop(request.match_info["path"], None)
        return web.Response(status=204)

    # Events

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        topics = {topic.partition(":")[0] for topic in request.query.getall("topic", ["*"])}
        sent = int(request.query.get("index", 0))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # nobody listens any more
            while True:
                for batch in list(self._events):
                    if batch["Index"] > sent and topics & {"*", batch["Events"][0]["Topic"]}:
                        await response.write(json.dumps(batch).encode() + b"\n")
                sent = self._index
                try:
                    async with asyncio.timeout(HEARTBEAT), self._moved:
                        await self._moved.wait()
                except TimeoutError:
                    await response.write(b"{}\n")
        return response


def _json(value: Any) -> web.Response:
    return web.json_response(value)


def _failure(kind: str, text: str) -> Refused:
    failure = Refused(0, text)
    failure.args = (kind,)
    return failure


def _check(job: dict[str, Any]) -> None:
    """Raises Refused for what Nomad would not run, or would not see."""
    _check_keys("Job", job)
    if job["Type"] not in ("service", "batch", "system", "sysbatch") or not job["Datacenters"]:
        raise Refused(500, f"1 error occurred:\n\t* Invalid job type: {job['Type']!r}\n\n")
    for group in job["TaskGroups"]:
        _check_keys("Group", group)
        for name in ("RestartPolicy", "ReschedulePolicy"):
            _check_keys(name, group.get(name) or {})
        restart = group.get("RestartPolicy") or {"Attempts": 3, "Mode": "fail"}
        if restart["Attempts"] == 0 and restart["Mode"] != "fail":
            raise Refused(500, 'Restart policy "delay" with 0 attempts is ambiguous')
        for task in group["Tasks"]:
            _check_keys("Task", task)
            _check_keys("Resources", task["Resources"])
            if not set(task["Config"]) <= set(CONFIGURATION[task["Driver"]].split()):
                raise Refused(500, f"driver {task['Driver']} does not know {task['Config']}")
            if task["Resources"]["MemoryMB"] < 10:
                raise Refused(500, "1 error occurred:\n\t* minimum MemoryMB value is 10; got 0\n\n")
            for template in task.get("Templates") or []:
                _check_keys("Template", template)
            for device in task["Resources"].get("Devices") or []:
                _check_keys("Device", device)


def _check_keys(what: str, value: dict[str, Any]) -> None:
    if unknown := set(value) - set(KEYS[what].split()):
        raise Refused(400, f"{what} has no {', '.join(sorted(unknown))}")
