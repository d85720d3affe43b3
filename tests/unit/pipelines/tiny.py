"""Tiny random models of every family, written as their real files are: one file, original layout.

With the tensors come the diffusers and transformers modules that they were taken from, so that a
test can compute with these what the engine is to make. Every parameter is random, of norms and of
zero convolutions, too: a tensor that lands in the wrong place changes the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.families import TEXT_PREFIXES
from shared.weights.kinds import REFINER, SD1, SD2, SDXL

Tensors = dict[str, Tensor]
Config = dict[str, Any]


class Tiny(msgspec.Struct, frozen=True, eq=False):
    """A checkpoint. `text_encoder`: OpenAI's CLIP; `text_encoder_2`: OpenCLIP."""

    family: str
    configs: dict[str, Config]
    unet: Any
    vae: Any
    text_encoder: Any = None
    text_encoder_2: Any = None

    @property
    def modules(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in self.configs if name != "scheduler"}
        return {name: module for name, module in named.items() if module is not None}

    def tensors(self) -> Tensors:
        """By the names that the original files have."""
        clip, open_clip = TEXT_PREFIXES[self.family]
        sources = {
            "unet": layouts.unet_sources(self.configs["unet"]),
            "vae": layouts.vae_sources(self.configs["vae"]),
            "text_encoder": layouts.clip_sources(clip),
            "text_encoder_2": layouts.open_clip_sources(open_clip),
        }
        tensors: Tensors = {}
        for name, module in self.modules.items():
            tensors |= layouts.to_original(module.state_dict(), sources[name])
        return tensors

    def save(self, path: Path, tensors: Tensors | None = None) -> Path:
        return save(path, self.tensors() if tensors is None else tensors, self.configs)


def save(path: Path, tensors: Mapping[str, Tensor], config: object = None) -> Path:
    """As .safetensors. `config`: of models that are smaller than the published ones."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["darkroom.config"] = json.dumps(config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def randomise(module: nn.Module, seed: int) -> Any:
    """Weights that keep the size of what they are given, and norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim > 1:
                parameter.div_(math.sqrt(parameter.numel() / parameter.shape[0]))
            else:
                parameter.mul_(0.2).add_(1 if name.endswith("weight") else 0)
    return module.eval().requires_grad_(False)


# Checkpoints

_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
_SCHEDULER: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def _unet(context: int, heads: Any, attention: str, **more: Any) -> Config:
    """`attention`: a letter per level, y where it has attention."""
    names = {"y": "CrossAttnDownBlock2D", "n": "DownBlock2D"}
    down = [names[letter] for letter in attention]
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": [16, 32][: len(attention)],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        **more,
    }


def _clip(width: int, activation: str, projection: int = 0) -> Config:
    return {
        "vocab_size": 49_408,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": projection or width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def sd1(seed: int = 1, **unet: Any) -> Tiny:
    """`unet`: what is different in its config."""
    return _checkpoint(
        SD1, _unet(32, 2, "yn", **unet), _VAE, _SCHEDULER, _clip(32, "quick_gelu"), None, seed
    )


def sd1_inpainting(seed: int = 2) -> Tiny:
    return sd1(seed, in_channels=9)


def lcm(seed: int = 3) -> Tiny:
    """A latent consistency model that is told its guidance."""
    return sd1(seed, time_cond_proj_dim=16)


def sd2(prediction_type: str = "epsilon", seed: int = 4) -> Tiny:
    unet = _unet(40, [2, 4], "yn", use_linear_projection=True)
    scheduler = {**_SCHEDULER, "prediction_type": prediction_type}
    return _checkpoint(SD2, unet, _VAE, scheduler, None, _clip(40, "gelu"), seed)


def sdxl(seed: int = 5, **unet: Any) -> Tiny:
    more: Config = {
        "use_linear_projection": True,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
        **unet,
    }
    return _checkpoint(
        SDXL,
        _unet(32 + 48, [2, 4], "ny", **more),
        {**_VAE, "scaling_factor": 0.13025},
        _SCHEDULER,
        _clip(32, "quick_gelu"),
        _clip(48, "gelu"),
        seed,
    )


def sdxl_inpainting(seed: int = 6) -> Tiny:
    return sdxl(seed, in_channels=9)


def refiner(seed: int = 7) -> Tiny:
    unet = _unet(
        48,
        [2, 4],
        "ny",
        use_linear_projection=True,
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 5 * 8,
    )
    vae = {**_VAE, "scaling_factor": 0.13025}
    return _checkpoint(REFINER, unet, vae, _SCHEDULER, None, _clip(48, "gelu"), seed)


CHECKPOINTS: dict[str, Callable[[], Tiny]] = {
    "SD 1.x": sd1,
    "SD 1.x inpainting": sd1_inpainting,
    "SD 1.x LCM": lcm,
    "SD 2.x": sd2,
    "SD 2.x v": lambda: sd2("v_prediction"),
    "SDXL": sdxl,
    "SDXL inpainting": sdxl_inpainting,
    "SDXL refiner": refiner,
}


def _checkpoint(
    family: str,
    unet: Config,
    vae: Config,
    scheduler: Config,
    clip: Config | None,
    open_clip: Config | None,
    seed: int,
) -> Tiny:
    configs = {"unet": unet, "vae": vae, "scheduler": scheduler}
    if clip is not None:
        configs["text_encoder"] = clip
    if open_clip is not None:
        configs["text_encoder_2"] = open_clip
    pooled = CLIPTextModel if family == SD2 else CLIPTextModelWithProjection
    return Tiny(
        family=family,
        configs=configs,
        unet=randomise(UNet2DConditionModel.from_config(unet), 10 * seed),
        vae=vae_of(vae, 10 * seed + 1),
        text_encoder=clip and randomise(CLIPTextModel(CLIPTextConfig(**clip)), 10 * seed + 2),
        text_encoder_2=open_clip and randomise(pooled(CLIPTextConfig(**open_clip)), 10 * seed + 3),
    )


def vae_of(config: Config, seed: int) -> Any:
    return randomise(AutoencoderKL.from_config(config), seed)


# ControlNets


def controlnet(checkpoint: Tiny, seed: int = 8) -> tuple[Any, Config]:
    """One for a checkpoint, and the config that its file is to carry."""
    shared = {
        key: value
        for key, value in checkpoint.configs["unet"].items()
        if key not in ("sample_size", "in_channels", "out_channels", "up_block_types")
    }
    config = {**shared, "in_channels": 4, "conditioning_embedding_out_channels": [4, 4, 8, 8]}
    return randomise(ControlNetModel.from_config(config), seed), config


def controlnet_tensors(model: Any, config: Config, layout: str) -> Tensors:
    """`layout`: `original`, `bare` (the same without its prefix) or `diffusers`."""
    if layout == "diffusers":
        return dict(model.state_dict())
    prefix = layouts.CONTROL if layout == "original" else ""
    return layouts.to_original(model.state_dict(), layouts.controlnet_sources(config, prefix))


# Upscalers


def esrgan(seed: int = 9, width: int = 8, growth: int = 32) -> Tensors:
    """One of one block that makes pictures twice as large, as the first ones were saved."""
    shapes = {"model.0": (width, 3), "model.1.sub.1": (width, width)}
    shapes |= {f"model.{layer}": (width, width) for layer in (3, 5)}
    shapes["model.7"] = (3, width)
    for dense in (1, 2, 3):
        for layer in range(1, 6):
            out = growth if layer < 5 else width
            shapes[f"model.1.sub.0.RDB{dense}.conv{layer}.0"] = out, width + growth * (layer - 1)
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        weight = _draw(*shape, 3, 3, seed=100 * seed + number)
        tensors[f"{name}.weight"] = weight / math.sqrt(shape[1] * 3)
        tensors[f"{name}.bias"] = 0.1 * _draw(shape[0], seed=100 * seed + number + 50)
    return tensors


# Networks: what each form has for one layer. `alpha` is never the rank, so that it counts.

Parts = dict[str, Tensor]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])


def lora(weight: Tensor, seed: int, rank: int = 4) -> Parts:
    """Linear layers and convolutions of any size (LoCon)."""
    out, into, *kernel = weight.shape
    return {
        "lora_down.weight": _draw(rank, into, *kernel, seed=seed),
        "lora_up.weight": _draw(out, rank, *(1 for _ in kernel), seed=seed + 1),
        "alpha": torch.tensor(rank / 2),
    }


def lora_mid(weight: Tensor, seed: int, rank: int = 4) -> Parts:
    """LoCon with a core of its own for the kernel (LyCORIS' `use_cp`)."""
    out, into, *kernel = weight.shape
    return {
        "lora_down.weight": _draw(rank, into, 1, 1, seed=seed),
        "lora_mid.weight": _draw(rank, rank, *kernel, seed=seed + 1),
        "lora_up.weight": _draw(out, rank, 1, 1, seed=seed + 2),
        "alpha": torch.tensor(rank / 2),
    }


def loha(weight: Tensor, seed: int, rank: int = 3) -> Parts:
    out, into, *kernel = weight.shape
    inner = into * math.prod(kernel)
    return {
        "hada_w1_a": _draw(out, rank, seed=seed),
        "hada_w1_b": _draw(rank, inner, seed=seed + 1),
        "hada_w2_a": _draw(out, rank, seed=seed + 2),
        "hada_w2_b": _draw(rank, inner, seed=seed + 3),
        "alpha": torch.tensor(rank * 2.0),
    }


def loha_core(weight: Tensor, seed: int, rank: int = 3) -> Parts:
    out, into, *kernel = weight.shape
    return {
        "hada_t1": _draw(rank, rank, *kernel, seed=seed),
        "hada_w1_a": _draw(rank, out, seed=seed + 1),
        "hada_w1_b": _draw(rank, into, seed=seed + 2),
        "hada_t2": _draw(rank, rank, *kernel, seed=seed + 3),
        "hada_w2_a": _draw(rank, out, seed=seed + 4),
        "hada_w2_b": _draw(rank, into, seed=seed + 5),
        "alpha": torch.tensor(rank * 2.0),
    }


def lokr(weight: Tensor, seed: int, rank: int = 2) -> Parts:
    out, into, *kernel = weight.shape
    parts = {"lokr_w1": _draw(4, 4, seed=seed), "alpha": torch.tensor(rank / 2)}
    if kernel:
        return {**parts, "lokr_w2": _draw(out // 4, into // 4, *kernel, seed=seed + 1)}
    return {
        **parts,
        "lokr_w2_a": _draw(out // 4, rank, seed=seed + 1),
        "lokr_w2_b": _draw(rank, into // 4, seed=seed + 2),
    }


def ia3(weight: Tensor, seed: int) -> Parts:
    return {"weight": _draw(weight.shape[0], seed=seed), "on_input": torch.tensor(False)}


def ia3_on_input(weight: Tensor, seed: int) -> Parts:
    return {"weight": _draw(weight.shape[1], seed=seed), "on_input": torch.tensor(True)}


def full(weight: Tensor, seed: int) -> Parts:
    return {
        "diff": 0.3 * _draw(*weight.shape, seed=seed),
        "diff_b": _draw(weight.shape[0], seed=seed + 1),
    }


def dora(form: Callable[[Tensor, int], Parts], *, of: str) -> Callable[[Tensor, int], Parts]:
    """A form with magnitudes. `of`: `inputs`, as the webui reads them; `outputs`, in the shape of
    LyCORIS; `PEFT`, which has them for outputs too."""

    def parts(weight: Tensor, seed: int) -> Parts:
        out, into, *kernel = weight.shape
        count = into if of == "inputs" else out
        magnitudes = 1 + 0.3 * torch.rand(count, generator=torch.Generator().manual_seed(seed + 9))
        match of:
            case "inputs":
                shape = [1, into, *(1 for _ in kernel)]
            case "outputs":
                shape = [out, 1, *(1 for _ in kernel)]
            case _:  # convolutions have an axis more
                shape = [1, out, 1, 1] if kernel else [out]
        name = "lora_magnitude_vector" if of == "PEFT" else "dora_scale"
        return {**form(weight, seed), name: magnitudes.reshape(shape)}

    return parts


def network(
    layers: Mapping[str, nn.Module],
    form: Callable[[Tensor, int], Parts],
    key_of: Callable[[str], str],
) -> tuple[Tensors, dict[str, Parts]]:
    """A network file for some layers: its tensors, and its parts by layer."""
    parts = {
        name: form(layer.weight, 100 * number)  # type: ignore[arg-type]
        for number, (name, layer) in enumerate(layers.items(), 1)
    }
    tensors = {
        f"{key_of(name)}.{part}": tensor
        for name, some in parts.items()
        for part, tensor in some.items()
    }
    return tensors, parts
