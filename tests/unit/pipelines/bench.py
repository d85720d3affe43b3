"""An engine on the CPU, and what it was seen to make."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines import Listener, Result
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.webui.settings import WebuiSettings
from tests.weights import files_of, used

Pixels = NDArray[np.int16]
"""(height, width, 3)"""

SIDE = 64
MODEL = "Stable-diffusion"
USUAL: dict[str, Any] = {
    "prompt": "a red ball, on grass",
    "negative_prompt": "blue",
    "sampler_name": "Euler",
    "steps": 4,
    "width": SIDE,
    "height": SIDE,
    "seed": 7,
    "cfg_scale": 6.5,
}
"""The body that a test changes."""
USUAL_SETTINGS = WebuiSettings()


class Seen(msgspec.Struct, frozen=True, eq=False):
    """`latents`: what the VAE was given to decode, before any rounding to 256 levels."""

    result: Result
    latents: list[Tensor]

    @property
    def pixels(self) -> list[Pixels]:
        return [pixels_of(image.data) for image in self.result.images]

    @property
    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = json.loads(json.loads(self.result.param_json)["info"])
        return info


class Bench:
    """Runs bodies on checkpoints that lie in a folder."""

    def __init__(self, folder: Path, webui: WebuiSettings = USUAL_SETTINGS) -> None:
        self.folder = folder
        options = EngineOptions(preview_seconds=0, webui=webui)
        self.engine = Engine("cpu", folder, Listener(), options)

    def job(self, task_type: str, files: Mapping[Path, str], job_id: str = "job") -> RunJob:
        return RunJob(
            job_id=job_id,
            endpoint_id="endpoint",
            task_type=task_type,
            models=[used(path, type_) for path, type_ in files.items()],
            bucket="bucket",
            params_key="key",
            result_prefix="out/job/result/",
        )

    def paint(
        self,
        checkpoint: Path,
        *,
        task_type: str = "txt2img",
        beside: Mapping[Path, str] | None = None,
        **body: Any,
    ) -> Seen:
        """`beside`: further files and their types. `body`: what is not `USUAL`."""
        files = {checkpoint: MODEL, **(beside or {})}
        job = self.job(task_type, files)
        params = json.dumps({**USUAL, **body}).encode()
        with _Decoded() as decoded:
            result = self.engine.run(job, params, files_of(job))
        return Seen(result, decoded.latents)


class _Decoded:
    """Notes what VAEs are given to decode, in diffusers itself."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def __enter__(self) -> _Decoded:
        self._decode = decode = AutoencoderKL.decode

        def noting(vae: Any, latents: Tensor, *rest: Any, **more: Any) -> Any:
            self.latents.append(latents * vae.config.scaling_factor)
            return decode(vae, latents, *rest, **more)

        AutoencoderKL.decode = noting
        return self

    def __exit__(self, *error: object) -> None:
        AutoencoderKL.decode = self._decode


def pixels_of(packed: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(packed)).convert("RGB"), dtype=np.int16)


def base64_of(picture: Image.Image) -> str:
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return base64.b64encode(packed.getvalue()).decode()


def photo(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    """A picture with something of every scale in it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    grain = 0.2 * torch.rand(1, 3, height, width, generator=generator)
    levels = ((0.8 * smooth + grain)[0].permute(1, 2, 0) * 255).to(torch.uint8)
    return Image.fromarray(levels.numpy())


def worst(ours: Any, theirs: Any) -> float:
    """The largest difference between two pictures or two tensors."""
    one, other = (np.asarray(each, dtype=np.float64) for each in (ours, theirs))
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    return float(abs(one - other).max())
