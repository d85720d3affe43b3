"""Configs that model files carry in their metadata: what of them is read, and what is allowed.

A stranger writes them, and they decide what is built before any tensor is looked at. So each key is
known here, with its type and bounds; all others are left out, since some make the libraries look
for code.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure

T = TypeVar("T")

Size = Annotated[int, Meta(ge=1, le=100_000)]
"""No size is larger; the vocabulary has 49,408 words."""
Count = Annotated[int, Meta(ge=1, le=64)]
"""What building a model loops over; all else is settled by the shapes of the tensors."""
Sizes = Annotated[list[Size], Meta(min_length=1, max_length=16)]
Counts = Annotated[list[Count], Meta(min_length=1, max_length=16)]
Token = Annotated[int, Meta(ge=0, le=100_000)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu", "quick_gelu"]
DownBlock = Literal["CrossAttnDownBlock2D", "DownBlock2D"]
UpBlock = Literal["CrossAttnUpBlock2D", "UpBlock2D"]


class _Half(TypedDict):
    """What a UNet and a ControlNet have in common."""

    in_channels: Size
    down_block_types: Annotated[list[DownBlock], Meta(min_length=1, max_length=16)]
    block_out_channels: Sizes
    layers_per_block: Count
    cross_attention_dim: Size
    attention_head_dim: Size | Sizes
    norm_num_groups: NotRequired[Size]
    norm_eps: NotRequired[Positive]
    act_fn: NotRequired[Activation]
    addition_embed_type: NotRequired[Literal["text_time"] | None]
    addition_time_embed_dim: NotRequired[Size | None]
    center_input_sample: NotRequired[bool]
    downsample_padding: NotRequired[Literal[0, 1]]
    flip_sin_to_cos: NotRequired[bool]
    freq_shift: NotRequired[Literal[0, 1]]
    mid_block_scale_factor: NotRequired[Positive]
    only_cross_attention: NotRequired[bool]
    projection_class_embeddings_input_dim: NotRequired[Size | None]
    transformer_layers_per_block: NotRequired[Count | Counts]
    upcast_attention: NotRequired[bool]
    use_linear_projection: NotRequired[bool]


class UNetConfig(_Half):
    up_block_types: Annotated[list[UpBlock], Meta(min_length=1, max_length=16)]
    out_channels: NotRequired[Size]
    sample_size: NotRequired[Size]
    time_cond_proj_dim: NotRequired[Size | None]


class ControlNetConfig(_Half):
    conditioning_embedding_out_channels: NotRequired[Sizes]


class VAEConfig(TypedDict):
    in_channels: Size
    out_channels: Size
    down_block_types: Annotated[
        list[Literal["DownEncoderBlock2D"]], Meta(min_length=1, max_length=16)
    ]
    up_block_types: Annotated[list[Literal["UpDecoderBlock2D"]], Meta(min_length=1, max_length=16)]
    block_out_channels: Sizes
    layers_per_block: Count
    latent_channels: Size
    norm_num_groups: NotRequired[Size]
    sample_size: NotRequired[Size]
    scaling_factor: Positive
    act_fn: NotRequired[Activation]
    force_upcast: NotRequired[bool]


class TextEncoderConfig(TypedDict):
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Size
    max_position_embeddings: Size
    projection_dim: NotRequired[Size]
    hidden_act: NotRequired[Activation]
    layer_norm_eps: NotRequired[Positive]
    bos_token_id: NotRequired[Token]
    eos_token_id: NotRequired[Token]
    pad_token_id: NotRequired[Token]


class SchedulerConfig(TypedDict):
    num_train_timesteps: NotRequired[Annotated[int, Meta(ge=2, le=100_000)]]
    beta_start: NotRequired[Annotated[float, Meta(gt=0, lt=1)]]
    beta_end: NotRequired[Annotated[float, Meta(gt=0, lt=1)]]
    beta_schedule: NotRequired[Literal["linear", "scaled_linear"]]
    prediction_type: NotRequired[Literal["epsilon", "v_prediction"]]
    rescale_betas_zero_snr: NotRequired[bool]


class CheckpointConfig(TypedDict):
    """`text_encoder`: OpenAI's CLIP; `text_encoder_2`: OpenCLIP."""

    unet: UNetConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    text_encoder: NotRequired[TextEncoderConfig | None]
    text_encoder_2: NotRequired[TextEncoderConfig | None]


def read_config(text: str, type_: type[T], file: str) -> T:
    """Raises JobFailure for one with anything that is not allowed."""
    try:
        config = msgspec.json.decode(text, type=type_)
        _check_together(config)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise JobFailure(f"broken checkpoint: darkroom.config in {file}: {error}") from None
    return config


def _check_together(config: Any) -> None:
    """Raises ValueError where values do not go together."""
    for part in [config, *config.values()]:
        if not isinstance(part, dict):
            continue
        heads = part.get("num_attention_heads", 1)
        if part.get("hidden_size", 0) % heads:
            raise ValueError(f"hidden_size: {part['hidden_size']} can't be {heads} equal heads")
        if "block_out_channels" not in part:
            continue
        levels = len(part["block_out_channels"])
        for key in (
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "transformer_layers_per_block",
        ):
            value = part.get(key)
            if isinstance(value, list) and len(value) != levels:
                raise ValueError(f"{key} has {len(value)} entries, {levels} are needed")
        if part.get("addition_embed_type"):
            for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if part.get(key) is None:
                    raise ValueError(f"{key} is missing, which addition_embed_type needs")
        groups = part.get("norm_num_groups", 32)
        for channels in part["block_out_channels"]:
            if channels % groups:
                raise ValueError(f"block_out_channels: {channels} can't be {groups} equal groups")
