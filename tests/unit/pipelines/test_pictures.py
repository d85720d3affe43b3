"""Pictures of strangers, what is made of them, and what is written down with the results."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageFilter

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.families import STANDARD
from services.inference.worker.pipelines.pictures import masks, previews
from services.inference.worker.pipelines.pictures.files import (
    Format,
    notes_of,
    on_ground,
    pack,
    read_picture,
    result_image,
)
from services.inference.worker.pipelines.pictures.fitting import fit
from services.inference.worker.pipelines.pictures.grids import grid, labelled
from services.inference.worker.pipelines.pictures.infotext import (
    VERSION,
    fields_text,
    infotext,
    param_json,
)
from services.inference.worker.pipelines.pictures.previews import Mixes, fit_mix
from shared.weights.kinds import SD1, SDXL
from tests.unit.pipelines.conftest import at_once
from tests.unit.pipelines.easel import DEMO, NAME, Easel, base64_of, pixels_of, read_back

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0),
    (0, 128, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
)


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """No two places of it look the same."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, ImageChops.invert(across)))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and has no pixels."""
    head = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    check = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + check + b"\0\0\0\x63IDAT"


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Pictures of strangers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not base64!", "no base64: "),
        ("é" * 8, "no base64: "),
        ("-_-_", "no base64: "),
        ("", "no PNG, JPEG, WEBP, BMP, GIF that can be read"),
        ("data:image/png;base64,", "no PNG, JPEG"),
        (packed(b"no picture"), "no PNG, JPEG"),
        (packed(png_of(64, 64)), "a damaged PNG: "),
        (packed(png_of(0, 64)), "no PNG, JPEG"),
        (packed(png_of(60_000, 60_000)), "got a picture far above it, allowed are 36000000 pixels"),
        (packed(png_of(6_001, 6_000)), "got 6001x6000 pixels, allowed are 36000000 pixels in all"),
        ("https://example.org/x.png", "got a URL, allowed is a picture in base64"),
        ("http://example.org/x.png", "got a URL, allowed is a picture in base64"),
        (base64_of(Image.new("RGB", (8, 8)), "TIFF"), "no PNG, JPEG"),
        (base64_of(Image.new("RGB", (16, 16)), "ICO"), "no PNG, JPEG"),
        (packed(base64.b64decode(base64_of(scene(), "JPEG"))[:-200]), "a damaged JPEG: image file"),
    ],
)
def test_pictures_that_are_none_or_too_large_are_refused(text: str, reason: str) -> None:
    """A PNG may say that it has billions of pixels: nothing is unpacked to find out."""
    with pytest.raises(JobFailure) as failure:
        read_picture(text, "mask")
    assert str(failure.value).startswith(f"mask: {reason}")


def test_damaged_pictures_are_refused_or_read() -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = base64.b64decode(base64_of(scene(), form))
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            broken = bytes([*whole[:place], whole[place] ^ 0xFF, *whole[place + 1 :]])
            for data in (broken, whole[:place]):
                try:
                    read_picture(packed(data), "image")
                except JobFailure as failure:
                    assert str(failure).startswith("image: ")  # noqa: PT017


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.binary(max_size=40).map(packed))
def test_any_text_is_a_picture_or_refused(text: str) -> None:
    with pytest.raises(JobFailure, match=r"^image: "):
        read_picture(text, "image")


def test_pictures_come_in_many_forms() -> None:
    plain = Image.new("RGB", (8, 6), RED)
    for form in ("PNG", "BMP", "GIF", "JPEG", "WEBP"):
        picture = read_picture(base64_of(plain, form), "image")
        assert (picture.mode, picture.size) == ("RGB", (8, 6))
        assert abs(pixels_of(picture) - pixels_of(plain)).max() <= 3
    text = base64_of(plain)
    for other in (
        f"data:image/png;base64,{text}",
        f"{text[:20]}\n {text[20:]}\n",
        text.rstrip("="),
    ):
        assert pixels_of(read_picture(other, "image")).tolist() == pixels_of(plain).tolist()
    for mode in ("L", "1", "P", "CMYK"):
        form = "JPEG" if mode == "CMYK" else "PNG"
        picture = read_picture(base64_of(Image.new("RGB", (8, 6), WHITE).convert(mode), form), "x")
        assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", WHITE)


def test_depth_maps_of_sixteen_bits_keep_their_depth() -> None:
    depths = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    picture = read_picture(base64_of(Image.fromarray(depths)), "image")
    assert pixels_of(picture)[..., 0].tolist() == (depths // 257).tolist()


def test_pictures_are_turned_as_their_camera_says() -> None:
    picture = Image.new("RGB", (16, 8), RED)
    ImageDraw.Draw(picture).rectangle((0, 0, 7, 7), fill=BLUE)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = read_picture(base64_of(picture, "JPEG", exif=exif, quality=100), "image")
    assert turned.size == (8, 16)
    upper, lower = pixels_of(turned)[2, 4], pixels_of(turned)[13, 4]
    assert upper[2] > 200 > upper[0]
    assert lower[0] > 200 > lower[2]


# Metadata of pictures of strangers


def chunk(kind: bytes, data: bytes, *, sound: bool = True) -> bytes:
    """Of a PNG. Not `sound`: with a wrong checksum."""
    checksum = zlib.crc32(kind + data) ^ (not sound)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunks(*chunks: bytes, png: bytes | None = None, place: int = 33) -> str:
    """A PNG with more chunks, behind its header or elsewhere."""
    png = png or base64.b64decode(base64_of(scene()))
    return packed(png[:place] + b"".join(chunks) + png[place:])


LONG = b"x" * 1_600_000
ORIENTATION = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
"""EXIF that says: turn it by 90 degrees."""


@pytest.mark.parametrize(
    "more",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(LONG)),
        chunk(b"zTXt", b"parameters\0\x05no method"),
        chunk(b"zTXt", b"parameters\0\0no stream"),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"parameters\0\1\0"),
        chunk(b"tEXt", b"workflow\0" + LONG) * 45,
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
        chunk(b"iCCP", b"icc"),
        chunk(b"iCCP", b"icc\0\x01x"),
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        chunk(b"eXIf", ORIENTATION[:12]),
        chunk(b"eXIf", ORIENTATION, sound=False),
        chunk(b"tEXt", b"a\0b", sound=False),
        chunk(b"tRNS", b"\0"),
        chunk(b"tRNS", b"\0" * 6, sound=False),
        chunk(b"pHYs", b""),
        chunk(b"acTL", b"\0"),
        chunk(b"xxxx", b"anything"),
    ],
)
@pytest.mark.parametrize("place", [33, -12])
def test_what_is_wrong_beside_the_pixels_of_a_png_is_left_aside(more: bytes, place: int) -> None:
    text = with_chunks(more, place=place)
    picture = read_picture(text, "image")
    assert (picture.mode, picture.info) == ("RGB", {})
    assert pixels_of(picture).tolist() == pixels_of(scene()).tolist()
    assert notes_of(text) == {}


def test_what_is_sound_beside_the_pixels_of_a_png_is_used() -> None:
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    for more in (chunk(b"eXIf", ORIENTATION), chunk(b"iTXt", xmp)):
        broken = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG))
        assert read_picture(with_chunks(broken, more), "image").size == (48, 64)
    for more in (
        chunk(b"tEXt", b"parameters\0notes"),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"notes")),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"notes")),
    ):
        assert notes_of(with_chunks(broken, more)) == {"parameters": "notes"}
    clear = Image.new("RGB", (8, 6), RED)
    png = base64.b64decode(base64_of(clear, transparency=RED))
    assert read_picture(with_chunks(broken, png=png), "image").mode == "RGBA"


def test_a_png_of_a_thousand_bombs_is_read_at_once() -> None:
    bomb = zlib.compress(bytes(1 << 20))
    bombs = [chunk(b"zTXt", b"parameters\0\0" + bomb), chunk(b"iCCP", b"icc\0\0" + bomb)] * 1000
    with at_once(seconds=1):
        assert read_picture(with_chunks(*bombs), "image").size == (64, 48)


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ([(0x0112, 3, 1, 6)], (48, 64)),
        ([(0x0112, 3, 1, 6), (0x011A, 5, 1, 99_999)], (48, 64)),  # points out of the file
        ([(0x0112, 3, 1, 6), (0x011A, 5, 2, 8)], (48, 64)),
        ([(0x0112, 3, 1, 6), (0x010F, 3, 1, 5)], (48, 64)),  # a number where a text belongs
        ([(0x0112, 3, 1, 6), (0x8825, 4, 1, 77_777)], (48, 64)),
        ([(0x0112, 3, 1, 0)], (64, 48)),
        ([(0x0112, 3, 1, 9)], (64, 48)),
        ([(0x0112, 2, 2, 0x36)], (64, 48)),  # a text
        ([(0x0112, 3, 9, 6)], (64, 48)),
        ([(0x0112, 5, 1, 99_999)], (64, 48)),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_of_any_camera_is_read_as_far_as_it_can_be(
    entries: list[tuple[int, int, int, int]], size: tuple[int, int], form: str
) -> None:
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    exif += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    for head in (b"Exif\0\0", b"Exif\0\0Exif\0\0"):
        picture = read_picture(base64_of(scene(), form, exif=head + exif), "image")
        assert (picture.size, picture.info) == (size, {})
    for broken in (b"", b"garbage!" * 4, exif[:9]):
        text = base64_of(scene(), form, exif=b"Exif\0\0" + broken)
        assert read_picture(text, "image").size == (64, 48)


def icc_of(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile of colors of this space, related to XYZ, or to Lab for CMYK."""
    tags = {"wtpt": b"XYZ " + bytes(4) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D), **tags}
    table, data, place = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name.encode() + struct.pack(">II", place + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    related = b"Lab " if space == b"CMYK" else b"XYZ "
    head = struct.pack(">I", place + len(data)) + bytes(4) + b"\x02\x20\0\0" + b"prtr" + space
    head += related + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


def linear_grey() -> bytes:
    """Of half the light at level 128, where sRGB has it at 188."""
    return icc_of(b"GRAY", kTRC=b"curv" + bytes(8))


def blue_ink() -> bytes:
    """Of CMYK with inks of which the first is blue and the last black: Lab at each corner."""
    white, blue, black = bytes((255, 128, 128)), bytes((128, 168, 78)), bytes((0, 128, 128))
    corners = [black if n & 1 else blue if n & 8 else white for n in range(16)]
    straight = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65_536 * (place % 4 == 0)) for place in range(9))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity
    return icc_of(b"CMYK", A2B0=lut + straight * 4 + b"".join(corners) + straight * 3)


def test_colors_are_converted_with_their_profile() -> None:
    grey, inks = Image.new("L", (8, 8), 128), Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for picture, form, profile, wanted in (
        (grey, "JPEG", linear_grey(), (188, 188, 188)),
        (grey, "PNG", linear_grey(), (188, 188, 188)),
        (inks, "JPEG", blue_ink(), (148, 96, 205)),
    ):
        plain = read_picture(base64_of(picture, form), "image")
        read = read_picture(base64_of(picture, form, icc_profile=profile), "image")
        assert (read.mode, read.info) == ("RGB", {})
        assert abs(pixels_of(read)[4, 4] - wanted).max() <= 12
        assert abs(pixels_of(plain)[4, 4] - wanted).max() > 40
    clear = Image.merge("LA", (grey, Image.new("L", (8, 8), 7)))
    read = read_picture(base64_of(clear, icc_profile=linear_grey()), "image")
    assert read.getpixel((4, 4)) == (188, 188, 188, 7)


def test_only_a_profile_of_the_picture_s_own_colors_is_kept() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("PNG", "JPEG", "WEBP"):
        read = read_picture(base64_of(scene(), form, icc_profile=profile), "image")
        assert read.info == {"icc_profile": profile}
    wrong = [profile[:16] + space + profile[20:] for space in (b"CMYK", b"GRAY", b"Lab ", b"????")]
    for mode in ("RGB", "L", "CMYK"):
        plain = read_picture(base64_of(scene().convert(mode), "JPEG", quality=95), "image")
        for other in [*wrong, *([] if mode == "RGB" else [profile]), profile[:60], b"x" * 200]:
            text = base64_of(scene().convert(mode), "JPEG", quality=95, icc_profile=other)
            read = read_picture(text, "image")
            assert read.info == {}
            assert read.tobytes() == plain.tobytes()
    text = base64_of(scene(), "WEBP", icc_profile=profile + bytes(1 << 20))
    assert read_picture(text, "image").info == {}  # a JPEG would not hold it
    commented = base64_of(scene(), "GIF", comment=b"x" * 100_000)
    assert read_picture(commented, "image").info == {}  # nor this


def test_transparency_is_kept_and_can_be_put_on_a_ground() -> None:
    clear = Image.new("RGBA", (4, 4), (*RED, 0))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([level for level in range(256) for _ in "rgb"])
    for text in (
        base64_of(clear),
        base64_of(clear, "WEBP", lossless=True),
        base64_of(palette, "PNG", transparency=3),
        base64_of(palette, "GIF", transparency=3),
        base64_of(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED),
        base64_of(clear.convert("LA")),
    ):
        picture = read_picture(text, "image")
        assert (picture.mode, picture.getpixel((0, 0))[3]) == ("RGBA", 0)  # type: ignore[index]
        assert on_ground(picture, "#00ff00", "ground").getpixel((0, 0)) == (0, 255, 0)
    half = on_ground(Image.new("RGBA", (1, 1), (255, 255, 255, 128)), "black", "ground")
    assert half.getpixel((0, 0)) == (128, 128, 128)
    plain = Image.new("RGB", (1, 1), RED)
    assert on_ground(plain, "no color, as it is not needed", "ground").getpixel((0, 0)) == RED
    with pytest.raises(JobFailure, match=r"^ground: got no color, allowed is one such as #ffffff"):
        on_ground(clear, "no color", "ground")


# Resize modes


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(9000, 1), (1, 9000), (1, 1), (37, 91), (2000, 3)])
def test_pictures_of_any_shape_fit(size: tuple[int, int], mode: str) -> None:
    for resize_mode in (0, 1, 2, 3):
        for wanted in ((64, 128), (2048, 64), size):
            fitted = fit(Image.new(mode, size), *wanted, resize_mode)
            assert (fitted.size, fitted.mode) == (wanted, mode)


def test_resize_modes_stretch_crop_and_fill() -> None:
    wide = Image.new("RGB", (128, 64), RED)
    ImageDraw.Draw(wide).rectangle((32, 0, 95, 63), fill=BLUE)
    for mode, corner, middle in ((0, RED, BLUE), (1, BLUE, BLUE), (2, RED, BLUE), (3, RED, BLUE)):
        fitted = fit(wide, 64, 64, mode)
        assert fitted.getpixel((1, 1)) == corner
        assert fitted.getpixel((32, 32)) == middle


def test_filling_draws_the_borders_out() -> None:
    picture = Image.new("RGB", (64, 32), BLUE)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 63, 3), fill=RED)
    draw.rectangle((0, 28, 63, 31), fill=GREEN)
    filled = pixels_of(fit(picture, 64, 96, 2))
    assert abs(filled[:31] - RED).max() <= 1
    assert abs(filled[65:] - GREEN).max() <= 1
    assert filled[32:64].tolist() == pixels_of(picture).tolist()
    beside = pixels_of(fit(picture.transpose(Image.Transpose.ROTATE_90), 96, 64, 2))
    assert abs(beside[:, :31] - RED).max() <= 1
    assert abs(beside[:, 65:] - GREEN).max() <= 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 300))
def test_a_picture_of_the_same_ratio_has_no_border(side: int, factor: int, wanted: int) -> None:
    """However it is rounded."""
    picture = Image.new("RGB", (side, side * factor), RED)
    ImageDraw.Draw(picture).line((0, 0, 0, side * factor), fill=BLUE)
    height = wanted * factor
    if height > 3000:
        return
    stretched, filled = (fit(picture, wanted, height, mode) for mode in (0, 2))
    assert stretched.tobytes() == filled.tobytes()


# Masks


def mask_of(*box: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """White in the box: left, top, right, bottom."""
    mask = Image.new("RGB", size)
    mask.paste(WHITE, box)  # type: ignore[arg-type]
    return mask


def prepared(mask: Image.Image, **options: Any) -> masks.Inpainting:
    usual = {
        "size": (64, 48),
        "invert": False,
        "blur": (0, 0),
        "whole": True,
        "padding": 0,
        "resize_mode": 0,
    }
    inpainting = masks.prepare(mask, **{**usual, **options})
    assert inpainting is not None
    return inpainting


def test_a_mask_is_white_or_opaque() -> None:
    opaque = Image.new("RGBA", (4, 4), (*WHITE, 255))
    assert masks.black_and_white(opaque).getextrema() == (255, 255)
    erased = Image.new("RGBA", (4, 4), (*WHITE, 0))
    erased.putpixel((1, 1), (*BLACK, 200))
    levels = masks.black_and_white(erased)
    assert (levels.getpixel((1, 1)), levels.getpixel((0, 0))) == (255, 0)
    erased.putpixel((1, 1), (*WHITE, 128))
    assert masks.black_and_white(erased).getextrema() == (0, 0)
    grey = masks.black_and_white(Image.new("L", (4, 4), 100))
    assert grey.getextrema() == (100, 100)


def test_a_mask_can_be_inverted_and_blurred_each_way() -> None:
    mask = mask_of(16, 16, 32, 32)
    assert prepared(mask).mask.getbbox() == (16, 16, 32, 32)
    inverted = prepared(mask, invert=True).mask
    assert (inverted.getpixel((20, 20)), inverted.getpixel((0, 0))) == (0, 255)
    across = prepared(mask, blur=(4, 0)).mask.getbbox()
    assert across is not None
    left, top, right, bottom = across
    assert (top, bottom) == (16, 32)
    assert 16 - left == right - 32
    assert 4 <= 16 - left <= 10
    down = prepared(mask, blur=(0, 4)).mask.getbbox()
    assert down == (16, left, 32, right)
    level = prepared(mask, blur=(4, 4)).mask.getpixel((16, 24))
    assert isinstance(level, int | float)
    assert 100 < level < 160  # half of it on the edge


def test_the_part_around_a_mask_is_as_the_webui_cuts_it() -> None:
    def box(*mask: int, size: tuple[int, int] = (64, 64), **options: Any) -> masks.Box | None:
        drawn = mask_of(*mask, size=(128, 96))
        return prepared(drawn, size=size, whole=False, **options).paste

    assert box(40, 40, 56, 56) == (40, 40, 56, 56)
    assert box(40, 40, 56, 56, padding=8) == (32, 32, 64, 64)
    assert box(40, 40, 72, 56) == (40, 32, 72, 64)  # higher, as a square is rendered
    assert box(40, 40, 56, 56, size=(128, 64)) == (32, 40, 64, 56)  # wider
    assert box(0, 40, 32, 48) == (0, 28, 32, 60)
    assert box(40, 0, 72, 8) == (40, 0, 72, 32)  # moved back into the picture
    assert box(40, 90, 72, 96) == (40, 64, 72, 96)
    assert box(0, 40, 128, 56) == (0, 0, 128, 96)  # no higher than the picture is
    assert box(0, 0, 128, 96, padding=64) == (0, 0, 128, 96)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_part_around_a_mask_holds_it_and_lies_in_the_picture(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    size = data.draw(st.sampled_from([(64, 64), (128, 64), (64, 200)]))
    found = prepared(
        mask_of(left, top, right, bottom, size=(width, height)),
        size=size,
        whole=False,
        padding=data.draw(st.integers(0, 10)),
    )
    assert found.paste is not None
    assert 0 <= found.paste[0] <= left < right <= found.paste[2] <= width
    assert 0 <= found.paste[1] <= top < bottom <= found.paste[3] <= height
    assert found.mask.size == size
    assert found.overlay_mask.size == (width, height)


def test_a_mask_without_anything_in_it_has_no_part_around_it() -> None:
    nothing = Image.new("RGB", (64, 48))
    assert (
        masks.prepare(
            nothing,
            (64, 64),
            invert=False,
            blur=(4, 4),
            whole=False,
            padding=0,
            resize_mode=0,
        )
        is None
    )


def test_what_is_not_masked_stays_exactly_as_it_was() -> None:
    picture, result = scene(), Image.new("RGB", (64, 48), RED)
    mask = mask_of(20, 10, 40, 30)
    inpainting = prepared(mask, blur=(2, 2))
    whole = masks.lay_over(result, masks.overlay_of(picture, inpainting), inpainting.paste)
    changed = (pixels_of(whole) != pixels_of(picture)).any(axis=2)
    touched = np.asarray(inpainting.overlay_mask) > 0
    assert not changed[~touched].any()
    assert pixels_of(whole)[20, 30].tolist() == [*RED]
    assert changed[12:28, 22:38].all()


def test_a_part_is_put_back_where_it_was_cut() -> None:
    picture = scene(128, 96)
    mask = mask_of(40, 40, 56, 60, size=(128, 96))
    inpainting = prepared(mask, size=(128, 128), whole=False, padding=4)
    assert inpainting.paste is not None
    overlay = masks.overlay_of(picture, inpainting)
    part = fit(picture.crop(inpainting.paste), 128, 128, 2)
    same = masks.lay_over(part, overlay, inpainting.paste)
    assert abs(pixels_of(same) - pixels_of(picture)).max() <= 8  # enlarged and made small again
    other = masks.lay_over(Image.new("RGB", (128, 128), RED), overlay, inpainting.paste)
    changed = (pixels_of(other) != pixels_of(picture)).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 59, 40, 55)


def test_masked_places_are_filled_with_the_colors_around_them() -> None:
    picture = Image.new("RGB", (64, 48), BLUE)
    picture.paste(RED, (24, 12, 40, 36))
    mask = mask_of(20, 8, 44, 40).convert("L")
    filled = masks.filled(picture, mask)
    assert abs(pixels_of(filled) - BLUE).max() <= 2
    outside = np.asarray(mask) == 0
    noisy = scene()
    assert (pixels_of(masks.filled(noisy, mask))[outside] == pixels_of(noisy)[outside]).all()
    everything = masks.filled(picture, Image.new("L", (64, 48), 255))
    assert everything.size == (64, 48)


# Grids


@pytest.mark.parametrize(
    ("count", "rows", "size"),
    [
        (1, None, (1, 1)),
        (2, None, (2, 1)),
        (3, None, (2, 2)),
        (4, None, (2, 2)),
        (5, None, (3, 2)),
        (6, None, (3, 2)),
        (7, None, (3, 3)),
        (12, None, (4, 3)),
        (6, 1, (6, 1)),
        (6, 3, (2, 3)),
        (2, 9, (1, 2)),
    ],
)
def test_a_grid_is_as_near_to_a_square_as_the_webuis(
    count: int, rows: int | None, size: tuple[int, int]
) -> None:
    """`size`: columns and rows."""
    pictures = [Image.new("RGB", (8, 6), (number + 1, 0, 0)) for number in range(count)]
    whole = grid(pictures, rows)
    assert whole.size == (size[0] * 8, size[1] * 6)
    places = [(n % size[0] * 8 + 4, n // size[0] * 6 + 3) for n in range(size[0] * size[1])]
    shown = [whole.getpixel(place)[0] for place in places]  # type: ignore[index]
    assert shown == [*range(1, count + 1)] + [0] * (len(places) - count)


def test_a_grid_has_room_for_the_largest_picture() -> None:
    whole = grid([Image.new("RGB", (8, 6), RED), Image.new("RGB", (4, 10), BLUE)])
    assert whole.size == (16, 10)
    assert (whole.getpixel((0, 0)), whole.getpixel((8, 9))) == (RED, BLUE)
    assert whole.getpixel((15, 9)) == BLACK


def test_a_labelled_grid_shows_its_cells_and_texts() -> None:
    cells = grid([Image.new("RGB", (64, 48), color) for color in (RED, GREEN, BLUE, RED)], 2)
    whole = labelled(cells, ["Steps: 10", "Steps: 20"], ["Euler", "a b " * 20], margin=4)
    left, top = whole.width - 2 * 64 - 4, whole.height - 2 * 48 - 4
    assert (left, whole.getpixel((left, top))) == (48, RED)
    assert whole.getpixel((left + 64 + 4, top)) == GREEN
    assert whole.getpixel((left, top + 48 + 4)) == BLUE
    assert whole.getpixel((left + 64, top)) == WHITE
    for texts in ((left, 0, whole.width, top), (0, top, left, whole.height)):
        assert pixels_of(whole.crop(texts)).min() < 100
    assert labelled(cells, ["", ""], ["", ""]).size == cells.size


# Previews


def test_a_preview_looks_like_the_picture(easel: Easel) -> None:
    checkpoint = easel.engine.library.checkpoint(easel.engine.library.open(DEMO, NAME))
    picture = Image.new("RGB", (128, 128), (30, 60, 200))
    ImageDraw.Draw(picture).ellipse((30, 30, 98, 98), fill=(220, 40, 40))
    pixels = torch.from_numpy(pixels_of(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = checkpoint.vae
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    levels = ((decoded[0] * 0.5 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    wanted = pixels_of(Image.fromarray(levels).resize((16, 16), Image.Resampling.BOX))
    data = Mixes().preview(torch.cat([latents, latents * 0]), checkpoint, vae)
    shown = Image.open(io.BytesIO(data))
    assert (shown.format, shown.size) == ("JPEG", (16, 16))
    assert abs(pixels_of(shown) - wanted).mean() < 25
    for place in ((8, 8), (1, 1)):
        assert np.argmax(pixels_of(shown)[place]) == np.argmax(wanted[place])


def test_a_mix_is_fitted_once_for_each_vae(easel: Easel, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = easel.engine.library.checkpoint(easel.engine.library.open(DEMO, NAME))
    fitted: list[Any] = []

    def counted(vae: Any) -> torch.Tensor:
        fitted.append(vae)
        return fit_mix(vae)

    monkeypatch.setattr(previews, "fit_mix", counted)
    mixes, latents = Mixes(), torch.ones(1, 4, 8, 8)
    other = type(checkpoint.vae).from_config(checkpoint.vae.config)
    one, two = (mixes.preview(latents, checkpoint, vae) for vae in (checkpoint.vae, other))
    assert mixes.preview(latents, checkpoint, checkpoint.vae) == one
    assert one != two
    assert fitted == [checkpoint.vae, other]


def test_previews_of_the_published_families_need_no_fitting() -> None:
    for family in (SD1, SDXL):
        checkpoint: Any = SimpleNamespace(configs=STANDARD[family], family=family)
        for size, shown in (((8, 12), (12, 8)), ((64, 96), (96, 64)), ((256, 128), (96, 192))):
            data = Mixes().preview(torch.zeros(1, 4, *size).half(), checkpoint, None)
            picture = Image.open(io.BytesIO(data))
            assert picture.size == shown
            assert abs(pixels_of(picture) - 127).max() <= 2


# Files with notes

NOTE = "a café, (red:1.2) 猫 🐈\nNegative prompt: blue\nSteps: 3, Sampler: Euler"


def test_a_png_has_a_text_chunk_for_each_note() -> None:
    data = pack(scene(), {"parameters": NOTE, "postprocessing": "Lanczos"}, Format())
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert picture.text == {"parameters": NOTE, "postprocessing": "Lanczos"}  # type: ignore[attr-defined]
    assert pixels_of(picture).tolist() == pixels_of(scene()).tolist()
    assert notes_of(packed(data)) == {"parameters": NOTE}


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_other_files_have_notes_where_the_webui_reads_them(name: str) -> None:
    picture = Image.open(io.BytesIO(pack(scene(), {"parameters": NOTE}, Format(name))))
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == NOTE
    assert abs(pixels_of(picture) - pixels_of(scene())).mean() < 8
    bare = Image.open(io.BytesIO(pack(scene(), {}, Format(name))))
    assert not bare.getexif().get_ifd(ExifTags.IFD.Exif)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("a" * 32_000, "utf-16-be"),
        ("a" * 65_000, "ascii"),
        ("猫" * 32_000, "utf-16-be"),
    ],
)
def test_long_notes_are_in_a_jpeg_as_far_as_it_holds_them(text: str, encoding: str) -> None:
    image, warnings = result_image("x", scene(), {"parameters": text}, Format("jpg"))
    picture = Image.open(io.BytesIO(image.data))
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == {"ascii": b"ASCII\0\0\0", "utf-16-be": b"UNICODE\0"}[encoding]
    assert comment[8:].decode(encoding) == text
    assert (image.name, warnings) == ("x.jpg", [])


def test_notes_that_a_format_does_not_hold_are_left_out_and_told() -> None:
    for text in ("a" * 66_000, "猫" * 33_000):
        notes = {"parameters": text, "postprocessing": "Lanczos"}
        image, warnings = result_image("x", scene(), notes, Format("jpg"))
        picture = Image.open(io.BytesIO(image.data))
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert comment[8:].decode("utf-16-be") == "Lanczos"
        assert warnings == [
            "samples_format jpg holds notes of 65533 bytes: pictures are without their parameters,"
            " which the job's param JSON has"
        ]
    for name in ("png", "webp"):
        image, warnings = result_image("x", scene(), notes, Format(name))
        assert warnings == []
        assert notes["parameters"].encode("utf-16-be" if name == "webp" else "utf-8") in image.data


@pytest.mark.parametrize(
    ("name", "size"), [("jpg", (65_501, 1)), ("jpg", (1, 65_501)), ("webp", (16_384, 1))]
)
def test_a_picture_that_a_format_does_not_hold_is_a_png(name: str, size: tuple[int, int]) -> None:
    image, warnings = result_image("grid", Image.new("RGB", size), {}, Format(name))
    assert (image.name, image.media_type) == ("grid.png", "image/png")
    assert Image.open(io.BytesIO(image.data)).size == size
    assert warnings == [
        f"samples_format {name} holds no picture of {size[0]}x{size[1]}, only sides up to"
        f" {max(size) - 1}: grid is a PNG"
    ]
    most = Image.new("RGB", (max(size) - 1, 1))
    image, warnings = result_image("grid", most, {}, Format(name))
    assert (image.name, warnings) == (f"grid.{name}", [])
    assert Image.open(io.BytesIO(image.data)).size == most.size


def test_transparency_is_in_a_format_that_holds_it() -> None:
    clear = Image.new("RGBA", (8, 8), (*RED, 100))
    image, warnings = result_image("x", clear, {}, Format("jpg"))
    assert Image.open(io.BytesIO(image.data)).getpixel((0, 0)) == (*RED, 100)
    assert warnings == ["samples_format jpg holds no transparency: x is a PNG"]
    opaque = Image.new("RGBA", (8, 8), (*RED, 255))
    assert result_image("x", opaque, {}, Format("jpg"))[0].name == "x.jpg"


def test_formats_have_a_quality_and_a_media_type() -> None:
    fuzzy = scene().filter(ImageFilter.EMBOSS)
    for name, media_type in (("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")):
        assert Format(name).media_type == media_type
    for name in ("jpg", "webp"):
        sizes = [len(pack(fuzzy, {}, Format(name, quality))) for quality in (10, 50, 95)]
        assert sizes == sorted(sizes)
    exact = Image.open(io.BytesIO(pack(fuzzy, {}, Format("webp", lossless=True))))
    assert pixels_of(exact).tolist() == pixels_of(fuzzy).tolist()
    clear = Image.new("RGBA", (8, 8), (*RED, 0))
    assert Image.open(io.BytesIO(pack(clear, {}, Format("jpg")))).mode == "RGB"
    for name in ("png", "webp"):
        assert Image.open(io.BytesIO(pack(clear, {}, Format(name)))).mode == "RGBA"


def test_notes_are_those_of_pngs_that_have_some() -> None:
    for text in ("", "no base64!", packed(b"x"), base64_of(scene()), base64_of(scene(), "JPEG")):
        assert notes_of(text) == {}


# The infotext


def test_the_infotext_has_three_parts() -> None:
    text = infotext("a\nb", "c", {"Steps": 3, "Eta": None, "Size": "64x64"})
    assert text == f"a\nb\nNegative prompt: c\nSteps: 3, Size: 64x64, Version: {VERSION}"
    assert infotext("", "", {"Steps": 3}, version=False) == "Steps: 3"
    assert infotext("a", "", {"Steps": 3}, version=False) == "a\nSteps: 3"


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z]\w[\w \-/]{0,8}\w", fullmatch=True),
        st.text(min_size=1, max_size=20).filter(lambda text: text == text.strip()) | st.integers(),
        max_size=5,
    )
)
def test_fields_of_any_text_are_read_back(fields: dict[str, Any]) -> None:
    assert read_back(fields_text(fields)) == {name: str(value) for name, value in fields.items()}


def test_the_answer_is_strict_json() -> None:
    answer = json.loads(param_json({"a": [1]}, {"seed": 1}, ["image_0.png"], {"weights": []}))
    assert answer["parameters"] == {"a": [1]}
    assert answer["images"] == ["image_0.png"]
    assert json.loads(answer["info"]) == {"seed": 1, "version": VERSION}
    with pytest.raises(ValueError, match="not JSON compliant"):
        param_json({"a": float("inf")}, {}, [], {})
