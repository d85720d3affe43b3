"""Bodies of extra-single-image and extra-batch-images jobs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines.params.reading import Body, Share, convert, ignored
from shared.webui.settings import WebuiSettings

Side = Annotated[int, Meta(ge=1)]


SINGLE, BATCH = "extra-single-image", "extra-batch-images"


class FileData(msgspec.Struct, frozen=True, kw_only=True):
    """A picture in base64, and the name of its file."""

    data: str = ""
    name: str = ""


class EnlargingParams(msgspec.Struct, frozen=True, kw_only=True):
    """`image` belongs to extra-single-image, `imageList` to extra-batch-images. `resize_mode` 0:
    by `upscaling_resize`; 1: to `upscaling_resize_w` x `upscaling_resize_h`, cropped to that if
    `upscaling_crop`. `upscaler_2` is blended in with its visibility. Then faces are restored, by
    each of two models with its own visibility. `codeformer_weight`: 0 for its greatest effect."""

    image: str = ""
    imageList: list[FileData] = []
    resize_mode: Literal[0, 1] = 0
    upscaling_resize: Annotated[float, Meta(ge=1, le=8)] = 2.0
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: Share = 0.0
    gfpgan_visibility: Share = 0.0
    codeformer_visibility: Share = 0.0
    codeformer_weight: Share = 0.0

    def pictures(self, task_type: str) -> dict[str, str]:
        """Field -> picture in base64."""
        if task_type != BATCH:
            return {"image": self.image} if self.image else {}
        return {f"imageList[{n}].data": file.data for n, file in enumerate(self.imageList)}


_HARMLESS: dict[str, tuple[object, ...]] = {
    "image": ("",),
    "imageList": ([],),
    "show_extras_results": (True, False),
    "upscale_first": (True, False),
}


def parse_enlarging(
    raw: Body, webui: WebuiSettings, task_type: str = SINGLE
) -> tuple[EnlargingParams, list[str]]:
    """The typed params, and the warnings. Raises JobFailure."""
    most = dict.fromkeys(("upscaling_resize_w", "upscaling_resize_h"), webui.max_upscaled_side)
    params = convert(raw, EnlargingParams, most=most)
    known = {field.name for field in msgspec.structs.fields(EnlargingParams)}
    known.remove("image" if task_type == BATCH else "imageList")
    return params, ignored(raw, _HARMLESS, known)
