"""rembg: pictures without their background, and what is said of a job that can't be done.

Most tests cut with a model that finds what is bright; U²-Net itself is used where it is on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from deploy.local.weights import FOLDER
from services.inference.worker.pipelines import JobFailure, cutting
from services.inference.worker.pipelines.cutting import CUSTOM, SESSIONS, CuttingPlan
from services.inference.worker.pipelines.library import Models
from services.inference.worker.pipelines.pictures.files import Format
from tests.unit.pipelines import small
from tests.unit.pipelines.easel import DEMO, Done, Easel, Model, base64_of, job_of

U2NET = Path(os.environ.get("DARKROOM_U2NET", FOLDER / "u2net.onnx"))
INSIDE, OUTSIDE = (60, 45), (4, 4)
PALE = (250, 240, 245)
MATTING = {"alpha_matting": True, "alpha_matting_background_threshold": 40}

Cut = Callable[..., Done]


def scene() -> Image.Image:
    """A pale disc in the dark."""
    picture = Image.new("RGB", (120, 90), (10, 10, 10))
    ImageDraw.Draw(picture).ellipse((30, 20, 90, 70), fill=PALE)
    return picture


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_brightness(tmp_path_factory.mktemp("models") / "x")


@pytest.fixture
def cut(easel: Easel, brightness: Path) -> Cut:
    def cut(*names: str, **body: Any) -> Done:
        models = [("rembg", name, brightness) for name in names or ("u2net.onnx",)]
        return easel.run("rembg", models, {"input_image": base64_of(scene()), **body})

    return cut


def alpha(done: Done, place: tuple[int, int]) -> int:
    pixel = done.pictures[0].convert("RGBA").getpixel(place)
    assert isinstance(pixel, tuple)
    return int(pixel[3])


# What is cut out


def test_the_background_is_taken_away(cut: Cut, easel: Easel) -> None:
    done = cut()
    assert (done.pictures[0].mode, done.pictures[0].size) == ("RGBA", (120, 90))
    assert alpha(done, INSIDE) > 230
    assert alpha(done, OUTSIDE) < 25
    assert easel.steps == [(0, 1), (1, 1)]


def test_only_the_mask_may_be_wanted(cut: Cut) -> None:
    for field in ("only_mask", "return_mask"):
        (mask,) = cut(**{field: True}).pictures
        assert mask.mode == "L"
        inside, outside = mask.getpixel(INSIDE), mask.getpixel(OUTSIDE)
        assert isinstance(inside, int | float)
        assert isinstance(outside, int | float)
        assert inside > 230
        assert outside < 25


def test_a_mask_may_be_made_hard(cut: Cut) -> None:
    done = cut(post_process_mask=True)
    assert (alpha(done, INSIDE), alpha(done, OUTSIDE)) == (255, 0)
    assert done.pictures[0].getpixel(INSIDE) == (*PALE, 255)


def test_colors_may_be_kept_under_what_is_clear(cut: Cut) -> None:
    done = cut(putalpha=True)
    pixel = done.pictures[0].getpixel(OUTSIDE)
    assert isinstance(pixel, tuple)
    assert pixel[:3] == (10, 10, 10)


def test_borders_may_be_matted(cut: Cut) -> None:
    for size in (0, 1, 3):
        done = cut(**MATTING, alpha_matting_erode_size=size)
        assert alpha(done, INSIDE) > 230
        assert alpha(done, OUTSIDE) < 25
        assert done.warnings == []


@pytest.mark.parametrize(
    ("given", "color"),
    [
        ("#00ff00", (0, 255, 0, 255)),
        ("lime", (0, 255, 0, 255)),
        ([0, 255, 0], (0, 255, 0, 255)),
        ([0, 255, 0, 100], (0, 255, 0, 100)),
        ("", None),
    ],
)
def test_a_ground_may_be_put_under_it(
    cut: Cut, given: object, color: tuple[int, ...] | None
) -> None:
    pixel = cut(bgcolor=given, post_process_mask=True).pictures[0].getpixel(OUTSIDE)
    assert pixel == (color or (0, 0, 0, 0))


# Models


@pytest.mark.parametrize("model", ["", "u2net", "u2net.onnx"])
def test_the_model_is_that_of_the_body_or_the_job(cut: Cut, model: str) -> None:
    done = cut(model=model)
    assert done.info["model"] == "u2net"
    assert done.info["file"] == "u2net.onnx"
    assert done.answer["parameters"]["model"] == "u2net"
    assert "input_image" not in done.answer["parameters"]


def test_of_several_models_the_body_chooses(cut: Cut) -> None:
    done = cut("u2net.onnx", "silueta.onnx", model="silueta")
    assert done.info["model"] == "silueta"
    assert [weights["name"] for weights in done.answer["receipt"]["weights"]] == ["silueta.onnx"]
    assert cut("u2net.onnx", "silueta.onnx").info["model"] == "u2net"


def test_a_model_of_anybody_s_making_needs_no_name(cut: Cut) -> None:
    done = cut("ours.onnx", model="u2net_custom")
    assert (done.info["model"], done.info["file"]) == ("u2net_custom", "ours.onnx")
    assert alpha(done, INSIDE) > 230


def test_no_session_sends_pictures_away_or_fetches_models() -> None:
    """Of rembg's own list: `withoutbg` and `atlascloud` have a cloud behind them."""
    from rembg.sessions import sessions

    assert set(SESSIONS) <= set(sessions)
    assert set(sessions) - set(SESSIONS) <= {"withoutbg", "withoutbg-pro", "atlascloud"}
    assert set(CUSTOM) <= set(SESSIONS)


def test_a_model_may_not_be_replaced_by_a_download(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetched(*_: object, **__: object) -> str:
        raise AssertionError("a download")

    monkeypatch.setattr("pooch.retrieve", fetched)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    assert cut("u2netp.onnx").pictures
    assert not [*tmp_path.iterdir()]


# What is refused


@pytest.mark.parametrize(
    ("names", "body", "reason"),
    [
        (
            (),
            {"model": "silueta"},
            "model silueta needs the checkpoint silueta.onnx of type rembg: ",
        ),
        ((), {"model": "withoutbg"}, 'model: got "withoutbg", allowed is one of u2net, u2netp'),
        ((), {"model": "../u2net"}, 'model: got "../u2net", allowed is one of'),
        (("ours.onnx",), {}, 'model: got "ours", allowed is one of'),
        ((), {"model": "sam"}, "model sam needs two checkpoints of type rembg: name both"),
        (("sam_b.encoder.onnx",), {}, "model sam needs two checkpoints of type rembg"),
        ((), {"input_image": ""}, "input_image: got none, allowed is a picture in base64"),
        ((), {"input_image": "AAAA"}, "input_image: no PNG, JPEG"),
        ((), {"alpha_matting_erode_size": -1}, "alpha_matting_erode_size: got -1"),
        ((), {"bgcolor": "no color"}, 'bgcolor: got "no color", allowed is a color such as #ff'),
        ((), {"vitmatte": True}, "vitmatte needs the checkpoint vitmatte-small-distinctions-646."),
        (
            (),
            {"vitmatte": True, "vitmatte_model": "base-composition-1k"},
            "vitmatte needs the checkpoint vitmatte-base-composition-1k.onnx of type rembg",
        ),
        (
            ("u2net.onnx", "vitmatte-base.onnx"),
            {"vitmatte": True, "vitmatte_model": "base"},
            'vitmatte_model: got "base", allowed is one of small-distinctions-646, small-c',
        ),
        (
            ("u2net.onnx", "vitmatte-small-distinctions-646.onnx"),
            {"vitmatte": True},
            "vitmatte-small-distinctions-646.onnx is no model for vitmatte: ",
        ),
        (("isnet-general-use.onnx",), {}, "isnet-general-use.onnx is no model for this session: "),
    ],
)
def test_rembg_says_what_it_lacks(
    cut: Cut, names: tuple[str, ...], body: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JobFailure) as failure:
        cut(*names, **body)
    assert str(failure.value).startswith(reason)


def test_a_job_without_a_model_is_told_to_name_one(easel: Easel) -> None:
    with pytest.raises(JobFailure, match="the job names no checkpoint of type rembg in models"):
        easel.run("rembg", [], {"input_image": base64_of(scene())})


def test_what_is_no_model_is_told(easel: Easel, tmp_path: Path) -> None:
    garbage, empty = tmp_path / "garbage", tmp_path / "empty"
    garbage.write_bytes(b"\x08\x07" + b"\xff" * 100)
    empty.write_bytes(b"")
    for path in (garbage, empty, DEMO):
        models: list[Model] = [("rembg", "u2net.onnx", path)]
        with pytest.raises(JobFailure, match=r"^broken checkpoint: u2net.onnx is no ONNX model: "):
            easel.run("rembg", models, {"input_image": base64_of(scene())})


def test_matting_has_its_bounds(cut: Cut) -> None:
    """A system with a row per pixel is solved."""
    large = base64_of(Image.new("1", (2100, 2000)))
    with pytest.raises(
        JobFailure, match=r"^alpha_matting: got a picture of 2100x2000, allowed are"
    ):
        cut(input_image=large, alpha_matting=True)


@pytest.mark.parametrize("field", ["alpha_matting", "decontaminate"])
def test_one_pixel_has_no_borders(cut: Cut, field: str) -> None:
    pixel = base64_of(Image.new("RGB", (1, 1), PALE))
    with pytest.raises(JobFailure, match=rf"^{field}: got a picture of 1x1, allowed is one of two"):
        cut(input_image=pixel, **{field: True})
    assert cut(input_image=pixel).pictures[0].size == (1, 1)


@pytest.mark.parametrize(
    ("picture", "body", "lacks"),
    [
        (Image.new("RGB", (64, 64), "white"), {}, "foreground"),  # flat: nothing is found in it
        (Image.new("RGBA", (64, 64)), {}, "foreground"),
        (Image.new("RGB", (1, 200), PALE), {}, "foreground"),
        (scene().resize((24, 18)), {"alpha_matting_erode_size": 255}, "background"),
        (scene(), {"alpha_matting_foreground_threshold": 255}, "foreground"),
        (scene(), {"alpha_matting_background_threshold": 0}, "background"),
    ],
)
def test_matting_that_comes_to_nothing_is_told(
    cut: Cut, picture: Image.Image, body: dict[str, Any], lacks: str
) -> None:
    asked = {"input_image": base64_of(picture), **MATTING, **body}
    done = cut(**asked)
    assert done.pictures[0].size == picture.size
    (warning,) = done.warnings
    assert warning.startswith("alpha_matting: no effect here: ")
    assert f"did not contain {lacks} values" in warning
    assert cut(**asked, only_mask=True).warnings == []


def test_a_cut_out_keeps_the_profile_of_its_colors(cut: Cut) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = base64_of(scene(), icc_profile=profile)
    for body in ({}, MATTING, {"bgcolor": "lime"}):
        assert cut(input_image=text, **body).pictures[0].info["icc_profile"] == profile
    assert "icc_profile" not in cut(input_image=text, only_mask=True).pictures[0].info


def test_cut_outs_are_of_a_format_that_can_be_clear(easel: Easel, brightness: Path) -> None:
    job, files = job_of("rembg", [("rembg", "u2net.onnx", brightness)])
    body = {"input_image": base64_of(scene())}
    library = easel.engine.library
    for usual, wanted in (("jpg", "png"), ("png", "png"), ("webp", "webp")):
        plan = CuttingPlan(job, body, files, library, Format(usual))
        assert plan.format.name == wanted


# U²-Net


@pytest.mark.skipif(not U2NET.exists(), reason="set DARKROOM_U2NET to the path of u2net.onnx")
def test_u2net_takes_the_background_away(easel: Easel) -> None:
    picture = Image.new("RGB", (256, 200), (120, 160, 90))
    ImageDraw.Draw(picture).ellipse((70, 40, 180, 160), fill=(200, 30, 30))

    def cut(**options: Any) -> Image.Image:
        body = {"input_image": base64_of(picture), **options}
        return easel.run("rembg", [("rembg", "u2net.onnx", U2NET)], body).pictures[0]

    plain, mask = cut(), cut(model="u2net", only_mask=True)
    green = cut(bgcolor="#00ff00")
    assert plain.getpixel((125, 100)) == (200, 30, 30, 255)
    assert plain.getpixel((5, 5))[3] == 0  # type: ignore[index]
    assert (mask.mode, mask.getpixel((125, 100)), mask.getpixel((5, 5))) == ("L", 255, 0)
    assert green.getpixel((5, 5)) == (0, 255, 0, 255)
    found = np.asarray(mask) > 128
    disc = Image.new("1", picture.size)
    ImageDraw.Draw(disc).ellipse((70, 40, 180, 160), fill=1)
    assert (found == np.asarray(disc)).mean() > 0.99


VARIANT = "small-distinctions-646"


def test_jobs_side_by_side_have_each_its_own_vitmatte_of_a_name(
    easel: Easel, tmp_path: Path
) -> None:
    from rembg import matting

    sessions, both = [], Barrier(2)
    for number in range(2):
        path = small.write_brightness(tmp_path / f"{number}.onnx")
        job, files = job_of("rembg", [("rembg", f"vitmatte-{VARIANT}.onnx", path)])
        sessions.append(
            Models(job, files, easel.engine.library).get("rembg", f"vitmatte-{VARIANT}", "x")
        )

    def used(number: int) -> set[object]:
        both.wait()
        seen = set()
        for _ in range(20):
            with cutting._vitmatte_in_place(sessions[number]):
                seen |= {matting._get_session(VARIANT) for _ in "ab"}
        return seen

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(used, range(2))
    assert len(one) == len(other) == 1
    assert one != other
