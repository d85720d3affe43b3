"""Renames diffusers and transformers weights to the layout of the original SD 1.x checkpoints.

It is the inverse of `diffusers.loaders.single_file_utils`, for any number of blocks and layers. The
original layout counts a UNet's blocks through (`input_blocks.0` to `output_blocks.N`) and lists the
VAE decoder's levels from the output side.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_RESNET_NAMES = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION_NAMES = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    raise KeyError(f"no place for {name!r} in the original layout")


def _unet_block_names(levels: int, layers: int, up_block_types: Sequence[str]) -> dict[str, str]:
    names = dict(_UNET_NAMES)
    for level in range(levels):
        first = (layers + 1) * level
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for layer in range(layers):
            names[f"{down}.resnets.{layer}."] = f"input_blocks.{first + layer + 1}.0."
            names[f"{down}.attentions.{layer}."] = f"input_blocks.{first + layer + 1}.1."
        names[f"{down}.downsamplers.0.conv."] = f"input_blocks.{first + layers + 1}.0.op."
        for layer in range(layers + 1):
            names[f"{up}.resnets.{layer}."] = f"output_blocks.{first + layer}.0."
            names[f"{up}.attentions.{layer}."] = f"output_blocks.{first + layer}.1."
        place = 2 if "CrossAttn" in up_block_types[level] else 1
        names[f"{up}.upsamplers.0."] = f"output_blocks.{first + layers}.{place}."
    return names


def unet_to_ldm(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    blocks = _unet_block_names(
        len(config["block_out_channels"]), config["layers_per_block"], config["up_block_types"]
    )
    renamed = {}
    for name, tensor in state.items():
        resnet = re.match(r"(.*\.resnets\.\d+\.)(.*)", name)
        if resnet:
            name = resnet[1] + _replace_prefix(resnet[2], _RESNET_NAMES)
        renamed["model.diffusion_model." + _replace_prefix(name, blocks)] = tensor
    return renamed


def vae_to_ldm(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    last = len(config["block_out_channels"]) - 1
    renamed = {}
    for name, tensor in state.items():
        attention = re.match(r"(.*)\.mid_block\.attentions\.0\.(.*)", name)
        if attention:
            name = f"{attention[1]}.mid.attn_1." + _replace_prefix(
                attention[2], _VAE_ATTENTION_NAMES
            )
            if tensor.ndim == 2:  # 1x1 convolutions there, matrices here
                tensor = tensor[:, :, None, None]
        name = re.sub(r"\.mid_block\.resnets\.0\.", ".mid.block_1.", name)
        name = re.sub(r"\.mid_block\.resnets\.1\.", ".mid.block_2.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
        for level in range(last + 1):
            old, new = f".up_blocks.{level}.", f".up.{last - level}."
            name = name.replace(f"{old}resnets.", f"{new}block.")
            name = name.replace(f"{old}upsamplers.0.", f"{new}upsample.")
        name = name.replace("conv_norm_out.", "norm_out.")
        name = name.replace("conv_shortcut.", "nin_shortcut.")
        renamed["first_stage_model." + name] = tensor
    return renamed


def text_encoder_to_ldm(state: State, positions: int) -> dict[str, Tensor]:
    prefix = "cond_stage_model.transformer.text_model."
    renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed[prefix + "embeddings.position_ids"] = torch.arange(positions)[None]
    return renamed
