"""Pictures in (base64 of strangers) and out (PNG with the `parameters` text of the webui)."""

from __future__ import annotations

import base64
import io
import warnings

from PIL import Image, ImageOps, PngImagePlugin

from services.inference.worker.pipelines import JobFailure

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 36_000_000
"""Of one input picture: 6000 x 6000. Told from its header, before anything is unpacked."""


def read_picture(text: str, field: str) -> Image.Image:
    """From base64 or a `data:` URL, upright, as RGB or RGBA. Raises JobFailure."""
    if text.startswith(("http://", "https://")):
        raise JobFailure(f"{field}: got a URL, allowed is a picture in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        packed = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise JobFailure(f"{field}: no base64: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our bound is lower
            opened = Image.open(io.BytesIO(packed), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise _too_large(field, f"{opened.width}x{opened.height} pixels")
        picture = ImageOps.exif_transpose(opened)
        transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        return picture.convert("RGBA" if transparent else "RGB")
    except Image.DecompressionBombError:
        raise _too_large(field, "a picture far above it") from None
    except (JobFailure, MemoryError):
        raise
    except Exception:
        # Damaged pictures end in a dozen types of errors: zlib's, struct's, SyntaxError, …
        raise JobFailure(f"{field}: no {', '.join(FORMATS)} that can be read") from None


def _too_large(field: str, got: str) -> JobFailure:
    return JobFailure(f"{field}: got {got}, allowed are {MAX_PIXELS} pixels in all")


def on_white(picture: Image.Image) -> Image.Image:
    """Without transparency, as the webui does before img2img."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def fit(picture: Image.Image, width: int, height: int, resize_mode: int) -> Image.Image:
    """`resize_mode` of the webui: 0 stretch, 1 crop to the ratio, 2 fill up to the ratio."""
    size = (width, height)
    if picture.size == size:
        return picture
    if resize_mode == 1:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if resize_mode == 2:
        scale = min(width / picture.width, height / picture.height)
        inner_size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        inner = picture.resize(inner_size, Image.Resampling.LANCZOS)
        # The webui draws the outermost rows or columns out to the border.
        filled = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (width - inner.width) // 2, (height - inner.height) // 2
        right, bottom = left + inner.width, top + inner.height
        if top > 0:
            filled.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
            rest = height - bottom
            below = inner.resize((width, rest), box=(0, inner.height, width, inner.height))
            filled.paste(below, (0, bottom))
        if left > 0:
            filled.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
            rest = width - right
            beside = inner.resize((rest, height), box=(inner.width, 0, inner.width, height))
            filled.paste(beside, (right, 0))
        filled.paste(inner, (left, top))
        return filled
    return picture.resize(size, Image.Resampling.LANCZOS)


def png(picture: Image.Image, parameters: str) -> bytes:
    """`parameters` goes where the webui writes and reads it: a text chunk of that name."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", parameters)
    packed = io.BytesIO()
    picture.save(packed, "PNG", pnginfo=notes)
    return packed.getvalue()
