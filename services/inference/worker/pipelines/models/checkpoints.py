"""Whole checkpoints: a UNet, a VAE and text encoders from one file, and what is worn on them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models import components
from services.inference.worker.pipelines.models.components import Place, TextEncoder
from services.inference.worker.pipelines.models.families import (
    Configs,
    configs_of,
    tells_prediction,
)
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.networks import Wardrobe
from services.inference.worker.pipelines.models.parts import Parts
from services.inference.worker.pipelines.sampling.schedules import NoiseSchedule
from shared.weights.kinds import REFINER, SD2, Kind


class Checkpoint:
    """One loaded checkpoint. `wardrobe` puts networks (LoRA) on it and takes them off.

    `unused`: tensors in its file that have no place in it. `has_own_positions`: its file numbers
    the tokens of a text in another way than from 0 to 76."""

    def __init__(self, file: ModelFile, place: Place, parts: Parts | None = None) -> None:
        """`parts`: of the other checkpoints that are loaded. Raises JobFailure for a file that is
        broken or of no family that is known here."""
        self.kind: Kind
        self.configs: Configs
        self.kind, self.configs = configs_of(file.header, file.name)
        self.file = file
        self.place = place
        self._parts = parts or Parts()
        with file.reading(place.device) as opened:
            tensors = components.Tracked(opened)
            self.unet = self._parts.share(components.load_unet(file, tensors, self.configs, place))
            self.text_encoders: list[TextEncoder] = components.load_text_encoders(
                file, tensors, self.configs, self.kind.family, place
            )
            for encoder in self.text_encoders:
                self._parts.share(encoder.model)
            self.vae: Any = None
            if components.has_vae(file):
                self.vae = self._parts.share(
                    components.load_vae(file, tensors, self.configs.vae, place)
                )
            self.unused = tensors.unused()
            self.has_own_positions = components.has_own_positions(opened)
        self._check_fit()
        trained = dict(self.configs.scheduler)
        if self.kind.family == SD2 and not tells_prediction(file.header):
            trained["prediction_type"] = predicts(self.unet)
        self.schedule = NoiseSchedule(**trained)
        self.tiling = False
        self.wardrobe = Wardrobe(self.unet, self.configs.unet, self.text_encoders)

    @property
    def family(self) -> str:
        return self.kind.family

    def tensors(self) -> list[Tensor]:
        """All that it has in memory. Some may be other checkpoints', too."""
        vae = () if self.vae is None else (self.vae,)
        models = (self.unet, *vae, *(encoder.model for encoder in self.text_encoders))
        return self._parts.tensors(models)

    def _check_fit(self) -> None:
        width = sum(encoder.width for encoder in self.text_encoders)
        config = self.unet.config
        latents = self.configs.vae["latent_channels"]
        vocabulary = len(self.text_encoders[0].tokenizer)
        more = None  # what a UNet is told beside the text
        if config.addition_embed_type:
            told = 5 if self.family == REFINER else 6
            pooled = (one.model.config.projection_dim for one in self.text_encoders if one.pooled)
            more = told * config.addition_time_embed_dim + sum(pooled)
        if (
            config.cross_attention_dim != width
            or more not in (None, config.projection_class_embeddings_input_dim)
            or config.in_channels not in (latents, 2 * latents + 1)
            or any(
                encoder.model.config.max_position_embeddings < 77
                or encoder.model.config.vocab_size < vocabulary
                for encoder in self.text_encoders
            )
        ):
            raise JobFailure(
                f"broken checkpoint: the parts of {self.file.name} do not fit together"
            )


def size_of_file(file: ModelFile, place: Place) -> int:
    """Bytes that a model file will take in memory."""
    return file.header.parameters * place.dtype.itemsize


@torch.no_grad()
def predicts(unet: Any) -> str:
    """Whether a UNet of SD 2.x predicts noise or v. Nothing in a file tells; but asked at the last
    time about a picture that is a constant, one that predicts v answers far below it, as the webui
    has found out."""
    device, dtype = unet.device, unet.dtype
    picture = torch.full((1, 4, 8, 8), 0.5, device=device, dtype=dtype)
    if unet.config.in_channels > 4:
        more = unet.config.in_channels - 4
        picture = torch.cat([picture, torch.zeros(1, more, 8, 8, device=device, dtype=dtype)], 1)
    text = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, device=device, dtype=dtype)
    time = torch.tensor([999.0], device=device)
    answer = unet(picture, time, text, return_dict=False)[0]
    return "v_prediction" if float((answer - 0.5).float().mean()) < -1 else "epsilon"


def set_tiling(model: nn.Module, on: bool) -> None:
    """Whether the picture's edges meet: convolutions then look around its border."""
    mode: Literal["circular", "zeros"] = "circular" if on else "zeros"
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = mode
