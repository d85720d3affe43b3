"""Pictures enlarged: by interpolation, and by small upscalers with random weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor

from services.inference.worker.pipelines import JobFailure, enlarging
from services.inference.worker.pipelines.enlarging import EnlargingPlan
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.image_models import load_image_model
from services.inference.worker.pipelines.pictures.files import Format
from shared.webui.settings import WebuiSettings
from tests.unit.pipelines import small
from tests.unit.pipelines.easel import DEMO, Done, Easel, Model, base64_of, job_of, pixels_of

CPU = torch.device("cpu")


def scene(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    """Soft colors that change everywhere; RGBA is ever more transparent to the right."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (across, down, Image.new("L", (width, height), 90)))
    if mode == "RGBA":
        picture.putalpha(across)
    return picture


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("upscalers")
    made = {
        "esrgan": small.esrgan_tensors(),
        "compact": small.compact_tensors(),
        "restorer": small.compact_tensors(scale=1),
    }
    return {
        name: ("Upscaler", f"{name}.safetensors", small.write(folder / name, tensors))
        for name, tensors in made.items()
    }


Enlarge = Callable[..., Done]


@pytest.fixture
def enlarge(easel: Easel, models: dict[str, Model]) -> Enlarge:
    def enlarge(picture: Image.Image, **body: Any) -> Done:
        body = {"upscaler_1": "Lanczos", "image": base64_of(picture), **body}
        return easel.run("extra-single-image", [*models.values()], body)

    return enlarge


# Several pictures


def file_of(picture: Image.Image, name: str = "") -> dict[str, str]:
    return {"data": base64_of(picture), "name": name}


def test_each_picture_of_a_list_is_enlarged_as_it_is_alone(
    easel: Easel, models: dict[str, Model], enlarge: Enlarge
) -> None:
    scenes = [scene(), scene(20, 30, "RGBA")]
    files = [file_of(each, f"{n}.png") for n, each in enumerate(scenes)]
    body = {"upscaler_1": "compact", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.5}
    batch = easel.run("extra-batch-images", [*models.values()], {**body, "imageList": files})
    assert [image.name for image in batch.result.images] == ["image_0.png", "image_1.png"]
    assert batch.answer["images"] == ["image_0.png", "image_1.png"]
    assert batch.info["names"] == ["0.png", "1.png"]
    assert easel.steps == sorted(easel.steps)
    for picture, made in zip(scenes, batch.pictures, strict=True):
        alone = enlarge(picture, **body)
        assert made.mode == picture.mode
        assert made.tobytes() == alone.pictures[0].tobytes()
        assert made.info["postprocessing"] == alone.pictures[0].info["postprocessing"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "imageList: got none, allowed is a list of pictures in base64"),
        ([file_of(scene()), {"name": "x"}], "imageList[1].data: "),
        ([file_of(scene()), {"data": "?"}], "imageList[1].data: no base64"),
        ([file_of(scene(20, 20))] * 6, "imageList: got results of 0 million pixels in all"),
        ([file_of(scene(10, 10))] * 50, "imageList: got pictures of 0 million pixels in all"),
        ([file_of(scene(1, 1))] * 1001, "imageList: got 1001 pictures, allowed are 1000"),
    ],
)
def test_a_list_that_can_not_be_done_is_refused(
    easel: Easel, files: list[Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = replace(easel.engine._studio, webui=WebuiSettings(max_pixels=4500))
    monkeypatch.setattr(easel.engine, "_studio", studio)
    body = {"imageList": files, "upscaler_1": "Lanczos", "upscaling_resize": 3}
    with pytest.raises(JobFailure) as failure:
        easel.run("extra-batch-images", [], body)
    assert str(failure.value).startswith(reason)


# Sizes


@pytest.mark.parametrize("upscaler", ["Lanczos", "Nearest", "esrgan", "compact", "restorer"])
@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({}, (80, 48)),
        ({"upscaling_resize": 1}, (40, 24)),
        ({"upscaling_resize": 1.15}, (46, 28)),
        ({"upscaling_resize": 3}, (120, 72)),
        ({"upscaling_resize": 8}, (320, 192)),
        ({"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 100}, (100, 100)),
        ({"resize_mode": 1, "upscaling_resize_w": 99, "upscaling_resize_h": 51}, (99, 51)),
        ({"resize_mode": 1, "upscaling_resize_w": 10, "upscaling_resize_h": 12}, (10, 12)),
        (
            {
                "resize_mode": 1,
                "upscaling_resize_w": 100,
                "upscaling_resize_h": 30,
                "upscaling_crop": False,
            },
            (100, 60),
        ),
    ],
)
def test_a_picture_gets_the_size_that_was_asked_for(
    enlarge: Enlarge, upscaler: str, body: dict[str, Any], size: tuple[int, int]
) -> None:
    done = enlarge(scene(), upscaler_1=upscaler, **body)
    assert done.pictures[0].size == size
    assert (done.info["width"], done.info["height"]) == size
    assert done.warnings == []


@pytest.mark.parametrize("upscaler", ["Lanczos", "Nearest", "compact"])
@pytest.mark.parametrize("width", [19, 23, 38, 46, 49, 54])
def test_a_crop_has_no_border(enlarge: Enlarge, upscaler: str, width: int) -> None:
    """However the factor is rounded, and whatever a model makes of it."""
    white = Image.new("RGB", (width, 16), "white")
    body = {"resize_mode": 1, "upscaling_resize_w": 129, "upscaling_resize_h": 43}
    pixels = enlarge(white, upscaler_1=upscaler, **body).pixels
    assert pixels.shape == (43, 129, 3)
    assert pixels.min() > 150


def test_a_crop_keeps_the_middle(enlarge: Enlarge) -> None:
    thirds = Image.new("RGB", (60, 20), "red")
    thirds.paste("blue", (20, 0, 40, 20))
    done = enlarge(thirds, resize_mode=1, upscaling_resize_w=40, upscaling_resize_h=40)
    assert done.pixels[20, 20].tolist() == [0, 0, 255]
    assert (done.pixels[:, 1, 2] > 200).all()


def test_interpolation_is_pillows(enlarge: Enlarge) -> None:
    for name, resampling in (
        ("Lanczos", Image.Resampling.LANCZOS),
        ("nearest", Image.Resampling.NEAREST),
    ):
        done = enlarge(scene(), upscaler_1=name)
        wanted = pixels_of(scene().resize((80, 48), resampling))
        assert done.pixels.tolist() == wanted.tolist()


def test_none_leaves_a_picture_as_it_is(enlarge: Enlarge) -> None:
    for name in ("None", "", "none"):
        done = enlarge(scene(), upscaler_1=name)
        assert done.pixels.tolist() == pixels_of(scene()).tolist()
        assert done.warnings == []


# Models


def test_a_model_is_what_spandrel_makes_of_it(enlarge: Enlarge, models: dict[str, Model]) -> None:
    pixels = torch.from_numpy(pixels_of(scene())).permute(2, 0, 1)[None].float() / 255
    for name, scale in (("esrgan", 4), ("compact", 2)):
        path = models[name][2]
        with torch.no_grad():
            wanted = load_image_model(ModelFile(path, name), CPU)(pixels)[0]
        levels = (wanted * 255).round().permute(1, 2, 0).numpy()
        done = enlarge(scene(), upscaler_1=name, upscaling_resize=scale)
        assert abs(done.pixels - levels).max() <= 1


def test_models_go_by_any_name_that_people_use(enlarge: Enlarge) -> None:
    one = enlarge(scene(), upscaler_1="compact")
    for name in ("compact.safetensors", "folder/Compact.pth", "compact [0123456789]"):
        assert enlarge(scene(), upscaler_1=name).rows == one.rows
    assert one.answer["receipt"]["weights"][0]["name"] == "compact.safetensors"


def test_a_model_makes_several_passes_for_a_large_factor(easel: Easel, enlarge: Enlarge) -> None:
    enlarge(scene(), upscaler_1="compact", upscaling_resize=2)
    assert len(easel.steps) == 1
    enlarge(scene(), upscaler_1="compact", upscaling_resize=8)
    assert len(easel.steps) == 3
    assert easel.steps[-1] == (100, 100)
    enlarge(scene(), upscaler_1="esrgan", upscaling_resize=8)
    assert easel.steps[-1] == (100, 100)


def test_a_model_that_does_not_enlarge_is_run_once(enlarge: Enlarge) -> None:
    """And the rest is interpolated, as in the webui."""
    restored = enlarge(scene(), upscaler_1="restorer").pixels
    assert restored.shape == (48, 80, 3)
    assert abs(restored - enlarge(scene()).pixels).mean() > 1


@pytest.mark.parametrize("name", ["compact", "esrgan"])
def test_tiles_come_to_what_a_whole_pass_comes_to(
    enlarge: Enlarge, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what a model sees beyond the border of a tile, of which little is left by blending."""
    picture = scene(90, 70)
    factor = {"compact": 2, "esrgan": 4}[name]
    whole = enlarge(picture, upscaler_1=name, upscaling_resize=factor).pixels
    monkeypatch.setattr(enlarging, "TILE", 32)
    tiled = enlarge(picture, upscaler_1=name, upscaling_resize=factor).pixels
    difference = abs(whole - tiled)
    assert difference.max() <= 6
    assert difference.mean() < 0.3
    monkeypatch.setattr(enlarging, "OVERLAP", 16)
    monkeypatch.setattr(enlarging, "TILE", 64)
    assert (
        abs(whole - enlarge(picture, upscaler_1=name, upscaling_resize=factor).pixels).mean() < 0.2
    )


@pytest.mark.parametrize("length", [1, 191, 192, 193, 200, 376, 377, 1000, 5000])
def test_tiles_cover_a_picture_and_overlap(length: int) -> None:
    starts = enlarging._starts(length)
    ends = [min(start + enlarging.TILE, length) for start in starts]
    assert (starts[0], ends[-1]) == (0, length)
    for end, start in zip(ends, starts[1:], strict=False):
        assert end - start >= enlarging.OVERLAP
    assert len(starts) <= length // (enlarging.TILE - enlarging.OVERLAP) + 1


def test_pictures_of_a_few_pixels_can_be_enlarged(enlarge: Enlarge) -> None:
    for name in ("esrgan", "compact"):
        for size in ((1, 1), (1, 300), (300, 2)):
            done = enlarge(scene(*size), upscaler_1=name)
            assert done.pictures[0].size == (2 * size[0], 2 * size[1])


def test_transparency_is_enlarged_too(enlarge: Enlarge) -> None:
    for name in ("Lanczos", "esrgan", "compact"):
        done = enlarge(scene(mode="RGBA"), upscaler_1=name)
        assert (done.pictures[0].mode, done.pictures[0].size) == ("RGBA", (80, 48))
        alpha = np.asarray(done.pictures[0].getchannel("A"), np.int16)
        wanted = np.asarray(scene(mode="RGBA").getchannel("A").resize((80, 48)), np.int16)
        assert abs(alpha - wanted).max() <= 12


# Two upscalers


def test_a_second_upscaler_is_blended_in(enlarge: Enlarge) -> None:
    body = {"upscaling_resize": 1.6}
    one, two = (enlarge(scene(), upscaler_1=n, **body).pixels for n in ("Nearest", "esrgan"))
    for share in (0.25, 1):
        blend = enlarge(
            scene(),
            upscaler_1="Nearest",
            upscaler_2="esrgan",
            extras_upscaler_2_visibility=share,
            **body,
        )
        assert abs(blend.pixels - (one * (1 - share) + two * share)).max() <= 1
        assert {weight["name"] for weight in blend.answer["receipt"]["weights"]} == {
            "esrgan.safetensors"
        }
        assert "Postprocess upscaler 2: esrgan" in blend.info["html_info"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_any_two_upscalers_can_be_blended(enlarge: Enlarge, mode: str) -> None:
    names = ("Lanczos", "Nearest", "None", "", "compact", "esrgan", "restorer")
    for one in names:
        for two in names:
            done = enlarge(
                scene(13, 9, mode),
                upscaler_1=one,
                upscaler_2=two,
                extras_upscaler_2_visibility=0.5,
                upscaling_resize=1.7,
            )
            assert done.pictures[0].size == ((13, 9) if one in ("None", "") else (22, 15))
            vain = one in ("None", "") and two not in ("None", "")
            assert done.warnings == ["upscaler_2: no effect without upscaler_1"] * vain


def test_the_second_upscaler_has_its_share_of_the_steps(easel: Easel, enlarge: Enlarge) -> None:
    enlarge(
        scene(),
        upscaler_1="compact",
        upscaler_2="esrgan",
        extras_upscaler_2_visibility=0.5,
    )
    assert easel.steps == [(100, 200), (200, 200)]


# What is written down


def test_what_was_done_is_written_down(enlarge: Enlarge) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 3")
    chunks.add_text("secret", "x")
    packed = base64_of(scene(), "PNG", pnginfo=chunks)
    done = enlarge(scene(), image=packed, upscaler_1="esrgan", codeformer_weight=0)
    text = "Postprocess upscale by: 2.0, Postprocess upscaler: esrgan"
    assert done.pictures[0].text == {  # type: ignore[attr-defined]
        "parameters": "a cat\nSteps: 3",
        "postprocessing": text,
    }
    assert done.info["html_info"] == text
    assert done.answer["images"] == ["image_0.png"]
    assert done.answer["parameters"] == {"upscaler_1": "esrgan", "codeformer_weight": 0}
    (weights,) = done.answer["receipt"]["weights"]
    assert len(weights["sha256"]) == 64
    assert weights["type"] == "Upscaler"
    to_size = enlarge(scene(), resize_mode=1, upscaling_resize_w=64, upscaling_resize_h=32)
    assert to_size.info["html_info"] == (
        "Postprocess upscale to: 64x32, Postprocess crop to: 64x32, Postprocess upscaler: Lanczos"
    )
    assert to_size.answer["receipt"]["weights"] == []


# What is refused


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"image": ""}, "image: got none, allowed is a picture in base64"),
        ({"image": "AAAA"}, "image: no PNG, JPEG"),
        (
            {"upscaler_1": "SwinIR"},
            'upscaler_1: got "SwinIR", allowed is one of Lanczos, Nearest, None, or a checkpoint of'
            ' type Upscaler that the job names in models: {"Upscaler": ["NAME"]} (it names esrgan,'
            " compact, restorer)",
        ),
        (
            {"upscaler_2": "SwinIR", "extras_upscaler_2_visibility": 0.1},
            'upscaler_2: got "SwinIR", allowed is',
        ),
        (
            {"resize_mode": 1, "upscaling_resize_w": 8192, "upscaling_resize_h": 8192},
            "upscaling_resize_w and _h: got a result of 112 million pixels, allowed are 100 mil",
        ),
    ],
)
def test_what_can_not_be_enlarged_is_told(
    enlarge: Enlarge, body: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JobFailure) as failure:
        enlarge(scene(), **body)
    assert str(failure.value).startswith(reason)


def test_results_may_not_be_larger_than_memory(enlarge: Enlarge) -> None:
    large = Image.new("1", (5000, 5000))
    with pytest.raises(JobFailure, match=r"upscaling_resize: got a result of 225 million pixels"):
        enlarge(large, upscaling_resize=3)
    with pytest.raises(JobFailure, match=r"esrgan makes .* of 5500x5000 4 times as large: 440 mil"):
        enlarge(Image.new("1", (5500, 5000)), upscaler_1="esrgan", upscaling_resize=1.5)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.ones(2)}, "x.pth is no upscaler of a form that is known here"),
        ("half", "broken checkpoint: x.pth: "),
        ("scalars", "broken checkpoint: x.pth: "),
        ("grey", "x.pth is for pictures without colors"),
        ("demo", "x.pth is no upscaler of a form that is known here"),
    ],
)
def test_what_is_no_upscaler_is_told(
    easel: Easel, tensors: dict[str, Tensor] | str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    if tensors == "demo":
        path = DEMO
    else:
        whole = small.esrgan_tensors()
        made: dict[str, dict[str, Tensor]] = {
            "half": dict([*whole.items()][:5]),
            "scalars": dict.fromkeys(whole, torch.ones(())),
            "grey": small.compact_tensors(channels=1),
        }
        small.write(path, made[tensors] if isinstance(tensors, str) else tensors)
    body = {"image": base64_of(scene()), "upscaler_1": "x"}
    with pytest.raises(JobFailure) as failure:
        easel.run("extra-single-image", [("Upscaler", "x.pth", path)], body)
    assert str(failure.value).startswith(reason)


def test_pickled_upscalers_are_read(easel: Easel, tmp_path: Path) -> None:
    """As most of them are published, some within `params_ema`."""
    tensors = small.compact_tensors()
    body = {"image": base64_of(scene()), "upscaler_1": "x"}
    results = []
    parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
    for number, saved in enumerate(
        (tensors, {"params_ema": tensors, "params": {}}, {"params": tensors}, parallel)
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(saved, path)
        results.append(easel.run("extra-single-image", [("Upscaler", "x.pth", path)], body).rows)
    assert results == [results[0]] * 4


@pytest.mark.parametrize("upscaler", ["None", "Lanczos", "compact"])
def test_a_picture_keeps_the_profile_of_its_colors(enlarge: Enlarge, upscaler: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = base64_of(scene(), icc_profile=profile)
    done = enlarge(scene(), image=picture, upscaler_1=upscaler)
    assert done.pictures[0].info["icc_profile"] == profile


def test_a_picture_that_its_format_does_not_hold_is_a_png(easel: Easel) -> None:
    job, files = job_of("extra-single-image", [])
    body = {"image": base64_of(Image.new("RGB", (66_000, 1)))}
    library, form = easel.engine.library, Format("jpg")
    plan = EnlargingPlan(job, body, files, library, form, WebuiSettings())
    report: Any = None  # nobody is told of a picture that stays as it is
    with pytest.raises(StopIteration) as end:
        next(plan.work(report))
    result = end.value.value
    assert [image.name for image in result.images] == ["image_0.png"]
    assert json.loads(result.param_json)["images"] == ["image_0.png"]
    (warning,) = result.warnings
    assert warning.startswith("samples_format jpg holds no picture of 66000x1, only sides up to")


def test_pictures_come_in_the_format_of_the_engine(easel: Easel, enlarge: Enlarge) -> None:
    done = enlarge(scene())
    (image,) = done.result.images
    assert (image.name, image.media_type) == ("image_0.png", "image/png")
    assert Image.open(io.BytesIO(image.data)).format == "PNG"
