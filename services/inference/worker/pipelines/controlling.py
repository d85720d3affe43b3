"""ControlNet: which networks a job asks for, the hints that they are given, and how they act."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from services.inference.worker.pipelines import JobFailure, hints
from services.inference.worker.pipelines.denoising import Control
from services.inference.worker.pipelines.library import Library, Models
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.params.control import (
    CONTROL_MODES,
    RESIZE_MODES,
    ControlUnit,
)
from services.inference.worker.pipelines.params.reading import short
from services.inference.worker.pipelines.pictures.files import read_picture
from services.inference.worker.pipelines.pictures.fitting import fit
from services.inference.worker.pipelines.pictures.masks import Box
from shared.weights.kinds import recognise

CONTROLNET = "ControlNet"
BALANCED, PROMPT_FIRST, CONTROL_FIRST = range(3)
SOFTENING = 0.825
"""By so much each output acts more weakly than the one that is nearer to the middle, if it is to be
soft; the outermost are thirteenth at most."""


class Source(msgspec.Struct, frozen=True, eq=False):
    """What img2img starts from: for units without a picture or mask of their own. `mask` is as
    large as the picture it was made for, white where that is painted anew; `box`: the part of it
    that is rendered, where that is not the whole."""

    picture: Image.Image | None = None
    resize_mode: int = 0
    mask: Image.Image | None = None
    box: Box | None = None


class _Unit(msgspec.Struct, frozen=True, eq=False):
    unit: ControlUnit
    file: ModelFile
    picture: Image.Image | None
    mask: Image.Image | None


class _Look(msgspec.Struct, frozen=True, eq=False):
    """What a unit shows its network. `masked`: (height, width), None where the unit has no mask."""

    hint: hints.Pixels
    masked: NDArray[np.bool_] | None


ASKED_ALIKE = (
    "cross_attention_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""Of the configs of a ControlNet and its UNet."""


class Controls:
    """The ControlNet units of one job."""

    def __init__(
        self, units: Sequence[ControlUnit], models: Models, library: Library, family: str
    ) -> None:
        """Raises JobFailure for a unit that can't act."""
        self._library = library
        self._units = [self._look_at(unit, models, family) for unit in units]
        self._loaded: list[Any] = []
        self._made: dict[tuple[Source, int, int, bool], list[Control]] = {}
        self._looks: dict[tuple[Source, int, int, int], _Look] = {}

    def _look_at(self, unit: ControlUnit, models: Models, family: str) -> _Unit:
        where = f"alwayson_scripts.controlnet.args[{unit.number}]"
        module = unit.module.lower()
        if module not in hints.HINTS:
            raise JobFailure(
                f"{where}.module: {short(unit.module)} needs weights of its own or is not known;"
                " put the finished hint into image and use none. Built in are"
                f" {', '.join(hints.HINTS)}"
            )
        if unit.model.lower() in ("", "none"):
            raise JobFailure(
                f"{where}.model: got none, allowed is a checkpoint of type {CONTROLNET} that the"
                f' job names in models: {{"{CONTROLNET}": ["NAME"]}}'
            )
        model = models.get(CONTROLNET, unit.model, f"{where}.model")
        file = self._library.open(model.path, model.name)
        kind = recognise(file.header)
        if kind.type != CONTROLNET:
            raise JobFailure(f"{where}.model: {file.name} is {kind.title}; a ControlNet is needed")
        own = "darkroom.config" in file.header.metadata
        if kind.family != family and not own:
            raise JobFailure(
                f"{where}.model: {file.name} is {kind.title}; the checkpoint is one of {family}"
            )
        if unit.guidance_start > unit.guidance_end:
            raise JobFailure(f"{where}.guidance_start: allowed is what is not above guidance_end")
        picture = read_picture(unit.picture, f"{where}.image") if unit.picture else None
        mask = read_picture(unit.picture_mask, f"{where}.mask") if unit.picture_mask else None
        return _Unit(unit, file, picture, mask)

    def load(self, unet: Any, checkpoint: str) -> None:
        """Raises JobFailure for a ControlNet that is asked with what `unet`, that of `checkpoint`,
        is asked with, and takes something else."""
        self._loaded = [self._library.controlnet(one.file) for one in self._units]
        for one, model in zip(self._units, self._loaded, strict=True):
            for key in ASKED_ALIKE:
                if getattr(model.config, key) != getattr(unet.config, key):
                    raise JobFailure(
                        f"{one.file.name} does not fit {checkpoint}: its {key} is"
                        f" {getattr(model.config, key)}, there it is {getattr(unet.config, key)}"
                    )

    def unused(self) -> Iterable[tuple[ModelFile, list[str]]]:
        """What each file has of which its ControlNet makes no use."""
        for one, model in zip(self._units, self._loaded, strict=True):
            yield one.file, model.unused

    def of(self, width: int, height: int, source: Source, *, hires: bool) -> list[Control]:
        """The units for pictures of a size. `hires`: for the second pass. Raises JobFailure if
        there is no picture."""
        key = source, width, height, hires
        if key not in self._made:
            self._made[key] = [
                self._control(number, width, height, source, hires)
                for number in range(len(self._units))
            ]
        return self._made[key]

    def forget(self) -> None:
        """What was made for pictures that are finished."""
        self._made.clear()
        self._looks.clear()

    @property
    def own_pictures(self) -> list[str]:
        """The fields of those that the units bring with them."""
        return [
            f"alwayson_scripts.controlnet.args[{one.unit.number}].image"
            for one in self._units
            if one.picture is not None
        ]

    def _control(
        self, number: int, width: int, height: int, source: Source, hires: bool
    ) -> Control:
        unit, model = self._units[number].unit, self._loaded[number]
        outputs = len(model.controlnet_down_blocks) + 1
        # The extension holds back edges on the second pass, where they are finer.
        soft = unit.control_mode != BALANCED or (hires and "canny" in unit.module.lower())
        look = self._look(number, width, height, source)
        hint = torch.from_numpy(look.hint.copy()).permute(2, 0, 1)[None].float() / 255
        if look.masked is not None:
            hint = torch.where(torch.from_numpy(look.masked)[None, None], torch.tensor(-1.0), hint)
        return Control(
            model=model,
            hint=hint.to(self._library.place.device),
            scales=scales(unit.weight, soft, outputs),
            start=unit.guidance_start,
            end=unit.guidance_end,
            on_negative=unit.control_mode != CONTROL_FIRST
            and not model.config.global_pool_conditions,
        )

    def finish(self, picture: Image.Image, source: Source) -> Image.Image:
        """A result as its units want it: `inpaint_only` puts back what is not masked, and the
        recoloring ones how light their picture is."""
        for number, one in enumerate(self._units):
            module = one.unit.module.lower()
            if module != hints.KEEPING and module not in hints.RECOLORING:
                continue
            look = self._look(number, *picture.size, source)
            pixels = np.asarray(picture)
            if module in hints.RECOLORING:
                pixels = hints.recolor(pixels, look.hint, module)
            elif source.mask is None and look.masked is not None:  # else img2img puts it back
                pixels = hints.keep(pixels, look.hint, look.masked)
            picture = Image.fromarray(pixels)
        return picture

    def _look(self, number: int, width: int, height: int, source: Source) -> _Look:
        key = source, number, width, height
        if key not in self._looks:
            self._looks[key] = _look(self._units[number], width, height, source)
        return self._looks[key]

    def infotext(self) -> dict[str, object]:
        """A field per unit, as the extension writes them."""
        return {
            f"ControlNet {one.unit.number}": ", ".join(
                f"{name}: {value}" for name, value in self._told(one).items() if value is not None
            )
            for one in self._units
        }

    def _told(self, one: _Unit) -> dict[str, object]:
        unit = one.unit
        short_hash = self._library.hashes.sha256(one.file.path)[:8]
        resizes = hints.HINTS[unit.module.lower()].resizes
        return {
            "Module": unit.module,
            "Model": f"{one.file.stem} [{short_hash}]",
            "Weight": unit.weight,
            "Resize Mode": RESIZE_MODES[int(unit.resize_mode)],
            "Low Vram": False,
            "Processor Res": unit.processor_res if resizes and unit.processor_res > 0 else None,
            "Threshold A": unit.threshold_a if unit.threshold_a >= 0 else None,
            "Threshold B": unit.threshold_b if unit.threshold_b >= 0 else None,
            "Guidance Start": unit.guidance_start,
            "Guidance End": unit.guidance_end,
            "Pixel Perfect": unit.pixel_perfect,
            "Control Mode": CONTROL_MODES[int(unit.control_mode)],
        }


def _look(one: _Unit, width: int, height: int, source: Source) -> _Look:
    unit, where = one.unit, f"alwayson_scripts.controlnet.args[{one.unit.number}]"
    module = unit.module.lower()
    picture, mask, mode = one.picture, one.mask, int(unit.resize_mode)
    if picture is None:
        picture, mode = source.picture, source.resize_mode % 3
    if picture is None:
        raise JobFailure(f"{where}.image: got none, allowed is a picture in base64")
    if mask is None and source.mask is not None and source.mask.size == picture.size:
        mask = source.mask
    if module == hints.KEEPING and mask is None:
        raise JobFailure(f"{where}.mask: got none, {hints.KEEPING} needs one")
    if source.box and source.mask:

        def part(whole: Image.Image, like: Image.Image, box: Box) -> Image.Image:
            return fit(fit(whole, *like.size, mode).crop(box), width, height, 2)

        picture = part(picture, source.mask, source.box)
        mask = mask and part(mask, source.mask, source.box)
    resolution = unit.processor_res if unit.processor_res > 0 else hints.RESOLUTION
    if unit.pixel_perfect:
        resolution = hints.perfect_resolution(picture, width, height, mode)
    made = hints.make(picture, module, resolution, unit.threshold_a, unit.threshold_b)
    masked = None
    if module in hints.MASKED and mask is not None:
        levels = np.asarray(mask.convert("RGB"))
        masked = hints.fit_hint(levels, width, height, mode)[..., 0] > 127
    return _Look(hints.fit_hint(made, width, height, mode), masked)


def scales(weight: float, soft: bool, outputs: int) -> list[float]:
    """How strongly each output of a ControlNet acts, from the outermost to the middle."""
    if not soft:
        return [weight] * outputs
    return [weight * SOFTENING ** (12 - number) for number in range(outputs)]
