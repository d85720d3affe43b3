"""Latents -> a small picture without the VAE: each pixel is a linear mix of the four channels."""

from __future__ import annotations

import io
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines.models.checkpoints import Checkpoint
from services.inference.worker.pipelines.models.families import STANDARD
from shared.weights.kinds import REFINER, SDXL

MEDIA_TYPE = "image/jpeg"
MOST_SIDE = 192
QUALITY = 75

# Found by others by fitting decoded pictures to latents: a row per channel; red, green, blue.
_MIX_SD = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)
_MIX_XL = (
    (0.3448, 0.4168, 0.4395),
    (-0.1953, -0.0290, 0.0250),
    (0.1074, 0.0886, -0.0163),
    (-0.3730, -0.2499, -0.2088),
)


class Mixes:
    """The mix for each VAE: a known one for the published families, else one fitted to it."""

    def __init__(self) -> None:
        self._fitted: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def preview(self, latents: Tensor, checkpoint: Checkpoint, vae: Any) -> bytes:
        """JPEG of the first of the pictures, (pictures, 4, height, width)."""
        mix = self._mix(checkpoint, vae)
        first = latents[0].float().cpu()
        colors = torch.einsum("chw,cr->hwr", first, mix[:4]) + mix[4]
        levels = ((colors * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).numpy()
        picture = Image.fromarray(levels)
        picture.thumbnail((MOST_SIDE, MOST_SIDE))
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=QUALITY)
        return packed.getvalue()

    def _mix(self, checkpoint: Checkpoint, vae: Any) -> Tensor:
        """(5, 3): the channels, and a constant."""
        if checkpoint.configs.vae == STANDARD[checkpoint.family].vae:
            known = _MIX_XL if checkpoint.family in (SDXL, REFINER) else _MIX_SD
            return torch.tensor([*known, (0.0, 0.0, 0.0)])
        if vae not in self._fitted:
            self._fitted[vae] = fit_mix(vae)
        return self._fitted[vae]


@torch.no_grad()
def fit_mix(vae: Any) -> Tensor:
    """The mix, (5, 3), that comes nearest to what the VAE makes of even patches of latents."""
    generator = torch.Generator("cpu").manual_seed(0)
    patches = torch.randn(32, 4, 1, 1, generator=generator)
    latents = (patches / vae.config.scaling_factor).expand(-1, -1, 4, 4)
    pixels = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0].float().cpu()
    colors = pixels[:, :, 8:-8, 8:-8].mean((2, 3))
    channels = torch.cat([patches[:, :, 0, 0], torch.ones(32, 1)], 1)
    mix: Tensor = torch.linalg.lstsq(channels, colors).solution
    return mix
