"""Small files of weights: whole and harmless, of a given type and size; and files on this disk as
jobs name them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from shared.contracts.inference import RunJob, UsedModel

TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "Stable-diffusion": {"model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)},
    "Lora": {"lora_unet_mid_block_attentions_0_attn2_to_k.lora_down.weight": (4, 768)},
    "VAE": {"decoder.conv_in.weight": (4, 4, 3, 3)},
    "ControlNet": {"input_hint_block.0.weight": (4, 3, 3, 3)},
    "embeddings": {"emb_params": (2, 768)},
    "FaceRestoration": {
        "toRGB.0.weight": (3, 4, 1, 1),
        "stylegan_decoder.style_mlp.1.weight": (4, 4),
    },
    "Upscaler": {},
}
"""What makes a file one of a type."""
HEADER = 1024
"""Bytes."""


def content(size: int, seed: str = "") -> bytes:
    """Bytes that differ from block to block."""
    start = hashlib.sha256(seed.encode()).digest()
    blocks = (start[:24] + number.to_bytes(8, "big") for number in range(size // 32 + 1))
    return b"".join(blocks)[:size]


def weights(type_: str, size: int = 16_384, seed: str = "") -> bytes:
    """A safetensors file of that many bytes in all."""
    entries, length = entries_of(type_, size)
    return with_header(entries, content(length, seed))


def entries_of(type_: str, size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of that many bytes in all, and how many of them follow it."""
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in TENSORS[type_].items():
        length = 2
        for side in shape:
            length *= side
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": (at, at + length)}
        at += length
    rest = size - 8 - HEADER - at
    assert rest > 0, "too small for its header"
    entries["filler"] = {"dtype": "U8", "shape": (rest,), "data_offsets": (at, at + rest)}
    return entries, at + rest


def with_header(entries: Any, data: bytes, length: int = HEADER) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", max(length, len(text))) + text.ljust(length) + data


def used(path: Path, type_: str = "Stable-diffusion", name: str = "") -> UsedModel:
    """A file on this disk as the model of a job."""
    return UsedModel(type=type_, name=name or path.name, checkpoint_id=name, key=str(path))


def files_of(job: RunJob) -> dict[str, Path]:
    """Where the models of such a job lie, as an engine is told."""
    return {model.content: Path(model.key) for model in job.models}
