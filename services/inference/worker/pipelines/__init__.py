"""pipelines: what a worker can do with a job. No bus, no S3.

Files
  engine.py      runs jobs side by side: their rows of one UNet become one batch
  painting.py    txt2img and img2img, hires fix and refiner
  plotting.py    the script "X/Y/Z plot"
  sd_upscale.py  the script "SD upscale"
  enlarging.py   extra-single-image, extra-batch-images
  faces.py       faces found and restored
  cutting.py     rembg
  controlling.py ControlNet: hints from pictures (`hints.py`), and how they act
  compiling.py   UNets compiled ahead for some shapes
  denoising.py   a step of guidance as rows for a UNet, and the evaluation of rows
  library.py     model files: opened, loaded, kept
  memory.py      what work takes of a device's memory
Rooms
  params/        bodies of the webui's API -> typed params and warnings
  prompts/       the webui's prompt syntax -> text embeddings
  sampling/      from noise to latents
  models/        what lies in model files
  pictures/      pixels in and out, and what is written down with them

A job is a generator: it yields what it needs done (rows of a UNet, work that may go on beside) and
is sent the results, so that the engine may serve several at once. torch and diffusers are imported
in this room only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import msgspec

# Weights and configs come from the registry, never from a hub; read as the libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class JobFailure(Exception):
    """The job can't be done as asked. The text is for the user; trying again would not help."""


class ResultImage(msgspec.Struct, frozen=True):
    name: str
    media_type: str
    data: bytes


class Result(msgspec.Struct, frozen=True):
    """`param_json`: `{"parameters", "info", "images", "receipt"}`, the first three as the webui's
    API answers. `seconds`: stage -> duration."""

    images: list[ResultImage]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine is: bytes taken of its device, of how many, and the names of what is loaded."""

    device_name: str = ""
    memory: int = 0
    memory_total: int = 0
    models: list[str] = []


class Aside(msgspec.Struct, frozen=True, eq=False):
    """Works that others need not wait for, such as decoding pictures that are finished, and which
    may go on at the same time. Who yields it is sent their results."""

    works: Sequence[Callable[[], Any]]


class Report(Protocol):
    """What a running job tells of itself."""

    def step(self, step: int, steps: int) -> None: ...

    def preview(self, picture: Callable[[], bytes]) -> None:
        """`picture` is only made when one is due."""


Work = Generator[Any, Any, Result]
"""A job under way. It yields lists of `denoising.Rows`, or an `Aside`."""


class Plan(Protocol):
    """A job whose params and files have been looked at, and that may be begun."""

    @property
    def key(self) -> object:
        """Jobs of one key share their weights and the shape of their latents. None: shares
        nothing."""
        ...

    def work(self, report: Report) -> Work:
        """Raises JobFailure, at any time."""


class Listener:
    """What is told of the jobs of an engine, by their ids. The default says nothing."""

    def planning(self, job_id: str) -> None:
        """Its params and files are looked at from now on. Whoever dies before `planned` has died of
        it."""

    def planned(self, job_id: str) -> None: ...

    def begun(self, job_id: str) -> None:
        """It is about to be begun, and goes on once `go` is called for it."""

    def step(self, job_id: str, step: int, steps: int) -> None: ...

    def preview(self, job_id: str, media_type: str, picture: bytes) -> None: ...

    def done(self, job_id: str, result: Result) -> None: ...

    def unfit(self, job_id: str, reason: str) -> None:
        """It can't be done, here or elsewhere."""

    def gone(self, job_id: str) -> None:
        """It was cancelled or recalled, and leaves nothing behind."""

    def wake(self) -> None:
        """Called in any thread when work that went on beside has ended: the engine can go on."""
