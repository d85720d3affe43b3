"""UNets compiled ahead for the shapes that a deployment renders most (torch.compile, CUDA graphs).

What is compiled takes the weights as arguments, so all checkpoints of a family share it. A batch
with fewer rows is filled up to the compiled number; any other shape runs as it always does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor

from services.inference.worker.pipelines.models.components import Place
from services.inference.worker.pipelines.models.families import STANDARD, Configs
from shared.logs import get_logger
from shared.weights.kinds import REFINER, SD1, SD2, SDXL

log = get_logger(__name__)

NAMES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "refiner": REFINER}
TOKENS = 77


class Shape(msgspec.Struct, frozen=True):
    """`rows`: of a batch; a picture has two, with its negative prompt. Sides in pixels."""

    family: str
    width: int
    height: int
    rows: int


def parse_shapes(text: str) -> list[Shape]:
    """`sd1:512x512:2 sdxl:1024x1024:2`. Raises ValueError that says what is wrong."""
    shapes = []
    for word in text.split():
        try:
            name, size, rows = word.split(":")
            width, height = map(int, size.split("x"))
            shape = Shape(NAMES[name], width, height, int(rows))
        except (ValueError, KeyError):
            known = ", ".join(NAMES)
            raise ValueError(
                f"{word!r} is no shape such as sd1:512x512:2; families are {known}"
            ) from None
        if width % 8 or height % 8 or shape.rows < 1:
            raise ValueError(f"{word!r}: sides are multiples of 8, rows at least 1")
        shapes.append(shape)
    return sorted(shapes, key=lambda shape: shape.rows)


class CompiledUNets:
    def __init__(
        self,
        shapes: Sequence[Shape],
        place: Place,
        configs: dict[str, Configs] = STANDARD,
        **options: Any,
    ) -> None:
        """`options`: of torch.compile, such as `mode` and `backend`."""
        self._shapes = shapes
        self._place = place
        self._configs = configs
        self._forward: Any = torch.compile(UNet2DConditionModel.forward, dynamic=False, **options)

    def warm_up(self) -> None:
        """Compiles every shape, with weights that mean nothing. Takes minutes."""
        for family in dict.fromkeys(shape.family for shape in self._shapes):
            unet = _meaningless(self._configs[family], self._place)
            for shape in self._shapes:
                if shape.family == family:
                    started = time.perf_counter()
                    for _ in range(3):  # CUDA graphs are recorded at the second call
                        self._run(unet, *_inputs(shape, self._configs[family], self._place))
                    seconds = round(time.perf_counter() - started, 1)
                    log.info("shape_compiled", shape=msgspec.to_builtins(shape), seconds=seconds)

    def find(self, unet: Any, family: str, x: Tensor, context: Tensor) -> Shape | None:
        """The smallest compiled shape that such a batch fits into."""
        if context.shape[1] != TOKENS or not _is_like(unet, self._configs[family]):
            return None
        rows, _, height, width = x.shape
        for shape in self._shapes:
            same = (shape.family, shape.width, shape.height) == (family, width * 8, height * 8)
            if same and shape.rows >= rows:
                return shape
        return None

    @torch.no_grad()
    def predict(
        self,
        shape: Shape,
        unet: Any,
        x: Tensor,
        times: Tensor,
        context: Tensor,
        added: dict[str, Tensor] | None,
    ) -> Tensor:
        """What the UNet says of the rows of `x`; rows that fill up are cut off again."""
        rows = len(x)
        filled = {name: _filled(t, shape.rows) for name, t in added.items()} if added else None
        prediction = self._run(
            unet,
            _filled(x, shape.rows),
            _filled(times, shape.rows),
            _filled(context, shape.rows),
            filled,
        )
        return prediction[:rows].clone()  # the next run of a CUDA graph writes over it

    @torch.no_grad()
    def _run(
        self,
        unet: Any,
        x: Tensor,
        times: Tensor,
        context: Tensor,
        added: dict[str, Tensor] | None,
    ) -> Tensor:
        prediction: Tensor = self._forward(
            unet, x, times, context, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction


def _filled(tensor: Tensor, rows: int) -> Tensor:
    lacking = rows - len(tensor)
    return (
        torch.cat([tensor, tensor[-1:].expand(lacking, *tensor.shape[1:])]) if lacking else tensor
    )


def _is_like(unet: Any, configs: Configs) -> bool:
    return all(_same(unet.config.get(key), value) for key, value in configs.unet.items())


def _same(one: Any, other: Any) -> bool:
    listed = [list(value) if isinstance(value, tuple) else value for value in (one, other)]
    return bool(listed[0] == listed[1])


def _meaningless(configs: Configs, place: Place) -> Any:
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(configs.unet)
    unet = unet.to_empty(device=place.device).to(place.dtype).eval().requires_grad_(False)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if place.device.type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)
    return unet


def _inputs(
    shape: Shape, configs: Configs, place: Place
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
    def random(*sides: int) -> Tensor:
        return torch.randn(shape.rows, *sides, device=place.device, dtype=place.dtype)

    unet = configs.unet
    x = random(unet["in_channels"], shape.height // 8, shape.width // 8)
    times = torch.full((shape.rows,), 500.0, device=place.device)
    context = random(TOKENS, unet["cross_attention_dim"])
    added = None
    if "addition_time_embed_dim" in unet:
        told = 5 if shape.family == REFINER else 6
        width = unet["projection_class_embeddings_input_dim"]
        pooled = width - told * unet["addition_time_embed_dim"]
        added = {
            "text_embeds": random(pooled),
            "time_ids": random(told),
        }
    return x, times, context, added
