"""Model files for tests: the demo checkpoint changed, or random weights in the layout of SD 1.x."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.image_models import import_spandrel
from tests.unit.pipelines.easel import DEMO

CONFIGS: dict[str, Any] = {
    "unet": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49_408,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "scheduler": {"prediction_type": "epsilon"},
}
"""Of the random checkpoint."""


def random_tensors() -> dict[str, Tensor]:
    """A whole checkpoint that has learned nothing."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(CONFIGS["unet"])
    vae = AutoencoderKL.from_config(CONFIGS["vae"])
    text_encoder = CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"]))
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("final_layer_norm.bias"):  # the mean that attention restores is not zero
            torch.nn.init.normal_(parameter, mean=0.5)
    text_sources = layouts.clip_sources("cond_stage_model.transformer.")
    return {
        **layouts.to_original(unet.state_dict(), layouts.unet_sources(CONFIGS["unet"])),
        **layouts.to_original(vae.state_dict(), layouts.vae_sources(CONFIGS["vae"])),
        **layouts.to_original(text_encoder.state_dict(), text_sources),
    }


def demo_tensors() -> dict[str, Tensor]:
    return dict(load_file(DEMO))


def demo_configs() -> dict[str, Any]:
    with safe_open(DEMO, framework="pt") as file:
        configs: dict[str, Any] = json.loads(file.metadata()["darkroom.config"])
    return configs


def write(
    path: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, Any] | None = None
) -> Path:
    """`configs` go where a model of another size than the usual one tells them."""
    told = {"darkroom.config": json.dumps(configs)} if configs is not None else {}
    save_file(
        {k: t.contiguous().clone() for k, t in tensors.items()}, path, {"format": "pt", **told}
    )
    return path


def write_random(path: Path) -> Path:
    return write(path, random_tensors(), CONFIGS)


def write_changed(path: Path, name: str, by: float) -> Path:
    """The demo checkpoint with one of its tensors changed everywhere."""
    tensors = demo_tensors()
    tensors[name] = tensors[name] + by
    return write(path, tensors, demo_configs())


def write_vae(path: Path, redder: float = 0.0) -> Path:
    """That of the demo checkpoint, on its own."""
    prefix = layouts.VAE
    tensors = {k.removeprefix(prefix): t for k, t in demo_tensors().items() if k.startswith(prefix)}
    tensors["decoder.conv_out.bias"] += torch.tensor([redder, 0, 0])
    return write(path, tensors)


def write_embedding(path: Path, count: int = 2) -> Path:
    """For the demo checkpoint."""
    vectors = torch.randn(count, 48, generator=torch.Generator().manual_seed(0))
    return write(path, {"emb_params": vectors})


def write_lora(path: Path, strength: float = 1.0, **metadata: str) -> Path:
    """For the demo checkpoint: a layer of its text encoder and one of its UNet."""
    torch.manual_seed(0)
    tensors = {}
    for module, width in (
        ("lora_te_text_model_encoder_layers_0_mlp_fc2", (48, 192)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", (96, 96)),
    ):
        tensors[f"{module}.lora_up.weight"] = torch.randn(width[0], 2) * strength
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, width[1]) * strength
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, {"format": "pt", **metadata})
    return path


def write_controlnet_names(path: Path) -> Path:
    """What tells a ControlNet for SD 1.x, and nothing else of it: enough for a plan."""
    names = {"input_hint_block.0.weight": (4, 3), "middle_block.1.attn2.to_k.weight": (4, 768)}
    return write(path, {f"control_model.{name}": torch.zeros(s) for name, s in names.items()})


def esrgan_tensors(scale: int = 4) -> dict[str, Tensor]:
    """One block with a few filters, that adds some noise of its own."""
    architecture = import_spandrel().architectures.ESRGAN.ESRGAN
    torch.manual_seed(0)
    return dict(architecture(num_filters=8, num_blocks=1, scale=scale).state_dict())


def compact_tensors(scale: int = 2, channels: int = 3) -> dict[str, Tensor]:
    """Repeats each pixel, and adds what a few random convolutions say."""
    architecture = import_spandrel().architectures.Compact.Compact
    torch.manual_seed(0)
    network = architecture(
        num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale
    )
    return dict(network.state_dict())


GFPGAN_SIZE = {"narrow": 1 / 32, "num_style_feat": 16, "num_mlp": 2}
"""Of one that draws a face in a third of a second; spandrel knows one size only."""


def gfpgan_tensors() -> dict[str, Tensor]:
    architecture = import_spandrel().architectures.GFPGAN.GFPGAN
    torch.manual_seed(0)
    return dict(architecture(**GFPGAN_SIZE).state_dict())


def write_brightness(path: Path) -> Path:
    """An ONNX model in the form of U²-Net that finds what is bright: the mean of the colors."""
    axes = _message((1, "axes"), (8, 1), (20, 7))
    node = _message((1, "picture"), (2, "mean"), (4, "ReduceMean"), (5, axes))
    graph = _message(
        (1, node),
        (2, "brightness"),
        (11, _floats("picture", 1, 3, 320, 320)),
        (12, _floats("mean", 1, 1, 320, 320)),
    )
    path.write_bytes(_message((1, 7), (7, graph), (8, _message((2, 13)))))
    return path


def _floats(name: str, *shape: int) -> bytes:
    """ONNX's ValueInfoProto."""
    sizes = [(1, _message((1, size))) for size in shape]
    tensor = _message((1, 1), (2, _message(*sizes)))
    return _message((1, name), (2, _message((1, tensor))))


def _message(*fields: tuple[int, bytes | str | int]) -> bytes:
    """In the encoding of protobuf: whole numbers, and everything else with its length."""
    packed = b""
    for number, value in fields:
        if isinstance(value, int):
            packed += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            packed += _varint(number << 3 | 2) + _varint(len(data)) + data
    return packed


def _varint(number: int) -> bytes:
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    return bytes([*packed, number])
