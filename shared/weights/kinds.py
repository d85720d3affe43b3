"""What a file of weights is, told from the names and shapes in it, whoever named it what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from shared.weights.headers import Header, TensorSpec

SD1, SD2, SDXL, REFINER = "SD 1.x", "SD 2.x", "SDXL", "SDXL refiner"
FAMILIES = (SD1, SD2, SDXL, REFINER)

LONGEST_ALIAS = 255
"""Characters, as of a file's name."""
UNET = "model.diffusion_model."
_XL_TEXT = ("conditioner.embedders.0.", "conditioner.embedders.1.")


FACE_RESTORATION = "FaceRestoration"
GFPGAN, RESTOREFORMER, CODEFORMER = "GFPGAN", "RestoreFormer", "CodeFormer"
"""Families of models that restore faces."""


class Kind(msgspec.Struct, frozen=True, omit_defaults=True):
    """`type`: of the registry's types of checkpoints; empty where it is none of them. `title` says
    it in words. `family` is empty where it is of none, or of one that is not known here. `format`:
    safetensors, pickle or onnx.

    `inpainting`: its UNet is also given a mask and a picture. `precision`: of most of its numbers,
    as fp16; `parameters`: how many there are. `rank`: of most layers of a LoRA. `vectors`: of an
    embedding; `widths`: how wide they are, for each text encoder. `alias`: what its author called a
    LoRA."""

    type: str
    title: str
    family: str = ""
    format: str = ""
    inpainting: bool = False
    precision: str = ""
    parameters: int = 0
    rank: int = 0
    vectors: int = 0
    widths: list[int] = []
    alias: str = ""


def describe(header: Header) -> Kind:
    """All that can be told."""
    kind = recognise(header)
    return msgspec.structs.replace(
        kind,
        format=header.format,
        precision=_precision(header.tensors.values()),
        parameters=header.parameters,
        rank=_rank(header) if kind.type == "Lora" else 0,
        alias=alias_of(header) if kind.type == "Lora" else "",
        **_vectors(header) if kind.type == "embeddings" else {},
    )


def recognise(header: Header) -> Kind:
    """What it is and of which family."""
    for found in (_faces(header), _other_kind(header), _part(header), _embedding(header)):
        if found is not None:
            return found
    if not _begins(header, UNET + "input_blocks.0.0."):
        return Kind("", "no model that is known here")
    first = header.tensors.get(UNET + "input_blocks.0.0.weight")
    channels = first.shape[1] if first and len(first.shape) > 1 else 4
    family = _family(header)
    if family == SD2 and _begins(header, UNET + "label_emb."):
        return Kind("Stable-diffusion", "an SD 2.x unCLIP checkpoint")
    if channels not in (4, 9):
        what = "an InstructPix2Pix" if channels == 8 else f"a {family} ({channels} channels)"
        return Kind("Stable-diffusion", f"{what} checkpoint")
    inpainting = " inpainting" if channels == 9 else ""
    title = f"a {family}{inpainting} checkpoint"
    return Kind("Stable-diffusion", title, family, inpainting=channels == 9)


_OF_NETWORKS = (
    "lora_down",
    "lora_up",
    "lora_A.",
    "lora.down",
    "lora_linear_layer.",
    "hada_w1",
    "lokr_w",
    "oft_blocks",
    "oft_diag",
    ".on_input",
)


def _begins(header: Header, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in header.tensors)


def _has(header: Header, *parts: str) -> bool:
    return any(part in name for name in header.tensors for part in parts)


_OTHER_CONTROLS = {
    "task_embedding": "a ControlNet Union",
    "control_add_embedding": "a ControlNet Union",
    "lora_controlnet": "a Control-LoRA",
    "lllite_": "a ControlNet-LLLite",
    "ip_adapter.": "an IP-Adapter",
    "adapter.body.": "a T2I-Adapter",
}
"""What steers pictures in other ways than a ControlNet, though it may hold all of one."""


def _other_kind(header: Header) -> Kind | None:
    for sign, title in _OTHER_CONTROLS.items():
        if _begins(header, sign, f"control_model.{sign}"):
            return Kind("", f"{title}, which can't be used here yet")
    differences = any(name.endswith((".diff", ".diff_b")) for name in header.tensors)
    if differences or _has(header, *_OF_NETWORKS) or _begins(header, "lora_unet_", "lora_te"):
        family = network_family(header)
        title = f"a LoRA for {family}" if family else "a LoRA"
        return Kind("Lora", title, family if family in FAMILIES else "")
    if _has(header, "input_hint_block", "controlnet_cond_embedding"):
        family = _controlnet_family(header)
        return Kind("ControlNet", f"a ControlNet for {family or 'no family known here'}", family)
    if _begins(header, "emb_params", "string_to_param") or {"clip_g", "clip_l"} <= {
        *header.tensors
    }:
        return Kind("embeddings", "a textual inversion embedding")
    if _begins(header, UNET + "joint_blocks", "joint_blocks"):
        return Kind("Stable-diffusion", "a Stable Diffusion 3 checkpoint")
    if _has(header, "double_blocks.0."):
        return Kind("Stable-diffusion", "a Flux checkpoint")
    if _begins(header, "down_blocks.0.") and _has(header, "attn2"):
        title = "a UNet in diffusers' own layout and not a single-file checkpoint"
        return Kind("Stable-diffusion", title)
    return None


_OF_FACES = {
    GFPGAN: {"toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight"},
    RESTOREFORMER: {"quantize.embedding.weight", "quant_conv.weight", "encoder.conv_in.weight"},
    CODEFORMER: {"quantize.embedding.weight", "position_emb", "encoder.blocks.0.weight"},
}


def _faces(header: Header) -> Kind | None:
    for family, names in _OF_FACES.items():
        if names <= header.tensors.keys():
            return Kind(FACE_RESTORATION, f"a {family} model that restores faces", family)
    return None


def _part(header: Header) -> Kind | None:
    vae = ("encoder.conv_in.", "decoder.conv_in.", "first_stage_model.")
    if not _begins(header, UNET) and _begins(header, *vae):
        return Kind("VAE", "a VAE")
    return None


def _embedding(header: Header) -> Kind | None:
    """A single tensor of a few vectors as wide as a text encoder, whatever it is called."""
    if len(header.tensors) != 1:
        return None
    (spec,) = header.tensors.values()
    if len(spec.shape) in (1, 2) and spec.shape[-1] in _BY_CONTEXT and spec.count <= 75 * 2048:
        return Kind("embeddings", "a textual inversion embedding")
    return None


def _family(header: Header) -> str:
    if _begins(header, _XL_TEXT[1]):
        return SDXL
    if _begins(header, _XL_TEXT[0]):
        return REFINER
    if _begins(header, "cond_stage_model.model."):
        return SD2
    return SD1


_EMBEDDING_WIDTHS = {SD1: [768], SD2: [1024], SDXL: [768, 1280], REFINER: [1280]}
"""The narrowest first."""
_BY_CONTEXT = {768: SD1, 1024: SD2, 2048: SDXL, 1280: REFINER}


def embedding_fits(widths: Iterable[int], families: Iterable[str]) -> bool:
    """Whether an embedding whose vectors are so wide may fit a checkpoint of one of the families;
    those of no known family may fit any."""
    found = sorted(widths)
    fitting = [_EMBEDDING_WIDTHS.get(family) for family in families]
    return found not in _EMBEDDING_WIDTHS.values() or None in fitting or found in fitting


_OTHER_NETWORKS = {
    "double_blocks_": "Flux",
    "double_blocks.": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
}
_WIDTH = re.compile(
    r"(.*attn2[._]to_[kv].*?)\.(?:lora_down|lora_A(?:\.\w+)?|lora\.down|hada_w1_b|diff)(?:\.weight)?"
    r"|(.*attn2\.processor\.to_[kv])_lora\.down\.weight"
)
"""Tensors as wide as the text that an attention looks at."""
_KRONECKER = re.compile(r"(.*attn2[._]to_[kv].*)\.lokr_w1(?:_b)?")
_DEEP = re.compile(r"transformer_blocks[._](\d+)")


def network_family(header: Header) -> str:
    """For what a LoRA was made; empty if it does not tell.

    By the width of the text that its attention looks at, else by its second text encoder or by
    transformers deeper than any but SDXL's. One text encoder alone tells nothing: SD 1.x and SDXL
    share it, and its tensors are called `lora_te1_` in files for either."""
    for sign, family in _OTHER_NETWORKS.items():
        if _has(header, sign):
            return family
    for name, spec in header.tensors.items():
        family = _BY_CONTEXT.get(_context_width(header, name, spec), "")
        if family:
            return family
    deepest = max(
        (int(found) for name in header.tensors for found in _DEEP.findall(name)), default=0
    )
    if _begins(header, "lora_te2_", "text_encoder_2.") or deepest > 3:
        return SDXL
    return ""


def _context_width(header: Header, name: str, spec: TensorSpec) -> int:
    """Of a tensor that tells it; else 0."""
    if len(spec.shape) < 2:
        return 0
    if _WIDTH.fullmatch(name):
        return spec.shape[1]
    kronecker = _KRONECKER.fullmatch(name)
    if kronecker:
        for part in ("lokr_w2", "lokr_w2_b"):
            other = header.tensors.get(f"{kronecker[1]}.{part}")
            if other and len(other.shape) > 1:
                return spec.shape[1] * other.shape[1]
    return 0


def _controlnet_family(header: Header) -> str:
    for name, spec in header.tensors.items():
        if name.endswith("attn2.to_k.weight") and len(spec.shape) > 1:
            return _BY_CONTEXT.get(spec.shape[1], "")
    return ""


_PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def _precision(specs: Iterable[TensorSpec]) -> str:
    counts: Counter[str] = Counter()
    for spec in specs:
        counts[spec.dtype] += spec.count
    if not counts:
        return ""
    (most, _), *_ = counts.most_common(1)
    return _PRECISIONS.get(most, most.lower())


_RANKED = re.compile(
    r".*(lora_down\.weight|lora_A(\.\w+)?\.weight|lora(_linear_layer)?\.down\.weight|hada_w1_b"
    r"|lokr_w2_b)"
)


def _rank(header: Header) -> int:
    """The one that most layers have; 0 for forms without one."""
    ranks = Counter(
        spec.shape[0]
        for name, spec in header.tensors.items()
        if spec.shape and _RANKED.fullmatch(name)
    )
    return ranks.most_common(1)[0][0] if ranks else 0


def alias_of(header: Header) -> str:
    """What its author called a LoRA; empty where it tells none that could be written down."""
    name = header.metadata.get("ss_output_name", "").strip()
    return name if name.isprintable() and len(name) <= LONGEST_ALIAS else ""


def _vectors(header: Header) -> Mapping[str, Any]:
    specs = [spec for spec in header.tensors.values() if len(spec.shape) in (1, 2)]
    if not specs:
        return {}
    count = specs[0].shape[0] if len(specs[0].shape) == 2 else 1
    return {"vectors": count, "widths": [spec.shape[-1] for spec in specs]}
