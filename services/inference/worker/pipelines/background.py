"""rembg: takes a picture's background away with an ONNX model from the registry.

The library would fetch a model that it lacks, and two of its sessions send pictures to somebody's
cloud. Here a session is one of a list, and its model is the file that the job names.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

from services.inference.worker.pipelines import JobFailure, Progress, Result, file_of
from services.inference.worker.pipelines.images import png, read_picture
from services.inference.worker.pipelines.infotext import VERSION, param_json
from services.inference.worker.pipelines.params import CuttingParams, parse, printable, short
from shared.contracts.inference import RunJob

MODEL_TYPE = "rembg"
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
    "birefnet-portrait",
    "birefnet-dis",
    "birefnet-hrsod",
    "birefnet-cod",
    "birefnet-massive",
)
KEPT = 2
"""Sessions kept; one takes from 0.2 to 2 GB."""
MAX_MATTING_PIXELS = 4_000_000
"""Alpha matting solves a system with a row per pixel: above it takes minutes and gigabytes."""


class Cutter:
    """Keeps the sessions of the last jobs."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def cut(
        self, job: RunJob, body: bytes, files: Mapping[str, Path], progress: Progress
    ) -> Result:
        """Raises JobFailure; what `progress` raises comes through."""
        params, raw = parse(body, CuttingParams)
        session_name, file_name = _choose(job, params)
        if not params.input_image:
            raise JobFailure("input_image: got none, allowed is a picture in base64")
        picture = read_picture(params.input_image, "input_image")
        if params.alpha_matting and picture.width * picture.height > MAX_MATTING_PIXELS:
            raise JobFailure(
                f"alpha_matting: got a picture of {picture.width}x{picture.height},"
                f" allowed are {MAX_MATTING_PIXELS} pixels in all"
            )
        ground = _color(params.bgcolor)
        progress(0, 1)
        started = time.perf_counter()
        session = self._session(session_name, file_of(file_name, files), file_name)
        loaded = time.perf_counter()
        cut = _remove(picture, session, params, ground, file_name)
        done = time.perf_counter()
        progress(1, 1)
        info = {"model": session_name, "file": file_name, "width": cut.width, "height": cut.height}
        packed = png(cut, f"rembg: {session_name}, Version: {VERSION}")
        seconds = {
            "load": round(loaded - started, 4),
            "render": round(done - loaded, 4),
            "save": round(time.perf_counter() - done, 4),
        }
        return Result(
            [packed], param_json(printable({**raw, "model": session_name}), info, 1), seconds, []
        )

    def _session(self, name: str, path: Path, file_name: str) -> Any:
        stat = path.stat()
        key = (name, str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._sessions:
            while len(self._sessions) >= KEPT:
                self._sessions.popitem(last=False)
            self._sessions[key] = _open(name, path, file_name)
        self._sessions.move_to_end(key)
        return self._sessions[key]


def _choose(job: RunJob, params: CuttingParams) -> tuple[str, str]:
    """The session and the file for it: that of `model`, else that of the first file named."""
    given = {Path(m.name).stem: m.name for m in job.models if m.type == MODEL_TYPE}
    name = params.model.removesuffix(".onnx") or next(iter(given), "")
    if not name:
        raise JobFailure(
            "the job names no checkpoint of type rembg in models; upload u2net.onnx, say, and name"
            ' it: {"rembg": ["u2net.onnx"]}'
        )
    if name not in SESSIONS:
        raise JobFailure(f"model: got {short(name)}, allowed is one of {', '.join(SESSIONS)}")
    if name not in given:
        raise JobFailure(
            f"model {name} needs the checkpoint {name}.onnx of type rembg: upload it and name it in"
            f' models: {{"rembg": ["{name}.onnx"]}}'
        )
    return name, given[name]


def _open(name: str, path: Path, file_name: str) -> Any:
    import onnxruntime
    from rembg.sessions import sessions  # compiles for a minute on its very first import

    options = onnxruntime.SessionOptions()
    if "OMP_NUM_THREADS" in os.environ:
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    # Never a download: the session's model is our file, whatever the library would look for.
    from_file = classmethod(lambda cls, *args, **kwargs: str(path))
    session_type = type(name, (sessions[name],), {"download_models": from_file})
    try:
        return session_type(name, options)
    except Exception as error:
        # onnxruntime has a dozen exception types without a common one of its own.
        reason = _line(error)
        raise JobFailure(f"broken checkpoint: {file_name} is no ONNX model: {reason}") from error


def _remove(
    picture: Image.Image,
    session: Any,
    params: CuttingParams,
    ground: tuple[int, int, int, int] | None,
    file_name: str,
) -> Image.Image:
    from rembg import remove

    try:
        cut: Image.Image = remove(
            picture,
            session=session,
            only_mask=params.only_mask or params.return_mask,
            post_process_mask=params.post_process_mask,
            alpha_matting=params.alpha_matting,
            alpha_matting_foreground_threshold=params.alpha_matting_foreground_threshold,
            alpha_matting_background_threshold=params.alpha_matting_background_threshold,
            alpha_matting_erode_size=params.alpha_matting_erode_size,
            bgcolor=ground,
        )
    except MemoryError:
        raise
    except Exception as error:
        # Another model than the session's fails in onnxruntime or, by its output, after it.
        raise JobFailure(f"{file_name} is no model for this session: {_line(error)}") from error
    return cut


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
