"""Bodies as clients send them: read where they can be, refused with the field where they can't."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.params.control import ControlUnit, parse_units
from services.inference.worker.pipelines.params.cutting import CuttingParams, parse_cutting
from services.inference.worker.pipelines.params.enlarging import EnlargingParams, parse_enlarging
from services.inference.worker.pipelines.params.painting import (
    OverrideSettings,
    PaintingParams,
    parse_painting,
)
from services.inference.worker.pipelines.params.reading import Body, convert, read_body
from services.inference.worker.pipelines.sampling.names import SAMPLERS, find_sampler
from shared.webui.settings import WebuiSettings

PICTURE = "iVBORw0KGgo="


def read(task_type: str = "txt2img", **body: Any) -> tuple[PaintingParams, list[str]]:
    if task_type == "img2img":
        body.setdefault("init_images", [PICTURE])
    return parse_painting(sent(body), task_type, WebuiSettings())


def sent(body: object) -> Body:
    """As a worker has it once it has come."""
    return read_body(json.dumps(body).encode())


def reason_of(body: bytes, task_type: str = "txt2img", **webui: Any) -> str:
    with pytest.raises(JobFailure) as failure:
        parse_painting(read_body(body), task_type, WebuiSettings(**webui))
    return str(failure.value)


# What is wrong is named


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"steps": 0}', "steps: got 0, allowed is a whole number from 1 to 1000"),
        ('{"steps": "many"}', 'steps: got "many", allowed is a whole number from 1 to 1000'),
        ('{"steps": true}', "steps: got true, allowed is a whole number from 1 to 1000"),
        ('{"steps": 20.5}', "steps: got 20.5, allowed is a whole number from 1 to 1000"),
        ('{"cfg_scale": NaN}', "cfg_scale: got NaN, allowed is a number from -1000 to 1000"),
        (
            '{"cfg_scale": Infinity}',
            "cfg_scale: got Infinity, allowed is a number from -1000",
        ),
        ('{"cfg_scale": "1e999"}', 'cfg_scale: got "1e999", allowed is a number from -1000'),
        ('{"tiling": "maybe"}', 'tiling: got "maybe", allowed is true or false'),
        ('{"tiling": 2}', "tiling: got 2, allowed is true or false"),
        ('{"sampler_index": 5.5}', "sampler_index: got 5.5, allowed is a text or a whole number"),
        (
            '{"init_images": "x"}',
            "init_images: got 'x', allowed is a list of items, each a text",
        ),
        ('{"init_images": [true]}', "init_images[0]: got true, allowed is a text"),
        ('{"hr_scale": 0.001}', "hr_scale: got 0.001, allowed is a number from 0.01 to 64"),
        ('{"refiner_switch_at": 2}', "refiner_switch_at: got 2, allowed is a number from 0 to 1"),
        ('{"seed_resize_from_w": 5000}', "seed_resize_from_w: got 5000, allowed is a whole number"),
        (
            '{"prompt": ["a"]}',
            "prompt: got another value (list), allowed is a text of up to 20000 characters",
        ),
        (
            '{"hr_negative_prompt": true}',
            "hr_negative_prompt: got another value (bool), allowed is a text of up to 20000",
        ),
        (
            '{"override_settings": {"CLIP_stop_at_last_layers": 13}}',
            "override_settings.CLIP_stop_at_last_layers: got 13, allowed is a whole number from 1",
        ),
        (
            '{"override_settings": {"hires_fix_refiner_pass": "third"}}',
            'override_settings.hires_fix_refiner_pass: got "third", allowed is one of both passes,',
        ),
        ('{"override_settings": []}', "override_settings: got [], allowed is an object"),
        ('{"sampler_name": "\\ud800"}', 'sampler_name: got "?", allowed is one of Euler a'),
        ('{"sampler_name": "Eular"}', 'sampler_name: got "Eular", allowed is one of Euler a, Eul'),
        ('{"sampler_index": "Eular"}', 'sampler_index: got "Eular", allowed is one of Euler a, Eu'),
        ('{"sampler_name": ["Euler"]}', 'sampler_name: got ["Euler"], allowed is a text'),
        (
            '{"enable_hr": true, "hr_sampler_name": "Eular"}',
            'hr_sampler_name: got "Eular", allowed is one of Euler a',
        ),
        ("[1]", "the params are no JSON object but [1]"),
        ("null", "the params are no JSON object but null"),
        ('{"steps": ', "the params are no JSON: "),
        ("", "the params are no JSON: "),
        ('{"seed": 1' + "0" * 5000 + "}", "the params are no JSON: "),
        ('{"a":' * 100_000, "the params are no JSON: "),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(body: str, reason: str) -> None:
    assert reason_of(body.encode()).startswith(reason.replace("'", '"'))


BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "steps": (1, 1000),
    "cfg_scale": (-1000, 1000),
    "seed": (-(2**63), 2**64 - 1),
    "subseed": (-(2**63), 2**64 - 1),
    "subseed_strength": (-10, 10),
    "seed_resize_from_h": (None, 4096),
    "seed_resize_from_w": (None, 4096),
    "width": (64, 4096),
    "height": (64, 4096),
    "batch_size": (1, 128),
    "n_iter": (1, 1000),
    "eta": (0, 10),
    "s_churn": (0, 1000),
    "s_tmin": (0, 1000),
    "s_tmax": (0, None),
    "s_noise": (0, 10),
    "s_min_uncond": (0, 1000),
    "refiner_switch_at": (0, 1),
    "hr_scale": (0.01, 64),
    "hr_second_pass_steps": (0, 1000),
    "hr_resize_x": (0, 4096),
    "hr_resize_y": (0, 4096),
    "firstphase_width": (0, 4096),
    "firstphase_height": (0, 4096),
    "denoising_strength": (0, 1),
    "resize_mode": (0, 3),
    "mask_blur": (0, 1024),
    "mask_blur_x": (0, 1024),
    "mask_blur_y": (0, 1024),
    "inpainting_fill": (0, 3),
    "inpaint_full_res_padding": (0, 16384),
    "initial_noise_multiplier": (0, 10),
    "override_settings.s_churn": (0, 1000),
    "override_settings.s_min_uncond": (0, 1000),
    "override_settings.s_noise": (0, 10),
    "override_settings.s_tmax": (0, None),
    "override_settings.s_tmin": (0, 1000),
    "override_settings.CLIP_stop_at_last_layers": (1, 12),
    "override_settings.code_former_weight": (0, 1),
    "override_settings.beta_dist_alpha": (0.01, 10),
    "override_settings.beta_dist_beta": (0.01, 10),
    "override_settings.skip_early_cond": (0, 1),
    "override_settings.comma_padding_backtrack": (0, 74),
    "override_settings.eta_ancestral": (0, 10),
    "override_settings.eta_ddim": (0, 10),
    "override_settings.eta_noise_seed_delta": (-(2**63), 2**64 - 1),
    "override_settings.img2img_extra_noise": (0, 10),
    "override_settings.initial_noise_multiplier": (0, 10),
    "override_settings.inpainting_mask_weight": (0, 1),
    "override_settings.jpeg_quality": (1, 100),
    "override_settings.rho": (0, 100),
    "override_settings.sdxl_crop_left": (0, 16384),
    "override_settings.sdxl_crop_top": (0, 16384),
    "override_settings.sdxl_refiner_high_aesthetic_score": (0, 10),
    "override_settings.sdxl_refiner_low_aesthetic_score": (0, 10),
    "override_settings.sigma_max": (0, 1000),
    "override_settings.sigma_min": (0, 1000),
    "override_settings.uni_pc_order": (1, 5),
}


def body_of(field: str, value: object) -> dict[str, Any]:
    """With `init_images` and enough of a batch, so that nothing else is wrong."""
    *outer, name = field.split(".")
    return {outer[0]: {name: value}} if outer else {name: value}


def test_the_bounds_are_those_of_every_number_in_a_body() -> None:
    def numbers(params: type[msgspec.Struct], where: str = "") -> set[str]:
        found = set()
        for field in msgspec.structs.fields(params):
            kind = msgspec.inspect.type_info(field.type)
            kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
            number = (msgspec.inspect.IntType, msgspec.inspect.FloatType)
            literal = isinstance(kind, msgspec.inspect.LiteralType) and 0 in kind.values
            if literal or isinstance(kinds[0], number):
                found.add(where + field.name)
        return found

    told = numbers(PaintingParams) | numbers(OverrideSettings, "override_settings.")
    assert told == BOUNDS.keys()


@pytest.mark.parametrize("field", BOUNDS)
def test_a_number_may_be_its_bounds_and_nothing_beyond(field: str) -> None:
    low, high = BOUNDS[field]
    for edge, beyond in ((low, -1), (high, 1)):
        if edge is None:
            continue
        read("img2img", **body_of(field, edge))
        wrong = json.dumps({"init_images": [PICTURE], **body_of(field, edge + beyond)})
        told = reason_of(wrong.encode(), "img2img")
        assert told.startswith(f"{field}: got {edge + beyond}, allowed is ")
        assert str(edge) in told
    for nothing in ("NaN", "-Infinity") + (() if field.endswith("s_tmax") else ("Infinity",)):
        raw = json.dumps(body_of(field, "@")).replace('"@"', nothing)
        assert reason_of(raw.encode(), "img2img").startswith(f"{field}: got {nothing}, allowed is ")


@pytest.mark.parametrize(
    ("webui", "body", "reason"),
    [
        ({"max_steps": 30}, {"steps": 31}, "steps: got 31, allowed is a whole number from 1 to 30"),
        ({"max_steps": 30}, {}, "steps: got 50, allowed is a whole number from 1 to 30"),
        ({"max_steps": 50}, {"hr_second_pass_steps": "51"}, 'hr_second_pass_steps: got "51", all'),
        ({"max_side": 512}, {"width": 520}, "width: got 520, allowed is a whole number from 64 to"),
        (
            {"max_side": 512},
            {"enable_hr": True, "hr_scale": 1.1},
            "hires fix: got a size of 563x563, allowed are sides from 64 to 512",
        ),
        ({"max_batch_size": 2}, {"batch_size": 3}, "batch_size: got 3, allowed is a whole number"),
        ({"max_n_iter": 2}, {"n_iter": 3}, "n_iter: got 3, allowed is a whole number from 1 to 2"),
        (
            {"max_pictures": 3},
            {"batch_size": 2, "n_iter": 2},
            "batch_size and n_iter: got 2 x 2 pictures, allowed are 3 in all",
        ),
        (
            {"max_prompt_length": 5},
            {"prompt": "flower"},
            "prompt: got another value (str), allowed is a text of up to 5 characters",
        ),
        ({"max_eta": 1}, {"eta": 2}, "eta: got 2, allowed is a number from 0 to 1"),
        (
            {"max_eta": 1},
            {"override_settings": {"eta_ddim": 2}},
            "override_settings.eta_ddim: got 2, allowed is a number from 0 to 1",
        ),
    ],
)
def test_a_deployment_says_what_is_too_much(
    webui: dict[str, Any], body: dict[str, Any], reason: str
) -> None:
    read(**body)
    assert reason_of(json.dumps(body).encode(), **webui).startswith(reason)
    least = reason_of(b'{"steps": 0}', max_steps=30)
    assert least == "steps: got 0, allowed is a whole number from 1 to 30"


def test_seeds_have_64_bits_as_in_the_webui() -> None:
    for seed in (-2, -(2**63), 2**53, 10788741199826055000, 2**64 - 1):
        assert read(seed=seed, subseed=seed)[0].seed == seed
    told = reason_of(json.dumps({"seed": 2**64 - 2, "batch_size": 3}).encode())
    assert told == (
        "seed: got 18446744073709551614 for the first of 3 pictures, allowed is up to"
        " 18446744073709551615 for the last"
    )


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_in_any_encoding(encoding: str) -> None:
    body = {"prompt": "ein Käfer \N{BEETLE}", "script_name": "X/Y/Z plot"}
    plain = json.dumps(body, ensure_ascii=False)
    escaped = "".join(f"\\u{ord(c):04x}" if c in "XYZ/" else c for c in plain)
    for text in (plain, escaped, json.dumps(body), json.dumps(body, indent=4)):
        assert read_body(text.encode(encoding)) == body


def test_texts_may_be_long_and_no_longer() -> None:
    for field in ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt"):
        read(**{field: "a" * 20_000})
        body = json.dumps({field: "a" * 20_001}).encode()
        wanted = f"{field}: got 20001 characters, allowed is a text of up to 20000 characters"
        assert reason_of(body) == wanted


def test_a_reason_does_not_quote_prompts_and_says_little_of_long_values() -> None:
    told = reason_of(json.dumps({"prompt": {"secret": "wish"}}).encode())
    assert "wish" not in told
    told = reason_of(json.dumps({"width": "9" * 5000}).encode())
    assert told == "width: got 5000 characters, allowed is a whole number from 64 to 4096"
    told = reason_of(json.dumps({"width": [9] * 5000}).encode())
    assert len(told) < 200


@pytest.mark.parametrize(
    ("task_type", "body", "reason"),
    [
        ("img2img", {}, "init_images: got none, allowed is a list of at least one picture"),
        ("img2img", {"init_images": []}, "init_images: got none"),
        (
            "img2img",
            {"init_images": [PICTURE] * 3, "batch_size": 2},
            "init_images: got 3 pictures, allowed is up to batch_size (2)",
        ),
        (
            "txt2img",
            {"batch_size": 2, "n_iter": 501},
            "batch_size and n_iter: got 2 x 501 pictures, allowed are 1000 in all",
        ),
        (
            "txt2img",
            {"override_settings": {"samples_format": "tiff"}},
            'override_settings.samples_format: got "tiff", allowed is one of png, jpg, webp',
        ),
        (
            "txt2img",
            {"override_settings": {"k_sched_type": "steep"}},
            'override_settings.k_sched_type: got "steep", allowed is one of Automatic, Uniform,',
        ),
        (
            "txt2img",
            {"override_settings": {"sigma_min": 2, "sigma_max": 2}},
            "override_settings.sigma_min: allowed is what is below sigma_max",
        ),
        (
            "txt2img",
            {"enable_hr": True, "width": 2048, "hr_scale": 2.5},
            "hires fix: got a size of 5120x1280, allowed are sides from 64 to 4096",
        ),
        (
            "txt2img",
            {"enable_hr": True, "hr_resize_x": 16},
            "hires fix: got a size of 16x16, allowed are sides from 64 to 4096",
        ),
        (
            "txt2img",
            {"firstphase_width": 8},
            "firstphase_width: got 8, allowed is a whole number from 64 to 4096",
        ),
        (
            "txt2img",
            {"firstphase_height": 63},
            "firstphase_height: got 63, allowed is a whole number from 64 to 4096",
        ),
        (
            "txt2img",
            {"override_settings": {"rho": 0.001}},
            "override_settings.rho: got 0.001, allowed is a number from 0.1 to 100",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    task_type: str, body: dict[str, Any], reason: str
) -> None:
    assert reason_of(json.dumps(body).encode(), task_type).startswith(reason)


# What clients really send


def test_bodies_of_real_clients_are_read() -> None:
    body = b"""{"prompt": "cat", "negative_prompt": null, "steps": "20", "cfg_scale": 7,
        "width": 515, "s_tmax": Infinity, "s_churn": 0, "foo": [1], "sampler_index": 3,
        "restore_faces": false, "seed": 12.0, "tiling": "False", "batch_size": "2",
        "sampler_name": "k_dpmpp_2m", "scheduler": "karras", "styles": [], "eta": null,
        "override_settings": {"sd_vae": "Automatic", "eta_noise_seed_delta": 31337, "bar": NaN,
            "randn_source": "GPU", "rho": null},
        "alwayson_scripts": {"controlnet": {"args": []}, "Tiled VAE": {"args": [true]}}}"""
    raw = read_body(body)
    params, warnings = parse_painting(raw, "txt2img", WebuiSettings())
    assert (params.steps, params.width, params.sampler.name) == (20, 512, "DPM++ 2M Karras")
    assert (params.seed, params.tiling, params.batch_size) == (12, False, 2)
    assert params.highest_churn == math.inf
    assert params.override_settings.eta_noise_seed_delta == 31337
    assert raw["foo"] == [1]
    assert "negative_prompt" not in raw
    assert warnings == [
        "foo: no effect here",
        "override_settings.bar: no effect here",
        'alwayson_scripts."Tiled VAE": no effect here',
        "width 515: rounded to 512, a multiple of 8",
    ]


STRUCTS = (PaintingParams, OverrideSettings, ControlUnit, CuttingParams, EnlargingParams)


def fields_of(*kinds: type[msgspec.inspect.Type]) -> list[Any]:
    """(struct, name) of all fields of bodies that are of these kinds, or of nothing."""
    found = []
    for struct in STRUCTS:
        told = msgspec.inspect.type_info(struct)
        assert isinstance(told, msgspec.inspect.StructType)
        for field in told.fields:
            inner = field.type
            if isinstance(inner, msgspec.inspect.UnionType) and inner.includes_none:
                inner = inner.types[0]
            if isinstance(inner, kinds):
                found.append(pytest.param(struct, field.name, id=f"{struct.__name__}.{field.name}"))
    return found


@pytest.mark.parametrize(("struct", "name"), fields_of(msgspec.inspect.BoolType))
def test_flags_are_read_however_they_are_written(struct: type[msgspec.Struct], name: str) -> None:
    for value in (True, False):
        written = ("True", "true", "TRUE", " on ", "yes", "1", 1, 1.0)
        if not value:
            written = ("False", "false", "FALSE", " off ", "no", "0", 0, 0.0)
        for one in (value, *written):
            assert getattr(convert({name: one}, struct), name) is value
    wrongs: list[Any] = ["maybe", "", 2, 0.5, [True], {}]
    for wrong in wrongs:
        with pytest.raises(JobFailure, match=f"^{name}: got .*, allowed is true or false"):
            convert({name: wrong}, struct)


@pytest.mark.parametrize(
    ("struct", "name"), fields_of(msgspec.inspect.IntType, msgspec.inspect.FloatType)
)
def test_numbers_are_read_however_they_are_written(struct: type[msgspec.Struct], name: str) -> None:
    for value in (1, 5, 64):
        with suppress(JobFailure):
            plain = getattr(convert({name: value}, struct), name)
            for one in (str(value), f" {value} ", float(value), f"{value}.0"):
                assert getattr(convert({name: one}, struct), name) == plain == value
            assert type(getattr(convert({name: "1"}, struct), name)) in (int, type(plain))
    wrongs: list[Any] = ["7,5", "many", "", True, [1], {}]
    for wrong in wrongs:
        with pytest.raises(JobFailure, match=f"^{name}: got .*, allowed is "):
            convert({name: wrong}, struct)


def test_choices_among_numbers_are_read_however_they_are_written() -> None:
    for one in (1, "1", 1.0, "1.0"):
        params, _ = read("img2img", resize_mode=one, inpainting_fill=one)
        assert (params.resize_mode, params.inpainting_fill) == (1, 1)
        extras, _ = parse_enlarging({"resize_mode": one}, WebuiSettings())
        assert extras.resize_mode == 1
        (unit,), _ = units_of({"resize_mode": one, "control_mode": one})
        assert (unit.resize_mode, unit.control_mode) == (1, 1)
    for wrong in (1.5, "1.5", "one", 7):
        assert reason_of(json.dumps({"resize_mode": wrong}).encode()).startswith("resize_mode: got")


def test_texts_may_be_written_as_numbers() -> None:
    assert read(prompt=2024, negative_prompt=1.5)[0].prompt == "2024"


def test_what_asks_for_nothing_however_it_is_written_is_passed_over() -> None:
    _, warnings = read(
        restore_faces="False",
        send_images="true",
        save_images="0",
        image_cfg_scale="1.5",
        do_not_save_samples="True",
        mask_blur_x="4",
        alwayson_scripts={"controlnet": {"args": [{"enabled": "False", "model": "x"}]}},
    )
    assert warnings == []
    assert read(save_images="True")[1] == ["save_images: no effect here"]


def test_what_asks_for_nothing_is_passed_over() -> None:
    _, warnings = read(
        restore_faces=False,
        styles=[],
        send_images=True,
        save_images=False,
        do_not_save_samples=True,
        override_settings_restore_afterwards=False,
        comments={},
        firstphase_width=0,
        resize_mode=0,
        init_images=[],
        mask="",
        denoising_strength=0.5,
        eta=0,
        override_settings={"randn_source": "CPU"},
        alwayson_scripts={},
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        (
            {"styles": ["anime"]},
            'styles "anime": no effect, this deployment has no style of that name',
        ),
        ({"send_images": False}, "send_images: no effect here"),
        ({"units": []}, "units: no effect here"),
        ({"x" * 500: 1}, "x" * 59 + "…: no effect here"),
        ({"sampler_index": 4}, "sampler_index 4: not a name, Euler was used"),
        (
            {"scheduler": "karras", "sampler_name": "UniPC"},
            'scheduler "karras": no effect on UniPC',
        ),
        ({"scheduler": "steep"}, 'scheduler "steep": no effect on Euler'),
        (
            {"sampler_name": "DDIM", "override_settings": {"k_sched_type": "karras"}},
            "override_settings.k_sched_type: no effect on DDIM",
        ),
        ({"sampler_name": "Euler a", "s_churn": 1}, "s_churn: no effect on Euler a"),
        ({"sampler_name": "Euler", "eta": 0.5}, "eta: no effect on Euler"),
        ({"sampler_name": "DPM++ 2M", "s_tmin": 1}, "s_tmin: no effect on DPM++ 2M"),
        ({"sampler_name": "DPM++ 2M", "s_tmax": 1}, "s_tmax: no effect on DPM++ 2M"),
        ({"sampler_name": "Euler a", "s_noise": 1.1}, "s_noise: no effect on Euler a"),
        ({"sampler_name": "Restart", "s_noise": 0}, "s_noise: no effect on Restart"),
        (
            {"sampler_name": "Euler a", "override_settings": {"s_churn": 1}},
            "s_churn: no effect on Euler a",
        ),
        (
            {"enable_hr": True, "sampler_name": "LMS", "hr_sampler_name": "Euler", "eta": 1},
            "eta: no effect on LMS and Euler",
        ),
        ({"height": 100}, "height 100: rounded to 96, a multiple of 8"),
        ({"init_images": [PICTURE], "batch_size": 1}, "init_images: no effect here"),
        ({"mask": PICTURE}, "mask: no effect here"),
        ({"inpainting_fill": 2}, "inpainting_fill: no effect here"),
    ],
)
def test_a_field_without_effect_is_told(body: dict[str, Any], warning: str) -> None:
    assert read(**body)[1] == [warning]


def test_a_field_with_effect_on_one_pass_has_an_effect() -> None:
    passes: dict[str, Any] = {
        "enable_hr": True,
        "sampler_name": "DPM++ 2M",
        "hr_sampler_name": "Euler a",
    }
    assert read(**passes, eta=0.5)[1] == []
    assert read(**{**passes, "hr_sampler_name": "Euler"}, s_churn=1, s_noise=1.1)[1] == []


def test_settings_of_churn_go_before_the_fields_as_in_the_webui() -> None:
    fields: dict[str, Any] = {"s_churn": 5, "s_tmin": 0.1, "s_tmax": 9, "s_noise": 1.1}
    settings = {"s_churn": 7, "s_tmin": 0.2, "s_tmax": 8, "s_noise": 1.05}

    def churn_of(params: PaintingParams) -> dict[str, Any]:
        return {name: getattr(params, name) for name in fields}

    both, warnings = read(**fields, override_settings=settings)
    assert (churn_of(both), warnings) == (settings, [])
    usual = {"s_churn": 0, "s_tmin": 0, "s_tmax": 0, "s_noise": 1}
    assert churn_of(read(**fields, override_settings=usual)[0]) == fields


def test_a_field_of_the_other_task_is_told_and_left_out() -> None:
    other = {"enable_hr": True, "hr_scale": 3, "hr_upscaler": "Lanczos", "hr_prompt": "x"}
    params, warnings = read("img2img", **other, firstphase_width=128)
    assert [warning.split(":")[0] for warning in warnings] == [*other, "firstphase_width"]
    assert (params.enable_hr, params.width) == (False, 512)
    params, warnings = read(init_images=[PICTURE], mask=PICTURE, resize_mode=1, mask_blur=9)
    told = [warning.split(":")[0] for warning in warnings]
    assert told == ["init_images", "mask", "resize_mode", "mask_blur"]
    assert (params.init_images, params.mask, params.blur) == ([], "", (4, 4))


def test_numbers_of_img2img_may_come_as_text() -> None:
    params, _ = read("img2img", resize_mode="1", inpainting_fill="2", mask_blur="3")
    assert (params.resize_mode, params.inpainting_fill, params.blur) == (1, 2, (3, 3))


def test_texts_with_half_characters_are_read() -> None:
    """A tokenizer and a log take whole characters only."""
    raw = read_body(rb'{"prompt": "a \ud800 b", "\udfff": "\ud83d\ude00"}')
    params, _ = parse_painting(raw, "txt2img", WebuiSettings())
    assert params.prompt == "a ? b"
    assert raw["?"] == "\N{GRINNING FACE}"


def test_the_mask_may_be_blurred_alike_or_each_way() -> None:
    assert read("img2img")[0].blur == (4, 4)
    assert read("img2img", mask_blur=7, mask_blur_x=1)[0].blur == (7, 7)
    assert read("img2img", mask_blur_x=1, mask_blur_y=0)[0].blur == (1, 0)


def test_the_noise_multiplier_of_the_body_goes_before_that_of_the_settings() -> None:
    settings = {"initial_noise_multiplier": 0.5}
    assert read("img2img")[0].noise_multiplier == 1
    assert read("img2img", override_settings=settings)[0].noise_multiplier == 0.5
    told = {"override_settings": settings, "initial_noise_multiplier": 0.7}
    assert read("img2img", **told)[0].noise_multiplier == 0.7


# Samplers and levels


def test_samplers_go_by_the_names_of_the_webui() -> None:
    assert len(SAMPLERS) == 31
    assert find_sampler("euler A") is find_sampler("k_euler_a") is SAMPLERS["Euler a"]
    assert find_sampler(" k_dpmpp_2m_sde_ka ") is SAMPLERS["DPM++ 2M SDE Karras"]
    assert find_sampler("k_dpmpp_3m_sde_exp") is SAMPLERS["DPM++ 3M SDE Exponential"]
    assert find_sampler("k_euler_x") is None
    assert find_sampler("karras") is None


@pytest.mark.parametrize(
    ("sampler", "scheduler", "name", "kind"),
    [
        ("", "", "Euler", "automatic"),
        ("Euler", "Karras", "Euler Karras", "karras"),
        ("Euler", "SGM Uniform", "Euler SGM Uniform", "sgm_uniform"),
        ("Euler", "sgm_uniform", "Euler SGM Uniform", "sgm_uniform"),
        ("DPM++ 2M", "Automatic", "DPM++ 2M", "automatic"),
        ("DPM++ 2M", "karras", "DPM++ 2M Karras", "karras"),
        ("DPM++ 2M Karras", "Karras", "DPM++ 2M Karras", "karras"),
        ("DPM++ 2M Karras", "Automatic", "DPM++ 2M Karras", "karras"),
        ("DPM++ 2M Karras", "Exponential", "DPM++ 2M Karras", "karras"),
        ("Restart", "Exponential", "Restart Exponential", "exponential"),
    ],
)
def test_a_scheduler_names_a_variant_of_the_sampler(
    sampler: str, scheduler: str, name: str, kind: str
) -> None:
    params, _ = read(sampler_name=sampler, scheduler=scheduler, enable_hr=True)
    assert (params.sampler.name, params.sampler.spread.kind) == (name, kind)
    assert params.hr_sampler == params.sampler


def test_a_sampler_may_be_named_by_the_old_field() -> None:
    assert read(sampler_index="DDIM")[0].sampler.name == "DDIM"
    assert read(sampler_index="DDIM", sampler_name="LMS")[0].sampler.name == "LMS"


def test_the_second_pass_may_have_a_sampler_of_its_own() -> None:
    for name, wanted in (("", "LMS"), ("Use same sampler", "LMS"), ("Heun", "Heun")):
        params, _ = read(enable_hr=True, sampler_name="LMS", hr_sampler_name=name)
        assert params.hr_sampler.name == wanted


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Uniform", "uniform"),
        ("SGMUniform", "sgm_uniform"),
        ("KL Optimal", "kl_optimal"),
        ("kl_optimal", "kl_optimal"),
        ("Align Your Steps", "align_your_steps"),
        ("Simple", "simple"),
        ("normal", "normal"),
        ("DDIM", "ddim"),
        ("Beta", "beta"),
        ("Turbo", "turbo"),
    ],
)
def test_schedule_types_go_by_the_names_of_the_webui(words: str, kind: str) -> None:
    """Under either version, as a field or behind a sampler's name."""
    for version in ("1.7", "1.10"):
        named = read_as(version, sampler_name=f"LCM {words}")
        by_field = read_as(version, sampler_name="LCM", scheduler=words)
        for params, warnings in (named, by_field):
            assert params.spread(params.sampler).kind == kind
            assert params.sampler.plain_name == "LCM"
            assert warnings == []


def read_as(version: Any, **body: Any) -> tuple[PaintingParams, list[str]]:
    return parse_painting(sent(body), "txt2img", WebuiSettings(webui_version=version))


@pytest.mark.parametrize(
    ("sampler", "earlier", "later"),
    [
        ("Euler", "automatic", "automatic"),
        ("LMS", "automatic", "automatic"),
        ("DPM++ 2M", "automatic", "karras"),
        ("DPM++ SDE", "automatic", "karras"),
        ("DPM++ 2S a", "automatic", "karras"),
        ("DPM2", "automatic", "karras"),
        ("DPM2 a", "automatic", "karras"),
        ("DPM++ 2M SDE", "automatic", "exponential"),
        ("DPM++ 2M SDE Heun", "automatic", "exponential"),
        ("DPM++ 3M SDE", "automatic", "exponential"),
        ("Restart", "karras", "karras"),
        ("DPM++ 2M Uniform", "uniform", "uniform"),
        ("DPM++ 2M SDE Karras", "karras", "karras"),
    ],
)
def test_automatic_is_what_the_version_says(sampler: str, earlier: str, later: str) -> None:
    for version, kind in (("1.7", earlier), ("1.10", later)):
        params, warnings = read_as(version, sampler_name=sampler, scheduler="Automatic")
        assert params.spread(params.sampler).kind == kind
        assert warnings == []


@pytest.mark.parametrize(
    ("body", "earlier", "later"),
    [
        ({"hr_scheduler": "Simple"}, ("DPM++ 2M", "simple"), ("DPM++ 2M", "simple")),
        (
            {"hr_scheduler": "Use same scheduler"},
            ("DPM++ 2M", "exponential"),
            ("DPM++ 2M", "exponential"),
        ),
        ({"hr_scheduler": "Automatic"}, ("DPM++ 2M", "automatic"), ("DPM++ 2M", "karras")),
        ({"hr_sampler_name": "Euler"}, ("Euler", "automatic"), ("Euler", "exponential")),
        (
            {"hr_sampler_name": "Euler", "hr_scheduler": "beta"},
            ("Euler", "beta"),
            ("Euler", "beta"),
        ),
        (
            {"hr_sampler_name": "LMS Karras", "hr_scheduler": "LMS"},
            ("LMS", "karras"),
            ("LMS", "karras"),
        ),
    ],
)
def test_the_second_pass_may_have_a_schedule_type_of_its_own(
    body: dict[str, Any], earlier: tuple[str, str], later: tuple[str, str]
) -> None:
    """If not, it is that of the first pass as of 1.9, and of its own sampler before."""
    for version, wanted in (("1.7", earlier), ("1.10", later)):
        first = {"sampler_name": "DPM++ 2M Exponential", "enable_hr": True}
        params, _ = read_as(version, **first, **body)
        assert params.spread(params.sampler).kind == "exponential"
        second = params.hr_sampler
        assert (second.plain_name, params.spread(second).kind) == wanted


def test_the_ends_of_levels_take_no_choice_in_a_later_webui() -> None:
    ends = {"override_settings": {"sigma_min": 0.1, "rho": 5}}
    params, warnings = read_as("1.10", sampler_name="DPM++ 2M", **ends)
    spread = params.spread(params.sampler)
    assert (spread.kind, spread.sigma_min, spread.rho, warnings) == ("karras", 0.1, 5, [])
    settings = {"k_sched_type": "karras"}
    params, warnings = read_as("1.10", sampler_name="Euler Beta", override_settings=settings)
    assert params.spread(params.sampler).kind == "beta"
    assert warnings == ["override_settings.k_sched_type: no effect on Euler Beta"]


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        ({"scheduler": "Fancy"}, 'scheduler "Fancy": no effect on Euler'),
        ({"scheduler": "Beta", "sampler_name": "DDIM"}, 'scheduler "Beta": no effect on DDIM'),
        (
            {"scheduler": "Beta", "sampler_name": "DPM fast"},
            'scheduler "Beta": no effect on DPM fast Beta',
        ),
        (
            {"hr_scheduler": "Fancy", "enable_hr": True},
            'hr_scheduler "Fancy": no effect on Euler',
        ),
        (
            {"override_settings": {"beta_dist_alpha": 0.7}},
            "override_settings.beta_dist_alpha: no effect on the levels of Euler;"
            " name a k_sched_type",
        ),
    ],
)
def test_a_schedule_type_without_effect_is_warned_of(body: dict[str, Any], warning: str) -> None:
    assert read(**body)[1] == [warning]


def test_noise_is_of_the_source_that_the_body_or_the_deployment_names() -> None:
    def source(deployed: Any = "CPU", **settings: Any) -> str:
        webui = WebuiSettings(randn_source=deployed)
        params, warnings = parse_painting(sent({"override_settings": settings}), "txt2img", webui)
        assert warnings == []
        return params.override_settings.noise_source

    assert [source(), source("NV"), source("GPU")] == ["CPU", "NV", "NV"]
    assert [source(randn_source=one) for one in ("CPU", "NV", "GPU")] == ["CPU", "NV", "NV"]
    assert source("NV", randn_source="CPU") == "CPU"


def test_what_is_no_field_of_a_body_is_warned_of() -> None:
    params, warnings = read(units=5, webui_version="1.10")
    assert warnings == ["units: no effect here", "webui_version: no effect here"]
    assert (params.units, params.webui_version) == ([], "1.7")


def test_settings_say_how_levels_are_spread() -> None:
    settings = {"k_sched_type": "Exponential", "sigma_min": 0.1, "sigma_max": 10, "rho": 5}
    params, _ = read(sampler_name="DPM2", override_settings=settings)
    spread = params.spread(params.sampler)
    assert (spread.kind, spread.sigma_min, spread.sigma_max) == ("exponential", 0.1, 10)
    assert spread.rho == 0  # no exponential spread has one
    assert spread.drop_last_but_one  # DPM2's own
    plain, _ = read(sampler_name="Euler")
    assert not plain.spread(plain.sampler).drop_last_but_one
    told, _ = read(override_settings={"always_discard_next_to_last_sigma": True})
    assert told.spread(told.sampler).drop_last_but_one


def test_the_ends_of_levels_take_a_schedule_type_as_in_the_webui() -> None:
    ends: dict[str, Any] = {"sigma_min": 0.1, "rho": 5}
    params, warnings = read(sampler_name="DPM++ 2M Karras", override_settings=ends)
    assert params.spread(params.sampler) == params.sampler.spread
    assert warnings == [
        f"override_settings.{name}: no effect on the levels of DPM++ 2M Karras; name a k_sched_type"
        for name in ends
    ]
    by_field: dict[str, Any] = {"scheduler": "karras", "override_settings": ends}
    by_setting: dict[str, Any] = {"override_settings": {**ends, "k_sched_type": "karras"}}
    for body in (by_field, by_setting):
        params, warnings = read(sampler_name="DPM++ 2M", **body)
        spread = params.spread(params.sampler)
        assert (spread.sigma_min, spread.rho, warnings) == (0.1, 5, [])


# Hires fix


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({}, (1024, 1024, 0, 0)),
        ({"hr_scale": 1.5, "width": 520}, (780, 768, 0, 0)),
        ({"hr_resize_x": 800, "width": 512, "height": 640}, (800, 1000, 0, 0)),
        ({"hr_resize_y": 800, "width": 512, "height": 640}, (640, 800, 0, 0)),
        ({"hr_resize_x": 1024, "hr_resize_y": 768}, (1024, 1024, 0, 32)),
        ({"hr_resize_x": 768, "hr_resize_y": 1024}, (1024, 1024, 32, 0)),
        ({"hr_resize_x": 1024, "hr_resize_y": 1024}, (1024, 1024, 0, 0)),
        ({"hr_resize_x": 100, "hr_resize_y": 70}, (100, 100, 0, 3)),
        ({"firstphase_width": 256, "firstphase_height": 128}, (1024, 512, 64, 0)),
    ],
)
def test_the_size_of_the_second_pass_is_the_webuis(
    body: dict[str, Any], size: tuple[int, int, int, int]
) -> None:
    """Width and height to scale to, and the latent columns and rows to cut off then."""
    assert read(enable_hr=True, **body)[0].hires_size == size


def test_a_first_phase_of_its_own_size_ends_at_the_size_asked_for() -> None:
    params, _ = read(width=640, height=512, firstphase_width=320, firstphase_height=256)
    assert (params.width, params.height) == (320, 256)
    assert (params.hr_resize_x, params.hr_resize_y) == (640, 512)
    params, _ = read(width=640, height=512, firstphase_width=320)
    assert (params.width, params.height) == (320, 512)


# ControlNet


def units_of(*units: dict[str, Any]) -> tuple[list[ControlUnit], list[str]]:
    params, warnings = read(alwayson_scripts={"ControlNet": {"args": [*units]}})
    return params.units, warnings


def test_units_are_read_under_old_and_new_names() -> None:
    (unit,), warnings = units_of(
        {
            "preprocessor": "inpaint",
            "model": "control_canny",
            "input_image": PICTURE,
            "mask_image": "m",
            "guidance": 0.5,
            "resize_mode": "Scale to Fit (Inner Fit)",
            "control_mode": "ControlNet is more important",
            "lowvram": True,
            "hr_option": "Both",
            "pixel_perfect": "true",
        }
    )
    assert warnings == []
    assert (unit.module, unit.model, unit.picture, unit.picture_mask) == (
        "inpaint",
        "control_canny",
        PICTURE,
        "m",
    )
    assert (unit.guidance_end, unit.resize_mode, unit.control_mode) == (0.5, 1, 2)
    assert unit.pixel_perfect


def test_a_unit_may_have_its_picture_and_mask_in_one_object() -> None:
    (unit,), _ = units_of({"image": {"image": "a", "mask": "b"}})
    assert (unit.picture, unit.picture_mask) == ("a", "b")
    (unit,), _ = units_of({"image": {"image": "a"}, "mask": "c"})
    assert (unit.picture, unit.picture_mask) == ("a", "c")


@pytest.mark.parametrize(
    ("given", "resize_mode", "control_mode"),
    [
        ((0, 0), 0, 0),
        (("2", "1"), 2, 1),
        (("Just Resize", "Balanced"), 0, 0),
        (("Crop and Resize", "My prompt is more important"), 1, 1),
        (("Resize and Fill", "ControlNet is more important"), 2, 2),
        (("Envelope (Outer Fit)", "ControlMode.BALANCED"), 2, 0),
        (("Inner Fit (Scale to Fit)", "balanced"), 1, 0),
        (("Outer Fit (Shrink to Fit)", 2), 2, 2),
        (("ResizeMode.RESIZE", "ControlMode.PROMPT"), 0, 1),
        (("ResizeMode.INNER_FIT", "ControlMode.CONTROL"), 1, 2),
        (("ResizeMode.OUTER_FIT", 0), 2, 0),
    ],
)
def test_modes_are_numbers_or_texts(
    given: tuple[object, object], resize_mode: int, control_mode: int
) -> None:
    (unit,), _ = units_of({"resize_mode": given[0], "control_mode": given[1]})
    assert (unit.resize_mode, unit.control_mode) == (resize_mode, control_mode)


def test_units_are_found_whatever_is_around_their_name() -> None:
    params, _ = read(alwayson_scripts={" ControlNet ": {"args": [{"model": "a"}]}})
    assert [unit.model for unit in params.units] == ["a"]


def test_units_that_are_off_are_left_out() -> None:
    """Whatever else is in them."""
    off = {"enabled": False, "weight": 99, "model": 7, "image": ["a"], "resize_mode": "x", "foo": 1}
    units, warnings = units_of(off, {"model": "y"}, {**off, "threshold_a": math.nan}, *[off] * 20)
    assert [(unit.model, unit.number) for unit in units] == [("y", 1)]
    assert warnings == []
    with pytest.raises(JobFailure, match=r"args\[0\]\.enabled: got 7, allowed is true or false"):
        units_of({"enabled": 7})


def test_what_a_unit_asks_for_in_vain_is_told() -> None:
    _, warnings = units_of({"model": "x"}, {"loopback": True, "weights": [1], "low_vram": True})
    assert warnings == [
        "alwayson_scripts.controlnet.args[1].loopback: no effect here",
        "alwayson_scripts.controlnet.args[1].weights: no effect here",
    ]


@pytest.mark.parametrize(
    ("scripts", "reason"),
    [
        ([1], "alwayson_scripts: got [1], allowed is an object"),
        ({"controlnet": 5}, "alwayson_scripts.controlnet: got 5, allowed is an object"),
        (
            {"controlnet": {"args": "x"}},
            'alwayson_scripts.controlnet.args: got "x", allowed is a list',
        ),
        (
            {"controlnet": {"args": [None]}},
            "alwayson_scripts.controlnet.args[0]: got null, allowed is an object",
        ),
        (
            {"controlnet": {"args": [{}, {"weight": 11}]}},
            "alwayson_scripts.controlnet.args[1].weight: got 11, allowed is a number from -10",
        ),
        (
            {"controlnet": {"args": [{"resize_mode": 3}]}},
            "alwayson_scripts.controlnet.args[0].resize_mode: got 3, allowed is one of 0 (Just Res",
        ),
        (
            {"controlnet": {"args": [{"control_mode": "Wild"}]}},
            'alwayson_scripts.controlnet.args[0].control_mode: got "Wild", allowed is one of 0 (Ba',
        ),
        (
            {"controlnet": {"args": [{"threshold_a": 1e9}]}},
            "alwayson_scripts.controlnet.args[0].threshold_a: got 1000000000.0, allowed is a",
        ),
        (
            {"controlnet": {"args": [{"threshold_b": math.nan}]}},
            "alwayson_scripts.controlnet.args[0].threshold_b: got NaN, allowed is a number",
        ),
        ({"controlnet": {"args": [{}] * 11}}, "alwayson_scripts.controlnet: got 11 units, allowed"),
    ],
)
def test_units_that_can_not_be_read_are_refused(scripts: object, reason: str) -> None:
    assert reason_of(json.dumps({"alwayson_scripts": scripts}).encode()).startswith(reason)


def test_units_are_no_field_of_their_own() -> None:
    units, warnings = parse_units(None)
    assert (units, warnings) == ([], [])
    params, _ = read(units=[{"model": "x"}])
    assert params.units == []
    units, warnings = parse_units({"controlnet": {"args": [{"enabled": False}, {"number": "x"}]}})
    assert [unit.number for unit in units] == [1]
    assert warnings == ["alwayson_scripts.controlnet.args[1].number: no effect here"]
    units, warnings = parse_units(
        {"controlnet": {"args": [{"mask": "x"}, {"mask": "x", "module": "inpaint_only"}]}}
    )
    assert len(units) == 2
    assert warnings == [
        "alwayson_scripts.controlnet.args[0].mask: no effect here but with a module for inpainting"
    ]


# Scripts that every body of an installation carries

FROM_A_WEBUI: dict[str, Any] = {
    "extra options": {"args": []},
    "hypertile": {"args": []},
    "comments": {"args": []},
    "tiled diffusion": {"args": [False, "MultiDiffusion", False, True, 1024, 1024, "", -1.0]},
    "tiled vae": {"args": [False, 3072, 192, True, True, True, False]},
    "controlnet": {"args": [{"enabled": False, "module": "none", "image": None, "weight": 1}]},
    "reactor": {"args": [None, False, "0", "0", "inswapper_128.onnx", "CodeFormer", 1, True]},
    "ADetailer": {"args": [False, False, {"ad_model": "face_yolov8n.pt"}, {"ad_model": "None"}]},
    "AnimateDiff": {"args": [{"enable": False, "video_length": 16}]},
    "Dynamic Prompts v2.17.1": {"args": [True, False, 1, False, False, 0.7]},
    "Dynamic Thresholding (CFG Scale Fix)": {"args": ["False", 7, 100, "Constant"]},
    "LoRA Block Weight": {"args": ["NONE:0,0,0", True, 1, "", "", ""]},
    "Regional Prompter": {"args": [0, False, "Matrix", "Horizontal", "1,1"]},
    "FreeU Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [False, 1.01, 1.02, 0.99, 0.95, 0, 1]},
    "Kohya HRFix Integrated": {"args": [False, 3, 2, 0, 0.35, True, "bicubic", "bicubic"]},
    "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": {"args": [False, 0.5, 2, 1]},
    "Never OOM Integrated": {"args": [True, True]},
    "StyleAlign Integrated": {"args": [False, 1]},
    "soft inpainting": {"args": [{"Soft inpainting": False, "Schedule bias": 1}]},
    "refiner": {"args": [False, "", 0.8]},
    "seed": {"args": [-1, False, -1, 0, 0, 0]},
    "sampler": {"args": [20, "DPM++ 2M", "Automatic"]},
    "no script of ours": {"args": [None, False, 0, "", []]},
}


def test_scripts_that_are_off_ask_for_nothing() -> None:
    params, warnings = read(**OF_A_WEBUI, alwayson_scripts=FROM_A_WEBUI)
    assert warnings == []
    assert params == read(**OF_A_WEBUI)[0]


OF_A_WEBUI: dict[str, Any] = {
    "seed": 223104262,
    "steps": 8,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
}


@pytest.mark.parametrize(
    ("title", "args"),
    [
        ("tiled diffusion", [True, "MultiDiffusion"]),
        ("Tiled VAE", ["true", 3072]),
        ("extra options", [False]),
        ("Dynamic Thresholding (CFG Scale Fix)", [1, 7, 100]),
        ("FreeU Integrated (SD 1.x, SD 2.x, SDXL)", [True, 1.01]),
        ("soft inpainting", [{"Soft inpainting": True}]),
        ("nobody knows it", [0.5]),
        ("nobody knows it", [None, 1]),
        ("nobody knows it", [{"enabled": False}, {"enabled": True}]),
        ("nobody knows it", {"enabled": True}),
    ],
)
def test_a_script_that_is_on_and_not_there_is_told(title: str, args: object) -> None:
    warning = f'alwayson_scripts."{title}": no effect here'
    assert read(alwayson_scripts={title: {"args": args}})[1] == [warning]


def test_dynamic_prompts_are_told_where_a_prompt_has_some() -> None:
    on = {"Dynamic Prompts v2.17.1": {"args": [True, False, 1]}}
    for prompt in ("a {red|blue} circle", "a __color__ circle"):
        _, (warning,) = read(prompt=prompt, alwayson_scripts=on)
        assert warning == 'alwayson_scripts."Dynamic Prompts v2.17.1": no effect here'
    off = {"Dynamic Prompts v2.17.1": {"args": [False, False, 1]}}
    assert read(prompt="a {red|blue} circle", alwayson_scripts=off)[1] == []


@pytest.mark.parametrize(
    ("title", "args"),
    [
        ("ADetailer", [True, False, {"ad_model": "face_yolov8n.pt"}]),
        ("adetailer", [{"ad_model": "face_yolov8n.pt"}]),
        ("ADetailer", ["True", False, {"ad_model": "None"}, {"ad_model": "hand_yolov8n.pt"}]),
        ("reactor", ["iVBORw0KGgo=", True, "0"]),
        ("roop", [None, 1, "0"]),
        ("AnimateDiff", [{"enable": True}]),
    ],
)
def test_a_script_that_makes_another_picture_is_refused(title: str, args: list[Any]) -> None:
    told = reason_of(json.dumps({"alwayson_scripts": {title: {"args": args}}}).encode())
    assert told.startswith(f"alwayson_scripts.{title}: got one that is enabled, allowed is none")


@pytest.mark.parametrize(
    "args",
    [
        [],
        [True, False],
        [True, False, {"ad_model": "None"}],
        [True, False, {"ad_model": "face_yolov8n.pt", "ad_tab_enable": False}],
        [False, {"ad_model": "face_yolov8n.pt"}],
    ],
)
def test_adetailer_without_anything_to_find_is_off(args: list[Any]) -> None:
    assert read(alwayson_scripts={"ADetailer": {"args": args}})[1] == []


def test_the_scripts_that_are_there_act_in_place_of_fields() -> None:
    scripts = {
        "seed": {"args": ["5", True, 6, 0.5, 128.0, 64]},
        "Refiner": {"args": [True, "refiner.safetensors [0123abcdef]", "0.7"]},
        "Sampler": {"args": [12, "DPM++ 2M", "Karras"]},
    }
    params, warnings = read(alwayson_scripts=scripts)
    assert warnings == []
    assert (params.seed, params.subseed, params.subseed_strength) == (5, 6, 0.5)
    assert (params.seed_resize_from_w, params.seed_resize_from_h) == (128, 64)
    assert params.refiner_checkpoint == "refiner.safetensors [0123abcdef]"
    assert params.refiner_switch_at == 0.7
    assert (params.steps, params.sampler.name) == (12, "DPM++ 2M Karras")
    own: dict[str, Any] = {"seed": 1, "subseed": 2, "refiner_switch_at": 0.5, "steps": 3}
    params, _ = read(**own, alwayson_scripts=scripts)
    assert (params.seed, params.subseed, params.subseed_strength) == (1, 2, 0.5)
    assert (params.steps, params.refiner_switch_at) == (3, 0.5)
    without_extra = {"seed": {"args": [5, False, 6, 0.5, 128, 64]}}
    assert read(alwayson_scripts=without_extra)[0] == read(seed=5)[0]


@pytest.mark.parametrize(
    ("scripts", "reason"),
    [
        ({"seed": {"args": ["any"]}}, 'alwayson_scripts.seed.args.seed: got "any", allowed is a'),
        (
            {"refiner": {"args": ["on and off"]}},
            'alwayson_scripts.refiner.args.enable_refiner: got "on and off", allowed is true or fa',
        ),
        ({"sampler": {"args": 5}}, "alwayson_scripts.sampler.args: got 5, allowed is a list"),
        ({"sampler": {"args": [1001]}}, "steps: got 1001, allowed is a whole number from 1 to"),
    ],
)
def test_a_wrong_argument_of_a_script_is_named(scripts: dict[str, Any], reason: str) -> None:
    assert reason_of(json.dumps({"alwayson_scripts": scripts}).encode()).startswith(reason)


# Styles

STYLES = json.dumps(
    {
        "cinema": {"prompt": "cinematic still of {prompt}, 35mm", "negative_prompt": "cartoon"},
        "sharp": {"prompt": "sharp"},
    }
)


def test_styles_can_not_make_prompts_without_end() -> None:
    webui = WebuiSettings(styles='{"twice": {"prompt": "{prompt}, {prompt}"}}')
    told = "prompt: with its styles it has more than 20000 characters"
    with pytest.raises(JobFailure, match=told):
        parse_painting({"prompt": "a cat", "styles": ["twice"] * 100_000}, "txt2img", webui)


def test_styles_are_put_to_the_prompts_as_in_the_webui() -> None:
    webui = WebuiSettings(styles=STYLES)
    body = {"prompt": "a cat", "negative_prompt": "blurry", "styles": ["sharp", "cinema"]}
    params, warnings = parse_painting(body, "txt2img", webui)
    assert warnings == []
    assert params.prompt == "cinematic still of a cat, sharp, 35mm"
    assert params.negative_prompt == "blurry, cartoon"
    assert (params.hr_prompt, params.hr_negative_prompt) == ("", "")
    params, _ = parse_painting(body | {"prompt": "", "hr_prompt": "a dog"}, "txt2img", webui)
    assert params.prompt == "cinematic still of sharp, 35mm"
    assert params.hr_prompt == "cinematic still of a dog, sharp, 35mm"
    params, warnings = parse_painting({"styles": ["Sharp", "None", ""]}, "txt2img", webui)
    assert params.prompt == ""
    assert warnings == ['styles "Sharp": no effect, this deployment has no style of that name']


def test_prompts_are_written_as_the_webui_writes_them() -> None:
    prompt = "# a note\na  cat, ,  red #not blue\n, round,"
    (old, _), (new, _) = (
        parse_painting({"prompt": prompt}, "txt2img", WebuiSettings(webui_version=version))
        for version in ("1.7", "1.10")
    )
    assert old.prompt == "# a note\na cat, red #not blue\n, round"
    assert new.prompt == "\na  cat, ,  red \n, round,"
    kept = {"prompt": prompt, "override_settings": {"enable_prompt_comments": False}}
    params, _ = parse_painting(kept, "txt2img", WebuiSettings(webui_version="1.10"))
    assert params.prompt == prompt


# rembg and extras


def test_bodies_of_rembg_are_read() -> None:
    raw = read_body(
        b"""{"input_image": "x", "model": "sam", "return_mask": "true", "bgcolor": [1, 2, 3],
        "alpha_matting_erode_size": "7", "foo": null, "bar": 1,
        "sam_prompt": [{"type": "point", "data": [3, 4]},
                       {"type": "rectangle", "data": [1, 2, 3, 4], "label": 0}]}"""
    )
    params, warnings = parse_cutting(raw)
    assert (params.return_mask, params.bgcolor, params.alpha_matting_erode_size) == (
        True,
        [1, 2, 3],
        7,
    )
    assert params.marks == [
        {"type": "point", "data": [3.0, 4.0], "label": 1},
        {"type": "rectangle", "data": [1.0, 2.0, 3.0, 4.0], "label": 0},
    ]
    assert warnings == ["bar: no effect here"]
    assert "foo" not in raw


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"alpha_matting_erode_size": -1}, "alpha_matting_erode_size: got -1, allowed is a whole"),
        (
            {"alpha_matting_foreground_threshold": 256},
            "alpha_matting_foreground_threshold: got 256",
        ),
        ({"alpha_matting_background_threshold": "x"}, "alpha_matting_background_threshold: got "),
        ({"bgcolor": 5}, "bgcolor: got 5, allowed is a list of 3 to 4 items, each a whole number"),
        ({"bgcolor": [1, 2]}, "bgcolor: got [1, 2], allowed is a list of 3 to 4 items"),
        ({"bgcolor": [1, 2, 300]}, "bgcolor[2]: got 300, allowed is a list of 3 to 4 items"),
        ({"cloth_category": "hat"}, 'cloth_category: got "hat", allowed is one of full, lower, up'),
        ({"input_image": [5]}, "input_image: got [5], allowed is a text"),
        ({"only_mask": "x"}, 'only_mask: got "x", allowed is true or false'),
        ({"sam_prompt": [{}]}, "sam_prompt[0]: `type` is missing"),
        ({"sam_prompt": [{"type": "x"}]}, "sam_prompt[0].type: got another value (str), allowed"),
        ({"sam_prompt": [{"type": "point", "data": [1]}]}, "sam_prompt[0].data: got another value"),
        (
            {"sam_prompt": [{"type": "point", "data": [1, 2, 3, 4]}]},
            "sam_prompt[0].data: got [1.0, 2.0, 3.0, 4.0], allowed for a point is a list of 2 num",
        ),
        (
            {"sam_prompt": [{"type": "rectangle", "data": [1, 2]}]},
            "sam_prompt[0].data: got [1.0, 2.0], allowed for a rectangle is a list of 4 numbers",
        ),
    ],
)
def test_a_wrong_field_of_rembg_is_named(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobFailure) as failure:
        parse_cutting(sent(body))
    assert str(failure.value).startswith(reason)


def test_bodies_of_extras_are_read() -> None:
    raw = read_body(
        b"""{"image": "x", "resize_mode": "1", "upscaling_resize_w": "64", "upscaler_1": "Lanczos",
        "upscaling_resize_h": 128, "upscaling_crop": 0, "extras_upscaler_2_visibility": 0.5,
        "gfpgan_visibility": 0, "codeformer_visibility": 0, "codeformer_weight": 0,
        "show_extras_results": true, "upscale_first": false, "imageList": []}"""
    )
    params, warnings = parse_enlarging(raw, WebuiSettings())
    assert (params.resize_mode, params.upscaling_resize_w, params.upscaling_crop) == (1, 64, False)
    assert warnings == []
    given = {"image": "x", "imageList": [{"data": "y", "name": "y.png"}]}
    for task_type, other in (("extra-single-image", "imageList"), ("extra-batch-images", "image")):
        params, warnings = parse_enlarging(given, WebuiSettings(), task_type)
        assert warnings == [f"{other}: no effect here"]
        assert [*params.pictures(task_type).values()] == ["y" if other == "image" else "x"]
    asked = {"gfpgan_visibility": 0.5, "upscale_first": True}
    params, warnings = parse_enlarging(asked, WebuiSettings())
    assert (params.gfpgan_visibility, params.codeformer_visibility, warnings) == (0.5, 0, [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"upscaling_resize": 9}, "upscaling_resize: got 9, allowed is a number from 1 to 8"),
        ({"upscaling_resize": 0.5}, "upscaling_resize: got 0.5, allowed is a number from 1 to 8"),
        ({"resize_mode": 2}, "resize_mode: got 2, allowed is one of 0, 1"),
        ({"upscaling_resize_w": 0}, "upscaling_resize_w: got 0, allowed is a whole number from 1"),
        ({"upscaling_resize_h": 16385}, "upscaling_resize_h: got 16385, allowed is a whole number"),
        ({"upscaler_1": True}, "upscaler_1: got true, allowed is a text"),
        ({"extras_upscaler_2_visibility": 2}, "extras_upscaler_2_visibility: got 2, allowed is a"),
        ({"imageList": ["x"]}, "imageList[0]: got "),
        ({"imageList": [{"data": [1]}]}, "imageList[0].data: got [1], allowed is a text"),
    ],
)
def test_a_wrong_field_of_extras_is_named(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobFailure) as failure:
        parse_enlarging(sent(body), WebuiSettings())
    assert str(failure.value).startswith(reason)


# Whatever is sent

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["Euler", "karras", "Infinity", "1e400", "-1", "none", "#fff", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def bodies_of(*params: type[msgspec.Struct], more: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    names = [name for struct in params for name in struct.__struct_fields__]
    known = st.sampled_from([*names, *more])
    inner = st.dictionaries(known, VALUES, max_size=6)
    return st.dictionaries(known | st.text(max_size=8), VALUES | inner, max_size=10) | VALUES


SCRIPTS = ("alwayson_scripts", "controlnet", "args", "seed", "refiner", "sampler", "ADetailer")


@settings(max_examples=400, deadline=None)
@given(bodies_of(PaintingParams, OverrideSettings, more=SCRIPTS))
def test_any_json_is_read_or_refused_as_a_painting(body: object) -> None:
    for task_type in ("txt2img", "img2img"):
        with suppress(JobFailure):
            parse_painting(sent(body), task_type, WebuiSettings())


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([f.name for f in msgspec.structs.fields(ControlUnit)]), VALUES)
)
def test_any_json_is_read_or_refused_as_a_unit(unit: object) -> None:
    with suppress(JobFailure):
        read(alwayson_scripts={"controlnet": {"args": [unit]}})


@settings(max_examples=200, deadline=None)
@given(bodies_of(CuttingParams, EnlargingParams, more=("type", "data", "label")))
def test_any_json_is_read_or_refused_as_a_picture_to_be_worked_on(body: object) -> None:
    with suppress(JobFailure):
        parse_cutting(sent(body))
    with suppress(JobFailure):
        parse_enlarging(sent(body), WebuiSettings())


@pytest.mark.parametrize("depth", [100, 400, 600, 900, 2000])
def test_json_of_any_depth_is_read_or_refused(depth: int) -> None:
    for field in ("foo", "script_args", "prompt", "override_settings"):
        body = f'{{"{field}": {"[" * depth}{"]" * depth}}}'.encode()
        with suppress(JobFailure):
            parse_painting(read_body(body), "txt2img", WebuiSettings())
