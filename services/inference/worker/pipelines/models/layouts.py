"""diffusers' and transformers' names of tensors -> their names in the original, single files.

The original layout counts a UNet's blocks through (`input_blocks.0` to `output_blocks.N`) and lists
the levels of a VAE's decoder from the output side. OpenCLIP keeps query, key and value in one
matrix. One direction serves for all: to find a tensor in a file, to write such files (the demo
model, tests), and to know what a LoRA means by `lora_unet_input_blocks_4_1_…`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor


class Source(msgspec.Struct, frozen=True):
    """Where a tensor lies in a file: the whole of `name`, or a third of it (query, key or value:
    0 to 2), or its transpose."""

    name: str
    third: int | None = None
    transposed: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


SourceOf = Callable[[str], Source]
"""diffusers' name -> where it lies. Raises KeyError for a name that has no place there."""

UNET, VAE, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."

_UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "time_embedding.cond_proj.": "time_embed.cond_proj.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Prefixes of a UNet's or ControlNet's modules: `down_blocks.0.resnets.0.` ->
    `input_blocks.1.0.`"""
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    up_types: Sequence[str] = config.get("up_block_types", ())
    names = dict(_UNET_NAMES)
    for level in range(levels):
        first = (layers + 1) * level
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for layer in range(layers):
            names[f"{down}.resnets.{layer}."] = f"input_blocks.{first + layer + 1}.0."
            names[f"{down}.attentions.{layer}."] = f"input_blocks.{first + layer + 1}.1."
        names[f"{down}.downsamplers.0.conv."] = f"input_blocks.{first + layers + 1}.0.op."
        if not up_types:
            continue
        for layer in range(layers + 1):
            names[f"{up}.resnets.{layer}."] = f"output_blocks.{first + layer}.0."
            names[f"{up}.attentions.{layer}."] = f"output_blocks.{first + layer}.1."
        place = 2 if "CrossAttn" in up_types[level] else 1
        names[f"{up}.upsamplers.0."] = f"output_blocks.{first + layers}.{place}."
    return names


def unet_module(name: str, blocks: Mapping[str, str]) -> str:
    """The original name of a module or tensor of a UNet, without the prefix of the model."""
    resnet = re.match(r"(.*\.resnets\.\d+\.)(\w+)(.*)", name)
    if resnet:
        name = resnet[1] + _RESNET_NAMES[resnet[2]] + resnet[3]
    return _replace_prefix(name, blocks)


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old) or name == old.removesuffix("."):
            return (new + name[len(old) :]).removesuffix(".")
    raise KeyError(f"no place for {name!r} in the original layout")


def unet_sources(config: Mapping[str, Any], prefix: str = UNET) -> SourceOf:
    blocks = unet_blocks(config)
    return lambda name: Source(prefix + unet_module(name, blocks))


def controlnet_sources(config: Mapping[str, Any], prefix: str = CONTROL) -> SourceOf:
    blocks = unet_blocks({**config, "up_block_types": ()})
    last = 2 * (2 * (len(config["conditioning_embedding_out_channels"]) - 1) + 1)

    def source_of(name: str) -> Source:
        hint = re.match(
            r"controlnet_cond_embedding\.(?:blocks\.(\d+)|(conv_in)|conv_out)\.(.*)", name
        )
        if hint:
            place = 2 * (int(hint[1]) + 1) if hint[1] else 0 if hint[2] else last
            return Source(f"{prefix}input_hint_block.{place}.{hint[3]}")
        zero = re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name)
        if zero:
            return Source(f"{prefix}zero_convs.{zero[1]}.0.{zero[2]}")
        if name.startswith("controlnet_mid_block."):
            return Source(f"{prefix}middle_block_out.0.{name.rpartition('.')[2]}")
        return Source(prefix + unet_module(name, blocks))

    return source_of


_VAE_ATTENTION_NAMES = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def vae_sources(config: Mapping[str, Any], prefix: str = VAE) -> SourceOf:
    last = len(config["block_out_channels"]) - 1

    def source_of(name: str) -> Source:
        attention = re.match(r"(.*)\.mid_block\.attentions\.0\.(.*)", name)
        if attention:
            inner = _replace_prefix(attention[2], _VAE_ATTENTION_NAMES)
            name = f"{attention[1]}.mid.attn_1.{inner}"
        name = re.sub(r"\.mid_block\.resnets\.0\.", ".mid.block_1.", name)
        name = re.sub(r"\.mid_block\.resnets\.1\.", ".mid.block_2.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
        for level in range(last + 1):
            old, new = f".up_blocks.{level}.", f".up.{last - level}."
            name = name.replace(f"{old}resnets.", f"{new}block.")
            name = name.replace(f"{old}upsamplers.0.", f"{new}upsample.")
        name = name.replace("conv_norm_out.", "norm_out.")
        return Source(prefix + name.replace("conv_shortcut.", "nin_shortcut."))

    return source_of


def clip_sources(prefix: str) -> SourceOf:
    """Of OpenAI's CLIP as transformers has always named it."""
    return lambda name: Source(f"{prefix}text_model.{name.removeprefix('text_model.')}")


_OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER_NAMES = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def open_clip_sources(prefix: str) -> SourceOf:
    def source_of(name: str) -> Source:
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            return Source(f"{prefix}text_projection", transposed=True)
        if name in _OPEN_CLIP_NAMES:
            return Source(prefix + _OPEN_CLIP_NAMES[name])
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
        if not layer:
            raise KeyError(f"no place for {name!r} in the original layout")
        block = f"{prefix}transformer.resblocks.{layer[1]}."
        part = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
        if part:
            return Source(f"{block}attn.in_proj_{part[2]}", "qkv".index(part[1]))
        return Source(block + _replace_prefix(layer[2], _OPEN_CLIP_LAYER_NAMES))

    return source_of


def to_original(state: Mapping[str, Tensor], source_of: SourceOf) -> dict[str, Tensor]:
    """A component's tensors as an original file holds them: the other way round."""
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for name, tensor in state.items():
        source = source_of(name)
        if source.third is not None:
            thirds.setdefault(source.name, [None] * 3)[source.third] = tensor
            continue
        if ".mid.attn_1." in source.name and tensor.ndim == 2:  # 1x1 convolutions there
            tensor = tensor[:, :, None, None]
        tensors[source.name] = (tensor.T if source.transposed else tensor).contiguous()
    for name, parts in thirds.items():
        tensors[name] = torch.cat([part for part in parts if part is not None])
    return tensors
