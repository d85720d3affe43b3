"""rembg: takes a picture's background away with an ONNX model from the registry.

The library would fetch a model that it lacks, and two of its sessions send pictures to somebody's
cloud. Here a session is one of a list, and its models are the files that the job names.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from services.inference.worker.pipelines import (
    Aside,
    JobFailure,
    Report,
    Result,
    Work,
)
from services.inference.worker.pipelines.library import Library, Models, Shelved, receipt
from services.inference.worker.pipelines.memory import is_out_of_memory
from services.inference.worker.pipelines.models.files import identity_of
from services.inference.worker.pipelines.params.cutting import CuttingParams, parse_cutting
from services.inference.worker.pipelines.params.reading import Body, printable, short
from services.inference.worker.pipelines.pictures.files import Format, read_picture, result_image
from services.inference.worker.pipelines.pictures.infotext import VERSION, param_json
from services.inference.worker.pipelines.stopwatch import Stopwatch
from shared.contracts.inference import RunJob

MODEL_TYPE = "rembg"
SAM = "sam"
CUSTOM = ("u2net_custom", "dis_custom", "ben_custom")
"""Sessions for models of anybody's making: any file that the job names will do."""
SESSIONS = (
    "u2net",
    "u2netp",
    "u2net_human_seg",
    "u2net_cloth_seg",
    "silueta",
    "isnet-general-use",
    "isnet-anime",
    "birefnet-general",
    "birefnet-general-lite",
    "birefnet-general-fp16",
    "birefnet-portrait",
    "birefnet-dis",
    "birefnet-hrsod",
    "birefnet-cod",
    "birefnet-massive",
    "bria-rmbg",
    SAM,
    *CUSTOM,
)
VITMATTES = (
    "small-distinctions-646",
    "small-composition-1k",
    "base-distinctions-646",
    "base-composition-1k",
)
TIMES_ITS_FILE = 4
"""Memory that a session takes, as a multiple of its file."""
MAX_MATTING_PIXELS = 4_000_000
"""Alpha matting solves a system with a row per pixel: above it takes minutes and gigabytes."""


class _Found:
    """A session of the library that has found its mask already."""

    def __init__(self, mask: Image.Image) -> None:
        self._mask = mask

    def predict(self, *_: object, **__: object) -> list[Image.Image]:
        return [self._mask]


class CuttingPlan:
    key: object = None

    def __init__(
        self, job: RunJob, raw: Body, files: Mapping[str, Path], library: Library, form: Format
    ) -> None:
        """Raises JobFailure."""
        self.params, self.warnings = parse_cutting(raw)
        self.raw = raw
        self.library = library
        self.format = Format() if form.name == "jpg" else form  # a cut-out is transparent
        self.models = Models(job, files, library)
        self.session_name, self.session_files = _choose(self.models, self.params)
        self.vitmatte = _choose_vitmatte(self.models, self.params)
        if not self.params.input_image:
            raise JobFailure("input_image: got none, allowed is a picture in base64")
        self.picture = read_picture(self.params.input_image, "input_image")
        _check_size(self.params, self.picture)
        self.ground = _color(self.params.bgcolor)

    def work(self, report: Report) -> Work:
        watch = Stopwatch()
        report.step(0, 1)
        with watch.stage("load"):
            (session,) = yield Aside([self._session])
        with watch.stage("render"):
            (cut,) = yield Aside([lambda: self._remove(session)])
        report.step(1, 1)
        with watch.stage("save"):
            notes = {"parameters": f"rembg: {self.session_name}, Version: {VERSION}"}
            image, warnings = result_image("image_0", cut, notes, self.format)
        info = {
            "model": self.session_name,
            "file": self.session_files[0].name,
            "width": cut.width,
            "height": cut.height,
        }
        raw = printable({**self.raw, "model": self.session_name})
        answer = param_json(raw, info, [image.name], receipt(self.models, self.library))
        return Result([image], answer, watch.seconds, self.warnings + warnings)

    def _session(self) -> Any:
        paths = [file.path for file in self.session_files]
        key = ("rembg", self.session_name, *map(identity_of, paths))
        size = sum(path.stat().st_size for path in paths) * TIMES_ITS_FILE
        return self.library.in_memory.get(key, size, lambda: self._open(paths))

    def _open(self, paths: list[Path]) -> Any:
        from rembg.sessions import sessions  # compiles for a minute on its very first import

        # Never a download: the session's models are our files, whatever the library would look for.
        found: Any = [str(path) for path in paths] if len(paths) > 1 else str(paths[0])
        from_files = classmethod(lambda cls, *args, **kwargs: found)
        kind = type(
            self.session_name, (sessions[self.session_name],), {"download_models": from_files}
        )
        try:
            return kind(self.session_name, _options(), model_path=str(paths[0]))
        except Exception as error:
            # onnxruntime has a dozen exception types without a common one of its own.
            name = self.session_files[0].name
            raise JobFailure(
                f"broken checkpoint: {name} is no ONNX model: {_line(error)}"
            ) from error

    def _remove(self, session: Any) -> Image.Image:
        from rembg import bg

        params = self.params
        cuts = [self._cut(mask) for mask in self._masks(session)]
        whole: Image.Image = bg.get_concat_v_multi(cuts)
        if not (params.only_mask or params.return_mask):
            if self.ground is not None:
                whole = bg.apply_background_color(whole, self.ground)
            whole.info = dict(self.picture.info)
        return whole

    def _masks(self, session: Any) -> list[Image.Image]:
        """What the model finds: one mask, or one for each of several kinds of things."""
        params = self.params
        more: dict[str, Any] = {}
        if params.sam_prompt:
            more["sam_prompt"] = params.marks
        if params.cloth_category:
            more["cloth_category"] = params.cloth_category
        try:
            return list(session.predict(self.picture, **more))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Another model than the session's fails in onnxruntime or, by its output, after it.
            name = self.session_files[0].name
            raise JobFailure(f"{name} is no model for this session: {_line(error)}") from error

    def _cut(self, mask: Image.Image) -> Image.Image:
        """What one mask leaves of the picture, or the mask itself."""
        from rembg import bg

        params = self.params
        only_mask = params.only_mask or params.return_mask
        more: dict[str, Any] = {}
        in_place: AbstractContextManager[None] = contextlib.nullcontext()
        if self.vitmatte is not None and not only_mask:
            in_place = _vitmatte_in_place(self.vitmatte)
            more = {
                "vitmatte": True,
                "vitmatte_model": _variant(self.vitmatte),
                "alpha_matting_foreground_threshold": params.alpha_matting_foreground_threshold,
                "alpha_matting_background_threshold": params.alpha_matting_background_threshold,
                "alpha_matting_erode_size": params.alpha_matting_erode_size,
            }
        try:
            if params.post_process_mask:
                mask = Image.fromarray(bg.post_process(np.array(mask)))
            if params.alpha_matting and not (only_mask or more):
                if matted := self._matted(mask):
                    return matted
                more = {"decontaminate": True}
            with in_place:
                cut: Image.Image = bg.remove(
                    self.picture.copy(),
                    session=_Found(mask),
                    only_mask=only_mask,
                    putalpha=params.putalpha,
                    **{"decontaminate": params.decontaminate, **more},
                )
        except Exception as error:
            if isinstance(error, JobFailure) or is_out_of_memory(error):
                raise
            if "vitmatte" in more and self.vitmatte is not None:
                raise JobFailure(
                    f"{self.vitmatte.name} is no model for vitmatte: {_line(error)}"
                ) from error
            raise JobFailure(f"the background could not be removed: {_line(error)}") from error
        return cut

    def _matted(self, mask: Image.Image) -> Image.Image | None:
        """None, and a warning, where alpha matting comes to nothing: it needs places that are
        surely in front and others that are surely not."""
        from rembg import bg

        params = self.params
        try:
            matted: Image.Image = bg.alpha_matting_cutout(
                self.picture,
                mask,
                params.alpha_matting_foreground_threshold,
                params.alpha_matting_background_threshold,
                params.alpha_matting_erode_size,
            )
        except ValueError as error:
            warning = (
                f"alpha_matting: no effect here: {_line(error)}; a smaller alpha_matting_erode_size"
                " and other thresholds may help"
            )
            if warning not in self.warnings:
                self.warnings.append(warning)
            return None
        return matted


_vitmatte_turn = threading.Lock()
"""Held while a model is in place: the library has one place for each name, whatever is in it."""


@contextlib.contextmanager
def _vitmatte_in_place(model: Shelved) -> Iterator[None]:
    """Where the library would keep what it had fetched. Raises JobFailure."""
    import onnxruntime
    from rembg import matting

    def load() -> Any:
        try:
            return onnxruntime.InferenceSession(
                str(model.path), _options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise JobFailure(
                f"broken checkpoint: {model.name} is no ONNX model: {_line(error)}"
            ) from error

    size = model.path.stat().st_size * TIMES_ITS_FILE
    session = model.library.in_memory.get(("vitmatte", identity_of(model.path)), size, load)
    with _vitmatte_turn:
        matting._sessions[_variant(model)] = session
        try:
            yield
        finally:
            del matting._sessions[_variant(model)]


def _variant(model: Shelved) -> str:
    """What the library calls it."""
    return model.stem.lower().removeprefix("vitmatte-")


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if "OMP_NUM_THREADS" in os.environ:
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return options


def _choose(models: Models, params: CuttingParams) -> tuple[str, list[Shelved]]:
    """The session and the files for it: that of `model`, else that of the first file named."""
    given = [model for model in models.of(MODEL_TYPE) if not model.stem.startswith("vitmatte-")]
    name = params.model.removesuffix(".onnx")
    if not name:
        name = next((m.stem for m in given), "")
        name = SAM if name.startswith("sam_") else name
    if not name:
        raise JobFailure(
            "the job names no checkpoint of type rembg in models; upload u2net.onnx, say, and name"
            ' it: {"rembg": ["u2net.onnx"]}'
        )
    if name not in SESSIONS:
        raise JobFailure(f"model: got {short(name)}, allowed is one of {', '.join(SESSIONS)}")
    if name == SAM:
        return name, _sam_files(models, given)
    found = given[:1] if name in CUSTOM else [model for model in given if model.stem == name]
    if not found:
        raise JobFailure(
            f"model {name} needs the checkpoint {name}.onnx of type rembg: upload it and name it in"
            f' models: {{"rembg": ["{name}.onnx"]}}'
        )
    return name, [models.use(found[0])]


def _sam_files(models: Models, given: list[Shelved]) -> list[Shelved]:
    parts = [
        next((model for model in given if f".{part}" in model.name), None)
        for part in ("encoder", "decoder")
    ]
    if parts[0] is None or parts[1] is None:
        raise JobFailure(
            "model sam needs two checkpoints of type rembg: name both in models, such as"
            ' {"rembg": ["sam_vit_b_01ec64.encoder.onnx", "sam_vit_b_01ec64.decoder.onnx"]}'
        )
    return [models.use(part) for part in parts if part]


def _choose_vitmatte(models: Models, params: CuttingParams) -> Shelved | None:
    if not params.vitmatte:
        return None
    variant = params.vitmatte_model or VITMATTES[0]
    if variant not in VITMATTES:
        raise JobFailure(
            f"vitmatte_model: got {short(variant)}, allowed is one of {', '.join(VITMATTES)}"
        )
    wanted = f"vitmatte-{variant}"
    found = models.find(MODEL_TYPE, wanted)
    if found is None:
        raise JobFailure(
            f"vitmatte needs the checkpoint {wanted}.onnx of type rembg: upload it and"
            " name it in models beside the other one"
        )
    return found


def _check_size(params: CuttingParams, picture: Image.Image) -> None:
    """Raises JobFailure for a picture whose borders can't be looked at."""
    pixels, size = picture.width * picture.height, f"{picture.width}x{picture.height}"
    if params.alpha_matting and pixels > MAX_MATTING_PIXELS:
        raise JobFailure(
            f"alpha_matting: got a picture of {size}, allowed are {MAX_MATTING_PIXELS} pixels in"
            " all"
        )
    asked = [
        name for name in ("alpha_matting", "decontaminate", "vitmatte") if getattr(params, name)
    ]
    if asked and pixels == 1:
        raise JobFailure(f"{asked[0]}: got a picture of 1x1, allowed is one of two pixels or more")


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _color(given: list[int] | str | None) -> tuple[int, int, int, int] | None:
    """[r, g, b], [r, g, b, a] or a name or #rrggbb -> RGBA."""
    if given is None or given == "":
        return None
    if isinstance(given, list):
        red, green, blue, *alpha = given
        return (red, green, blue, alpha[0] if alpha else 255)
    try:
        red, green, blue, opacity = ImageColor.getcolor(given, "RGBA")  # type: ignore[misc]
    except ValueError:
        raise JobFailure(
            f"bgcolor: got {short(given)}, allowed is a color such as #ffffff or [255, 255, 255]"
        ) from None
    return (red, green, blue, opacity)
