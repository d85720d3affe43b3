"""Pictures in (base64 of strangers) and out (files with the `parameters` text of the webui)."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Mapping

import msgspec
import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageColor,
    PngImagePlugin,
    UnidentifiedImageError,
)

from services.inference.worker.pipelines import JobFailure, ResultImage

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MOST_SIDE = {"jpg": 65_500, "webp": 16_383}
MOST_EXIF = {"jpg": 65_533}
"""Bytes: one segment of a JPEG holds all of it."""
LONG_COMMENT = 65_000
MAX_PIXELS = 36_000_000
"""Of one input picture: 6000 x 6000. Told from its header, before anything is unpacked."""
MAX_UNPACKED = PngImagePlugin.MAX_TEXT_CHUNK
"""Bytes of one piece of metadata, unpacked; a larger one is left aside."""

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_TEXTS = (b"parameters", b"XML:com.adobe.xmp", b"Raw profile type exif")
"""What a picture was made from, and two places where tools say how it was held."""
LEAST_TRANSPARENCY = {0: 2, 2: 6, 3: 1}
"""By a PNG's color type (grey, RGB, palette): bytes of a tRNS chunk."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation: what puts a picture upright."""
COLOR_SPACE = {"RGB": b"RGB ", "RGBA": b"RGB ", "P": b"RGB ", "CMYK": b"CMYK"} | dict.fromkeys(
    ("1", "L", "LA"), b"GRAY"
)
"""By a picture's mode: what an ICC profile that is about its colors calls them."""


def read_picture(text: str, field: str) -> Image.Image:
    """From base64 or a `data:` URL, upright, as RGB or RGBA; of its metadata a profile of RGB
    colors is kept and nothing else. Raises JobFailure."""
    packed = _unpacked(text, field)
    form = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our bound on pixels is lower; metadata may be broken
            opened = Image.open(io.BytesIO(_sound(packed)), formats=FORMATS)
            form = opened.format or ""
            if opened.width * opened.height > MAX_PIXELS:
                raise _too_large(field, f"{opened.width}x{opened.height} pixels")
            opened.load()
            return _in_rgb(_upright(_eight_bits(opened)))
    except Image.DecompressionBombError:
        raise _too_large(field, "a picture far above it") from None
    except (JobFailure, MemoryError):
        raise
    except UnidentifiedImageError:
        raise JobFailure(f"{field}: no {', '.join(FORMATS)} that can be read") from None
    except Exception as error:
        # Damaged pictures end in a dozen types of errors: zlib's, struct's, SyntaxError, …
        reason = str(error) or type(error).__name__
        raise JobFailure(f"{field}: a damaged {form or 'picture'}: {reason[:200]}") from None


def _sound(packed: bytes) -> bytes:
    """A PNG without those of its ancillary chunks that are damaged, unpack to more than they may or
    are of no use here, any of which Pillow would take for a broken picture. Other formats as they
    are."""
    if not packed.startswith(PNG):
        return packed
    kept, seen, place, kind = [PNG], set[bytes](), len(PNG), b""
    while place + 8 <= len(packed) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", packed, place)
        chunk = packed[place : place + 12 + length]
        name = chunk[8:].partition(b"\0")[0] if kind in (b"tEXt", b"zTXt", b"iTXt") else kind
        if kind in PNG_PIXELS:
            kept.append(chunk)
        elif name not in seen and _is_usable(kind, chunk, color_type=packed[25]):
            seen.add(name)
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def _is_usable(kind: bytes, chunk: bytes, color_type: int) -> bool:
    """Of a PNG's ancillary chunks. `chunk`: with its length, kind and checksum."""
    data = chunk[8:-4]
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    name, _, rest = data.partition(b"\0")
    match kind:
        case b"tRNS":
            return len(data) >= LEAST_TRANSPARENCY.get(color_type, 0)
        case b"eXIf":
            return True
        case b"iCCP":
            return rest[:1] == b"\0" and _unpacks(rest[1:])
        case b"zTXt":
            return name in PNG_TEXTS and rest[:1] == b"\0" and _unpacks(rest[1:])
        case b"iTXt":
            text = rest[2:].split(b"\0", 2)[-1]
            return name in PNG_TEXTS and (rest[:1] == b"\0" or _unpacks(text))
        case b"tEXt":
            return name in PNG_TEXTS
    return False


def _unpacks(data: bytes) -> bool:
    stream = zlib.decompressobj()
    try:
        stream.decompress(data, MAX_UNPACKED)
    except zlib.error:
        return False
    return not stream.unconsumed_tail


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Depth maps often come with 16 bits per pixel, of which Pillow would keep the lower ones."""
    if not picture.mode.startswith("I;16"):
        return picture
    depths = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    depths.info = picture.info
    return depths


def _upright(picture: Image.Image) -> Image.Image:
    """As its camera was held, as far as that can be read."""
    orientation = None
    with contextlib.suppress(Exception):  # what is broken in EXIF is no reason to refuse a picture
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _in_rgb(picture: Image.Image) -> Image.Image:
    """RGB or RGBA. A profile of grey or CMYK colors is used up by the conversion; one that is
    about other colors than the picture's is left aside."""
    transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
    result = picture.convert("RGBA" if transparent else "RGB")
    packed: bytes = picture.info.get("icc_profile") or b""
    space, result.info = packed[16:20], {}
    if not packed or space != COLOR_SPACE.get(picture.mode):
        return result
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):  # a profile of no use
        profile = ImageCms.ImageCmsProfile(io.BytesIO(packed))
        if space == b"RGB " and len(packed) <= MAX_UNPACKED:
            result.info["icc_profile"] = packed
        elif space != b"RGB ":
            converted = ImageCms.profileToProfile(
                picture.convert("L") if space == b"GRAY" else picture,
                profile,
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
            assert converted is not None
            if transparent:
                converted.putalpha(result.getchannel("A"))
            converted.info = {}
            return converted
    return result


def _unpacked(text: str, field: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise JobFailure(f"{field}: got a URL, allowed is a picture in base64")
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise JobFailure(f"{field}: no base64: {error}") from None


def notes_of(text: str) -> dict[str, str]:
    """The `parameters` that a PNG in base64 carries, if it is one that does."""
    try:
        opened = Image.open(io.BytesIO(_sound(_unpacked(text, ""))), formats=("PNG",))
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

    def reason_against(self, picture: Image.Image) -> str | None:
        """Why it can't hold a picture."""
        most = MOST_SIDE.get(self.name, math.inf)
        if max(picture.size) > most:
            return f"no picture of {picture.width}x{picture.height}, only sides up to {most}"
        if self.name == "jpg" and picture.mode == "RGBA":
            clearest, _ = picture.getchannel("A").getextrema()
            return "no transparency" if clearest != 255 else None
        return None

    def fitting(self, notes: Mapping[str, str]) -> dict[str, str]:
        """Those that it can hold, the shorter ones first."""
        fits: dict[str, str] = {}
        for name in sorted(notes, key=lambda name: len(notes[name])):
            more = {key: notes[key] for key in notes if key in fits or key == name}
            if self.name == "png" or self._holds("\n".join(more.values())):
                fits = more
        return fits

    def _holds(self, comment: str) -> bool:
        return len(_exif(comment).tobytes()) <= MOST_EXIF.get(self.name, math.inf)


def result_image(
    stem: str, picture: Image.Image, notes: Mapping[str, str], form: Format
) -> tuple[ResultImage, list[str]]:
    """A picture as a file, and warnings: it is a PNG where its format can't hold the picture, and
    comes without those `notes` that are longer than its format can hold."""
    warnings = []
    if reason := form.reason_against(picture):
        warnings.append(f"samples_format {form.name} holds {reason}: {stem} is a PNG")
        form = Format()
    fitting = form.fitting(notes)
    if left_out := [name for name in notes if name not in fitting]:
        warnings.append(
            f"samples_format {form.name} holds notes of {MOST_EXIF[form.name]} bytes: pictures are"
            f" without their {' and '.join(left_out)}, which the job's param JSON has"
        )
    name = f"{stem}.{form.name}"
    return ResultImage(name, form.media_type, pack(picture, fitting, form)), warnings


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
    """In UTF-16, which all readers know; what is too long for a JPEG so, and is ASCII, as that."""
    exif = Image.Exif()
    if comment:
        encoded = b"UNICODE\0" + comment.encode("utf-16-be")
        if len(encoded) > LONG_COMMENT and comment.isascii():
            encoded = b"ASCII\0\0\0" + comment.encode()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = encoded
    return exif
