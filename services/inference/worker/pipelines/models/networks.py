"""Networks that change a checkpoint's weights: LoRA, LoCon, LoHa, LoKr, IA3 and full differences,
any of them with DoRA.

What a network adds to a weight is computed once and put into it; the weights as they were are kept
and put back, bit for bit, when the next job wears something else. Steps then cost what they cost
without networks. The forms are those of kohya's scripts, LyCORIS, diffusers and PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import is_out_of_memory
from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.components import TextEncoder
from services.inference.worker.pipelines.models.embeddings import Embedding
from services.inference.worker.pipelines.models.files import ModelFile
from shared.weights.headers import Header
from shared.weights.kinds import network_family, recognise

MOST_ON_THE_WAY = 64
"""Times the numbers of a weight that may be computed on the way to what is added to it. A rank of
128 on a convolution of few channels needs some 30."""

Parts = dict[str, Tensor]
"""What a network has for one module: `lora_down.weight`, `alpha`, …"""

_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te_", "te1"),
    ("oft_unet_", "unet"),
    ("unet.", "unet"),
    ("text_encoder_2.", "te2"),
    ("text_encoder.", "te1"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
)
_PEFT = "base_model.model."
"""What PEFT puts before the names of a model's modules, with or without a prefix before it."""
_OF_TEXT_ENCODERS = ("text_model.", "encoder.layers.")
_OF_UNETS = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|input_blocks"
    r"|middle_block|output_blocks|time_embed|label_emb|out)\."
)
_COMMON = {"alpha", "scale", "diff_b", "b_norm"}
_NUMBERS = {"alpha", "scale", "on_input"}
_DORA = {"dora_scale", "lora_magnitude_vector"}
_FORMS: tuple[tuple[set[str], set[str]], ...] = (
    ({"lora_up.weight", "lora_down.weight"}, {"lora_mid.weight"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    ({"lokr_w1", "lokr_w2"}, set()),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, set()),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2"}),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2"}),
    ({"weight"}, {"on_input"}),
    ({"diff"}, set()),
    ({"w_norm"}, set()),
)
"""What each form of network has for a module, and what it may have besides."""
_UNKNOWN_HERE = {"oft_blocks": "OFT", "oft_diag": "OFT", "a1.weight": "GLoRA"}
_KNOWN_PARTS = _COMMON | _DORA | set().union(*(one | more for one, more in _FORMS))
_SPELLINGS = (
    (re.compile(r"lora(_A|\.down|_linear_layer\.down)(\.\w+)?\.weight"), "lora_down.weight"),
    (re.compile(r"lora(_B|\.up|_linear_layer\.up)(\.\w+)?\.weight"), "lora_up.weight"),
    (re.compile(r"lora_magnitude_vector(\.\w+){0,2}"), "lora_magnitude_vector"),
)
"""How diffusers and PEFT call the parts of kohya's files; with the name of an adapter, or not."""
_PART_OF_PROCESSOR = re.compile(r"(.*)\.processor\.(to_\w+)_lora\.(down|up)\.weight")
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\..+|clip_l|clip_g|emb_params)")
"""An embedding that comes with a network: its word, and what a file of it would have."""


class NetworkFile:
    """One network. `modules`: what it has for which module. `unknown`: its tensors of which nothing
    is known here.

    Raises JobFailure for a file that is none, or of a form that is not known here."""

    def __init__(self, file: ModelFile) -> None:
        kind = recognise(file.header)
        if kind.type != "Lora":
            raise JobFailure(f"{file.name} is {kind.title}; a LoRA is needed here")
        self.file = file
        self.family = network_family(file.header)
        self.modules: dict[str, Parts] = {}
        self.unknown: list[str] = []
        self._bundled: dict[str, Parts] = {}
        for key, tensor in file.read().items():
            bundled, place = _BUNDLED.fullmatch(key), _place(key)
            if bundled:
                self._bundled.setdefault(bundled[1], {})[bundled[2]] = tensor
                continue
            if place is None:
                self.unknown.append(key)
                continue
            module, part = place
            if part in self.modules.setdefault(module, {}):
                raise JobFailure(f"{file.name} has the {part} of {module} twice")
            self.modules[module][part] = tensor
        self._check_forms()

    def _check_forms(self) -> None:
        name = self.file.name
        useless = [
            (module, part) for module, parts in self.modules.items() for part in _useless(parts)
        ]
        for _, part in useless:
            if part in _UNKNOWN_HERE:
                raise JobFailure(
                    f"{name} is a network of the form {_UNKNOWN_HERE[part]}, which is not known"
                    f" here; {_KNOWN_FORMS} are"
                )
        if useless:
            module, part = useless[0]
            raise JobFailure(
                f"{name} is incomplete or of a form that is not known here ({_KNOWN_FORMS} are):"
                f" {len(useless)} of its tensors have no use, the {part} of {module} among them"
            )
        for module, parts in self.modules.items():
            for part, tensor in parts.items():
                if part in _NUMBERS:
                    if tensor.numel() != 1 or tensor.is_complex():
                        raise JobFailure(f"{name}: the {part} of {module} is not one number")
                elif not tensor.is_floating_point():
                    raise JobFailure(
                        f"{name}: the {part} of {module} is in {str(tensor.dtype)[6:]} and not in"
                        " floating point numbers"
                    )

    def embedding(self, word: str, name: str) -> Embedding:
        """One that it brings with it. `name`: for the reason. Raises JobFailure for what is no
        embedding."""
        return Embedding(self._bundled[word], name, (self.file.identity(), word))

    def tensors(self) -> list[Tensor]:
        held = (*self.modules.values(), *self._bundled.values())
        return [tensor for parts in held for tensor in parts.values()]


def bundled_words(header: Header) -> list[str]:
    """The words of the embeddings that a network brings with it."""
    found = (_BUNDLED.fullmatch(name) for name in header.tensors)
    return list(dict.fromkeys(match[1] for match in found if match))


_KNOWN_FORMS = "LoRA, LoCon, LoHa, LoKr, IA3, full differences, and DoRA on them"


def _useless(parts: Parts) -> set[str]:
    """What nothing can be done with: all that does not belong to the form that is complete."""
    for required, optional in _FORMS:
        if required <= parts.keys():
            return parts.keys() - required - optional - _COMMON - _one_of(_DORA, parts)
    return parts.keys() - _COMMON


def _one_of(names: set[str], parts: Parts) -> set[str]:
    there = names & parts.keys()
    return there if len(there) == 1 else set()


def _place(key: str) -> tuple[str, str] | None:
    """`lora_unet_mid_block_…_to_q.lora_down.weight` -> (`unet:mid_block_…_to_q`, part); None where
    it is of no model that is known here."""
    processor = _PART_OF_PROCESSOR.fullmatch(key)
    if processor:
        target = "to_out.0" if processor[2] == "to_out" else processor[2]
        key = f"{processor[1]}.{target}.lora.{processor[3]}.weight"
    component, path = next(
        ((name, key.removeprefix(prefix)) for prefix, name in _PREFIXES if key.startswith(prefix)),
        ("", key),
    )
    path = path.removeprefix(_PEFT)
    if not component:
        component = "unet" if _OF_UNETS.match(path) else ""
        component = "te1" if path.startswith(_OF_TEXT_ENCODERS) else component
    if not component:
        return None
    module, part = _split(path)
    module = module.replace(".", "_")
    if component != "unet" and not module.startswith("text_model_"):
        module = f"text_model_{module}"
    return f"{component}:{module}", part


def _split(path: str) -> tuple[str, str]:
    """The module and its part. Modules have dots in most layouts, and parts as well: so a part is
    the longest end that is known, else what follows the first dot."""
    pieces = path.split(".")
    for number in range(1, len(pieces)):
        module, part = ".".join(pieces[:number]), ".".join(pieces[number:])
        for spelling, name in _SPELLINGS:
            if spelling.fullmatch(part):
                return module, name
        plain = part == "weight" and number > 1  # a whole weight, and none of IA3's
        if (part in _KNOWN_PARTS and not plain) or part in _UNKNOWN_HERE:
            return module, part
    module, _, part = path.partition(".")
    return module, part


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
                for change in added:  # one after the other: some go by what they are put on
                    wide = wide + change(wide)
                parameter.data = wide.to(bare.dtype)
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
    if not parts.keys() - _COMMON:
        return None

    def change(bare: Tensor) -> Tensor:
        wide = {part: tensor.to(bare.device, torch.float32) for part, tensor in parts.items()}
        try:
            if _largest(wide) > MOST_ON_THE_WAY * max(bare.numel(), 1024):
                raise ValueError("small factors of something far larger than the weight")
            delta = _fitted(_delta(wide, bare) * _scale(parts), shape)
            return _decomposed(bare, delta, wide) if _DORA & wide.keys() else delta
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise JobFailure(
                f"{file} does not fit the checkpoint: {module} is of another size there"
            ) from error

    return change


def _fitted(delta: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In the shape of the weight. The first convolution of an inpainting checkpoint also sees a
    mask and a picture: a network for one that does not leaves these alone, as in the webui."""
    if len(shape) == 4 and shape[1] == 9 and delta.numel() * 9 == math.prod(shape) * 4:
        return pad(delta.reshape(shape[0], 4, *shape[2:]), (0, 0, 0, 0, 0, 5))
    if delta.shape[0] != shape[0]:
        raise ValueError("another number of rows")
    return delta.reshape(shape)


def _decomposed(bare: Tensor, delta: Tensor, parts: Parts) -> Tensor:
    """What DoRA adds, https://arxiv.org/abs/2402.09353: the changed weight gets the magnitudes that
    were learned. PEFT has one for each output, and LyCORIS too if it says so by its shape; the
    first files, which are those that the webui reads, have one for each input: (1, inputs, 1, 1)"""
    if bare.ndim < 2:
        raise ValueError("a vector has no direction for each of its numbers")
    merged = bare + delta
    inputs = "dora_scale" in parts and parts["dora_scale"].shape[:2] == (1, *bare.shape[1:2])
    axis = 1 if inputs else 0
    learned = parts["dora_scale"] if "dora_scale" in parts else parts["lora_magnitude_vector"]
    others = [dim for dim in range(bare.ndim) if dim != axis]
    length = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
    scale: Tensor = learned.reshape(length.shape) / length.clamp(min=torch.finfo(length.dtype).eps)
    return merged * scale - bare


def _bias_change(parts: Parts, file: str, module: str, shape: tuple[int, ...]) -> Change | None:
    for part in ("diff_b", "b_norm"):
        if part in parts:
            if tuple(parts[part].shape) != shape:
                raise JobFailure(
                    f"{file} does not fit the checkpoint: {module} is of another size there"
                )
            return lambda bare, part=part: parts[part].to(bare.device, torch.float32)  # type: ignore[misc]
    return None


def _largest(parts: Parts) -> int:
    """How many numbers the largest tensor has that is computed of a network's factors on the way to
    what it adds to a weight: a file of a few megabytes can ask for terabytes."""
    if "lora_down.weight" in parts:
        return _product_size(
            parts.get("lora_mid.weight"),
            parts["lora_up.weight"].flatten(1),
            parts["lora_down.weight"].flatten(1),
        )
    if "hada_w1_a" in parts:
        return max(_core_size(parts, f"hada_t{n}", f"hada_w{n}") for n in (1, 2))
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        sizes = [
            parts[name].numel() if name in parts else _core_size(parts, f"lokr_t{n}", name)
            for n, name in ((1, "lokr_w1"), (2, "lokr_w2"))
        ]
        return math.prod(sizes)
    return 0


def _core_size(parts: Parts, core: str, factors: str) -> int:
    a, b = parts[f"{factors}_a"], parts[f"{factors}_b"]
    return _product_size(parts.get(core), a if core not in parts else a.T, b)


def _product_size(core: Tensor | None, left: Tensor, right: Tensor) -> int:
    """Of `left @ right`, with a `core` (left's columns, right's rows, …) between them if there is
    one, whichever of its two sides is computed first."""
    rows, columns = left.shape[0], right.shape[1]
    if core is None:
        return rows * columns
    inner = core[0, 0].numel()
    return inner * max(rows * columns, rows * core.shape[1], core.shape[0] * columns)


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
        if one.shape != two.shape:
            raise ValueError("two factors of different sizes")
        return one * two
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        return _kronecker(_lokr_factor(parts, 1), _lokr_factor(parts, 2))
    if "weight" in parts:
        sides = [1] * bare.ndim
        on_input = "on_input" in parts and bool(parts["on_input"])
        sides[1 if on_input else 0] = -1
        return bare * parts["weight"].reshape(sides)
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
    ("lokr_w2_b", 0),
    ("lokr_w1_b", 0),
)


def _scale(parts: Parts) -> float:
    """alpha / rank; 1 where a network tells neither."""
    if "scale" in parts:
        return float(parts["scale"])
    rank = next((parts[part].shape[axis] for part, axis in _RANK_OF if part in parts), None)
    if "alpha" not in parts or not rank:
        return 1.0
    return float(parts["alpha"]) / rank
