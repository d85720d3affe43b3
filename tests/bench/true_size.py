"""Model files of true size with random values, in the original layout: what a GPU has to move and
multiply does not depend on the values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.families import STANDARD, TEXT_PREFIXES, Configs
from shared.weights.kinds import SD1, SDXL

RANK = 16


def small(family: str) -> Configs:
    """Configs of a model that runs in a moment on any machine, to try the benchmark itself."""
    standard = STANDARD[family]
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    encoders = {
        name: {**config, **text}
        for name in ("text_encoder", "text_encoder_2")
        if (config := getattr(standard, name)) is not None
    }
    levels = len(standard.unet["block_out_channels"])
    unet = {
        **standard.unet,
        "block_out_channels": [32, 64, 64, 64][:levels],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 32 * len(encoders),
    }
    if family == SDXL:
        unet |= {
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
    vae = {
        **standard.vae,
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return msgspec.structs.replace(standard, unet=unet, vae=vae, **encoders)


def write_checkpoint(
    path: Path, family: str, device: torch.device, *, configs: Configs | None, seed: int
) -> None:
    """In half precision. `configs`: None for those of the family."""
    used = configs or STANDARD[family]
    generator = torch.Generator(device).manual_seed(seed)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(used.unet)
        vae = AutoencoderKL.from_config(used.vae)
    tensors = layouts.to_original(_random(unet, generator), layouts.unet_sources(used.unet))
    tensors |= layouts.to_original(_random(vae, generator), layouts.vae_sources(used.vae))
    clip_prefix, open_clip_prefix = TEXT_PREFIXES[family]
    if used.text_encoder is not None:
        with init_empty_weights():
            encoder = CLIPTextModel(CLIPTextConfig(**used.text_encoder))
        sources = layouts.clip_sources(clip_prefix)
        tensors |= layouts.to_original(_random(encoder, generator), sources)
    if used.text_encoder_2 is not None:
        with init_empty_weights():
            encoder = CLIPTextModelWithProjection(CLIPTextConfig(**used.text_encoder_2))
        sources = layouts.open_clip_sources(open_clip_prefix)
        tensors |= layouts.to_original(_random(encoder, generator), sources)
    metadata = {"format": "pt"}
    if configs is not None:
        told = {name: value for name, value in msgspec.to_builtins(configs).items() if value}
        metadata["darkroom.config"] = json.dumps(told)
    save_file(tensors, path, metadata)


def write_lora(path: Path, unet: Any, seed: int) -> None:
    """Kohya's naming, on every projection of every attention."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".attn" not in name:
            continue
        key = "lora_unet_" + name.replace(".", "_")
        shapes = {"lora_down": (RANK, module.in_features), "lora_up": (module.out_features, RANK)}
        for part, shape in shapes.items():
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[f"{key}.{part}.weight"] = values.half()
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK)).half()
    save_file(tensors, path, {"format": "pt"})


def _random(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Small enough values that nothing overflows, however deep the model."""
    state = {}
    for name, wanted in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        if wanted.ndim == 1:
            make = torch.ones if "norm" in name and name.endswith("weight") else torch.zeros
            state[name] = make(wanted.shape, dtype=torch.float16)
            continue
        scale = min(0.02, wanted[0].numel() ** -0.5)
        values = torch.randn(wanted.shape, generator=generator, device=generator.device)
        state[name] = (values * scale).half().cpu()
    return state


FAMILIES = {"sd15": SD1, "sdxl": SDXL}
