"""An engine with the demo checkpoint on it, and what tests ask of it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.inference.worker.pipelines import Listener, Result
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from tests.weights import files_of, used

DEMO = Path(__file__).parents[3] / "deploy/demo_model/darkroom-demo.safetensors"
NAME = DEMO.name

Model = tuple[str, str, Path]
"""Type, name and file of a model that a job names."""
CHECKPOINT: Model = ("Stable-diffusion", NAME, DEMO)


class Easel(Listener):
    """`steps`: those of the last job, as they were reported."""

    def __init__(self, cache: Path, options: EngineOptions | None = None) -> None:
        self.engine = Engine("cpu", cache, self, options)
        self.steps: list[tuple[int, int]] = []

    def step(self, job_id: str, step: int, steps: int) -> None:
        self.steps.append((step, steps))

    def run(self, task_type: str, models: Sequence[Model], body: dict[str, Any]) -> Done:
        """Raises JobFailure."""
        self.steps.clear()
        job, files = job_of(task_type, models)
        return Done(self.engine.run(job, json.dumps(body).encode(), files))

    def paint(self, *models: Model, **body: Any) -> Done:
        """img2img if there are `init_images`. A small picture in few steps, always the same, but
        for what `body` says. `models`: beside the demo checkpoint, or with one in its place."""
        usual = {"prompt": "a red circle", "steps": 3, "width": 64, "height": 64, "seed": 7}
        task_type = "img2img" if "init_images" in body else "txt2img"
        named = [*models] if any(m[0] == CHECKPOINT[0] for m in models) else [CHECKPOINT, *models]
        return self.run(task_type, named, usual | body)


class Done:
    """The result of a job, unpacked."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.warnings = result.warnings
        self.pictures = [Image.open(io.BytesIO(image.data)) for image in result.images]
        self.answer: dict[str, Any] = json.loads(result.param_json, parse_constant=_refuse)
        self.info: dict[str, Any] = json.loads(self.answer["info"], parse_constant=_refuse)

    @property
    def pixels(self) -> NDArray[np.int16]:
        """Of the first picture: (height, width, 3)."""
        return pixels_of(self.pictures[0])

    @property
    def texts(self) -> list[str]:
        """The `parameters` of each picture, as the file carries them."""
        return [str(getattr(picture, "text", {}).get("parameters")) for picture in self.pictures]

    @property
    def fields(self) -> dict[str, str]:
        """Of the first picture's `parameters`."""
        return read_back(self.texts[0])

    @property
    def rows(self) -> list[bytes]:
        """All pictures, to be compared bit for bit."""
        return [pixels_of(picture).tobytes() for picture in self.pictures]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no strict JSON")


def job_of(task_type: str, models: Sequence[Model]) -> tuple[RunJob, dict[str, Path]]:
    """The job, and its files as an engine is told of them."""
    job = RunJob(
        job_id="job",
        endpoint_id="endpoint",
        task_type=task_type,
        models=[used(path, type_, name) for type_, name, path in models],
        bucket="bucket",
        params_key="key",
        result_prefix="out/job/result/",
    )
    return job, files_of(job)


def pixels_of(picture: Image.Image) -> NDArray[np.int16]:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def base64_of(picture: Image.Image, form: str = "PNG", **options: Any) -> str:
    packed = io.BytesIO()
    picture.save(packed, form, **options)
    return base64.b64encode(packed.getvalue()).decode()


_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_back(text: str) -> dict[str, str]:
    """The last line of an infotext, as the webui reads it."""
    fields = {}
    for name, value in _FIELD.findall(text.split("\n")[-1]):
        quoted = value[:1] == value[-1:] == '"'
        fields[name] = json.loads(value) if quoted else value
    return fields
