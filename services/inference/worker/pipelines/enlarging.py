"""extra-single-image, extra-batch-images: pictures enlarged, by interpolation or by an upscaler of
the registry, and their faces restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines import (
    Aside,
    JobFailure,
    Report,
    Result,
    ResultImage,
    Work,
)
from services.inference.worker.pipelines.faces import find_face_restorer
from services.inference.worker.pipelines.library import Library, Models, receipt
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.params.enlarging import (
    BATCH,
    EnlargingParams,
    parse_enlarging,
)
from services.inference.worker.pipelines.params.reading import Body, printable, short
from services.inference.worker.pipelines.pictures.files import (
    Format,
    notes_of,
    read_picture,
    result_image,
)
from services.inference.worker.pipelines.pictures.infotext import fields_text, param_json
from services.inference.worker.pipelines.stopwatch import Stopwatch
from shared.contracts.inference import RunJob
from shared.webui.settings import WebuiSettings
from shared.weights.kinds import CODEFORMER, GFPGAN

UPSCALER = "Upscaler"
MOST_ON_THE_WAY = 400_000_000
"""Pixels that a model may make before they are reduced to what was asked for: 16 bytes each."""
RESULTS_IN_ALL = 4
"""What all pictures of a list may make, as a multiple of what one may: they wait packed."""
TILE, OVERLAP = 192, 8
"""Pixels: what an upscaler is given at once, and how much of it neighbours share."""
BY_PIXELS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}


Enlargement = Generator[float, None, Image.Image]
"""Yields how much is done, 0 to 1, and returns the picture."""


class Upscaler(msgspec.Struct, frozen=True, eq=False):
    """`file` is None for one that only interpolates."""

    name: str
    library: Library
    resampling: Image.Resampling = Image.Resampling.LANCZOS
    file: ModelFile | None = None

    def by_factor(self, picture: Image.Image, factor: float, multiple: int = 1) -> Enlargement:
        """A model whose own factor is smaller makes up to three passes over the picture. Raises
        JobFailure for a pass that would take too much memory. `multiple`: of what the sides are to
        be, to which they are rounded down."""
        width, height = enlarged_size(picture.size, factor, multiple)
        if self.file is not None:
            model = load_upscaler(self.file, self.library)
            passes = _passes(factor, int(model.scale))
            for number in range(passes):
                if picture.width >= width and picture.height >= height:
                    break
                self._check_room(picture, int(model.scale))
                whole = _pass(picture, model, self.library.place.device)
                picture = yield from _as_share(whole, number, passes)
                if model.scale == 1:
                    break
        return _resized(picture, (width, height), self.resampling)

    def to_size(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        """Enlarged as far as one side needs it, then stretched to the size."""
        factor = max(width / picture.width, height / picture.height)
        if factor > 1:
            run = self.by_factor(picture, factor)
            while isinstance(done := _next(run), float):
                pass
            picture = done
        return _resized(picture, (width, height), Image.Resampling.LANCZOS)

    def _check_room(self, picture: Image.Image, scale: int) -> None:
        pixels = picture.width * picture.height * scale**2
        if pixels > MOST_ON_THE_WAY:
            raise JobFailure(
                f"{self.name} makes a picture of {picture.width}x{picture.height} {scale} times as"
                f" large: {pixels // 1_000_000} million pixels, allowed are"
                f" {MOST_ON_THE_WAY // 1_000_000} million"
            )


def enlarged_size(size: tuple[int, int], factor: float, multiple: int = 1) -> tuple[int, int]:
    """(width, height)"""
    if multiple == 1:
        return round(size[0] * factor), round(size[1] * factor)
    width, height = (int(side * factor // multiple * multiple) for side in size)
    return width, height


def find_upscaler(
    name: str, field: str, models: Models, library: Library, others: Sequence[str] = ()
) -> Upscaler:
    """Lanczos, Nearest or None, else a checkpoint of type Upscaler that the job names. `others`:
    names that the caller knows. Raises JobFailure."""
    for known, resampling in BY_PIXELS.items():
        if name.lower() == known.lower():
            return Upscaler(known, library, resampling)
    if name.lower() in ("", "none"):
        return Upscaler("None", library)
    found = models.find(UPSCALER, name)
    if found is None:
        named = ", ".join(model.stem for model in models.of(UPSCALER)) or "none"
        known = ", ".join([*others, *BY_PIXELS, "None"])
        raise JobFailure(
            f"{field}: got {short(name)}, allowed is one of {known}, or a checkpoint"
            f' of type {UPSCALER} that the job names in models: {{"{UPSCALER}": ["NAME"]}}'
            f" (it names {named})"
        )
    return Upscaler(found.stem, library, file=library.open(found.path, found.name))


def load_upscaler(file: ModelFile, library: Library) -> Any:
    """Of ESRGAN and its kin, SwinIR, …: whatever enlarges pictures. Raises JobFailure."""
    model = library.image_model(file)
    if model.purpose not in ("SR", "Restoration"):
        raise JobFailure(f"{file.name} ({model.architecture.name}) does not enlarge pictures")
    return model


def _resized(
    picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, resampling)


def _next(run: Enlargement) -> float | Image.Image:
    """How much is done, or the picture."""
    try:
        return next(run)
    except StopIteration as end:
        picture: Image.Image = end.value
        return picture


def aside(
    run: Enlargement, tell: Callable[[float], None] = lambda done: None
) -> Generator[Any, Any, Image.Image]:
    """As others need not wait for it. `tell`: called with how much is done, 0 to 1."""
    (done,) = yield Aside([lambda: _next(run)])
    while isinstance(done, float):
        tell(done)
        (done,) = yield Aside([lambda: _next(run)])
    picture: Image.Image = done
    return picture


def _as_share(run: Enlargement, number: int, count: int) -> Enlargement:
    """One of several runs, as a part of the whole."""
    while isinstance(done := _next(run), float):
        yield (number + done) / count
    return done


def _passes(factor: float, scale: int) -> int:
    return max(1, min(3, math.ceil(math.log(factor) / math.log(scale) - 1e-9))) if scale > 1 else 1


def _pass(picture: Image.Image, model: Any, device: torch.device) -> Enlargement:
    """One pass of a model over a picture, tile by tile; where tiles overlap, they are blended."""
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = int(model.scale)
    tiles = list(_tiles(picture.width, picture.height))
    _, height, width = pixels.shape
    total = torch.zeros(3, height * scale, width * scale)
    weight = torch.zeros(1, height * scale, width * scale)
    for number, (left, top, right, bottom) in enumerate(tiles):
        tile = pixels[:, top:bottom, left:right]
        enlarged = _enlarge(model, tile[None].to(device))[0].float().cpu()
        mask = _fading(enlarged.shape[1:], OVERLAP * scale)
        rows = slice(top * scale, top * scale + enlarged.shape[1])
        columns = slice(left * scale, left * scale + enlarged.shape[2])
        total[:, rows, columns] += enlarged * mask
        weight[:, rows, columns] += mask
        yield (number + 1) / len(tiles)
    levels = total.div_(weight).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    result = Image.fromarray(levels.permute(1, 2, 0).numpy())
    if alpha is not None:
        result.putalpha(alpha.resize(result.size, Image.Resampling.LANCZOS))
    return result


@torch.no_grad()
def _enlarge(model: Any, tile: Tensor) -> Tensor:
    enlarged: Tensor = model(tile)
    return enlarged


def _tiles(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    for top in _starts(height):
        for left in _starts(width):
            yield left, top, min(left + TILE, width), min(top + TILE, height)


def _starts(length: int) -> list[int]:
    if length <= TILE:
        return [0]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    return [round(number * (length - TILE) / (count - 1)) for number in range(count)]


def _fading(shape: tuple[int, ...] | torch.Size, border: int) -> Tensor:
    """1 in the middle, less towards the borders, never 0."""
    ramps = []
    for length in shape:
        steps = torch.arange(length)
        near = torch.minimum(steps, length - 1 - steps) + 1
        ramps.append((near / border).clamp(max=1.0))
    return (ramps[0][:, None] * ramps[1][None])[None]


class EnlargingPlan:
    key: object = None

    def __init__(
        self,
        job: RunJob,
        raw: Body,
        files: Mapping[str, Path],
        library: Library,
        form: Format,
        webui: WebuiSettings,
    ) -> None:
        """Raises JobFailure."""
        self.params, self.warnings = parse_enlarging(raw, webui, job.task_type)
        self.raw = raw
        self.library, self.format = library, form
        self.models = Models(job, files, library)
        self.batch = job.task_type == BATCH
        given = self.params.pictures(job.task_type)
        if not given:
            raise JobFailure(
                "imageList: got none, allowed is a list of pictures in base64"
                if self.batch
                else "image: got none, allowed is a picture in base64"
            )
        self.pictures = _read_pictures(given, webui)
        self.notes = [notes_of(text) for text in given.values()]
        self.upscalers = [find_upscaler(self.params.upscaler_1, "upscaler_1", self.models, library)]
        if self.params.extras_upscaler_2_visibility > 0:
            second = find_upscaler(self.params.upscaler_2, "upscaler_2", self.models, library)
            if second.name != "None" and self.upscalers[0].name != "None":
                self.upscalers.append(second)
            elif second.name != "None":
                self.warnings.append("upscaler_2: no effect without upscaler_1")
        most = webui.max_pixels
        self.factors = [_factor(self.params, picture, most) for picture in self.pictures]
        sizes = zip(self.pictures, self.factors, strict=True)
        pixels = sum(p.width * p.height * factor**2 for p, factor in sizes)
        if self.batch and pixels > RESULTS_IN_ALL * most:
            raise _too_many_pixels("results", pixels, RESULTS_IN_ALL * most)
        self.face_restorers = [
            (find_face_restorer(name, field, self.models, library, weight), visibility)
            for name, field, visibility, weight in (
                (GFPGAN, "gfpgan_visibility", self.params.gfpgan_visibility, 0.0),
                (
                    CODEFORMER,
                    "codeformer_visibility",
                    self.params.codeformer_visibility,
                    self.params.codeformer_weight,
                ),
            )
            if visibility > 0
        ]

    def work(self, report: Report) -> Work:
        watch, text = Stopwatch(), fields_text(self._fields())
        images: list[ResultImage] = []
        for number in range(len(self.pictures)):
            with watch.stage("render"):
                picture = yield from self._by_all(number, report)
            with watch.stage("restore"):
                picture = yield from self._with_restored_faces(picture, number)
            picture.info = dict(self.pictures[number].info)  # models know of no color profile
            with watch.stage("save"):
                notes = {**self.notes[number], "postprocessing": text}
                image, warnings = result_image(f"image_{number}", picture, notes, self.format)
                images.append(image)
                self.warnings += [text for text in warnings if text not in self.warnings]
        info: dict[str, Any] = {"html_info": text}
        if self.batch:
            info["names"] = [file.name for file in self.params.imageList]
        else:
            info |= {"width": picture.width, "height": picture.height}
        names, used = [image.name for image in images], receipt(self.models, self.library)
        answer = param_json(printable(self.raw), info, names, used)
        return Result(images, answer, watch.seconds, self.warnings)

    def _by_all(self, number: int, report: Report) -> Generator[Any, Any, Image.Image]:
        """One of the pictures by each upscaler, blended."""
        results: list[Image.Image] = []
        for upscaler in self.upscalers:
            before = number * len(self.upscalers) + len(results)
            results.append((yield from self._enlarged(upscaler, number, before, report)))
        if len(results) == 1:
            return results[0]
        return Image.blend(results[0], results[1], self.params.extras_upscaler_2_visibility)

    def _enlarged(
        self, upscaler: Upscaler, number: int, before: int, report: Report
    ) -> Generator[Any, Any, Image.Image]:
        """`before`: how many runs of an upscaler are done."""
        if upscaler.name == "None":
            return self.pictures[number]
        runs = len(self.pictures) * len(self.upscalers)
        enlarged = yield from aside(
            upscaler.by_factor(self.pictures[number], self.factors[number]),
            lambda done: report.step(round(100 * (before + done)), 100 * runs),
        )
        params = self.params
        if params.resize_mode == 1 and params.upscaling_crop:
            size = (params.upscaling_resize_w, params.upscaling_resize_h)
            left, top = (enlarged.width - size[0]) // 2, (enlarged.height - size[1]) // 2
            enlarged = enlarged.crop((left, top, left + size[0], top + size[1]))
        return enlarged

    def _with_restored_faces(
        self, picture: Image.Image, number: int
    ) -> Generator[Any, Any, Image.Image]:
        for restorer, visibility in self.face_restorers:
            ((restored, count),) = yield Aside([partial(restorer.restore, picture)])
            picture = Image.blend(picture, restored, visibility)
            if not count:
                self.warnings.append(f"{restorer.name}: no face was found in image_{number}")
        return picture

    def _fields(self) -> dict[str, object]:
        params = self.params
        size = f"{params.upscaling_resize_w}x{params.upscaling_resize_h}"
        to_size = params.resize_mode == 1
        return {
            "Postprocess upscale by": None if to_size else params.upscaling_resize,
            "Postprocess upscale to": size if to_size else None,
            "Postprocess crop to": size if to_size and params.upscaling_crop else None,
            "Postprocess upscaler": self.upscalers[0].name,
            "Postprocess upscaler 2": self.upscalers[1].name if len(self.upscalers) > 1 else None,
            "GFPGAN visibility": params.gfpgan_visibility or None,
            "CodeFormer visibility": params.codeformer_visibility or None,
            "CodeFormer weight": params.codeformer_weight if params.codeformer_visibility else None,
        }


def _read_pictures(given: Mapping[str, str], webui: WebuiSettings) -> list[Image.Image]:
    """By field. Raises JobFailure for one that can't be read, and for too many in all."""
    if len(given) > webui.max_pictures:
        raise JobFailure(f"imageList: got {len(given)} pictures, allowed are {webui.max_pictures}")
    pictures, pixels = [], 0
    for field, text in given.items():
        pictures.append(read_picture(text, field))
        pixels += pictures[-1].width * pictures[-1].height
        if pixels > webui.max_pixels:
            raise _too_many_pixels("pictures", pixels, webui.max_pixels)
    return pictures


def _too_many_pixels(what: str, pixels: float, most: int) -> JobFailure:
    return JobFailure(
        f"imageList: got {what} of {pixels / 1e6:.0f} million pixels in all,"
        f" allowed are {most // 1_000_000} million"
    )


def _factor(params: EnlargingParams, picture: Image.Image, most_pixels: int) -> float:
    """Raises JobFailure for a result that is too large."""
    factor = params.upscaling_resize
    if params.resize_mode == 1:
        factor = max(
            params.upscaling_resize_w / picture.width, params.upscaling_resize_h / picture.height
        )
    pixels = picture.width * picture.height * factor**2
    if pixels > most_pixels:
        field = "upscaling_resize_w and _h" if params.resize_mode == 1 else "upscaling_resize"
        raise JobFailure(
            f"{field}: got a result of {pixels / 1e6:.0f} million pixels,"
            f" allowed are {most_pixels // 1_000_000} million"
        )
    return factor
