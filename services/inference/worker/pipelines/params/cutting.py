"""Bodies of rembg jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.params.reading import (
    Body,
    Level,
    convert,
    ignored,
    short,
)

Mark = Annotated[list[float], Meta(min_length=2, max_length=4)]


class SamMark(msgspec.Struct, frozen=True):
    """A point (x, y) or a rectangle (left, top, right, bottom); `label` 1 is wanted, 0 is not."""

    type: Literal["point", "rectangle"]
    data: Mark
    label: Literal[0, 1] = 1


class CuttingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the library `rembg`. `return_mask` is the webui extension's name for
    `only_mask`. `sam_prompt`: what the model `sam` is to find. `cloth_category`: what
    `u2net_cloth_seg` is to find, all three kinds unless it is given."""

    input_image: str = ""
    model: str = ""
    only_mask: bool = False
    return_mask: bool = False
    post_process_mask: bool = False
    alpha_matting: bool = False
    alpha_matting_foreground_threshold: Level = 240
    alpha_matting_background_threshold: Level = 10
    alpha_matting_erode_size: Level = 10
    decontaminate: bool = False
    vitmatte: bool = False
    vitmatte_model: str = ""
    putalpha: bool = False
    bgcolor: Annotated[list[Level], Meta(min_length=3, max_length=4)] | str | None = None
    sam_prompt: Annotated[list[SamMark], Meta(max_length=100)] = []
    cloth_category: Literal["", "upper", "lower", "full"] = ""

    @property
    def marks(self) -> list[dict[str, Any]]:
        """`sam_prompt` as the library takes it."""
        return [msgspec.to_builtins(mark) for mark in self.sam_prompt]


def parse_cutting(raw: Body) -> tuple[CuttingParams, list[str]]:
    """The typed params, and the warnings. Raises JobFailure."""
    params = convert(raw, CuttingParams)
    for number, mark in enumerate(params.sam_prompt):
        wanted = 2 if mark.type == "point" else 4
        if len(mark.data) != wanted:
            raise JobFailure(
                f"sam_prompt[{number}].data: got {short(mark.data)}, allowed for a {mark.type} is a"
                f" list of {wanted} numbers"
            )
    known = (field.name for field in msgspec.structs.fields(CuttingParams))
    return params, ignored(raw, {}, known)
