"""Workers as jobs of Nomad, on whichever machine has room.

Each worker is a batch job of its own that is never restarted or moved: the reconciler decides which
worker goes and whether another comes, while Nomad decides where it runs. Secrets are a Nomad
variable that only that job may read, so the job's description shows none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from services.endpoints.domain import Endpoint, InstanceType, Seen
from services.endpoints.launchers import (
    CONTAINER_CACHE,
    LAST_BYTES,
    LaunchFailed,
    NoRoomYet,
    Program,
    describe_end,
)
from shared.logs import get_logger

log = get_logger(__name__)

TASK = "worker"
"""The one task of the one group of a job."""

META_ENDPOINT, META_MEMORY = "darkroom_endpoint_id", "darkroom_memory"

ANSWER_WITHIN, HEARTBEAT_WITHIN = 30.0, 40.0
"""Seconds. An event stream has a heartbeat every ten."""
PLACED_WITHIN = 5.0
"""Seconds; an evaluation takes milliseconds, unless all schedulers are busy."""
LISTEN_AGAIN = 1.0
AT_A_TIME = 8
"""Questions about allocations."""


class NomadError(Exception):
    """Nomad says no, or can't now: its status and its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"[{status}] {text}")
        self.status = status
        self.text = text


class NomadLauncher:
    def __init__(
        self,
        address: str,
        program: Program,
        *,
        installation: str,
        token: str,
        namespace: str,
        cache: str,
        workers_outlive_service: bool,
    ) -> None:
        """`cache`: a volume's name or a folder of each node, for workers in containers; else a
        folder."""
        self.workers_outlive_service = workers_outlive_service
        self._address = address
        self._program = program
        self._prefix = f"darkroom-{installation}-"
        self._token = token
        self._namespace = namespace
        self._cache = cache
        self._asked_to_stop: dict[str, float] = {}
        self._secrets_checked = False
        self._changed: Callable[[], None] = lambda: None
        self._http: httpx.AsyncClient
        self._listening: asyncio.Task[None]

    async def open(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._http = httpx.AsyncClient(
            base_url=self._address,
            headers={"X-Nomad-Token": self._token} if self._token else {},
            params={"namespace": self._namespace},
            timeout=ANSWER_WITHIN,
        )
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        await self._http.aclose()

    async def _listen(self) -> None:
        """For as long as Nomad answers, and again when it does."""
        index = 0
        while True:
            with contextlib.suppress(httpx.HTTPError, NomadError):
                async for heard in self._events(index):
                    index = heard["Index"]
                    if any(self._is_ours(event) for event in heard["Events"]):
                        self._changed()
            self._changed()  # who does not listen may have missed something
            await asyncio.sleep(LISTEN_AGAIN)

    async def _events(self, index: int) -> Any:
        parameters: dict[str, Any] = {"topic": ["Allocation", "Job"], "index": index}
        async with self._http.stream(
            "GET", "/v1/event/stream", params=parameters, timeout=HEARTBEAT_WITHIN
        ) as response:
            if response.is_error:
                raise NomadError(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                if heard := json.loads(line or "{}"):
                    yield heard

    def _is_ours(self, event: dict[str, Any]) -> bool:
        allocation = (event["Payload"] or {}).get("Allocation") or {}
        job_id: str = allocation.get("JobID") or event["Key"]
        return job_id.startswith(self._prefix)

    async def observe(self) -> dict[str, Seen]:
        jobs = await self._ask("GET", "/v1/jobs", prefix=self._prefix, meta="true")
        await self._drop_secrets_of_none({job["ID"] for job in jobs})
        gate = asyncio.Semaphore(AT_A_TIME)

        async def see(job: dict[str, Any]) -> Seen:
            async with gate:
                return await self._see(job)

        return {seen.instance_id: seen for seen in await asyncio.gather(*map(see, jobs))}

    async def _see(self, job: dict[str, Any]) -> Seen:
        """An instance is the first allocation of its job. Nomad may make another when it loses a
        node or drains it; that one is stopped with the job when the first has ended."""
        allocations = await self._ask("GET", f"/v1/job/{job['ID']}/allocations")
        meta = job.get("Meta") or {}
        alive, crash = not job["Stop"], None
        if allocations:
            first = min(allocations, key=lambda allocation: int(allocation["CreateIndex"]))
            alive = first["ClientStatus"] in ("pending", "running", "unknown")
            crash = None if alive else await self._describe_end(first, int(meta[META_MEMORY]))
        return Seen(
            instance_id=job["ID"].removeprefix(self._prefix),
            endpoint_id=meta[META_ENDPOINT],
            alive=alive,
            crash=crash,
        )

    async def _describe_end(self, allocation: dict[str, Any], memory: int) -> str:
        if allocation["ClientStatus"] == "lost":
            return "the worker's node was lost"
        events = ((allocation["TaskStates"] or {}).get(TASK) or {}).get("Events") or []
        for event in reversed(events):
            details = event.get("Details") or {}
            if event["Type"] == "Terminated":
                code, signal = int(details.get("exit_code", 0)), int(details.get("signal", 0))
                return describe_end(
                    128 + signal if signal else code,
                    await self._end_of_log(allocation["ID"]),
                    out_of_memory=memory if details.get("oom_killed") == "true" else None,
                )
        failures = [event for event in events if (event.get("Details") or {}).get("fails_task")]
        last = (failures or events or [{"DisplayMessage": "Nomad does not say why"}])[-1]
        return f"the worker does not start: {last['DisplayMessage']}"

    async def _end_of_log(self, allocation_id: str) -> str:
        text = ""
        for stream in ("stdout", "stderr"):
            with contextlib.suppress(httpx.HTTPError):  # its node may not answer any more
                response = await self._http.get(
                    f"/v1/client/fs/logs/{allocation_id}",
                    params={
                        "task": TASK,
                        "type": stream,
                        "plain": "true",
                        "origin": "end",
                        "offset": LAST_BYTES,
                    },
                )
                text += response.text if response.is_success else ""
        return text

    async def start(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> None:
        job = self._describe(instance_id, endpoint, type)
        await self._keep_secrets(instance_id)
        try:
            evaluation = await self._register(job)
            if reason := await self._why_not_placed(evaluation):
                raise LaunchFailed(reason)
        except LaunchFailed as failure:
            await self.forget(instance_id)
            if self._asked_to_stop.keys() & (await self.observe()).keys():
                raise NoRoomYet(str(failure)) from failure
            raise

    async def _register(self, job: dict[str, Any]) -> str:
        """The id of its evaluation, "" if it has been registered before: its answer got lost."""
        create_only = {"Job": job, "EnforceIndex": True, "JobModifyIndex": 0}
        try:
            answer = await self._ask("POST", "/v1/jobs", body=create_only)
        except NomadError as error:
            if "conflicting job modify index" in error.text:
                return ""
            if error.status in (429, 503) or "No cluster leader" in error.text:
                raise
            raise LaunchFailed(f"Nomad refuses: {error.text}") from error
        evaluation: str = answer["EvalID"]
        return evaluation

    async def _why_not_placed(self, evaluation_id: str) -> str | None:
        """None when it has a node, or Nomad takes its time: then observing shows what comes."""
        index = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PLACED_WITHIN):
                while evaluation_id:
                    evaluation = await self._ask(
                        "GET",
                        f"/v1/evaluation/{evaluation_id}",
                        index=index,
                        wait=f"{PLACED_WITHIN:g}s",
                    )
                    if failed := (evaluation.get("FailedTGAllocs") or {}).get(TASK):
                        return _why_no_node(failed)
                    if evaluation["Status"] == "complete":
                        return None
                    if evaluation["Status"] in ("failed", "canceled"):
                        return f"Nomad can't place the worker: {evaluation['StatusDescription']}"
                    index = evaluation["ModifyIndex"]
        return None

    def _describe(self, instance_id: str, endpoint: Endpoint, type: InstanceType) -> dict[str, Any]:
        needs, job_id = type.nomad, self._job_id(instance_id)
        in_container = needs.driver == "docker"
        environment = {
            **self._program.variables(instance_id, endpoint, type),
            "DARKROOM_CACHE": CONTAINER_CACHE if in_container else self._cache,
        }
        resources: dict[str, Any] = {"CPU": needs.cpu, "MemoryMB": type.memory_bytes // 1024**2}
        if type.gpu_count:
            device: dict[str, Any] = {"Name": needs.device, "Count": type.gpu_count}
            if needs.gpu_memory:
                device["Constraints"] = [
                    {
                        "LTarget": "${device.attr.memory}",
                        "Operand": ">=",
                        "RTarget": needs.gpu_memory,
                    }
                ]
            resources["Devices"] = [device]
        return {
            "ID": job_id,
            "Name": job_id,
            "Type": "batch",
            "Namespace": self._namespace,
            "Datacenters": needs.datacenters,
            **({"NodePool": needs.node_pool} if needs.node_pool else {}),
            "Constraints": needs.constraints,
            "Meta": {META_ENDPOINT: endpoint.endpoint_id, META_MEMORY: str(type.memory_bytes)},
            "TaskGroups": [
                {
                    "Name": TASK,
                    "Count": 1,
                    "RestartPolicy": {"Attempts": 0, "Mode": "fail"},
                    "ReschedulePolicy": {"Attempts": 0, "Unlimited": False},
                    "Tasks": [
                        {
                            "Name": TASK,
                            "Driver": needs.driver,
                            "Config": self._configuration(type),
                            "Env": environment,
                            "Templates": [self._template(job_id)],
                            "KillSignal": "SIGTERM",
                            "KillTimeout": int(self._program.stop_within * 1e9),
                            "Resources": resources,
                        }
                    ],
                }
            ],
        }

    def _configuration(self, type: InstanceType) -> dict[str, Any]:
        command = {"command": self._program.command[0], "args": self._program.command[1:]}
        if type.nomad.driver != "docker":
            return command
        kind = "bind" if self._cache.startswith("/") else "volume"
        mount = {"type": kind, "source": self._cache, "target": CONTAINER_CACHE}
        return {**command, "image": type.image, "cap_drop": ["all"], "mount": [mount]}

    def _template(self, job_id: str) -> dict[str, Any]:
        lines = [f"{name}={{{{ .{name} | toJSON }}}}" for name in self._program.secrets]
        text = "\n".join([f'{{{{ with nomadVar "nomad/jobs/{job_id}" }}}}', *lines, "{{ end }}"])
        return {
            "EmbeddedTmpl": text,
            "DestPath": "${NOMAD_SECRETS_DIR}/worker.env",
            "Envvars": True,
            "ChangeMode": "noop",
        }

    async def _keep_secrets(self, instance_id: str) -> None:
        path = f"nomad/jobs/{self._job_id(instance_id)}"
        variable = {
            "Namespace": self._namespace,
            "Path": path,
            "Items": self._program.secrets,
        }
        try:
            await self._ask("PUT", f"/v1/var/{path}", body=variable)
        except NomadError as error:
            if error.status in (400, 403):
                raise LaunchFailed(f"Nomad refuses a variable: {error.text}") from error
            raise

    async def _drop_secrets_of_none(self, jobs: set[str]) -> None:
        """Once: this service was killed after it had kept them, and before there was a job."""
        if self._secrets_checked:
            return
        found = await self._ask("GET", "/v1/vars", prefix=f"nomad/jobs/{self._prefix}")
        for variable in found:
            if variable["Path"].removeprefix("nomad/jobs/") not in jobs:
                await self._ask("DELETE", f"/v1/var/{variable['Path']}")
        self._secrets_checked = True

    async def stop(self, instance_id: str, *, within: float) -> None:
        """Nomad kills it after its KillTimeout at the latest, also when this service is gone."""
        asked = self._asked_to_stop.get(instance_id)
        if asked is None:
            await self._ask("DELETE", f"/v1/job/{self._job_id(instance_id)}")
            self._asked_to_stop[instance_id] = time.monotonic()
        elif time.monotonic() - asked > within:
            log.warning("worker_killed", instance_id=instance_id, seconds=within)
            await self._kill(instance_id)

    async def _kill(self, instance_id: str) -> None:
        for allocation in await self._ask(
            "GET", f"/v1/job/{self._job_id(instance_id)}/allocations"
        ):
            if allocation["ClientStatus"] == "running":
                with contextlib.suppress(NomadError):  # it has just ended, or its node is silent
                    await self._ask(
                        "POST",
                        f"/v1/client/allocation/{allocation['ID']}/signal",
                        body={"Signal": "SIGKILL", "Task": TASK},
                    )

    async def forget(self, instance_id: str) -> None:
        job_id = self._job_id(instance_id)
        await self._ask("DELETE", f"/v1/job/{job_id}", purge="true")
        await self._ask("DELETE", f"/v1/var/nomad/jobs/{job_id}")
        self._asked_to_stop.pop(instance_id, None)

    def _job_id(self, instance_id: str) -> str:
        return self._prefix + instance_id

    async def _ask(self, method: str, path: str, body: Any = None, **parameters: Any) -> Any:
        response = await self._http.request(method, path, json=body, params=parameters)
        if response.is_error:
            raise NomadError(response.status_code, response.text.strip())
        return response.json() if response.content else None


def _why_no_node(failed: dict[str, Any]) -> str:
    """What a scheduler counted when it looked for a node."""
    causes = [
        *(f"{what} on {nodes}" for what, nodes in (failed["ConstraintFiltered"] or {}).items()),
        *(f"{what} exhausted on {n}" for what, n in (failed["DimensionExhausted"] or {}).items()),
    ]
    nodes = failed["NodesEvaluated"]
    text = f"none of {nodes} Nomad nodes has room" + (f" ({', '.join(causes)})" if causes else "")
    return f"out of GPUs: {text}" if any("device" in cause for cause in causes) else text
