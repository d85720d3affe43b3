"""pipelines: what a worker can do with a job: txt2img, img2img, rembg. No bus, no S3.

Files
  params.py        AUTOMATIC1111 webui bodies -> typed params and warnings
  families.py      what a model file is, told from its header alone
  checkpoints.py   loads Stable Diffusion checkpoints and keeps the last ones
  prompts.py       webui prompt syntax -> text embeddings
  samplers.py      the webui's sampler names -> diffusers schedulers
  painting.py      txt2img and img2img
  background.py    rembg
  images.py        pictures in and out
  infotext.py      the `parameters` text of a PNG, and the result's info

torch and diffusers are imported in this room only, and only once an `Engine` is made; rembg (which
compiles for a minute on its very first import) only by its first job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from shared.contracts.inference import RunJob

Progress = Callable[[int, int], None]
"""Called with (steps done, steps of the whole job)."""


class JobFailure(Exception):
    """The job can't be done as asked. The text is for the user; trying again would not help."""


def file_of(name: str, files: Mapping[str, Path]) -> Path:
    if name not in files:
        raise JobFailure(f"the file of {name} did not come with the job")
    return files[name]


class Result(msgspec.Struct, frozen=True):
    """`images`: PNGs. `param_json`: `{"parameters", "info", "images"}` as the webui's API answers.
    `seconds`: stage -> duration."""

    images: list[bytes]
    param_json: bytes
    seconds: dict[str, float]
    warnings: list[str]


class Engine:
    """One device and the models kept on it. Not thread-safe: one job at a time."""

    def __init__(self, device: str, cache: Path) -> None:
        """`device`: cpu, cuda, cuda:1. `cache`: a folder for what is costly to find out again."""
        from services.inference.worker.pipelines.background import Cutter
        from services.inference.worker.pipelines.painting import Painter

        self._painter = Painter(device, cache)
        self._cutter = Cutter()

    def run(
        self, job: RunJob, params: bytes, files: Mapping[str, Path], progress: Progress
    ) -> Result:
        """`files`: where each of `job.models` lies, by its name. Never write into a file again that
        was handed in here (its pages are mapped); write a new one and rename it.

        Raises JobFailure. What `progress` raises comes through and ends the job; the engine stays
        usable.
        """
        if job.task_type in ("txt2img", "img2img"):
            return self._painter.paint(job, params, files, progress)
        if job.task_type == "rembg":
            return self._cutter.cut(job, params, files, progress)
        raise JobFailure(f"task_type {job.task_type!r} is not one of txt2img, img2img, rembg")
