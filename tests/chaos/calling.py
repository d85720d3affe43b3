"""A client as it should be where everything is killed: it repeats what was not answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4

import httpx

from deploy.local.client import Client, Failed
from shared.contracts.inference import FINISHED

T = TypeVar("T")

PARAMS = {"prompt": "a blue square", "steps": 4, "width": 64, "height": 64}


class Caller:
    """Repeats with the same key, so that nothing is done twice. For several threads."""

    def __init__(self, client: Client, models: Mapping[str, list[str]], *, seconds: float) -> None:
        """`models`: of its jobs. `seconds`: for which a call is repeated."""
        self.client = client
        self.lock = threading.Lock()
        self._models = models
        self._seconds = seconds

    def insist(self, attempt: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                return attempt()
            except (httpx.TransportError, httpx.HTTPStatusError, Failed) as error:
                if not self.will_pass(error) or time.monotonic() > deadline:
                    raise
                with self.lock:
                    self.note_repetition()
                time.sleep(0.2)

    def will_pass(self, error: Exception) -> bool:
        return not isinstance(error, Failed) or error.status >= 500

    def note_repetition(self) -> None: ...

    def start_job(self, seed: int) -> str:
        key, call = str(uuid4()), self.client.call
        body = {"inference_type": "Async", "task_type": "txt2img", "models": self._models}
        created = self.insist(lambda: call("POST", "/inferences", body, idempotency_key=key))
        inference = created["data"]["inference"]
        job_id: str = inference["id"]

        def put() -> None:
            url = inference["api_params_s3_upload_url"]
            self.client.http.put(url, json={**PARAMS, "seed": seed}).raise_for_status()

        self.insist(put)
        self.insist(lambda: call("PUT", f"/inferences/{job_id}/start", idempotency_key=key))
        return job_id

    def wait_for_job(self, job_id: str, *, seconds: float, every: float) -> dict[str, Any]:
        """As it is when it has ended, or after `seconds`; looks `every` so many of them."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.insist(lambda: self.client.get_job(job_id))
            if job["status"] in FINISHED or time.monotonic() > deadline:
                return job
            time.sleep(every)
