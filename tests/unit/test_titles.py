"""Which file is meant by what people call it."""

from __future__ import annotations

import msgspec
import pytest

from shared.webui.titles import CHECKPOINT, LORA, UPSCALER, find, keys_of, stem_of

ONE, OTHER = "0123456789" + "a" * 54, "9876543210" + "b" * 54


class Named(msgspec.Struct, frozen=True):
    name: str
    sha256: str = ""
    alias: str = ""


def test_a_name_is_told_with_or_without_folder_suffix_and_hash() -> None:
    files = [Named("v2.0.ckpt"), Named("Style A.safetensors", ONE)]
    for title in (
        "Style A.safetensors",
        "Style A",
        "style a",
        "anime/Style A.safetensors",
        r"C:\models\Style A.safetensors",
        f"Style A.safetensors [{ONE[:10]}]",
        f"Style A [{ONE}]",
        "Style A.safetensors [deadbeef]",
        "Style A.ckpt",
    ):
        assert find(CHECKPOINT, title, files) is files[1], title
    assert find(CHECKPOINT, "v2.0", files) is files[0]
    for title in ("Style", "Style A [v1]", "Style A [12]", "", " ", "[]", "/"):
        assert find(CHECKPOINT, title, files) is None, title


@pytest.mark.parametrize(
    "names", [("style [v1].pt", "style [v2].pt"), ("a [0123456789].pt", "a.pt")]
)
def test_brackets_of_a_name_are_no_hash(names: tuple[str, str]) -> None:
    files = [Named(name) for name in names]
    for file in files:
        assert find(LORA, file.name, files) is file
        assert find(LORA, stem_of(file.name), files) is file
    assert find(LORA, names[1], files[:1]) is None
    assert find(LORA, f"{stem_of(names[0])} [deadbeef]", files) is files[0]


def test_what_is_written_alike_goes_before_what_is_not() -> None:
    files = [Named("STYLE.ckpt"), Named("style.ckpt"), Named("style.pt.ckpt"), Named("style.pt")]
    for number, title in enumerate(("STYLE", "style", "style.pt.ckpt", "style.pt")):
        assert find(CHECKPOINT, title, files) is files[number], title
    assert find(CHECKPOINT, "Style", files) is files[0]


def test_a_hash_decides_between_files_of_one_name() -> None:
    files = [Named("a.safetensors", ONE), Named("a.ckpt", OTHER)]
    assert find(CHECKPOINT, "a", files) is files[0]
    assert find(CHECKPOINT, f"a [{OTHER[:10]}]", files) is files[1]
    assert find(CHECKPOINT, f"a [{OTHER[:8]}]", files) is files[1]
    assert find(CHECKPOINT, "a [ffffffffff]", files) is files[0]


def test_a_checkpoint_and_nothing_else_is_told_by_its_hash_alone() -> None:
    files = [Named("a.safetensors", ONE), Named(f"{OTHER[:10]}.ckpt"), Named("b.ckpt", OTHER)]
    for title in (ONE[:10], ONE, ONE[:12].upper(), f"[{ONE[:10]}]"):
        assert find(CHECKPOINT, title, files) is files[0], title
        assert find(LORA, title, files) is None, title
    assert find(CHECKPOINT, OTHER[:10], files) is files[1], "a name goes before a hash"
    assert find(CHECKPOINT, ONE[:8], files) is None
    assert find(CHECKPOINT, "f" * 10, files) is None


def test_a_lora_is_told_by_its_alias_unless_one_has_that_name() -> None:
    files = [
        Named("stage-000002.safetensors", alias="ink"),
        Named("stage-000004.safetensors", alias="ink"),
        Named("renamed.safetensors", alias="Original"),
    ]
    assert find(LORA, "Original", files) is find(LORA, "original", files) is files[2]
    assert find(LORA, "ink", files) is files[1], "the last stage of a training"
    assert find(CHECKPOINT, "Original", files) is None
    own = Named("INK.safetensors")
    assert find(LORA, "ink", [*files, own]) is own
    assert find(LORA, "", [Named("a.pt")]) is None


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("R-ESRGAN 4x+", "RealESRGAN_x4plus.pth"),
        ("R-ESRGAN 4x+ Anime6B", "RealESRGAN_x4plus_anime_6B.pth"),
        ("r-esrgan general 4xV3", "realesr-general-x4v3.pth"),
        ("ESRGAN_4x", "ESRGAN.pth"),
        ("ESRGAN_4x", "ESRGAN_4x.pth"),
        ("4x-UltraSharp", "4x-UltraSharp.pth"),
    ],
)
def test_an_upscaler_is_told_by_the_name_that_the_webui_shows(title: str, name: str) -> None:
    files = [Named("other.pth"), Named(name)]
    assert find(UPSCALER, title, files) is files[1]
    assert find(CHECKPOINT, "R-ESRGAN 4x+", files) is None


def test_whatever_is_found_by_a_name_is_under_its_keys() -> None:
    files = [
        Named("style [v1].pt.ckpt"),
        Named("B.safetensors", alias="the A/B"),
        Named("ESRGAN.pth"),
    ]
    for type_, title in (
        (LORA, "Style [v1].PT [deadbeef]"),
        (LORA, "x/style [v1].pt.ckpt"),
        (LORA, "The A/B [deadbeef]"),
        (UPSCALER, "ESRGAN_4x"),
    ):
        found = find(type_, title, files)
        assert found is not None, title
        known = {stem_of(found.name).lower(), found.alias.lower()}
        assert known & {*keys_of(type_, title)}, title


def test_a_title_takes_time_that_grows_with_its_length() -> None:
    """It would be minutes with the square of it."""
    title = "a" + " " * 1_000_000 + "b"
    assert find(CHECKPOINT, title, [Named("a")]) is None
    assert keys_of(CHECKPOINT, title) == [title]
