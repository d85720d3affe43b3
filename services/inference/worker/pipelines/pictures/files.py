"""Pictures in (base64 of strangers) and out (files with the `parameters` text of the webui)."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping

import msgspec
import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, PngImagePlugin

from services.inference.worker.pipelines import JobFailure

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MOST_SIDE = {"jpg": 65_500, "webp": 16_383}
MAX_PIXELS = 36_000_000
"""Of one input picture: 6000 x 6000. Told from its header, before anything is unpacked."""


def read_picture(text: str, field: str) -> Image.Image:
    """From base64 or a `data:` URL, upright, as RGB or RGBA. Raises JobFailure."""
    packed = _unpacked(text, field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is lower
            opened = Image.open(io.BytesIO(packed), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise _too_large(field, f"{opened.width}x{opened.height} pixels")
        picture = _eight_bits(ImageOps.exif_transpose(opened))
        transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        return picture.convert("RGBA" if transparent else "RGB")
    except Image.DecompressionBombError:
        raise _too_large(field, "a picture far above it") from None
    except (JobFailure, MemoryError):
        raise
    except Exception:
        # Damaged pictures end in a dozen types of errors: zlib's, struct's, SyntaxError, …
        raise JobFailure(f"{field}: no {', '.join(FORMATS)} that can be read") from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Depth maps often come with 16 bits per pixel, of which Pillow would keep the lower ones."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def _unpacked(text: str, field: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise JobFailure(f"{field}: got a URL, allowed is a picture in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise JobFailure(f"{field}: no base64: {error}") from None


def notes_of(text: str) -> dict[str, str]:
    """The `parameters` that a PNG in base64 carries, if it is one that does."""
    try:
        opened = Image.open(io.BytesIO(_unpacked(text, "")), formats=("PNG",))
        found = getattr(opened, "text", {}).get("parameters")
    except Exception:  # whatever it is, it has none
        return {}
    return {"parameters": str(found)} if found else {}


def _too_large(field: str, got: str) -> JobFailure:
    return JobFailure(f"{field}: got {got}, allowed are {MAX_PIXELS} pixels in all")


def on_ground(picture: Image.Image, color: str, field: str) -> Image.Image:
    """Without transparency, as the webui does before img2img. Raises JobFailure for no color."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    try:
        ground = Image.new("RGBA", picture.size, ImageColor.getrgb(color))
    except ValueError:
        raise JobFailure(f"{field}: got no color, allowed is one such as #ffffff") from None
    return Image.alpha_composite(ground, picture).convert("RGB")


class Format(msgspec.Struct, frozen=True):
    """How pictures are packed. `name`: png, jpg or webp."""

    name: str = "png"
    quality: int = 80
    lossless: bool = False

    @property
    def media_type(self) -> str:
        return {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}[self.name]

    def for_size(self, size: tuple[int, int]) -> Format:
        """PNG in place of a format that has no picture of this size."""
        return Format() if max(size) > MOST_SIDE.get(self.name, math.inf) else self


def pack(picture: Image.Image, notes: Mapping[str, str], form: Format) -> bytes:
    """`notes` (`parameters` above all) go where the webui writes and reads them: in a PNG each to a
    text chunk of its name, else all to the EXIF comment."""
    packed = io.BytesIO()
    if form.name == "png":
        chunks = PngImagePlugin.PngInfo()
        for name, text in notes.items():
            chunks.add_text(name, text)
        picture.save(packed, "PNG", pnginfo=chunks)
        return packed.getvalue()
    exif = _exif("\n".join(notes.values()))
    if form.name == "jpg":
        picture.convert("RGB").save(packed, "JPEG", quality=form.quality, exif=exif)
    else:
        picture.save(packed, "WEBP", quality=form.quality, lossless=form.lossless, exif=exif)
    return packed.getvalue()


def _exif(comment: str) -> Image.Exif:
    exif = Image.Exif()
    if comment:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment.encode(
            "utf-16-be"
        )
    return exif
