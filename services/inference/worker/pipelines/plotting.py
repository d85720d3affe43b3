"""The script "X/Y/Z plot": one job's pictures for every combination of up to three fields' values,
as one labelled grid.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from services.inference.worker.pipelines import (
    JobFailure,
    Report,
    Result,
    ResultImage,
    Work,
)
from services.inference.worker.pipelines.library import receipt
from services.inference.worker.pipelines.painting import PaintingPlan, Studio, packed_as_asked
from services.inference.worker.pipelines.params.painting import (
    PaintingParams,
    parse_painting,
)
from services.inference.worker.pipelines.params.reading import (
    Body,
    convert,
    printable,
    short,
)
from services.inference.worker.pipelines.pictures.grids import grid, labelled
from services.inference.worker.pipelines.pictures.infotext import fields_text, param_json
from services.inference.worker.pipelines.stopwatch import Stopwatch
from shared.contracts.inference import RunJob
from shared.webui.body_names import FACE_RESTORERS
from shared.webui.values import as_flag, as_whole

SEEDS = ("Seed", "Var. seed")

Apply = Callable[[Body, Any, list[Any]], None]
"""Puts one of an axis's values into a body; it is also given all of them."""


class Axis(msgspec.Struct, frozen=True):
    """What a plot may vary. `kind` makes a value from a text. `chosen`: its values are chosen from
    a list in the webui, and come as a list. `only`: the task that has it. `named`: its labels say
    what they are."""

    label: str
    kind: Callable[[str], Any] = str
    apply: Apply = lambda body, value, values: None
    chosen: bool = False
    only: str = ""
    named: bool = True


def _field(name: str) -> Apply:
    def apply(body: Body, value: Any, _: list[Any]) -> None:
        body[name] = value

    return apply


def _setting(name: str) -> Apply:
    def apply(body: Body, value: Any, _: list[Any]) -> None:
        body["override_settings"] = {**body.get("override_settings", {}), name: value}

    return apply


def _replace(body: Body, value: str, values: list[str]) -> None:
    """Prompt S/R: the first value is what is searched for."""
    searched = values[0]
    prompts = [str(body.get(name, "")) for name in ("prompt", "negative_prompt")]
    if not any(searched in prompt for prompt in prompts):
        raise JobFailure("script_args: Prompt S/R: the first value is in neither prompt")
    body["prompt"], body["negative_prompt"] = (text.replace(searched, value) for text in prompts)


def _reorder(body: Body, words: Sequence[str], _: list[Any]) -> None:
    """Prompt order: the places of the words in the prompt, filled in the order of `words`."""
    prompt = str(body.get("prompt", ""))
    for word in words:
        if word not in prompt:
            raise JobFailure("script_args: Prompt order: one of the values is not in the prompt")
    pieces, rest = [], prompt
    for place in sorted(words, key=prompt.find):
        before, _found, rest = rest.partition(place)
        pieces.append(before)
    body["prompt"] = "".join(itertools.chain(*zip(pieces, words, strict=True))) + rest


def _add_styles(body: Body, value: str, _: list[Any]) -> None:
    """To those of the body; several have commas between them."""
    body["styles"] = [*body.get("styles", []), *value.split(",")]


def _restore_faces(body: Body, value: str, values: list[Any]) -> None:
    """By a model, or whether at all."""
    model = FACE_RESTORERS.get(value.lower())
    if model:
        _setting("face_restoration_model")(body, model, values)
    body["restore_faces"] = bool(model) or value.lower() in ("true", "yes", "y", "1")


def _truth(text: str) -> bool:
    """Raises ValueError."""
    value = as_flag(text)
    if not isinstance(value, bool):
        raise ValueError(text)
    return value


def _resize(body: Body, value: str, _: list[Any]) -> None:
    body["width"], _x, body["height"] = (part.strip() for part in value.partition("x"))


TXT2IMG, IMG2IMG = "txt2img", "img2img"
AXES = (
    Axis("Nothing"),
    Axis("Seed", int, _field("seed")),
    Axis("Var. seed", int, _field("subseed")),
    Axis("Var. strength", float, _field("subseed_strength")),
    Axis("Steps", int, _field("steps")),
    Axis("Hires steps", int, _field("hr_second_pass_steps"), only=TXT2IMG),
    Axis("CFG Scale", float, _field("cfg_scale")),
    Axis("Image CFG Scale", float, _field("image_cfg_scale"), only=IMG2IMG),
    Axis("Prompt S/R", str, _replace, named=False),
    Axis("Prompt order", str, _reorder, named=False),
    Axis("Sampler", str, _field("sampler_name"), chosen=True, only=TXT2IMG, named=False),
    Axis("Hires sampler", str, _field("hr_sampler_name"), chosen=True, only=TXT2IMG),
    Axis("Sampler", str, _field("sampler_name"), chosen=True, only=IMG2IMG, named=False),
    Axis("Checkpoint name", str, _setting("sd_model_checkpoint"), chosen=True, named=False),
    Axis("Negative Guidance minimum sigma", float, _field("s_min_uncond")),
    Axis("Sigma Churn", float, _field("s_churn")),
    Axis("Sigma min", float, _field("s_tmin")),
    Axis("Sigma max", float, _field("s_tmax")),
    Axis("Sigma noise", float, _field("s_noise")),
    Axis("Schedule type", str, _setting("k_sched_type"), chosen=True),
    Axis("Schedule min sigma", float, _setting("sigma_min")),
    Axis("Schedule max sigma", float, _setting("sigma_max")),
    Axis("Schedule rho", float, _setting("rho")),
    Axis("Eta", float, _field("eta")),
    Axis("Clip skip", int, _setting("CLIP_stop_at_last_layers")),
    Axis("Denoising", float, _field("denoising_strength")),
    Axis("Initial noise multiplier", float, _field("initial_noise_multiplier")),
    Axis("Extra noise", float, _setting("img2img_extra_noise")),
    Axis("Hires upscaler", str, _field("hr_upscaler"), chosen=True, only=TXT2IMG),
    Axis("Cond. Image Mask Weight", float, _setting("inpainting_mask_weight"), only=IMG2IMG),
    Axis("VAE", str, _setting("sd_vae"), chosen=True),
    Axis("Styles", str, _add_styles, chosen=True),
    Axis("UniPC Order", int, _setting("uni_pc_order")),
    Axis("Face restore", str, _restore_faces, named=False),
    Axis("Token merging ratio", float, _setting("token_merging_ratio")),
    Axis("Token merging ratio high-res", float, _setting("token_merging_ratio_hr")),
    Axis(
        "Always discard next-to-last sigma",
        _truth,
        _setting("always_discard_next_to_last_sigma"),
        chosen=True,
    ),
    Axis("SGM noise multiplier", _truth, _setting("sgm_noise_multiplier"), chosen=True),
    Axis("Refiner checkpoint", str, _field("refiner_checkpoint"), chosen=True, named=False),
    Axis("Refiner switch at", float, _field("refiner_switch_at")),
    Axis("RNG source", str, _setting("randn_source"), chosen=True),
)
"""In the order of the webui 1.7, whose clients send the number of an axis."""
_LATER = {
    "Schedule type": [Axis("Schedule type", str, _field("scheduler"), chosen=True)],
    "Schedule rho": [
        Axis("Schedule rho", float, _setting("rho")),
        Axis("Beta schedule alpha", float, _setting("beta_dist_alpha")),
        Axis("Beta schedule beta", float, _setting("beta_dist_beta")),
    ],
    "RNG source": [
        Axis("RNG source", str, _setting("randn_source"), chosen=True),
        Axis("FP8 mode", str, _setting("fp8_storage"), chosen=True),
        Axis("Size", str, _resize),
    ],
}
"""What 1.10 has in place of an axis of 1.7."""


def axes_of(webui_version: str) -> list[Axis]:
    """In the order of that version."""
    if webui_version == "1.7":
        return [*AXES]
    return [later for axis in AXES for later in _LATER.get(axis.label, [axis])]


class _Drawn(msgspec.Struct, frozen=True):
    """One axis of one plot. `text`: its values as they came. `fixed`: of seeds, whether random ones
    were drawn for all cells that share them."""

    axis: Axis
    values: list[Any]
    text: str
    fixed: bool = False

    def label(self, number: int) -> str:
        value = self.values[number]
        if self.axis.label == "Nothing":
            return ""
        if isinstance(value, tuple):
            return ", ".join(value)
        shown = round(value, 8) if isinstance(value, float) else value
        return f"{self.axis.label}: {shown}" if self.axis.named else str(shown)


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """What follows on the axes in `script_args`, in this order. `vary_seeds_…` are of webui 1.8;
    `margin_size`: pixels between the pictures of a grid."""

    draw_legend: bool = False
    include_lone_images: bool = False
    include_sub_grids: bool = False
    no_fixed_seeds: bool = False
    vary_seeds_x: bool = False
    vary_seeds_y: bool = False
    vary_seeds_z: bool = False
    margin_size: Annotated[int, Meta(ge=0, le=500)] = 0
    csv_mode: bool = False


class _Args(msgspec.Struct, frozen=True):
    axes: tuple[_Drawn, _Drawn, _Drawn]
    options: _Options


class PlottingPlan:
    key: object = None

    def __init__(self, job: RunJob, raw: Body, files: Mapping[str, Path], studio: Studio) -> None:
        """Raises JobFailure, also for what is wrong with any of the combinations."""
        params, self.warnings = parse_painting(raw, job.task_type, studio.webui)
        self.studio, self.raw, self.settings = studio, raw, params.override_settings
        most = studio.webui.max_pictures
        self.args = _parse_args(params, job.task_type, most, self.warnings)
        self.base = self._base(params, raw)
        x, y, z = self.args.axes
        count = len(x.values) * len(y.values) * len(z.values)
        if count > most:
            raise JobFailure(f"script_args: got {count} combinations, allowed are {most}")
        cells = itertools.product(z.values, y.values, x.values)
        self.cells = [self._cell(job, files, dict(zip("zyx", cell, strict=True))) for cell in cells]
        for plan in self.cells:
            self._warn(plan.warnings)
        width, height = self.cells[0].params.width, self.cells[0].params.height
        if count * width * height > studio.webui.max_pixels:
            raise JobFailure(
                f"script_args: got a grid of {count * width * height // 1_000_000} million"
                f" pixels, allowed are {studio.webui.max_pixels // 1_000_000} million"
            )

    def _base(self, params: PaintingParams, raw: Body) -> Body:
        """The body of every cell: no script of its own, seeds that are the same for all unless
        random ones are to stay so, and one picture that can be read back as it was."""
        settings = {**raw.get("override_settings", {}), "samples_format": "png"}
        base = {**raw, "override_settings": settings, "script_name": "", "script_args": []}
        for field in ("seed", "subseed"):
            seed = getattr(params, field)
            drawn = seed == -1 and not self.args.options.no_fixed_seeds
            base[field] = secrets.randbelow(2**32 - 1) if drawn else seed
        if not params.override_settings.return_grid:
            base |= {"batch_size": 1}
        return base

    def _cell(self, job: RunJob, files: Mapping[str, Path], values: dict[str, Any]) -> PaintingPlan:
        body = dict(self.base)
        for letter, drawn in zip("xyz", self.args.axes, strict=True):
            drawn.axis.apply(body, values[letter], drawn.values)
        return PaintingPlan(job, body, files, self.studio)

    def work(self, report: Report) -> Work:
        watch = Stopwatch()
        results: list[Result] = []
        for number, plan in enumerate(self.cells):
            result = yield from plan.work(_Share(report, number, len(self.cells)))
            results.append(result)
            self._warn(result.warnings)
            for stage, seconds in result.seconds.items():
                watch.seconds[stage] = round(watch.seconds.get(stage, 0.0) + seconds, 4)
        with watch.stage("save"):
            images, texts = self._images(results)
        info = _info_of(results[0]) | {
            "infotexts": texts,
            "index_of_first_image": 1,
            "all_prompts": [_info_of(result)["prompt"] for result in results],
            "all_seeds": [_info_of(result)["seed"] for result in results],
        }
        models = self.cells[0].models
        for plan in self.cells[1:]:
            for model in plan.models.used:
                models.use(model)
        answer = param_json(
            printable({**self.raw, **{name: self.base[name] for name in ("seed", "subseed")}}),
            info,
            [image.name for image in images],
            receipt(models, self.studio.library),
        )
        return Result(images, answer, watch.seconds, self.warnings)

    def _images(self, results: Sequence[Result]) -> tuple[list[ResultImage], list[str]]:
        """The whole grid, then the grid of each z, then the pictures: the latter two if wanted."""
        (x, y, z), options = self.args.axes, self.args.options
        pictures = [Image.open(io.BytesIO(result.images[0].data)) for result in results]
        texts = [_info_of(result)["infotexts"][0] for result in results]
        size = len(x.values) * len(y.values)
        parts = []
        for number in range(len(z.values)):
            part = grid(pictures[number * size : (number + 1) * size], len(y.values))
            if options.draw_legend:
                columns = [x.label(n) for n in range(len(x.values))]
                rows = [y.label(n) for n in range(len(y.values))]
                part = labelled(part, columns, rows, options.margin_size)
            parts.append(part)
        whole = grid(parts, 1)
        if options.draw_legend:
            whole = labelled(whole, [z.label(n) for n in range(len(z.values))], [""])
        named = [("grid", whole, texts[0] + self._told("XYZ"))]
        if options.include_sub_grids:
            told = self._told("XY")
            named += [(f"grid_{n}", part, texts[n * size] + told) for n, part in enumerate(parts)]
        if options.include_lone_images:
            lone = zip(pictures, texts, strict=True)
            named += [(f"image_{n}", picture, text) for n, (picture, text) in enumerate(lone)]
        return [self._packed(*one) for one in named], [text for _, _, text in named]

    def _packed(self, name: str, picture: Image.Image, text: str) -> ResultImage:
        usual = self.studio.format
        image, warnings = packed_as_asked(name, picture, text, self.settings, usual)
        self._warn(warnings)
        return image

    def _warn(self, texts: Sequence[str]) -> None:
        self.warnings += [text for text in texts if text not in self.warnings]

    def _told(self, letters: str) -> str:
        """What the infotext of a grid says of its axes."""
        fields: dict[str, object] = {"Script": "X/Y/Z plot"}
        for letter, drawn in zip(letters, self.args.axes, strict=False):
            if drawn.axis.label == "Nothing":
                continue
            fields[f"{letter} Type"] = drawn.axis.label
            fields[f"{letter} Values"] = drawn.text
            if drawn.fixed:
                fields[f"Fixed {letter} Values"] = ", ".join(map(str, drawn.values))
        return ", " + fields_text(fields)


class _Share:
    """The report of one cell, as a share of the whole."""

    def __init__(self, report: Report, number: int, count: int) -> None:
        self._report, self._number, self._count = report, number, count

    def step(self, step: int, steps: int) -> None:
        self._report.step(self._number * steps + step, self._count * steps)

    def preview(self, picture: Callable[[], bytes]) -> None:
        self._report.preview(picture)


def _info_of(result: Result) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(json.loads(result.param_json)["info"])
    return info


def _parse_args(params: PaintingParams, task_type: str, most: int, warnings: list[str]) -> _Args:
    """`script_args` as the webui 1.7 takes them, or with the three fields that 1.8 put in. `most`:
    values of an axis. Raises JobFailure."""
    given, axes = [*params.script_args], axes_of(params.webui_version)
    if len(given) < 13:
        raise JobFailure(
            f"script_args: got {len(given)} values, allowed are the 13 to 19 of the X/Y/Z plot:"
            " type, values and chosen values of X, Y and Z, draw_legend, include_lone_images,"
            " include_sub_grids, no_fixed_seeds, margin_size, csv_mode"
        )
    names = [field.name for field in msgspec.structs.fields(_Options)]
    if len(given) < 9 + len(names) - 1:
        names = [name for name in names if not name.startswith("vary_seeds")]
    told = dict(zip(names, given[9:], strict=False))
    told = {name: value for name, value in told.items() if value is not None}
    options = convert(told, _Options, "script_args: ")
    if options.vary_seeds_x or options.vary_seeds_y or options.vary_seeds_z:
        warnings.append("script_args: vary_seeds of X, Y and Z: no effect here")
    x, y, z = (
        _axis(axes, given[3 * n : 3 * n + 3], task_type, options, most, letter)
        for n, letter in enumerate("xyz")
    )
    return _Args((x, y, z), options)


def _axis(
    axes: Sequence[Axis],
    given: Sequence[Any],
    task_type: str,
    options: _Options,
    most: int,
    letter: str,
) -> _Drawn:
    known = [axis for axis in axes if axis.only in ("", task_type)]
    type_, typed, chosen = given
    type_ = as_whole(type_)
    axis = None
    if isinstance(type_, int) and 0 <= type_ < len(known):
        axis = known[type_]
    elif isinstance(type_, str):
        axis = next((one for one in known if one.label.lower() == type_.lower()), None)
    if axis is None:
        names = ", ".join(f"{number} {one.label}" for number, one in enumerate(known))
        raise JobFailure(
            f"script_args: {letter} type: got {short(type_)}, allowed is one of {names}"
        )
    if axis.label == "Nothing":
        return _Drawn(axis, [None], "")
    texts = chosen if axis.chosen and not options.csv_mode and chosen else typed
    if isinstance(texts, int | float):
        texts = str(texts)
    text = texts
    if isinstance(texts, str):
        texts = _typed(texts, letter)
    if not isinstance(texts, list) or not texts:
        raise JobFailure(f"script_args: {letter} values: got none, allowed is a list of them")
    texts = [str(one) for one in texts]
    if not isinstance(text, str):
        text = _csv(texts)
    values = _values(axis, texts, most, letter)
    fixed = axis.label in SEEDS and not options.no_fixed_seeds
    if fixed:
        values = [secrets.randbelow(2**32 - 1) if value == -1 else value for value in values]
    return _Drawn(axis, values, text, fixed)


def _typed(text: str, letter: str) -> list[str]:
    try:
        return [one.strip() for one in itertools.chain(*csv.reader(io.StringIO(text)))]
    except csv.Error as error:
        raise JobFailure(
            f"script_args: {letter} values: got {short(text)}, allowed are values with commas"
            f" between them, those with a comma in quotes ({error})"
        ) from None


def _csv(texts: Sequence[str]) -> str:
    """What may be typed in place of a list, as the webui writes it down."""
    written = io.StringIO()
    csv.writer(written).writerow(texts)
    return written.getvalue().strip()


_NUMBER = r"([+-]?\s*\d+(?:\.\d*)?)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}(?:\s*\(\s*([+-]?\d+(?:\.\d*)?)\s*\))?\s*")
_COUNTED = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}\s*\[\s*(\d+)\s*\]\s*")


def _values(axis: Axis, texts: list[str], most: int, letter: str) -> list[Any]:
    """Also of ranges: `1-5`, `1-5 (+2)`, `1-10 [5]`. One more than `most`, if there are more."""
    if axis.label == "Prompt order":
        if len(texts) > 5:
            raise JobFailure(f"script_args: {letter} values: got {len(texts)} words, allowed are 5")
        return list(itertools.permutations(texts))
    values: list[Any] = []
    for text in texts:
        if axis.kind in (int, float):
            found = _span(text, axis.kind is int, most)
            if found is not None:
                values += found
                continue
        try:
            values.append(axis.kind(as_whole(text) if axis.kind is int else text))
        except ValueError:
            allowed = "a number or a range such as 1-5, 1-5 (+2) or 1-10 [5]"
            if axis.kind is _truth:
                allowed = "true or false"
            raise JobFailure(
                f"script_args: {letter} values: got {short(text)}, allowed is {allowed}"
            ) from None
        if len(values) > most:
            break
    return values[: most + 1]


def _span(text: str, whole: bool, most: int) -> list[Any] | None:
    found = _COUNTED.fullmatch(text)
    if found:
        start, end = (float(found[n].replace(" ", "")) for n in (1, 2))
        numbers = np.linspace(start, end, min(int(found[3]), most + 1)).tolist()
    else:
        found = _RANGE.fullmatch(text)
        if not found:
            return None
        start, end = (float(found[n].replace(" ", "")) for n in (1, 2))
        step = float(found[3] or 1)
        count = int((end - start) / step + 1e-9) + 1 if step and (end - start) / step >= 0 else 0
        numbers = [start + step * n for n in range(min(count, most + 1))]
    return [int(number) for number in numbers] if whole else numbers
