"""The configs of each family, and of a file.

The standard configs are facts about the published architectures: the parameter counts they give are
the published ones (a test adds them up). Tensors tell neither how many heads an attention has nor
what the UNet predicts, so a model of another size says it in its metadata, under `darkroom.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.configs import (
    CheckpointConfig,
    ControlNetConfig,
    read_config,
)
from shared.weights.headers import Header
from shared.weights.kinds import FAMILIES, REFINER, SD1, SD2, SDXL, UNET, Kind, recognise


class Configs(msgspec.Struct, frozen=True):
    """One complete diffusers or transformers config per component. `text_encoder`: OpenAI's CLIP;
    `text_encoder_2`: OpenCLIP; SD 1.x has the first, SDXL both, the others the second."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any] | None = None
    text_encoder_2: dict[str, Any] | None = None


_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def _unet(
    channels: list[int], heads: int | list[int], context: int, attention: str, **more: Any
) -> dict[str, Any]:
    """`attention`: a letter per level, y where it has attention. `heads`: SD 1.x means the number
    of heads by `attention_head_dim`, and so do the others, level by level."""
    names = {"y": "CrossAttnDownBlock2D", "n": "DownBlock2D"}
    down = [names[letter] for letter in attention]
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": channels,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        **more,
    }


_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_VAE_XL = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}


def _clip(width: int, layers: int, heads: int, activation: str, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": 49_408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": projection,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # means: the highest token is the end
        "pad_token_id": 1,
    }


_CLIP_L = _clip(768, 12, 12, "quick_gelu", 768)
_LINEAR = {"use_linear_projection": True}
_TIME_IDS = {
    **_LINEAR,
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}

STANDARD: dict[str, Configs] = {
    SD1: Configs(
        unet=_unet([320, 640, 1280, 1280], 8, 768, "yyyn"),
        vae=_VAE,
        scheduler=_SCHEDULER,
        text_encoder=_CLIP_L,
    ),
    SD2: Configs(
        unet=_unet(
            [320, 640, 1280, 1280], [5, 10, 20, 20], 1024, "yyyn", **_LINEAR, upcast_attention=True
        ),
        vae=_VAE,
        scheduler=_SCHEDULER,
        text_encoder_2=_clip(1024, 23, 16, "gelu", 512),  # of 24 layers the last is not used
    ),
    SDXL: Configs(
        unet=_unet(
            [320, 640, 1280],
            [5, 10, 20],
            2048,
            "nyy",
            **_TIME_IDS,
            transformer_layers_per_block=[1, 2, 10],
            projection_class_embeddings_input_dim=2816,
        ),
        vae=_VAE_XL,
        scheduler=_SCHEDULER,
        text_encoder=_CLIP_L,
        text_encoder_2=_clip(1280, 32, 20, "gelu", 1280),
    ),
    REFINER: Configs(
        unet=_unet(
            [384, 768, 1536, 1536],
            [6, 12, 24, 24],
            1280,
            "nyyn",
            **_TIME_IDS,
            transformer_layers_per_block=4,
            projection_class_embeddings_input_dim=2560,
        ),
        vae=_VAE_XL,
        scheduler=_SCHEDULER,
        text_encoder_2=_clip(1280, 32, 20, "gelu", 1280),
    ),
}

TEXT_PREFIXES: dict[str, tuple[str, str]] = {
    SD1: ("cond_stage_model.transformer.", ""),
    SD2: ("", "cond_stage_model.model."),
    SDXL: ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    REFINER: ("", "conditioner.embedders.0.model."),
}
"""Where the text encoders of a family lie in its files: OpenAI's, OpenCLIP."""


def configs_of(header: Header, name: str) -> tuple[Kind, Configs]:
    """The configs in the file's own metadata, else those of its family. Raises JobFailure for a
    file that can't be run as a checkpoint, and says what it is."""
    kind = recognise(header)
    if not kind.family or kind.type != "Stable-diffusion":
        raise JobFailure(
            f"{name} is {kind.title}; a checkpoint of {', '.join(FAMILIES[:-1])} or an"
            f" {REFINER} is needed here"
        )
    standard = STANDARD[kind.family]
    own = header.metadata.get("darkroom.config")
    if own is not None:
        return kind, _own_configs(own, standard, name)
    unet = {**standard.unet, "in_channels": 9 if kind.inpainting else 4}
    guided = header.tensors.get(UNET + "time_embed.cond_proj.weight")
    if guided:  # a latent consistency model that is told its guidance
        if len(guided.shape) != 2:
            raise JobFailure(
                f"broken checkpoint: time_embed.cond_proj.weight in {name} is no matrix"
            )
        unet["time_cond_proj_dim"] = guided.shape[1]
    scheduler = {**_SCHEDULER, **_prediction(header)}
    return kind, msgspec.structs.replace(standard, unet=unet, scheduler=scheduler)


def tells_prediction(header: Header) -> bool:
    """Whether a file says itself what its UNet predicts; SD 2.x files usually do not."""
    return (
        "v_pred" in header.tensors
        or "darkroom.config" in header.metadata
        or "modelspec.prediction_type" in header.metadata
    )


def _prediction(header: Header) -> dict[str, Any]:
    told = header.metadata.get("modelspec.prediction_type", "")
    predicts_v = told in ("v", "v_prediction") or "v_pred" in header.tensors
    return {
        "prediction_type": "v_prediction" if predicts_v else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in header.tensors,
    }


def _own_configs(text: str, standard: Configs, name: str) -> Configs:
    config = read_config(text, CheckpointConfig, name)
    for part in ("text_encoder", "text_encoder_2"):
        if (config.get(part) is None) != (getattr(standard, part) is None):
            raise JobFailure(
                f"broken checkpoint: darkroom.config in {name}: {part} is not expected"
                f" to be {'missing' if getattr(standard, part) else 'there'}"
            )
    scheduler = {**_SCHEDULER, **config["scheduler"]}
    return msgspec.convert({**config, "scheduler": scheduler}, Configs)


def controlnet_config(header: Header, name: str) -> Mapping[str, Any] | None:
    """Of one of another size than the published ones. Raises JobFailure."""
    text = header.metadata.get("darkroom.config")
    return None if text is None else read_config(text, ControlNetConfig, name)
