"""What ControlNets are shown: each preprocessor on a drawn picture, and units that can't act."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from services.inference.worker.pipelines import JobFailure, hints
from services.inference.worker.pipelines.controlling import Controls
from services.inference.worker.pipelines.library import Models
from services.inference.worker.pipelines.params.control import ControlUnit
from shared.weights.kinds import SD1, SD2
from tests.unit.pipelines import small
from tests.unit.pipelines.easel import DEMO, Easel, Model, base64_of, job_of

GROUND, DISC = (200, 180, 160), (30, 60, 200)
CENTER, EDGE, CORNER = (32, 48), (32, 28), (4, 4)
"""Row and column: in the disc, on its left edge, and far from it."""


@pytest.fixture
def picture() -> Image.Image:
    picture = Image.new("RGB", (96, 64), GROUND)
    ImageDraw.Draw(picture).ellipse((28, 12, 68, 52), fill=DISC)
    return picture


def sketch() -> Image.Image:
    """Thin black lines on white."""
    sketch = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(sketch).line((20, 0, 20, 63), fill="black", width=2)
    return sketch


def made(picture: Image.Image, module: str, a: float = -1, b: float = -1) -> NDArray[np.int16]:
    """At the picture's own size."""
    return hints.make(picture, module, min(picture.size), a, b).astype(np.int16)


@pytest.mark.parametrize("module", hints.HINTS)
def test_every_hint_is_a_picture(module: str, picture: Image.Image) -> None:
    for shown in (
        picture,
        picture.convert("L"),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (9, 70)),
    ):
        hint = hints.make(shown, module, 128, -1, -1)
        assert hint.dtype == np.uint8
        assert hint.shape[2:] == (3,)
        assert hint.flags["C_CONTIGUOUS"]
        if hints.HINTS[module].resizes:
            assert min(hint.shape[:2]) == 128
            assert hint.shape[1] / hint.shape[0] == pytest.approx(shown.width / shown.height, 0.02)
        else:
            assert hint.shape[:2] == (shown.height, shown.width)
    again = hints.make(picture, module, 128, -1, -1)
    assert (again == hints.make(picture, module, 128, -1, -1)).all()


def test_canny_shows_edges(picture: Image.Image) -> None:
    lines = made(picture, "canny")
    assert {*np.unique(lines)} == {0, 255}
    assert lines[EDGE[0], EDGE[1] - 2 : EDGE[1] + 3].max() == 255
    assert lines[CENTER].max() == lines[CORNER].max() == 0
    faint = Image.blend(Image.new("RGB", picture.size, GROUND), picture, 0.1)
    assert made(faint, "canny").max() == 0
    assert made(faint, "canny", 10, 20)[EDGE[0], EDGE[1] - 2 : EDGE[1] + 3].max() == 255


def test_invert_swaps_light_and_dark(picture: Image.Image) -> None:
    for module in ("invert", "invert (from white bg & black line)"):
        inverted = made(picture, module)
        assert inverted[CENTER].tolist() == [225, 195, 55]
        assert inverted[CORNER].tolist() == [55, 75, 95]


def test_threshold_shows_what_is_bright_in_all_colors(picture: Image.Image) -> None:
    bright = made(picture, "threshold")
    assert (bright[CENTER].tolist(), bright[CORNER].tolist()) == ([0] * 3, [255] * 3)
    assert made(picture, "threshold", 170).max() == 0
    assert made(picture, "threshold", 10).min() == 255


def test_scribbles_and_line_art_show_dark_lines() -> None:
    for module in ("scribble_xdog", "lineart_standard"):
        drawn = made(sketch(), module)
        assert drawn[32, 20].min() > 100
        assert drawn[32, 70].max() == 0
    assert {*np.unique(made(sketch(), "scribble_xdog"))} == {0, 255}
    assert made(sketch(), "scribble_xdog", 1000).max() == 0
    assert made(Image.new("RGB", (96, 64), "white"), "lineart_standard").max() == 0


def test_blur_takes_edges_away(picture: Image.Image) -> None:
    plain, blurred = pixels(picture), made(picture, "blur_gaussian", 3)
    assert abs(np.diff(blurred, axis=1)).max() < 0.3 * abs(np.diff(plain, axis=1)).max()
    assert abs(blurred.mean((0, 1)) - plain.mean((0, 1))).max() < 4
    assert (made(picture, "blur_gaussian", 0) == plain).all()
    widest = made(picture, "blur_gaussian", 1000)
    assert (widest == made(picture, "blur_gaussian", 64)).all()


def test_tiles_are_made_smaller_by_their_factor(picture: Image.Image) -> None:
    for module in ("tile", "tile_resample"):
        assert (made(picture, module) == pixels(picture)).all()
        assert made(picture, module, 4).shape == (16, 24, 3)
        assert made(picture, module, 1000).shape == (1, 1, 3)


def test_recolor_shows_how_bright_it_is(picture: Image.Image) -> None:
    for module in ("recolor_luminance", "recolor_intensity"):
        grey = made(picture, module)
        assert (grey[..., 0] == grey[..., 1]).all()
        assert (grey[..., 0] == grey[..., 2]).all()
        lighter, darker = made(picture, module, 0.5), made(picture, module, 2)
        assert (lighter >= grey).all()
        assert (darker <= grey).all()
        assert lighter.mean() > grey.mean() > darker.mean()
    assert made(picture, "recolor_intensity")[CENTER].tolist() == [200] * 3  # the strongest color
    assert made(picture, "recolor_luminance")[CENTER][0] < 100


def test_shuffle_moves_parts_about_and_keeps_their_colors() -> None:
    across = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    picture = Image.fromarray(np.stack([across, across.T, 255 - across], 2))
    shuffled = made(picture, "shuffle")
    assert abs(shuffled - pixels(picture)).mean() > 30
    # Where red came from tells where blue came from.
    assert abs(shuffled[..., 0] + shuffled[..., 2] - 255).max() <= 2


@pytest.mark.parametrize("module", ["none", *hints.MASKED])
def test_hints_that_are_the_picture_itself(module: str, picture: Image.Image) -> None:
    assert (made(picture, module) == pixels(picture)).all()


@pytest.mark.parametrize("module", hints.HINTS)
def test_pictures_of_any_shape_have_hints(module: str) -> None:
    """A line enlarged until its short side has 512 pixels would be larger than any memory."""
    for size in ((9000, 1), (1, 9000), (3000, 40)):
        hint = hints.make(Image.new("RGB", size), module, 512, -1, -1)
        assert hint.size < 30_000_000
        for mode in (0, 1, 2):
            assert hints.fit_hint(hint, 512, 256, mode).shape == (256, 512, 3)


def pixels(picture: Image.Image) -> NDArray[np.int16]:
    return np.asarray(picture, dtype=np.int16)


# Onto the size that is rendered


def squares() -> hints.Pixels:
    """64 high, 128 wide: red with a blue square in the middle."""
    hint = np.full((64, 128, 3), (255, 0, 0), np.uint8)
    hint[:, 32:96] = (0, 0, 255)
    return hint


def test_hints_are_stretched_cropped_or_filled() -> None:
    red, blue = [255, 0, 0], [0, 0, 255]
    for mode, left, top in ((0, red, blue), (1, blue, blue), (2, red, red)):
        fitted = hints.fit_hint(squares(), 128, 128, mode)
        assert fitted.dtype == np.uint8
        assert fitted.shape == (128, 128, 3)
        assert fitted[64, 2].tolist() == left
        assert fitted[2, 64].tolist() == top
        assert fitted[64, 64].tolist() == blue
    same = squares()
    assert hints.fit_hint(same, 128, 64, 1) is same


def test_a_hint_is_filled_up_with_the_color_of_its_border() -> None:
    hint = np.full((32, 64, 3), 7, np.uint8)
    hint[8:24, 8:56] = 200
    fitted = hints.fit_hint(hint, 64, 64, 2)
    assert (fitted[:16] == 7).all()
    assert (fitted[48:] == 7).all()
    assert (fitted[26:38, 10:54] == 200).all()


def test_a_hint_is_cropped_in_its_middle() -> None:
    across = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 3, 2).repeat(50, 0)
    fitted = hints.fit_hint(across, 200, 200, 1)
    assert fitted[100, 0, 0] == pytest.approx(75, abs=1)
    assert fitted[100, 199, 0] == pytest.approx(124, abs=1)


def test_lines_stay_lines() -> None:
    lines = np.zeros((50, 50, 3), np.uint8)
    lines[:, 20:23] = 255
    for size in ((70, 70), (33, 41), (128, 64)):
        for mode in (0, 1, 2):
            assert {*np.unique(hints.fit_hint(lines, *size, mode))} <= {0, 255}
    soft = np.full((50, 50, 3), 100, np.uint8)
    soft[20:] = 200
    assert len(np.unique(hints.fit_hint(soft, 70, 70, 0))) > 2


@pytest.mark.parametrize(
    ("size", "mode", "resolution"),
    [((1000, 500), 0, 512), ((1000, 500), 1, 512), ((1000, 500), 2, 256), ((64, 64), 1, 512)],
)
def test_the_perfect_resolution_needs_no_resizing(
    size: tuple[int, int], mode: int, resolution: int
) -> None:
    assert hints.perfect_resolution(Image.new("RGB", size), 512, 512, mode) == resolution


# Units that can't act


@pytest.fixture
def controls(easel: Easel, tmp_path: Path) -> Callable[..., Controls]:
    """Of units for a job that names a ControlNet for SD 1.x, and a checkpoint as another one."""
    named: list[Model] = [
        ("ControlNet", "control.safetensors", small.write_controlnet_names(tmp_path / "c")),
        ("ControlNet", "demo.safetensors", DEMO),
    ]
    models = Models(*job_of("txt2img", named), easel.engine.library)

    def of(*units: dict[str, Any], family: str = SD1) -> Controls:
        return Controls(
            [ControlUnit(**unit) for unit in units], models, easel.engine.library, family
        )

    return of


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (
            {"module": "depth_midas", "model": "control"},
            'module: "depth_midas" needs weights of its own or is not known; put the finished hint',
        ),
        ({"module": "canny"}, "model: got none, allowed is a checkpoint of type ControlNet"),
        ({"model": "none"}, "model: got none, allowed is a checkpoint of type ControlNet"),
        (
            {"model": "other"},
            "model: other is no checkpoint of type ControlNet that the job names; it names",
        ),
        (
            {"model": "demo"},
            "model: demo.safetensors is a SD 1.x checkpoint; a ControlNet is needed",
        ),
        (
            {"model": "control", "guidance_start": 0.5, "guidance_end": 0.4},
            "guidance_start: allowed is what is not above guidance_end",
        ),
        ({"model": "control", "image": "x"}, "image: no base64"),
        ({"model": "control", "image": base64_of(sketch()), "mask": "x"}, "mask: no base64"),
    ],
)
def test_a_unit_that_can_not_act_is_told(
    unit: dict[str, Any], reason: str, controls: Callable[..., Controls]
) -> None:
    with pytest.raises(JobFailure) as failure:
        controls(unit)
    assert str(failure.value).startswith(f"alwayson_scripts.controlnet.args[0].{reason}")


def test_the_modules_that_are_built_in_are_listed(controls: Callable[..., Controls]) -> None:
    with pytest.raises(JobFailure) as failure:
        controls({"module": "openpose", "model": "control"})
    assert all(module in str(failure.value) for module in hints.HINTS)


def test_a_controlnet_of_another_family_is_told(controls: Callable[..., Controls]) -> None:
    with pytest.raises(
        JobFailure, match=r"a ControlNet for SD 1\.x; the checkpoint is one of SD 2"
    ):
        controls({"model": "control"}, family=SD2)


def test_units_are_written_down_as_the_extension_does(controls: Callable[..., Controls]) -> None:
    told = controls(
        {"module": "canny", "model": "Control [0123abcd]", "processor_res": 768, "threshold_a": 50}
        | {"resize_mode": 2, "control_mode": 1},
        {"model": "control.safetensors", "weight": 0.5, "resize_mode": 1, "control_mode": 0}
        | {"number": 2},
    ).infotext()
    first, second = (str(told[f"ControlNet {number}"]) for number in (0, 2))
    assert re.sub(r"\[\w{8}\]", "[its hash]", first) == (
        "Module: canny, Model: control [its hash], Weight: 1.0, Resize Mode: Resize and Fill,"
        " Low Vram: False, Processor Res: 768, Threshold A: 50, Guidance Start: 0.0,"
        " Guidance End: 1.0, Pixel Perfect: False, Control Mode: My prompt is more important"
    )
    assert second.startswith("Module: none, Model: control [")
    assert "Weight: 0.5, Resize Mode: Crop and Resize, " in second
    assert "Processor Res" not in second
