"""Which models a body names, before anything is loaded or looked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.inference.worker.pipelines.enlarging import BY_PIXELS
from services.inference.worker.pipelines.painting import LATENT_UPSCALERS
from services.inference.worker.pipelines.plotting import axes_of
from shared.webui.body_names import (
    LONGEST_PROMPT,
    MODEL_AXES,
    MOST_NAMED,
    NO_MODEL,
    BodyNames,
    has_words,
    model_axes,
    names_in,
    squeezed,
    words_of,
)
from shared.webui.settings import WebuiSettings

USUAL = WebuiSettings()


def read(task_type: str, *webui: WebuiSettings, **body: Any) -> BodyNames:
    names = names_in(task_type, json.dumps(body).encode(), *(webui or (USUAL,)))
    assert names is not None
    return names


def named(task_type: str, **body: Any) -> list[tuple[str, str]]:
    return [(one.type, one.title) for one in read(task_type, **body).models]


def units(*units: dict[str, Any]) -> dict[str, Any]:
    return {"ControlNet": {"args": list(units)}}


def plot(*axes: Any, csv_mode: object = False) -> dict[str, Any]:
    given = [*axes, *[0, "", []] * 3][:9]
    args = [*given, True, False, False, False, 0, csv_mode]
    return {"script_name": "X/Y/Z plot", "script_args": args}


HIRES = {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+", "hr_checkpoint_name": "b [0123abcd]"}


@pytest.mark.parametrize(
    ("task_type", "body", "found"),
    [
        (
            "txt2img",
            {"override_settings": {"sd_model_checkpoint": "a.safetensors", "sd_vae": "v"}},
            [("Stable-diffusion", "a.safetensors"), ("VAE", "v")],
        ),
        (
            "txt2img",
            {"prompt": "x <lora:one:0.8> <lyco: two :1:2>", "negative_prompt": "<lora:three:1>"},
            [("Lora", "one"), ("Lora", "two")],
        ),
        ("txt2img", {"prompt": "<hypernet:h:1> <lora:> <b>"}, []),
        ("txt2img", {"prompt": "<lora:one:1>", "disable_extra_networks": "true"}, []),
        ("txt2img", {"hr_prompt": "<lora:one:1>", **HIRES, "enable_hr": False}, []),
        (
            "txt2img",
            {"hr_prompt": "<lora:one:1>", **HIRES},
            [("Stable-diffusion", "b [0123abcd]"), ("Upscaler", "R-ESRGAN 4x+"), ("Lora", "one")],
        ),
        ("img2img", {"hr_prompt": "<lora:one:1>", **HIRES}, []),
        ("img2img", {"refiner_checkpoint": "r"}, [("Stable-diffusion", "r")]),
        (
            "img2img",
            {"alwayson_scripts": {"Refiner": {"args": [True, "r", 0.8]}}},
            [("Stable-diffusion", "r")],
        ),
        ("img2img", {"alwayson_scripts": {"refiner": {"args": [False, "r", 0.8]}}}, []),
        (
            "img2img",
            {"alwayson_scripts": {"refiner": [True, "r", 0.8]}},
            [("Stable-diffusion", "r")],
        ),
        (
            "txt2img",
            {
                "refiner_checkpoint": "own",
                "alwayson_scripts": {"refiner": {"args": [True, "r", 0.8]}},
            },
            [("Stable-diffusion", "own")],
        ),
        (
            "txt2img",
            {
                "alwayson_scripts": units(
                    {"model": "canny", "image": "AAAA"},
                    {"model": "depth", "enabled": False},
                    {"model": "pose", "enabled": "false"},
                    {"model": "None"},
                    {},
                )
            },
            [("ControlNet", "canny")],
        ),
        (
            "img2img",
            {"script_name": "SD upscale", "script_args": ["", 64, "u", 2]},
            [("Upscaler", "u")],
        ),
        ("img2img", {"script_name": "SD upscale", "script_args": ["", 64, 1, 2]}, []),
        ("txt2img", {"script_name": "SD upscale", "script_args": ["", 64, "u", 2]}, []),
        ("extra-single-image", {"upscaler_1": "u", "upscaler_2": "w"}, [("Upscaler", "u")]),
        (
            "extra-single-image",
            {"upscaler_1": "Lanczos", "upscaler_2": "w", "extras_upscaler_2_visibility": "0.5"},
            [("Upscaler", "w")],
        ),
        ("extra-batch-images", {"upscaler_1": "u"}, [("Upscaler", "u")]),
        (
            "extra-single-image",
            {"gfpgan_visibility": 0, "codeformer_visibility": "0.5"},
            [("FaceRestoration", "CodeFormer")],
        ),
        ("txt2img", {"restore_faces": True}, [("FaceRestoration", "GFPGAN")]),
        (
            "img2img",
            {"override_settings": {"face_restoration": True, "face_restoration_model": "f"}},
            [("FaceRestoration", "f")],
        ),
        (
            "img2img",
            {"restore_faces": False, "override_settings": {"face_restoration": True}},
            [],
        ),
        ("rembg", {"model": "u2net"}, [("rembg", "u2net")]),
        ("rembg", {"model": "u2net_custom"}, []),
        ("rembg", {"input_image": "AAAA"}, []),
        (
            "rembg",
            {"model": "sam", "vitmatte": True, "vitmatte_model": "base"},
            [
                ("rembg", "sam_vit_b_01ec64.encoder.onnx"),
                ("rembg", "sam_vit_b_01ec64.decoder.onnx"),
                ("rembg", "vitmatte-base"),
            ],
        ),
    ],
)
def test_a_body_names_what_acts(
    task_type: str, body: dict[str, Any], found: list[tuple[str, str]]
) -> None:
    assert named(task_type, **body) == found


def test_upscalers_without_a_file_are_those_of_the_worker() -> None:
    known = [name.lower() for name in (*LATENT_UPSCALERS, *BY_PIXELS, "None", "")]
    assert sorted(NO_MODEL["Upscaler"]) == sorted(known)


@pytest.mark.parametrize("name", ["", "None", "none", "Automatic", "Use same checkpoint"])
def test_a_choice_is_no_name(name: str) -> None:
    settings = {"sd_vae": name if name != "Use same checkpoint" else ""}
    body = {
        "override_settings": settings,
        "refiner_checkpoint": name if name != "Automatic" else "",
        "enable_hr": True,
        "hr_upscaler": "Latent (nearest-exact)",
        "hr_checkpoint_name": name if name != "Automatic" else "",
    }
    assert named("txt2img", **body) == []


@pytest.mark.parametrize(
    "body",
    [
        {"override_settings": ["sd_vae"]},
        {"override_settings": {"sd_vae": 3, "sd_model_checkpoint": {}}},
        {"alwayson_scripts": []},
        {"alwayson_scripts": {"controlnet": {"args": {"model": "x"}}}},
        {"alwayson_scripts": {"controlnet": {"args": [3, {"model": "x", "enabled": "perhaps"}]}}},
        {"script_name": "X/Y/Z plot", "script_args": 3},
        {"script_name": "X/Y/Z plot", "script_args": [11, 5, {}]},
        {"script_name": "X/Y/Z plot", "script_args": [[], {}, None] * 6},
        {"prompt": ["<lora:x:1>"], "enable_hr": "perhaps"},
    ],
)
def test_what_the_worker_refuses_names_nothing(body: dict[str, Any]) -> None:
    assert named("txt2img", **body) == []


def test_where_a_name_stands_is_told() -> None:
    body = {"prompt": "<lora:x:1>", "alwayson_scripts": units({}, {"model": "canny"})}
    assert [one.field for one in read("txt2img", **body).models] == [
        "alwayson_scripts.controlnet.args[1].model",
        "prompt: <lora:…>",
    ]


def test_a_name_that_comes_again_is_one() -> None:
    body = {"prompt": "<lora:x:1> <lora:x:0.5>", "enable_hr": True, "hr_prompt": "<lora:x:1>"}
    assert named("txt2img", **body) == [("Lora", "x")]


@pytest.mark.parametrize(
    "written",
    [
        b'{"prompt": "<lora:\\u0061:1>", "s_tmax": Infinity}',
        b'{"prompt": "<lora:\\u0061:1>", "x": "\\ud800"}',
        b'\xef\xbb\xbf{"prompt": "<lora:a:1>"}',
        '{"prompt": "<lora:a:1>"}'.encode("utf-16"),
        '{"prompt": "<lora:a:1>"}'.encode("utf-32-le"),
        b'{"prompt": "<lora:b:1>", "prompt": "<lora:a:1>"}',
    ],
)
def test_equal_json_names_the_same(written: bytes) -> None:
    names = names_in("txt2img", written, USUAL)
    assert names is not None
    assert [one.title for one in names.models] == ["a"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'"prompt"', b"[" * 100_000])
def test_what_is_no_body_can_not_be_read(body: bytes) -> None:
    assert names_in("txt2img", body, USUAL) is None


def test_a_plot_names_what_its_cells_have() -> None:
    axes = plot(
        *(11, "", ["a.safetensors", "b"]), *(27, "v1, None", []), *("refiner checkpoint", "", "r")
    )
    own = {"override_settings": {"sd_model_checkpoint": "own", "sd_vae": "own"}}
    names = read("txt2img", **axes, **own)
    assert [(one.type, one.title) for one in names.models] == [
        ("Stable-diffusion", "a.safetensors"),
        ("Stable-diffusion", "b"),
        ("VAE", "v1"),
        ("Stable-diffusion", "r"),
    ]
    assert names.has_checkpoint
    typed = plot(11, "x, y", ["a"], csv_mode=True)
    assert named("txt2img", **typed) == [("Stable-diffusion", "x"), ("Stable-diffusion", "y")]
    assert named("img2img", **plot(29, "False, CodeFormer", []), restore_faces=True) == [
        ("FaceRestoration", "CodeFormer")
    ]
    hires = plot(26, "", ["u", "Latent"])
    assert named("txt2img", **hires) == []
    assert named("txt2img", **hires, enable_hr=True) == [("Upscaler", "u")]


def test_prompt_s_r_puts_networks_and_words_into_prompts() -> None:
    axes = plot(*(7, "cat, dog, <lora:one:1>", []), *("Prompt S/R", '"lora:one","lora:two"', []))
    names = read("img2img", **axes, prompt="a cat", negative_prompt="no cat")
    assert [one.title for one in names.models] == ["one", "two"]
    assert "a dog" in names.prompts
    assert "no dog" in names.prompts


def test_prompt_s_r_can_not_make_texts_without_end() -> None:
    def all_texts(prompt: str, *values: str) -> list[str]:
        args = [*(7, "", ""), *(7, "", ""), *[0, "", []] * 2]
        args[1] = args[4] = [*values]
        return read("txt2img", script_name="x/y/z plot", script_args=args, prompt=prompt).prompts

    long = "y" * LONGEST_PROMPT
    assert sum(map(len, all_texts(long, "", "x" * 1_000_000))) <= LONGEST_PROMPT
    assert all_texts(long + "y", "y", "x") == []
    assert len(all_texts("", *["x"] * 100_000)) < 1000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": " " * 20_000_000 + "x", "script_args": [7, ",".join(["ab"] * 50_000), []]},
        {"prompt": "," * LONGEST_PROMPT + "x"},
        {"prompt": "x", "script_args": [11, "", [str(number) for number in range(300_000)]]},
        {"prompt": "x", "script_args": [11, "," * 20_000_000, []]},
        {"prompt": "".join(f"<lora:{number}:1>" for number in range(7000))},
        {"prompt": "x", "styles": [""] * 100_000, "script_args": [28, "", ["x"] * 100_000]},
    ],
    ids=["replaced", "commas", "cells", "typed", "networks", "styles"],
)
def test_a_body_is_read_in_time_that_grows_with_its_length(body: dict[str, Any]) -> None:
    names = read("txt2img", script_name="x/y/z plot", **body)
    assert len(names.models) <= MOST_NAMED
    assert sum(map(len, names.prompts)) <= LONGEST_PROMPT


STYLES = WebuiSettings(
    styles=json.dumps(
        {
            "soft": {"prompt": "{prompt} <lora:soft:1>", "negative_prompt": "harsh"},
            "oil": {"prompt": "oil <lora:oil:1>"},
            "twice": {"prompt": "{prompt}, {prompt}"},
        }
    )
)


def test_styles_name_what_their_prompts_do() -> None:
    body = {"prompt": "a cat", "styles": ["soft", "None", "no such"]}
    names = read("txt2img", STYLES, **body)
    assert [(one.title, one.field) for one in names.models] == [("soft", "prompt: <lora:…>")]
    assert names.prompts == ["a cat ", "harsh"]
    assert [one.title for one in read("txt2img", **body).models] == []
    axes = plot("Styles", "", ["oil", "None"])
    assert [one.title for one in read("img2img", STYLES, **body, **axes).models] == ["soft", "oil"]
    hires = {"enable_hr": True, "hr_prompt": "large"}
    fields = [one.field for one in read("txt2img", STYLES, **hires, styles=["oil"]).models]
    assert fields == ["prompt: <lora:…>"]
    assert read("txt2img", STYLES, prompt="x", styles=["twice"] * 1000).prompts == []


def test_what_is_a_comment_names_nothing() -> None:
    later = WebuiSettings(webui_version="1.10")
    body = {"prompt": "a cat # <lora:one:1>\n#<lora:two:1>\na <lora:three:1>"}
    assert [one.title for one in read("txt2img", later, **body).models] == ["three"]
    assert len(read("txt2img", **body).models) == 3
    kept = {"override_settings": {"enable_prompt_comments": False}}
    assert len(read("txt2img", later, **body, **kept).models) == 3


@pytest.mark.parametrize("version", ["1.7", "1.10"])
@pytest.mark.parametrize("task_type", ["txt2img", "img2img"])
def test_the_numbers_of_axes_are_those_of_the_plot(task_type: str, version: str) -> None:
    known = [axis.label.lower() for axis in axes_of(version) if axis.only in ("", task_type)]
    numbers = {label: known.index(label) for label in MODEL_AXES if label in known}
    assert model_axes(task_type, version) == numbers


def test_a_number_of_an_axis_is_that_of_the_deployment_s_webui() -> None:
    later = WebuiSettings(webui_version="1.10")
    body = plot(28, "u", [])
    assert [one.title for one in read("txt2img", later, **body, enable_hr=True).models] == ["u"]
    assert read("txt2img", **body, enable_hr=True).models == []


@pytest.mark.parametrize(
    ("prompt", "name", "stands"),
    [
        ("a cat", "cat", True),
        ("a Cat.", "cAT", True),
        ("(cat:1.2)", "cat", True),
        ("[dog:cat:0.5]", "cat", True),
        ("concatenate", "cat", False),
        ("catalogue", "cat", False),
        ("easy negative", "easynegative", False),
        ("bad-hands-5, x", "bad-hands-5", True),
        ("bad-hands-51", "bad-hands-5", True),
        ("bad - hands - 5", "bad-hands-5", True),
        ("style \\(v1\\)", "style (v1)", True),
        ("style  v1", "style v1", True),
        ("my_style", "my_style", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("anything", "", False),
        ("a . b", " ", False),
    ],
)
def test_an_embedding_is_named_by_whole_words(prompt: str, name: str, stands: bool) -> None:
    assert has_words(words_of(prompt), name) == stands
    if stands:
        assert squeezed(name) in squeezed(prompt), "else nobody would ask"


def test_a_word_within_a_network_is_no_embedding() -> None:
    assert read("txt2img", prompt="a <lora:cat:1>").prompts == ["a "]
