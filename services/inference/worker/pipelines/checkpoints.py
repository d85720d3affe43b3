"""Loads single-file Stable Diffusion checkpoints, offline, and keeps the last ones.

The original layout is renamed to diffusers' names and every tensor is checked against the model's
own list, so that a file with a missing or misshapen tensor is told apart from a fault of ours.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.families import configs_of, noise_schedule, read_header
from services.inference.worker.pipelines.prompts import CHUNK

TOKENIZER = Path(__file__).parent / "tokenizer"
KEPT = 3
"""Checkpoints kept at most; fewer where they are large, see `Checkpoints`."""

_TEXT_ENCODER = "cond_stage_model.transformer."


class LoadedCheckpoint(msgspec.Struct, frozen=True):
    """`name`: of the file, without its suffix. `noise_schedule`: what the UNet was trained with."""

    name: str
    sha256: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    noise_schedule: dict[str, Any]
    size: int

    @property
    def short_hash(self) -> str:
        """The webui's "Model hash"."""
        return self.sha256[:10]


class Checkpoints:
    """The checkpoints on one device, least recently used ones given up first.

    They take up to half of the device's memory: the other half is for the pictures.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cache: Path) -> None:
        self._device, self._dtype, self._cache = device, dtype, cache
        self._tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
        self._loaded: OrderedDict[tuple[object, ...], LoadedCheckpoint] = OrderedDict()
        self._budget = _memory(device) // 2

    def get(self, path: Path, file_name: str) -> LoadedCheckpoint:
        """Raises JobFailure for a file that is broken or that this version does not run."""
        stat = path.stat()
        key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._loaded:
            self._loaded[key] = self._load(path, file_name)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def forget(self) -> None:
        """Gives all memory back, after the device had not enough of it."""
        self._loaded.clear()
        self._release()

    def _make_room(self, size: int) -> None:
        def full() -> bool:
            taken = sum(checkpoint.size for checkpoint in self._loaded.values())
            return len(self._loaded) >= KEPT or taken + size > self._budget

        while self._loaded and full():
            self._loaded.popitem(last=False)
            self._release()

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, path: Path, file_name: str) -> LoadedCheckpoint:
        header = read_header(path, file_name)
        configs = configs_of(header, file_name)
        self._make_room(sum(map(math.prod, header.shapes.values())) * self._dtype.itemsize)
        parts = _read_parts(path, file_name)
        with _told(file_name, "unet"):
            unet = _fill(
                lambda: UNet2DConditionModel.from_config(_without_class(configs.unet)),
                convert_ldm_unet_checkpoint(parts.unet, configs.unet),
            )
        with _told(file_name, "vae"):
            vae = _fill(
                lambda: AutoencoderKL.from_config(_without_class(configs.vae)),
                convert_ldm_vae_checkpoint(parts.vae, configs.vae),
            )
        with _told(file_name, "text_encoder"):
            text_encoder = _fill(
                lambda: CLIPTextModel(CLIPTextConfig(**_without_class(configs.text_encoder))),
                parts.text_encoder,
            )
        if unet.config.cross_attention_dim != text_encoder.config.hidden_size or (
            unet.config.in_channels != vae.config.latent_channels
            or text_encoder.config.max_position_embeddings < CHUNK + 2
            or text_encoder.config.vocab_size < len(self._tokenizer)
        ):
            raise JobFailure(f"broken checkpoint: the parts of {file_name} do not fit together")
        models = [model.to(self._device, self._dtype).eval() for model in (unet, vae, text_encoder)]
        return LoadedCheckpoint(
            name=Path(file_name).stem,
            sha256=self._sha256(path),
            unet=models[0],
            vae=models[1],
            text_encoder=models[2],
            tokenizer=self._tokenizer,
            noise_schedule=noise_schedule(configs.scheduler),
            size=sum(p.numel() * p.element_size() for m in models for p in m.parameters()),
        )

    def _sha256(self, path: Path) -> str:
        """Reading gigabytes takes seconds: the answer is kept beside, by path, size and time."""
        stat = path.stat()
        known_by = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
        kept = self._cache / ".sha256" / hashlib.sha256(known_by.encode()).hexdigest()
        if kept.exists():
            return kept.read_text()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.replace(kept)
        return digest


class _Parts(msgspec.Struct):
    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]


def _read_parts(path: Path, file_name: str) -> _Parts:
    """The tensors, mapped and not read: pages come in as they are used."""
    parts = _Parts({}, {}, {})
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if name.startswith("model.diffusion_model."):
                    parts.unet[name] = file.get_tensor(name)
                elif name.startswith("first_stage_model."):
                    parts.vae[name] = file.get_tensor(name)
                elif name.startswith(_TEXT_ENCODER) and not name.endswith("position_ids"):
                    # Some files lack the level of names that transformers had and gave up again.
                    short = name.removeprefix(_TEXT_ENCODER).removeprefix("text_model.")
                    parts.text_encoder[short] = file.get_tensor(name)
    except SafetensorError as error:
        raise JobFailure(f"broken checkpoint: {file_name}: {error}") from None
    return parts


class _MissingTensors(Exception):
    """The text tells which."""


class _told:
    """Turns what a component's load raises into a reason that names the file and the component."""

    def __init__(self, file_name: str, component: str) -> None:
        self._about = f"broken checkpoint: the {component} in {file_name}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _MissingTensors):
            raise JobFailure(f"{self._about} {error}") from error
        if isinstance(error, RuntimeError):  # load_state_dict lists what has another shape
            line = str(error).splitlines()[-1].strip()
            raise JobFailure(f"{self._about} does not fit its config: {line}") from error
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            # The config is a stranger's: it may make the libraries stumble anywhere.
            raise JobFailure(f"{self._about} can't be read: {error!r}") from error


def _fill(build: Callable[[], Any], tensors: Mapping[str, Tensor | None]) -> Any:
    """The model with these tensors for its parameters; none is ever made up."""
    with init_empty_weights(include_buffers=False):
        model = build()
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    given = {prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}
    missing, unknown = model.load_state_dict(given, strict=False, assign=True)
    if missing:
        raise _MissingTensors(f"lacks {len(missing)} tensors, {missing[0]} among them")
    if unknown:
        raise _MissingTensors(f"has {len(unknown)} tensors too many, {unknown[0]} among them")
    return model


def _without_class(config: Mapping[str, Any]) -> dict[str, Any]:
    unneeded = ("_class_name", "_diffusers_version", "architectures", "model_type", "torch_dtype")
    return {key: value for key, value in config.items() if key not in unneeded}


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
