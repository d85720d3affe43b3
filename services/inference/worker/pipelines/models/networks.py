"""Networks that change a checkpoint's weights: LoRA, LoCon, LoHa, LoKr, IA3 and full differences.

What a network adds to a weight is computed once and put into it; the weights as they were are kept
and put back, bit for bit, when the next job wears something else. Steps then cost what they cost
without networks. The forms are those of kohya's scripts, LyCORIS, diffusers and PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import is_out_of_memory
from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.components import TextEncoder
from services.inference.worker.pipelines.models.files import ModelFile
from shared.weights.kinds import network_family, recognise

Parts = dict[str, Tensor]
"""What a network has for one module: `lora_down.weight`, `alpha`, …"""

_KOHYA = (("lora_unet_", "unet"), ("lora_te1_", "te1"), ("lora_te2_", "te2"), ("lora_te_", "te1"))
_DIFFUSERS = (
    ("unet.", "unet"),
    ("text_encoder_2.", "te2"),
    ("text_encoder.", "te1"),
    ("base_model.model.", "unet"),
)
_RENAMED_PARTS = {
    "lora_A.weight": "lora_down.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora.down.weight": "lora_down.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
}
_PART_OF_PROCESSOR = re.compile(r"(.*)\.processor\.(to_\w+)_lora\.(down|up)\.weight")
_UNKNOWN_HERE = {"dora_scale": "DoRA", "oft_blocks": "OFT", "oft_diag": "OFT", "a1.weight": "GLoRA"}


class NetworkFile:
    """One network: what it has for which module. Raises JobFailure for a file that is none."""

    def __init__(self, file: ModelFile) -> None:
        kind = recognise(file.header)
        if kind.type != "Lora":
            raise JobFailure(f"{file.name} is {kind.title}; a LoRA is needed here")
        self.file = file
        self.family = network_family(file.header)
        self.modules: dict[str, Parts] = {}
        for key, tensor in file.read().items():
            place = _place(key)
            if place is not None:
                module, part = place
                self.modules.setdefault(module, {})[part] = tensor
        for parts in self.modules.values():
            for sign, what in _UNKNOWN_HERE.items():
                if sign in parts:
                    raise JobFailure(
                        f"{file.name} is a network of the form {what}, which is not known here;"
                        " LoRA, LoCon, LoHa, LoKr, IA3 and full differences are"
                    )

    def tensors(self) -> list[Tensor]:
        return [tensor for parts in self.modules.values() for tensor in parts.values()]


def _place(key: str) -> tuple[str, str] | None:
    """`lora_unet_mid_block_…_to_q.lora_down.weight` -> (`unet:mid_block_…_to_q`, part)."""
    for prefix, component in _KOHYA:
        if key.startswith(prefix):
            module, _, part = key.removeprefix(prefix).partition(".")
            return f"{component}:{module}", part
    processor = _PART_OF_PROCESSOR.fullmatch(key)
    if processor:
        target = "to_out.0" if processor[2] == "to_out" else processor[2]
        key = f"{processor[1]}.{target}.lora.{processor[3]}.weight"
    for prefix, component in _DIFFUSERS:
        if not key.startswith(prefix):
            continue
        path = key.removeprefix(prefix)
        for ending, part in (*_RENAMED_PARTS.items(), ("alpha", "alpha")):
            if path.endswith(f".{ending}"):
                module = path.removesuffix(f".{ending}")
                if component != "unet":
                    module = f"text_model.{module.removeprefix('text_model.')}"
                return f"{component}:{module.replace('.', '_')}", part
    return None


class Worn(msgspec.Struct, frozen=True, eq=False):
    """A network, what the job calls it, and how strongly it acts."""

    network: NetworkFile
    name: str
    text_weight: float
    unet_weight: float

    @property
    def key(self) -> tuple[object, ...]:
        return (self.network.file.identity(), self.text_weight, self.unet_weight)


class Wardrobe:
    """The networks that a checkpoint wears. Its key tells which weights are in place."""

    def __init__(
        self, unet: nn.Module, unet_config: Mapping[str, Any], encoders: Sequence[TextEncoder]
    ) -> None:
        self._targets: dict[str, nn.Module] = {}
        blocks = layouts.unet_blocks(unet_config)
        for name, module in _changeable(unet):
            self._targets["unet:" + name.replace(".", "_")] = module
            original = layouts.unet_module(name, blocks)
            self._targets["unet:" + original.replace(".", "_")] = module
        for number, encoder in enumerate(encoders, 1):
            for name, module in _changeable(encoder.core):
                self._targets[f"te{number}:text_model_{name.replace('.', '_')}"] = module
        self._bare: dict[tuple[nn.Module, str], Tensor] = {}
        self.key: tuple[object, ...] = ()

    def wear(self, worn: Sequence[Worn]) -> None:
        """Puts these on, and takes everything else off. Raises JobFailure for a network that was
        made for another family."""
        key = tuple(one.key for one in worn)
        if key == self.key:
            return
        changes: dict[tuple[nn.Module, str], list[Callable[[Tensor], Tensor]]] = {}
        for one in worn:
            for module, field, change in self._changes(one):
                changes.setdefault((module, field), []).append(change)
        self.take_off()
        try:
            for (module, field), added in changes.items():
                parameter: Tensor = getattr(module, field)
                bare = self._bare[module, field] = parameter.data
                wide = bare.float()
                parameter.data = (wide + sum(change(wide) for change in added)).to(bare.dtype)
        except Exception:
            self.take_off()
            raise
        self.key = key

    def take_off(self) -> None:
        for (module, field), bare in self._bare.items():
            getattr(module, field).data = bare
        self._bare.clear()
        self.key = ()

    def unplaced(self, network: NetworkFile) -> list[str]:
        """Modules that a network changes and that this checkpoint does not have."""
        return [name for name in network.modules if name not in self._targets]

    def _changes(self, worn: Worn) -> Iterable[tuple[nn.Module, str, Callable[[Tensor], Tensor]]]:
        for name, parts in worn.network.modules.items():
            weight = worn.unet_weight if name.startswith("unet:") else worn.text_weight
            module = self._targets.get(name)
            if module is None or not weight:
                continue
            for field, make in (("weight", _weight_change), ("bias", _bias_change)):
                parameter = getattr(module, field, None)
                if parameter is None:
                    continue
                change = make(parts, worn.name, name, tuple(parameter.shape))
                if change is not None:
                    yield module, field, _times(weight, change)


def _times(weight: float, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda bare: weight * change(bare)


def _changeable(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            yield name, module


Change = Callable[[Tensor], Tensor]


def _weight_change(parts: Parts, file: str, module: str, shape: tuple[int, ...]) -> Change | None:
    """What to add to a weight; None if nothing. Raises JobFailure where it does not fit."""
    if not parts.keys() - {"alpha", "scale", "diff_b", "b_norm"}:
        return None

    def change(bare: Tensor) -> Tensor:
        wide = {part: tensor.to(bare.device, torch.float32) for part, tensor in parts.items()}
        try:
            delta = _delta(wide, bare)
            return (delta * _scale(parts)).reshape(shape)
        except (RuntimeError, IndexError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            raise JobFailure(
                f"{file} does not fit the checkpoint: {module} is of another size there"
            ) from error

    return change


def _bias_change(parts: Parts, file: str, module: str, shape: tuple[int, ...]) -> Change | None:
    for part in ("diff_b", "b_norm"):
        if part in parts:
            if tuple(parts[part].shape) != shape:
                raise JobFailure(
                    f"{file} does not fit the checkpoint: {module} is of another size there"
                )
            return lambda bare, part=part: parts[part].to(bare.device, torch.float32)  # type: ignore[misc]
    return None


def _delta(parts: Parts, bare: Tensor) -> Tensor:
    """What a network adds to a weight, before its scale."""
    if "lora_down.weight" in parts:
        return _low_rank(
            parts["lora_up.weight"], parts["lora_down.weight"], parts.get("lora_mid.weight")
        )
    if "hada_w1_a" in parts:
        one, two = (
            _core(parts.get(f"hada_t{n}"), parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"])
            for n in (1, 2)
        )
        return one * two
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        return _kronecker(_lokr_factor(parts, 1), _lokr_factor(parts, 2))
    if "weight" in parts:
        factors = parts["weight"]
        on_input = "on_input" in parts and bool(parts["on_input"])
        return bare * (factors.reshape(1, -1) if on_input else factors.reshape(-1, 1))
    return parts["diff"] if "diff" in parts else parts["w_norm"]


def _low_rank(up: Tensor, down: Tensor, middle: Tensor | None) -> Tensor:
    if middle is not None:
        return torch.einsum("nmkl,in,mj->ijkl", middle, up.flatten(1), down.flatten(1))
    return up.flatten(1) @ down.flatten(1)


def _core(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, or a convolution's core tensor with both multiplied onto it (LyCORIS' "CP")."""
    if core is None:
        return a @ b
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _lokr_factor(parts: Parts, number: int) -> Tensor:
    name = f"lokr_w{number}"
    if name in parts:
        return parts[name]
    return _core(parts.get(f"lokr_t{number}"), parts[f"{name}_a"], parts[f"{name}_b"])


def _kronecker(one: Tensor, two: Tensor) -> Tensor:
    if two.ndim == 4:
        one = one[:, :, None, None]
    return torch.kron(one, two.contiguous())


_RANK_OF = (
    ("lora_down.weight", 0),
    ("hada_w1_b", 0),
    ("lokr_w1_b", 0),
    ("lokr_w2_b", 0),
    ("lokr_t2", 0),
)


def _scale(parts: Parts) -> float:
    """alpha / rank; 1 where a network tells neither."""
    if "scale" in parts:
        return float(parts["scale"])
    rank = next((parts[part].shape[axis] for part, axis in _RANK_OF if part in parts), None)
    if "alpha" not in parts or not rank:
        return 1.0
    return float(parts["alpha"]) / rank
