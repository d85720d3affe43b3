"""What a model file is, told from the names and shapes in its header: nothing is loaded for it.

The standard configs are facts about the published architectures: the parameter counts they give are
the published ones (a test adds them up).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from services.inference.worker.pipelines import JobFailure

MAX_HEADER = 100_000_000
"""Bytes; the bound that the safetensors library has, too."""


class Header(msgspec.Struct, frozen=True):
    """`shapes`: tensor name -> shape. `metadata`: what the author of the file wrote down."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


class Configs(msgspec.Struct, frozen=True):
    """One complete diffusers or transformers config per component."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


_NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}

SD15 = Configs(
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # SD 1.x means the number of heads by it
    },
    vae={
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
    },
    text_encoder={
        "vocab_size": 49_408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    scheduler=_NOISE_SCHEDULE,
)


def read_header(path: Path, name: str) -> Header:
    """Raises JobFailure for what is no complete safetensors file; `name` is what the user calls it.

    The format: eight bytes (little endian) tell the length of a JSON object, which tells of each
    tensor its dtype, shape and place in the bytes that follow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise JobFailure(
                f"{name} is a pickled checkpoint (.ckpt, .pt), which can carry code;"
                " convert it to .safetensors and upload that"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, max(size - 8, 0)):
            raise JobFailure(f"broken checkpoint: {name} is no safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = {key: str(text) for key, text in entries.pop("__metadata__", {}).items()}
        shapes = {key: tuple(map(int, entry["shape"])) for key, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, ArithmeticError):
        raise JobFailure(f"broken checkpoint: the header of {name} can't be read") from None
    if 8 + length + end != size:
        raise JobFailure(
            f"broken checkpoint: {name} has {size} bytes where its header tells of"
            f" {8 + length + end}; it was cut off or changed on the way, upload it again"
        )
    return Header(shapes, metadata)


MOST = 100_000
"""No size in a Stable Diffusion 1.x config is larger; its vocabulary has 49,408 words."""
_COUNTS = {"layers_per_block", "transformer_layers_per_block", "num_hidden_layers"}
"""What building a model loops over; everything else is settled by the shapes of the tensors."""

_UNET = "model.diffusion_model."


def recognise(header: Header) -> str | None:
    """What the file is, in words; None for a Stable Diffusion 1.x checkpoint, which can be run."""
    names = header.shapes.keys()

    def has(part: str) -> bool:
        return any(part in name for name in names)

    def begins(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("lora_down") or has("lora_up") or has("lora_A.") or has("lora.down"):
        return "a LoRA"
    if has("hada_w1") or has("lokr_w"):
        return "a LyCORIS network"
    if begins("control_model.") or has("input_hint_block") or has("controlnet_cond_embedding"):
        return "a ControlNet"
    if begins("emb_params") or begins("string_to_param") or names == {"clip_g", "clip_l"}:
        return "a textual inversion embedding"
    if begins(_UNET + "joint_blocks") or begins("joint_blocks"):
        return "a Stable Diffusion 3 checkpoint"
    if has("double_blocks.0."):
        return "a Flux checkpoint"
    if begins("down_blocks.0."):
        return "a UNet in diffusers' own layout and not a single-file checkpoint"
    vae_prefixes = ("encoder.conv_in.", "decoder.conv_in.", "first_stage_model.")
    if not begins(_UNET) and any(map(begins, vae_prefixes)):
        return "a VAE"
    if not begins(_UNET + "input_blocks.0.0."):
        return "no Stable Diffusion checkpoint"
    if begins("conditioner.embedders.1."):
        return "a Stable Diffusion XL checkpoint"
    if begins("conditioner.embedders.0."):
        return "a Stable Diffusion XL refiner"
    if begins("cond_stage_model.model."):
        return "a Stable Diffusion 2.x checkpoint"
    channels = header.shapes.get(_UNET + "input_blocks.0.0.weight", (0, 4))[1]
    if channels == 9:
        return "a Stable Diffusion inpainting checkpoint"
    if channels == 8:
        return "an InstructPix2Pix checkpoint"
    return None


def configs_of(header: Header, name: str) -> Configs:
    """The configs in the file's own metadata (`darkroom.config`), else Stable Diffusion 1.5's.

    Tensors tell neither how many heads an attention has nor what the UNet predicts, so a model of
    another size must say it there. Raises JobFailure for a file that this version does not run.
    """
    kind = recognise(header)
    if kind is not None:
        raise JobFailure(f"{name} is {kind}; this version runs Stable Diffusion 1.x checkpoints")
    own = header.metadata.get("darkroom.config")
    if own is None:
        return msgspec.structs.replace(SD15, scheduler={**_NOISE_SCHEDULE, **_prediction(header)})
    try:
        configs = msgspec.json.decode(own, type=Configs)
    except msgspec.DecodeError as error:
        raise JobFailure(f"broken checkpoint: darkroom.config in {name}: {error}") from None
    configs = _only_known(configs)
    for config in (configs.unet, configs.vae, configs.text_encoder):
        for key, value in config.items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number > MOST for number in numbers):
                raise JobFailure(f"broken checkpoint: darkroom.config in {name}: {key} is too much")
        for key in _COUNTS & config.keys():
            counts = config[key] if isinstance(config[key], list) else [config[key]]
            if not all(isinstance(count, int) and 1 <= count <= 64 for count in counts):
                raise JobFailure(f"broken checkpoint: darkroom.config in {name}: {key} is too much")
    return configs


_ALSO_KNOWN = {
    "unet": {
        "act_fn",
        "center_input_sample",
        "downsample_padding",
        "flip_sin_to_cos",
        "freq_shift",
        "mid_block_scale_factor",
        "only_cross_attention",
        "use_linear_projection",
    },
    "vae": {"act_fn", "force_upcast"},
    "text_encoder": {"attention_dropout", "initializer_factor", "initializer_range"},
}


def _only_known(configs: Configs) -> Configs:
    """Without any key that SD 1.x does not need: some make the libraries look for code."""
    kept = {
        part: {
            key: value
            for key, value in getattr(configs, part).items()
            if key in getattr(SD15, part) or key in known
        }
        for part, known in _ALSO_KNOWN.items()
    }
    return msgspec.structs.replace(configs, **kept)


def noise_schedule(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's config that belongs to the model and not to a sampler."""
    return {key: scheduler.get(key, value) for key, value in _NOISE_SCHEDULE.items()}


def _prediction(header: Header) -> dict[str, str]:
    told = header.metadata.get("modelspec.prediction_type", "")
    predicts_v = told in ("v", "v_prediction") or "v_pred" in header.shapes
    return {"prediction_type": "v_prediction" if predicts_v else "epsilon"}
