"""UNets, VAEs, text encoders and ControlNets, filled with the tensors of a file.

Every tensor is checked against the model's own list, so that a file with a missing or misshapen
tensor is told apart from a fault of ours; none is ever made up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import is_out_of_memory
from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.families import (
    STANDARD,
    TEXT_PREFIXES,
    Configs,
    controlnet_config,
)
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.layouts import Source, SourceOf
from shared.weights.kinds import SDXL, recognise

TOKENIZER = Path(__file__).parent.parent / "tokenizer"

Tensors = Mapping[str, Tensor]


class Place(msgspec.Struct, frozen=True):
    """Where models go, and in which precision."""

    device: torch.device
    dtype: torch.dtype


class TextEncoder(msgspec.Struct, frozen=True):
    """`model`: gives hidden states and, with `pooled`, one vector per text. `penultimate`: its
    last layer but one is used, and not normed. `skips`: follows the webui's "clip skip". `pad`: the
    token that chunks are filled up with."""

    name: str
    model: Any
    tokenizer: Any
    pad: int
    pooled: bool
    penultimate: bool
    skips: bool

    @property
    def core(self) -> Any:
        """The transformer itself, which has the embeddings and the last norm."""
        return getattr(self.model, "text_model", self.model)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)


class Tracked(Mapping[str, Tensor]):
    """Tensors, and which of them were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.asked.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def unused(self, prefix: str = "") -> list[str]:
        """Tensors that no part of a model has asked for, and that might have changed a picture."""
        left = [name for name in self if name.startswith(prefix) and name not in self.asked]
        return sorted(name for name in left if not _LEFT_BY_TRAINING.match(name))


_LEFT_BY_TRAINING = re.compile(
    r"(.*\.)?position_ids$|(first_stage_model\.)?(model_ema|loss)\."
    r"|(cond_stage_model|conditioner\.embedders\.\d+)\."
    r"((transformer|model)\.)?(logit_scale|text_projection|vision_model|visual_projection|visual)\b"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\."
    r"|((log|sqrt)_(one_minus_|recip_|recipm1_)?|one_minus_)?(betas|alphas)(_cumprod)?(_prev)?$"
    r"|sqrt_recipm?1?_alphas_cumprod$|posterior_(variance|log_variance_clipped|mean_coef[12])$"
    r"|logvar$|lvlb_weights$|scale_factor$|denoiser\.sigmas$|sigmas$|v_pred$|ztsnr$"
)
"""What acts on no picture: averages and losses of a training, its schedule, CLIP's other half, the
last layer of SD 2.x's text encoder, which is not used, and what is read elsewhere."""


def load_unet(file: ModelFile, tensors: Tensors, configs: Configs, place: Place) -> Any:
    with _told(file.name, "unet"):
        return _fill(
            lambda: UNet2DConditionModel.from_config(configs.unet),
            tensors,
            layouts.unet_sources(configs.unet),
            place,
        )


def load_vae(file: ModelFile, tensors: Tensors, config: Mapping[str, Any], place: Place) -> Any:
    """From a whole checkpoint, or from a file that is a VAE in either layout."""
    source_of: SourceOf
    if "encoder.conv_norm_out.weight" in file.header.tensors:
        source_of = _same
    elif "encoder.conv_in.weight" in file.header.tensors:
        source_of = layouts.vae_sources(config, "")
    else:
        source_of = layouts.vae_sources(config)
    if config.get("force_upcast") and place.dtype == torch.float16:
        place = Place(place.device, torch.float32)  # it leaves the range of halves
    with _told(file.name, "vae"):
        vae = _fill(
            lambda: AutoencoderKL.from_config(dict(config)),
            tensors,
            source_of,
            place,
        )
    return vae


def has_own_positions(tensors: Tensors) -> bool:
    """Some merges have left damaged position ids behind, which CLIP would go by if it read them."""
    found = (tensors[name].flatten() for name in tensors if name.endswith("position_ids"))
    return any(not torch.equal(ids.long(), torch.arange(len(ids)).to(ids.device)) for ids in found)


def has_vae(file: ModelFile) -> bool:
    return any(name.startswith(layouts.VAE) for name in file.header.tensors)


def load_text_encoders(
    file: ModelFile, tensors: Tensors, configs: Configs, family: str, place: Place
) -> list[TextEncoder]:
    """OpenAI's CLIP, OpenCLIP, or both, in this order."""
    clip_prefix, open_clip_prefix = TEXT_PREFIXES[family]
    encoders = []
    if configs.text_encoder is not None:
        with _told(file.name, "text_encoder"):
            model = _fill(
                _text_model(CLIPTextModel, configs.text_encoder),
                _with_old_names(tensors, clip_prefix),
                layouts.clip_sources(clip_prefix),
                place,
            )
        encoders.append(
            TextEncoder(
                "clip_l",
                model,
                tokenizer(),
                tokenizer().pad_token_id,
                pooled=False,
                penultimate=family == SDXL,
                skips=family != SDXL,
            )
        )
    if configs.text_encoder_2 is not None:
        projected = f"{open_clip_prefix}text_projection" in file.header.tensors
        pooled = configs.text_encoder is not None or family != "SD 2.x"
        if pooled and not projected:
            raise JobFailure(
                f"broken checkpoint: the text_encoder_2 in {file.name} lacks its projection"
            )
        with _told(file.name, "text_encoder_2"):
            kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
            model = _fill(
                _text_model(kind, configs.text_encoder_2),
                tensors,
                layouts.open_clip_sources(open_clip_prefix),
                place,
            )
        encoders.append(
            TextEncoder(
                "clip_g" if pooled else "clip_h",
                model,
                tokenizer(),
                0,
                pooled=pooled,
                penultimate=pooled,
                skips=False,
            )
        )
    return encoders


@lru_cache(1)
def tokenizer() -> Any:
    """The one that all families have. Nobody changes it: vectors stand beside its tokens."""
    return CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)


def pools_conditions(file: ModelFile) -> bool:
    """Whether a ControlNet is a "shuffle", which was trained to tell of colors and not of places.
    Nothing in its tensors says so; its name does."""
    return "shuffle" in file.name.lower()


def load_controlnet(file: ModelFile, place: Place) -> Any:
    """A ControlNet in either layout, for one of the families."""
    kind = recognise(file.header)
    own = controlnet_config(file.header, file.name)
    if kind.type != "ControlNet" or not (kind.family or own):
        raise JobFailure(f"{file.name} is {kind.title}; a ControlNet is needed here")
    shapes = file.header.tensors
    config = _half_of_unet(own or STANDARD[kind.family].unet)
    config["global_pool_conditions"] = pools_conditions(file)
    source_of: SourceOf
    if "controlnet_cond_embedding.conv_in.weight" in shapes:
        source_of, prefix = _same, ""
    else:
        prefix = layouts.CONTROL if any(n.startswith(layouts.CONTROL) for n in shapes) else ""
        source_of = layouts.controlnet_sources(config, prefix)
    with file.reading(place.device) as opened, _told(file.name, "ControlNet"):
        tensors = Tracked(opened)
        model = _fill(lambda: ControlNetModel.from_config(config), tensors, source_of, place)
        model.unused = tensors.unused(prefix)
        return model


_SHARED_WITH_UNET = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "attention_head_dim",
    "use_linear_projection",
    "transformer_layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "upcast_attention",
)


def _half_of_unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The half of a UNet that a ControlNet copies, and its way in for a picture."""
    shared = {key: unet[key] for key in _SHARED_WITH_UNET if key in unet}
    channels = unet.get("conditioning_embedding_out_channels", [16, 32, 96, 256])
    return {**shared, "in_channels": 4, "conditioning_embedding_out_channels": channels}


def _same(name: str) -> Source:
    return Source(name)


def _text_model(kind: Any, config: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: kind(CLIPTextConfig(**config))


def _with_old_names(tensors: Tensors, prefix: str) -> Tensors:
    """Some files lack the level of names that transformers had and gave up again."""
    if f"{prefix}embeddings.token_embedding.weight" not in tensors:
        return tensors
    return _Renamed(tensors, f"{prefix}text_model.", prefix)


class _Renamed(Mapping[str, Tensor]):
    def __init__(self, tensors: Tensors, wanted: str, there: str) -> None:
        self._tensors, self._wanted, self._there = tensors, wanted, there

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._there + name.removeprefix(self._wanted)]

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            if name.startswith(self._there):
                yield self._wanted + name.removeprefix(self._there)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _WrongTensors(Exception):
    """The text tells which."""


@contextmanager
def _told(file_name: str, component: str) -> Iterator[None]:
    """Turns what a component's load raises into a reason that names the file and the component."""
    about = f"broken checkpoint: the {component} in {file_name}"
    try:
        yield
    except JobFailure:
        raise
    except _WrongTensors as error:
        raise JobFailure(f"{about} {error}") from error
    except SafetensorError as error:
        raise JobFailure(f"broken checkpoint: {file_name}: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The config is a stranger's: it may make the libraries stumble anywhere.
        raise JobFailure(f"{about} can't be read: {error!r}") from error


def _fill(
    build: Callable[[], Any],
    tensors: Tensors,
    source_of: SourceOf,
    place: Place,
) -> Any:
    """The model with these tensors for its parameters, on its place."""
    try:
        with init_empty_weights(include_buffers=False):
            model = build()
    except ValueError as error:  # what the libraries find in a config, in their words
        raise _WrongTensors(f"can't be built from its config: {error}") from error
    given: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, wanted in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        try:
            source = source_of(name)
            tensor = source.cut(tensors[source.name])
        except (KeyError, IndexError):  # a layer that no file has, or a tensor without rows
            missing.append(name)
            continue
        if tensor.shape != wanted.shape:
            if tensor.squeeze().shape != wanted.squeeze().shape:
                got, needed = tuple(tensor.shape), tuple(wanted.shape)
                raise _WrongTensors(
                    f"does not fit its config: size mismatch for {name}:"
                    f" {got} where {needed} belongs"
                )
            tensor = tensor.reshape(wanted.shape)  # 1x1 convolutions and matrices
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise _WrongTensors(f"has {name} in {kind} and not in floating point numbers")
        given[name] = tensor.to(place.device, place.dtype)
    if missing:
        raise _WrongTensors(f"lacks {len(missing)} tensors, {missing[0]} among them")
    model.load_state_dict(given, strict=False, assign=True)
    model = model.to(place.device, place.dtype).eval().requires_grad_(False)
    if place.device.type == "cuda":  # what the convolutions of GPUs read fastest
        model = model.to(memory_format=torch.channels_last)
    return model


def size_of(*models: Any) -> int:
    """Bytes."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())
