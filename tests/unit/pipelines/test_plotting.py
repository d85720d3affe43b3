"""X/Y/Z plots: axes, grids and what is written down with them, as the webui's clients know them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.pictures import files
from services.inference.worker.pipelines.plotting import AXES, axes_of
from services.inference.worker.settings import EngineOptions
from shared.webui.settings import WebuiSettings
from tests.unit.pipelines.easel import CHECKPOINT, Done, Easel, job_of, read_back

SEED, STEPS, REPLACE, SAMPLER = 1, 4, 7, 9
"""Numbers of axes of txt2img."""
Axis = tuple[int | str, str, list[str]]
NOTHING: Axis = (0, "", [])


def plot(
    easel: Easel,
    x: Axis = NOTHING,
    y: Axis = NOTHING,
    z: Axis = NOTHING,
    *,
    lone: bool = True,
    sub_grids: bool = False,
    keep_random: bool = False,
    rest: tuple[Any, ...] = (0, False),
    **body: Any,
) -> Done:
    args = [*x, *y, *z, True, lone, sub_grids, keep_random, *rest]
    return easel.paint(script_name="X/Y/Z plot", script_args=args, **{"steps": 1, **body})


def test_axes_have_the_numbers_of_the_webui() -> None:
    names = {
        task: [a.label for a in AXES if a.only in ("", task)] for task in ("txt2img", "img2img")
    }
    of_both = ["Nothing", "Seed", "Var. seed", "Var. strength", "Steps"]
    assert names["txt2img"][:5] == names["img2img"][:5] == of_both
    assert names["txt2img"][5:12] == [
        "Hires steps",
        "CFG Scale",
        "Prompt S/R",
        "Prompt order",
        "Sampler",
        "Hires sampler",
        "Checkpoint name",
    ]
    assert names["img2img"][5:10] == [
        "CFG Scale",
        "Image CFG Scale",
        "Prompt S/R",
        "Prompt order",
        "Sampler",
    ]
    assert (names["txt2img"].index("VAE"), names["img2img"].index("VAE")) == (27, 26)


def test_axes_have_other_numbers_in_a_later_webui() -> None:
    assert axes_of("1.7") == [*AXES]
    later = [axis.label for axis in axes_of("1.10") if axis.only in ("", "txt2img")]
    assert [later.index(name) for name in ("Schedule rho", "Beta schedule alpha", "VAE")] == [
        20,
        21,
        29,
    ]
    assert later[-3:] == ["RNG source", "FP8 mode", "Size"]
    body: dict[str, Any] = {}
    for label, value in (("Schedule type", "Beta"), ("Size", "512 x 768")):
        next(axis for axis in axes_of("1.10") if axis.label == label).apply(body, value, [])
    assert body == {"scheduler": "Beta", "width": "512", "height": "768"}


def test_a_plot_is_one_however_its_json_is_written(easel: Easel) -> None:
    args = [*("Seed", "1, 2", []), *NOTHING, *NOTHING, False, True, False, False, 0, False]
    body = {"prompt": "a red circle", "steps": 1, "width": 64, "height": 64, "script_args": args}
    job, files = job_of("txt2img", [CHECKPOINT])
    for name in ('"x/y/z plot"', r'"X\/Y\/Z plot"', r'"\u0058/Y/Z plot"'):
        text = json.dumps({**body, "script_name": "@"}).replace('"@"', name)
        for encoding in ("utf-8-sig", "utf-16"):
            done = Done(easel.engine.run(job, text.encode(encoding), files))
            assert len(done.pictures) == 3


def test_more_cells_than_are_allowed_are_counted_and_refused(easel: Easel) -> None:
    with pytest.raises(JobFailure, match="got 1000000 combinations, allowed are 1000"):
        plot(easel, *[(SEED, "1-1000", [])] * 2)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ((["1", "1, 2", []], ["False"] * 4, ("0", "False")), None),
        (([1.0, [1.0, 2.0], None], [0, 0, 0, 0], (0.0, 0)), None),
        ((["seed", "1,2", []], [None] * 4, (None, None)), None),
        (((1, "1, 2", []), ["True", "true", 0, "no"], ("20", "false")), ([True, True], 20)),
        (((1, "1, 2", []), [1, 1.0, "off", False], (20.0, False)), ([True, True], 20)),
        (((1, "1, 2", []), [1, 1, 0, 0], (0, 0, "False", "20", "0")), ([True, True], 20)),
    ],
)
def test_args_are_read_however_they_are_written(
    easel: Easel, written: tuple[Any, ...], plain: tuple[list[bool], int] | None
) -> None:
    x, flags, rest = written
    legend, lone = plain[0] if plain else (False, False)
    margin = plain[1] if plain else 0

    def sizes(args: list[Any]) -> list[tuple[int, int]]:
        done = easel.paint(steps=1, script_name="X/Y/Z plot", script_args=args)
        assert done.warnings == []
        return [picture.size for picture in done.pictures]

    usual = [SEED, "1, 2", [], *NOTHING, *NOTHING, legend, lone, False, False, margin, False]
    assert sizes([*x, *NOTHING, *NOTHING, *flags, *rest]) == sizes(usual)


def test_values_may_be_numbers_and_flags(easel: Easel) -> None:
    assert plot(easel, (STEPS, 2, [])).info["all_seeds"] == [7]  # type: ignore[arg-type]
    done = plot(easel, ("SGM noise multiplier", "", ["True", "off"]))
    told = ["SGM noise multiplier: True" in text for text in done.texts[1:]]
    assert told == [True, False]


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (("wide", False), 'script_args: margin_size: got "wide", allowed is a whole number from 0'),
        (
            (501, False),
            "script_args: margin_size: got 501, allowed is a whole number from 0 to 500",
        ),
        ((-1, False), "script_args: margin_size: got -1, allowed is a whole number from 0 to 500"),
        ((0, "perhaps"), 'script_args: csv_mode: got "perhaps", allowed is true or false'),
    ],
)
def test_an_arg_that_means_nothing_is_named(
    easel: Easel, rest: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(JobFailure) as failure:
        plot(easel, (STEPS, "1", []), rest=rest)
    assert str(failure.value).startswith(reason)


def test_cells_run_along_x_then_y_then_z(easel: Easel) -> None:
    done = plot(
        easel,
        (SEED, "1, 2", []),
        (REPLACE, "red, blue", []),
        ("Steps", "1-3 (+2)", []),
        sub_grids=True,
    )
    assert [image.name for image in done.result.images] == [
        "grid.png",
        *(f"grid_{number}.png" for number in range(2)),
        *(f"image_{number}.png" for number in range(8)),
    ]
    told = [
        (text.split()[1], fields["Seed"], fields["Steps"]) for text, fields in read(done.texts[3:])
    ]
    assert told == [
        (color, str(seed), str(steps))
        for steps in (1, 3)
        for color in ("red", "blue")
        for seed in (1, 2)
    ]
    assert done.info["index_of_first_image"] == 1
    assert done.info["infotexts"] == done.texts
    assert done.info["all_seeds"] == [1, 2] * 4
    assert done.info["all_prompts"][1:3] == ["a red circle", "a blue circle"]
    grids = [fields for _, fields in read(done.texts[:3])]
    assert all(fields["Script"] == "X/Y/Z plot" for fields in grids)
    assert all((fields["X Type"], fields["Y Values"]) == ("Seed", "red, blue") for fields in grids)
    assert grids[0]["Z Values"] == "1-3 (+2)"
    assert "Z Type" not in grids[1]  # a sub grid has one value of it
    assert [fields["Steps"] for fields in grids] == ["1", "1", "3"]


def read(texts: list[str]) -> list[tuple[str, dict[str, str]]]:
    return [(text, read_back(text)) for text in texts]


def test_values_can_be_pasted_back(easel: Easel) -> None:
    typed = '"red, round", blue'
    fields = plot(easel, (REPLACE, typed, []), lone=False, prompt="a red, round thing").fields
    assert fields["X Values"] == typed
    names = ["Euler a", "DPM++ 2M"]
    fields = plot(easel, (SAMPLER, "", names), lone=False).fields
    assert fields["X Values"] == "Euler a,DPM++ 2M"
    assert "Fixed X Values" not in fields


def test_cells_share_a_random_seed_unless_it_is_to_stay_random(easel: Easel) -> None:
    shared = plot(easel, (STEPS, "1, 2", []), seed=-1)
    assert len(set(shared.info["all_seeds"])) == 1
    each = plot(easel, (STEPS, "1, 2", []), seed=-1, keep_random=True)
    assert len(set(each.info["all_seeds"])) == 2


def test_random_seeds_of_an_axis_are_drawn_once_unless_they_are_to_stay_random(
    easel: Easel,
) -> None:
    done = plot(easel, (SEED, "-1, 5", []), (STEPS, "1, 2", []))
    seeds = done.info["all_seeds"]
    assert seeds[:2] == seeds[2:]
    assert done.fields["Fixed X Values"] == f"{seeds[0]}, 5"
    done = plot(easel, (SEED, "-1, 5", []), (STEPS, "1, 2", []), keep_random=True)
    seeds = done.info["all_seeds"]
    assert seeds[0] != seeds[2]
    assert "Fixed X Values" not in done.fields


def test_styles_can_be_plotted(tmp_path: Path) -> None:
    table = json.dumps({"blue": {"prompt": "blue {prompt}"}, "calm": {"prompt": "calm"}})
    easel = Easel(tmp_path, EngineOptions(webui=WebuiSettings(styles=table)))
    done = plot(easel, ("Styles", "", ["None", "blue", "blue,calm", "wild"]), styles=["calm"])
    assert done.info["all_prompts"] == [
        "a red circle, calm",
        "blue a red circle, calm",
        "blue a red circle, calm, calm",
        "a red circle, calm",
    ]
    assert done.warnings == ['styles "wild": no effect, this deployment has no style of that name']


def test_a_plot_has_the_format_that_the_job_asks_for(easel: Easel) -> None:
    settings = {"samples_format": "jpg", "enable_pnginfo": False}
    done = plot(easel, (STEPS, "1, 2", []), override_settings=settings)
    assert [image.media_type for image in done.result.images] == ["image/jpeg"] * 3
    assert done.answer["images"] == ["grid.jpg", "image_0.jpg", "image_1.jpg"]
    assert not any(picture.getexif() for picture in done.pictures)


def test_what_is_told_of_a_plot_s_pictures_is_told_once(
    easel: Easel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(files.MOST_EXIF, "jpg", 300)
    done = plot(easel, (STEPS, "1, 2", []), override_settings={"samples_format": "jpg"})
    assert done.answer["images"] == ["grid.jpg", "image_0.jpg", "image_1.jpg"]
    assert [warning[:30] for warning in done.warnings] == ["samples_format jpg holds notes"]


def test_seeds_that_are_to_vary_are_told_to_have_no_effect(easel: Easel) -> None:
    """Of webui 1.8, whose three fields come before the margin."""
    done = plot(easel, (STEPS, "1, 2", []), rest=(True, False, False, 0, False))
    assert done.warnings == ["script_args: vary_seeds of X, Y and Z: no effect here"]
    assert plot(easel, (STEPS, "1", []), rest=(False, False, False, 0, False)).warnings == []


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ((99, "1", []), "script_args: x type: got 99, allowed is one of 0 Nothing, 1 Seed,"),
        ((STEPS, "", []), "script_args: x values: got none"),
        (
            ("SGM noise multiplier", "", ["perhaps"]),
            'script_args: x values: got "perhaps", allowed is true or false',
        ),
        ((STEPS, "1.5", []), 'script_args: x values: got "1.5", allowed is a number or a range'),
        ((STEPS, "many", []), 'script_args: x values: got "many", allowed is a number or a range'),
        ((REPLACE, "green, blue", []), "script_args: Prompt S/R: the first value is in neither"),
        ((REPLACE, "red\rblue", []), 'script_args: x values: got "red\\rblue", allowed are values'),
        ((SAMPLER, "", ["Oiler"]), 'sampler_name: got "Oiler", allowed is one of '),
    ],
)
def test_what_can_not_be_plotted_is_told(easel: Easel, x: Axis, reason: str) -> None:
    with pytest.raises(JobFailure) as failure:
        plot(easel, x)
    assert str(failure.value).startswith(reason)
