"""txt2img and img2img from a body to finished pictures, with the demo checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models.families import configs_of
from services.inference.worker.pipelines.pictures import files
from services.inference.worker.pipelines.pictures.infotext import VERSION
from services.inference.worker.pipelines.sampling.names import SAMPLERS
from shared.contracts.inference import UsedModel
from shared.weights.headers import Header, TensorSpec
from tests.unit.pipelines import small
from tests.unit.pipelines.easel import (
    CHECKPOINT,
    DEMO,
    NAME,
    Done,
    Easel,
    Model,
    base64_of,
    job_of,
    pixels_of,
    read_back,
)

HASH = hashlib.sha256(DEMO.read_bytes()).hexdigest()
STEM = DEMO.stem
TEAL = base64_of(Image.new("RGB", (80, 64), "teal"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def other(folder: Path) -> Model:
    """A checkpoint that paints something else."""
    name = "model.diffusion_model.out.2.bias"
    path = small.write_changed(folder / "other.safetensors", name, 0.5)
    return ("Stable-diffusion", "other.safetensors", path)


@pytest.fixture(scope="module")
def red_vae(folder: Path) -> Path:
    return small.write_vae(folder / "red", redder=1.0)


@pytest.fixture(scope="module")
def lora(folder: Path) -> Model:
    return ("Lora", "ink.safetensors", small.write_lora(folder / "ink"))


@pytest.fixture(scope="module")
def embedding(folder: Path) -> Model:
    return ("embeddings", "zorb.safetensors", small.write_embedding(folder / "zorb"))


def halves() -> Image.Image:
    """Red above, blue below."""
    picture = Image.new("RGB", (64, 64), (220, 40, 40))
    ImageDraw.Draw(picture).rectangle((0, 32, 64, 64), fill=(40, 40, 220))
    return picture


# Samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs(easel: Easel, sampler: str) -> None:
    """From noise, from a picture, and in a single step; what is no number would be refused."""
    assert easel.paint(sampler_name=sampler, steps=4).pictures
    assert easel.paint(sampler_name=sampler, steps=1).pictures
    assert easel.paint(sampler_name=sampler, steps=4, init_images=[TEAL]).pictures


@pytest.mark.parametrize(
    "sampler", [name for name in SAMPLERS if not name.endswith((" Karras", " Exponential"))]
)
def test_every_sampler_paints_what_was_asked_for(easel: Easel, sampler: str) -> None:
    body = {"prompt": "a large red circle on a blue background", "steps": 20, "cfg_scale": 4}
    done = easel.paint(sampler_name=sampler, **body)
    middle, corner = done.pixels[24:40, 24:40].mean((0, 1)), done.pixels[:6, :6].mean((0, 1))
    assert middle[0] > middle[2] + 60
    assert corner[2] > corner[0] + 60


@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "UniPC", "DPM adaptive", "DPM++ 3M SDE"])
@pytest.mark.parametrize("strength", [0, 0.001, 0.3, 1])
def test_img2img_runs_with_any_strength(easel: Easel, sampler: str, strength: float) -> None:
    for all_steps in (False, True):
        done = easel.paint(
            init_images=[TEAL],
            denoising_strength=strength,
            sampler_name=sampler,
            override_settings={"img2img_fix_steps": all_steps},
        )
        steps = 3 if all_steps and strength else int(min(strength, 0.999) * 3) + 1
        assert done.pictures
        if sampler != "DPM adaptive":
            assert easel.steps[-1] == (steps, steps)


@pytest.mark.parametrize(
    ("settings", "falls"),
    [
        ({"k_sched_type": "polyexponential", "rho": 2}, True),
        ({"k_sched_type": "karras", "rho": 100}, True),
        ({"k_sched_type": "exponential", "sigma_min": 0.1, "sigma_max": 20}, True),
        ({"k_sched_type": "sgm uniform"}, True),
        ({"k_sched_type": "karras", "sigma_min": 20}, False),
        ({"k_sched_type": "karras", "sigma_max": 0.01}, False),
        ({"k_sched_type": "karras", "sigma_min": 9.99999999, "sigma_max": 10}, False),
        ({"k_sched_type": "polyexponential", "rho": 100}, False),
        ({"k_sched_type": "karras", "rho": 0.1}, False),
    ],
)
@pytest.mark.parametrize("sampler", ["Euler a", "LMS", "DPM++ 2M", "DPM++ 2M SDE"])
def test_levels_can_be_chosen_as_long_as_they_fall(
    easel: Easel, sampler: str, settings: dict[str, Any], falls: bool
) -> None:
    body = {"sampler_name": sampler, "steps": 8, "override_settings": settings}
    if falls:
        assert easel.paint(**body).rows != easel.paint(sampler_name=sampler, steps=8).rows
        return
    with pytest.raises(JobFailure, match="noise does not become less with each of 8 steps"):
        easel.paint(**body)


# The same again


def test_the_same_body_gives_the_same_pixels(easel: Easel, other: Model, lora: Model) -> None:
    """Whatever ran in between, and after the checkpoint was loaded anew."""
    body: dict[str, Any] = {"sampler_name": "Euler a", "batch_size": 2}
    first = easel.paint(**body)
    easel.paint(sampler_name="DDIM", seed=1)
    easel.paint(lora, prompt="a red circle <lora:ink:1>", tiling=True)
    easel.paint(other)
    assert easel.paint(**body).rows == first.rows
    easel.engine.library.forget()
    assert easel.paint(**body).rows == first.rows
    assert first.rows[0] != first.rows[1]


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DPM++ SDE", "UniPC"])
def test_a_job_that_was_cancelled_leaves_no_trace(easel: Easel, sampler: str) -> None:
    before = easel.paint(sampler_name=sampler, steps=6)
    job, files = job_of("txt2img", [CHECKPOINT])
    body = {"prompt": "x", "steps": 6, "width": 64, "height": 64, "sampler_name": sampler}
    easel.engine.submit(job, json.dumps(body).encode(), files)
    for _ in range(3):
        easel.engine.advance()
    easel.engine.cancel(job.job_id)
    assert easel.engine.idle
    assert easel.paint(sampler_name=sampler, steps=6).rows == before.rows


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE Karras", "DPM++ 2M SDE"])
def test_a_picture_does_not_depend_on_its_batch(easel: Easel, sampler: str) -> None:
    """Up to rounding in the last digit: a batch is computed in another order."""
    together = easel.paint(sampler_name=sampler, batch_size=2, n_iter=2, seed=100)
    assert together.info["all_seeds"] == [100, 101, 102, 103]
    assert [image.name for image in together.result.images] == [
        f"image_{number}.png" for number in range(4)
    ]
    for seed, picture, text in zip(
        together.info["all_seeds"], together.pictures, together.texts, strict=True
    ):
        alone = easel.paint(sampler_name=sampler, seed=seed)
        assert abs(pixels_of(picture) - alone.pixels).max() <= 1
        assert read_back(text)["Seed"] == str(seed)


def test_variations_have_one_seed_and_several_subseeds(easel: Easel) -> None:
    body = {"subseed": 5, "subseed_strength": 0.3}
    done = easel.paint(batch_size=2, n_iter=2, **body)
    assert done.info["all_seeds"] == [7] * 4
    assert done.info["all_subseeds"] == [5, 6, 7, 8]
    assert len({*done.rows}) == 4
    for number, text in enumerate(done.texts):
        fields = read_back(text)
        assert (fields["Seed"], fields["Variation seed"]) == ("7", str(5 + number))
        assert fields["Variation seed strength"] == "0.3"
    alone = easel.paint(**{**body, "subseed": 8})
    assert abs(pixels_of(done.pictures[3]) - alone.pixels).max() <= 1


def test_a_random_seed_is_written_down(easel: Easel) -> None:
    first = easel.paint(seed=-1, subseed=-1, subseed_strength=0.5)
    seeds = {name: first.info[name] for name in ("seed", "subseed")}
    assert all(0 <= seed < 2**32 for seed in seeds.values())
    assert {name: first.answer["parameters"][name] for name in seeds} == seeds
    assert easel.paint(**seeds, subseed_strength=0.5).rows == first.rows
    assert easel.paint(seed=-1).info["seed"] != first.info["seed"]


def test_what_the_webuis_pages_do_not_offer_makes_a_picture(easel: Easel) -> None:
    """No more noise can be put back than there was: then a step goes all the way down."""
    for sampler in ("Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 3M SDE", "DPM fast"):
        assert easel.paint(sampler_name=sampler, eta=5).fields["Eta"] == "5.0"
    assert easel.paint(sampler_name="DDIM", eta=2).fields["Eta DDIM"] == "2.0"
    smaller = {"enable_hr": True, "hr_scale": 0.5, "width": 128, "height": 160}
    for upscaler in ("Latent", "Lanczos"):
        assert easel.paint(**smaller, hr_upscaler=upscaler).pictures[0].size == (64, 80)
    assert easel.paint(cfg_scale=-2).fields["CFG scale"] == "-2.0"
    assert easel.paint(subseed_strength=2, subseed=5).fields["Variation seed strength"] == "2.0"
    for seed in (-5, 2**64 - 1):
        done = easel.paint(seed=seed, sampler_name="DPM++ SDE", steps=1)
        assert done.fields["Seed"] == str(seed)


def test_seeds_may_be_as_large_as_json_has_numbers(easel: Easel) -> None:
    most = 2**53 - 1
    for delta in (most, -most):
        done = easel.paint(
            seed=most,
            subseed=most,
            subseed_strength=0.5,
            batch_size=2,
            sampler_name="Euler a",
            override_settings={"eta_noise_seed_delta": delta},
        )
        assert done.info["all_subseeds"] == [most, most + 1]
        assert done.fields["ENSD"] == str(delta)


# What comes back


def test_steps_are_reported_one_by_one(easel: Easel) -> None:
    easel.paint(steps=4)
    assert easel.steps == [(step, 4) for step in range(1, 5)]
    easel.paint(steps=3, n_iter=2, batch_size=2)
    assert easel.steps == [(step, 6) for step in range(1, 7)]
    easel.paint(steps=4, sampler_name="Heun")
    assert easel.steps[0] == (1, 4)
    assert easel.steps[-1] == (4, 4)
    assert easel.steps == sorted(easel.steps)
    easel.paint(steps=4, enable_hr=True, hr_second_pass_steps=3)
    assert easel.steps == [(step, 7) for step in range(1, 8)]


@pytest.mark.parametrize(("strength", "wanted"), [(0.0, 1), (0.5, 6), (0.75, 8), (1.0, 10)])
def test_img2img_runs_the_steps_of_the_webui(easel: Easel, strength: float, wanted: int) -> None:
    """int(denoising_strength * steps) and one more; none of it hangs on the picture's size."""
    picture = base64_of(Image.new("RGBA", (33, 50), (0, 128, 128, 100)))
    easel.paint(
        steps=10,
        denoising_strength=strength,
        init_images=[f"data:image/png;base64,{picture}"],
        resize_mode=2,
    )
    assert easel.steps == [(step + 1, wanted) for step in range(wanted)]


def test_a_grid_comes_only_when_it_is_asked_for(easel: Easel) -> None:
    plain = easel.paint(batch_size=2, n_iter=2)
    assert (len(plain.pictures), plain.info["index_of_first_image"]) == (4, 0)
    asked = {"return_grid": True}
    done = easel.paint(batch_size=2, n_iter=2, override_settings=asked)
    assert [image.name for image in done.result.images] == [
        "grid.png",
        *(f"image_{number}.png" for number in range(4)),
    ]
    assert done.info["index_of_first_image"] == 1
    assert done.answer["images"][0] == "grid.png"
    assert done.info["infotexts"] == done.texts
    assert read_back(done.texts[0])["Seed"] == "7"
    assert done.rows[1:] == plain.rows
    cells = done.pixels.reshape(2, 64, 2, 64, 3).swapaxes(1, 2).reshape(4, 64, 64, 3)
    assert [cell.tobytes() for cell in cells] == plain.rows
    assert len(easel.paint(override_settings=asked).pictures) == 1
    assert (
        len(easel.paint(batch_size=2, override_settings=asked, do_not_save_grid=True).pictures) == 2
    )


@pytest.mark.parametrize(
    ("name", "form", "media_type", "suffix"),
    [
        ("png", "PNG", "image/png", "png"),
        ("jpg", "JPEG", "image/jpeg", "jpg"),
        ("JPEG", "JPEG", "image/jpeg", "jpg"),
        ("webp", "WEBP", "image/webp", "webp"),
    ],
)
def test_a_job_may_choose_its_format(
    easel: Easel, name: str, form: str, media_type: str, suffix: str
) -> None:
    usual = easel.paint()
    done = easel.paint(override_settings={"samples_format": name, "jpeg_quality": 95})
    (image,) = done.result.images
    assert (image.name, image.media_type) == (f"image_0.{suffix}", media_type)
    assert done.pictures[0].format == form
    assert abs(done.pixels - usual.pixels).mean() < 6
    if form != "PNG":
        exif = done.pictures[0].getexif().get_ifd(ExifTags.IFD.Exif)
        comment = exif[ExifTags.Base.UserComment][8:].decode("utf-16-be")
        assert comment == done.info["infotexts"][0]


def test_notes_that_are_too_long_for_a_format_are_told_of_once(
    easel: Easel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(files.MOST_EXIF, "jpg", 500)
    for name, warned in (("jpg", 1), ("webp", 0), ("png", 0)):
        asked = {"samples_format": name, "return_grid": True}
        done = easel.paint(negative_prompt="猫" * 200, steps=1, n_iter=2, override_settings=asked)
        assert [image.name for image in done.result.images] == [
            f"grid.{name}",
            f"image_0.{name}",
            f"image_1.{name}",
        ]
        assert len(done.warnings) == warned
        assert "猫" * 200 in done.info["infotexts"][0]


def test_a_lossless_format_loses_nothing(easel: Easel) -> None:
    done = easel.paint(override_settings={"samples_format": "webp", "webp_lossless": True})
    assert done.rows == easel.paint().rows
    small, large = (
        easel.paint(override_settings={"samples_format": "jpg", "jpeg_quality": quality})
        for quality in (20, 95)
    )
    assert len(small.result.images[0].data) < len(large.result.images[0].data)


def test_pictures_may_come_without_notes(easel: Easel) -> None:
    settings = {"enable_pnginfo": False, "return_grid": True}
    done = easel.paint(batch_size=2, override_settings=settings)
    assert [getattr(picture, "text", {}) for picture in done.pictures] == [{}] * 3
    assert len(done.info["infotexts"]) == 3


def test_the_answer_is_the_webuis(easel: Easel) -> None:
    done = easel.paint(s_tmax=float("inf"), foo={"bar": float("nan")}, negative_prompt="blue")
    assert done.answer["parameters"] == {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "steps": 3,
        "width": 64,
        "height": 64,
        "seed": 7,
        "subseed": done.info["subseed"],
        "s_tmax": None,
        "foo": {"bar": None},
    }
    assert done.warnings == ["foo: no effect here"]
    assert done.info["infotexts"] == done.texts
    assert (done.info["prompt"], done.info["all_prompts"]) == ("a red circle", ["a red circle"])
    assert (done.info["width"], done.info["height"], done.info["clip_skip"]) == (64, 64, 1)
    assert done.info["sd_model_hash"] == HASH[:10]
    picture = easel.paint(init_images=[TEAL], mask=TEAL, inpaint_full_res=False)
    assert {"init_images", "mask"}.isdisjoint(picture.answer["parameters"])


def test_the_receipt_has_what_it_takes_to_do_it_again(
    easel: Easel, lora: Model, embedding: Model, red_vae: Path, other: Model
) -> None:
    vae: Model = ("VAE", "red.safetensors", red_vae)
    named = (CHECKPOINT, vae, lora, embedding, other)
    prompt = "a zorb <lora:ink:0.5>"
    done = easel.paint(*named, prompt=prompt, refiner_checkpoint="other")
    weights = {entry["name"]: entry for entry in done.answer["receipt"]["weights"]}
    assert weights.keys() == {name for _, name, _ in named}
    for type_, name, path in named:
        data = path.read_bytes()
        assert weights[name] == {
            "type": type_,
            "name": name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert done.answer["receipt"]["libraries"].keys() >= {"darkroom", "torch", "diffusers"}
    assert done.answer["receipt"]["device"]["precision"] == "float32"
    bare = easel.paint(*named)
    assert len(bare.answer["receipt"]["weights"]) == 2  # the checkpoint, and the first VAE


# What is written down


def test_the_infotext_can_be_read_back(easel: Easel) -> None:
    done = easel.paint(
        prompt="a café, (red:1.2)",
        negative_prompt="blue",
        cfg_scale=6.5,
        override_settings={"CLIP_stop_at_last_layers": 2},
    )
    prompt, negative, _ = done.texts[0].split("\n")
    assert (prompt, negative) == ("a café, (red:1.2)", "Negative prompt: blue")
    assert done.fields == {
        "Steps": "3",
        "Sampler": "Euler",
        "CFG scale": "6.5",
        "Seed": "7",
        "Size": "64x64",
        "Model hash": HASH[:10],
        "Model": STEM,
        "Clip skip": "2",
        "RNG": "CPU",
        "Version": VERSION,
    }
    assert done.answer["images"] == ["image_0.png"]
    assert done.info["infotexts"] == done.texts


def test_prompts_of_several_lines_stay_in_front(easel: Easel) -> None:
    (text,) = easel.paint(prompt="\n a\nb: c \n", negative_prompt=" d\ne ").texts
    assert text.startswith("a\nb: c\nNegative prompt: d\ne\nSteps: 3, ")


def test_everything_that_has_a_part_is_in_the_infotext(
    easel: Easel, lora: Model, embedding: Model, red_vae: Path, other: Model
) -> None:
    vae: Model = ("VAE", "red.safetensors", red_vae)
    done = easel.paint(
        CHECKPOINT,
        vae,
        lora,
        embedding,
        other,
        prompt="a zorb <lora:ink:0.5>",
        sampler_name="Euler",
        s_churn=2,
        s_tmin=0.1,
        s_tmax=10,
        s_noise=1.01,
        s_min_uncond=0.5,
        tiling=True,
        seed_resize_from_w=128,
        seed_resize_from_h=128,
        refiner_checkpoint="other",
        refiner_switch_at=0.5,
        enable_hr=True,
        hr_resize_x=96,
        hr_resize_y=80,
        hr_upscaler="Lanczos",
        hr_second_pass_steps=2,
        hr_sampler_name="DPM++ 2M Karras",
        hr_prompt='a "blue", zorb: 1',
        hr_negative_prompt="x\ny",
        hr_checkpoint_name="other.safetensors [0123456789]",
        denoising_strength=0.6,
        override_settings={
            "k_sched_type": "Exponential",
            "sigma_min": 0.1,
            "sigma_max": 12,
            "eta_noise_seed_delta": 31337,
            "always_discard_next_to_last_sigma": True,
            "sgm_noise_multiplier": True,
            "pad_cond_uncond": True,
        },
    )
    _, _, lora_path = lora
    length = 8 + struct.unpack("<Q", lora_path.read_bytes()[:8])[0]
    lora_hash = hashlib.sha256(lora_path.read_bytes()[length:]).hexdigest()[:12]
    zorb_hash = hashlib.sha256(embedding[2].read_bytes()).hexdigest()[:12]
    other_title = f"other [{hashlib.sha256(other[2].read_bytes()).hexdigest()[:10]}]"
    wanted = {
        "VAE hash": hashlib.sha256(red_vae.read_bytes()).hexdigest()[:10],
        "VAE": "red.safetensors",
        "Seed resize from": "128x128",
        "Denoising strength": "0.6",
        "ENSD": "31337",
        "NGMS": "0.5",
        "Tiling": "True",
        "Sigma churn": "2.0",
        "Sigma tmin": "0.1",
        "Sigma tmax": "10.0",
        "Sigma noise": "1.01",
        "Schedule type": "Exponential",
        "Schedule max sigma": "12.0",
        "Schedule min sigma": "0.1",
        "Discard penultimate sigma": "True",
        "SGM noise multiplier": "True",
        "Pad conds": "True",
        "Hires checkpoint": other_title,
        "Hires sampler": "DPM++ 2M Karras",
        "Hires prompt": 'a "blue", zorb: 1',
        "Hires negative prompt": "x\ny",
        "Hires resize": "96x80",
        "Hires steps": "2",
        "Hires upscaler": "Lanczos",
        "Refiner": other_title,
        "Refiner switch at": "0.5",
        "Lora hashes": f"ink: {lora_hash}",
        "TI hashes": f"zorb: {zorb_hash}",
    }
    assert {name: done.fields.get(name) for name in wanted} == wanted
    told = done.info["extra_generation_params"]
    assert told["Hires upscaler"] == "Lanczos"
    assert told["Refiner"] == other_title


def test_eta_is_written_down_where_it_acts(easel: Easel) -> None:
    assert easel.paint(sampler_name="Euler a", eta=0.5).fields["Eta"] == "0.5"
    ancestral = {"eta_ancestral": 0.3, "eta_ddim": 0.2}
    assert easel.paint(sampler_name="Euler a", override_settings=ancestral).fields["Eta"] == "0.3"
    done = easel.paint(sampler_name="DDIM", override_settings=ancestral)
    assert done.fields["Eta DDIM"] == "0.2"
    assert "Eta" not in easel.paint(sampler_name="Euler a").fields
    assert "Eta" not in easel.paint(sampler_name="Euler", override_settings=ancestral).fields


def test_the_scale_of_noise_acts_where_the_webui_gives_it_to_a_sampler(easel: Easel) -> None:
    def painted(sampler: str, s_noise: float) -> Done:
        return easel.paint(sampler_name=sampler, s_noise=s_noise)

    for sampler in ("Euler a", "DPM adaptive", "DDIM"):
        assert painted(sampler, 0).rows == painted(sampler, 1).rows
        assert "Sigma noise" not in painted(sampler, 0).fields
    for sampler in ("DPM2 a", "DPM++ 2M SDE Karras"):
        assert painted(sampler, 0.5).rows != painted(sampler, 1).rows
        assert painted(sampler, 0.5).fields["Sigma noise"] == "0.5"


def test_levels_are_written_down_where_they_were_chosen(easel: Easel) -> None:
    settings = {"sigma_min": 0.1, "sigma_max": 10, "rho": 5}
    plain = easel.paint(sampler_name="DPM++ 2M Karras")
    ends = easel.paint(sampler_name="DPM++ 2M Karras", override_settings=settings)
    assert ends.rows == plain.rows
    assert ends.fields == plain.fields
    chosen = {**settings, "k_sched_type": "karras"}
    done = easel.paint(sampler_name="DPM++ 2M", override_settings=chosen)
    told = [done.fields[f"Schedule {name}"] for name in ("type", "min sigma", "max sigma", "rho")]
    assert told == ["karras", "0.1", "10.0", "5.0"]
    assert "Schedule type" not in easel.paint(sampler_name="DDIM", override_settings=chosen).fields


def test_fields_of_img2img_are_written_down(easel: Easel) -> None:
    mask = Image.new("L", (80, 64))
    mask.paste(255, (20, 20, 50, 50))
    done = easel.paint(
        init_images=[TEAL],
        mask=base64_of(mask),
        mask_blur_x=2,
        mask_blur_y=3,
        inpainting_mask_invert=True,
        inpaint_full_res_padding=5,
        initial_noise_multiplier=0.9,
        denoising_strength=0.4,
        override_settings={"img2img_extra_noise": 0.1},
    )
    wanted = {
        "Denoising strength": "0.4",
        "Noise multiplier": "0.9",
        "Extra noise": "0.1",
        "Mask mode": "Inpaint not masked",
        "Mask blur": "2x3",
        "Inpaint area": "Only masked",
        "Masked area padding": "5",
        "Masked content": "fill",
    }
    assert {name: done.fields.get(name) for name in wanted} == wanted
    whole = easel.paint(
        init_images=[TEAL], mask=base64_of(mask), inpaint_full_res=False, inpainting_fill=1
    ).fields
    assert whole["Mask blur"] == "4"
    assert whole.keys().isdisjoint({"Inpaint area", "Masked content", "Mask mode", "Extra noise"})


def test_names_hashes_and_version_may_be_left_out(easel: Easel) -> None:
    settings = {
        "add_model_hash_to_info": False,
        "add_model_name_to_info": False,
        "add_version_to_infotext": False,
    }
    fields = easel.paint(override_settings=settings).fields
    assert fields.keys().isdisjoint({"Model", "Model hash", "Version"})


# Prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "\ud800 half",
        "nul \0 in it",
        "(" * 30 + "a" + ")" * 30,
        ":)]((",
        "猫 🐈",
        "",
        "AND",
        "BREAK",
        "[a|b] AND [c:d:0.5] BREAK :-3",
        "<hypernet:x:y>",
        "cat, " * 4000,
        "[" * 500 + "a" + ":1]" * 500,
    ],
)
def test_any_text_is_a_prompt(easel: Easel, prompt: str) -> None:
    for body in ({"prompt": prompt}, {"negative_prompt": prompt}):
        done = easel.paint(steps=1, **body)
        assert done.texts[0]


def test_attention_that_leaves_the_numbers_is_told(easel: Easel) -> None:
    with pytest.raises(JobFailure, match=r"the picture came out as no numbers: .* too strong"):
        easel.paint(prompt=f"(a:{'9' * 40}) b")


def test_texts_change_with_the_steps(easel: Easel) -> None:
    def painted(prompt: str) -> bytes:
        return easel.paint(prompt=prompt, steps=8).rows[0]

    late = painted("a [red:blue:8] circle")
    assert late == painted("a red circle")
    assert painted("a [red:blue:0] circle") == painted("a blue circle")
    assert painted("a [red:blue:4] circle") not in (late, painted("a blue circle"))
    assert painted("a [red:blue:0.5] circle") == painted("a [red:blue:4] circle")


def test_several_prompts_have_their_weights(easel: Easel) -> None:
    def painted(prompt: str) -> bytes:
        return easel.paint(prompt=prompt).rows[0]

    one = painted("a red circle")
    assert painted("a red circle AND a blue star :0") == one
    assert painted("a red circle AND a blue star") != one


# Models


def test_the_checkpoint_is_the_one_that_is_asked_for(easel: Easel, other: Model) -> None:
    mine = easel.paint(CHECKPOINT, other)
    assert mine.rows == easel.paint().rows
    assert mine.warnings == ["Stable-diffusion other.safetensors: not used"]
    theirs = easel.paint(other)
    assert theirs.rows != mine.rows
    for title in ("other", "other.safetensors", "folder\\Other.ckpt [0123456789]"):
        done = easel.paint(CHECKPOINT, other, override_settings={"sd_model_checkpoint": title})
        assert done.rows == theirs.rows
        assert done.info["sd_model_name"] == done.fields["Model"] == "other"
        assert done.warnings == [f"Stable-diffusion {NAME}: not used"]
    with pytest.raises(
        JobFailure,
        match=r'override_settings.sd_model_checkpoint: got "third", allowed is one that the job'
        rf" names in models: {NAME}, other.safetensors",
    ):
        easel.paint(CHECKPOINT, other, override_settings={"sd_model_checkpoint": "third"})


def test_a_job_without_a_checkpoint_is_told_to_name_one(easel: Easel, lora: Model) -> None:
    body = {"prompt": "a cat", "width": 64, "height": 64}
    with pytest.raises(JobFailure, match="the job names no checkpoint of type Stable-diffusion"):
        easel.run("txt2img", [lora], body)
    with pytest.raises(JobFailure, match="task_type 'dance' is not one of txt2img, img2img"):
        easel.run("dance", [CHECKPOINT], body)


def test_models_of_two_types_may_have_the_same_file_name(
    easel: Easel, red_vae: Path, lora: Model
) -> None:
    """Each is found by its own id."""
    vae: Model = ("VAE", NAME, red_vae)
    twin: Model = ("Lora", NAME, lora[2])
    done = easel.paint(CHECKPOINT, vae, twin, prompt=f"a red circle <lora:{STEM}:0.5>")
    assert done.fields["VAE"] == NAME
    alone = easel.paint(("VAE", "x", red_vae), lora, prompt="a red circle <lora:ink:0.5>")
    assert done.rows == alone.rows
    assert len(done.answer["receipt"]["weights"]) == 3


def test_the_vae_is_the_one_that_is_asked_for(easel: Easel, red_vae: Path, folder: Path) -> None:
    own = easel.paint()
    plain: Model = ("VAE", "plain.pt", small.write_vae(folder / "plain"))
    like: Model = ("VAE", f"{STEM}.vae.safetensors", red_vae)
    named: Model = ("VAE", "red.safetensors", red_vae)

    def redness(*models: Model, sd_vae: str | None = None) -> float:
        settings = {} if sd_vae is None else {"sd_vae": sd_vae}
        done = easel.paint(*models, override_settings=settings)
        return float((done.pixels - own.pixels)[..., 0].mean())

    assert redness(named) > 20  # the first that the job names
    assert redness(named, sd_vae="None") == 0
    assert redness(named, sd_vae="Automatic") == 0  # for a checkpoint of another name
    assert redness(named, like, sd_vae="Automatic") > 20
    assert redness(named, plain, sd_vae="red [0123456789]") > 20
    assert abs(redness(named, plain, sd_vae="plain")) < 1
    assert redness(sd_vae="Automatic") == redness(sd_vae="None") == 0
    with pytest.raises(
        JobFailure, match=r"override_settings.sd_vae: blue is no checkpoint of type"
    ):
        redness(named, sd_vae="blue")


def test_a_vae_that_stands_for_a_choice_comes_without_a_file(easel: Easel) -> None:
    job, files = job_of("txt2img", [CHECKPOINT])
    job.models.append(UsedModel(type="VAE", name="Automatic"))
    body = json.dumps({"prompt": "a red circle", "steps": 3, "width": 64, "height": 64, "seed": 7})
    result = easel.engine.run(job, body.encode(), files)
    picture = Image.open(io.BytesIO(result.images[0].data))
    assert pixels_of(picture).tolist() == easel.paint().pixels.tolist()
    assert result.warnings == []


def test_networks_act_with_their_weights(easel: Easel, lora: Model) -> None:
    def painted(prompt: str, **body: Any) -> bytes:
        return easel.paint(lora, prompt=prompt, **body).rows[0]

    bare = easel.paint(prompt="a red circle").rows[0]
    assert painted("a red circle <lora:ink:0>") == bare
    assert painted("a red circle <lora:ink:1>") != bare
    assert painted("a red circle <lora:INK.safetensors>") == painted("a red circle <lyco:ink:1>")
    texts, unet = painted("a red circle <lora:ink:1:0>"), painted("a red circle <lora:ink:0:1>")
    assert len({bare, texts, unet, painted("a red circle <lora:ink:1>")}) == 4
    assert painted("a red circle <lora:ink:1>", disable_extra_networks=True) == bare
    assert painted("a red circle") == bare  # nothing of it is left


def test_what_a_network_is_told_in_vain_is_told(easel: Easel, lora: Model) -> None:
    done = easel.paint(lora, prompt="<lora:INK:0.5:lbw=OUTALL> <lora:ink:1:1:8>")
    assert done.warnings == [
        "prompt: lbw= in <lora:ink:…>: no effect here",
        "prompt: a third number in <lora:ink:…>: no effect here",
    ]


def test_a_lora_that_the_job_does_not_name_is_told_what_to_do(easel: Easel, lora: Model) -> None:
    with pytest.raises(JobFailure) as failure:
        easel.paint(lora, prompt="a cat <lora:paint:0.8>")
    assert str(failure.value) == (
        "prompt: <lora:…>: paint is no checkpoint of type Lora that the job names; it names"
        ' ink.safetensors. Name it in models: {"Lora": ["paint"]}'
    )
    with pytest.raises(JobFailure, match=r"^hr_prompt: <lora:…>: paint is no checkpoint"):
        easel.paint(lora, enable_hr=True, hr_prompt="<lora:paint:1>")
    with pytest.raises(JobFailure, match=r"^prompt: <lora:ink:…> has a weight that is no number"):
        easel.paint(lora, prompt="<lora:ink:strong>")


def test_an_embedding_acts_where_a_prompt_names_it(easel: Easel, embedding: Model) -> None:
    bare = easel.paint(prompt="a cat")
    named = easel.paint(embedding, prompt="a Zorb")
    assert named.rows != bare.rows
    assert named.warnings == []
    unnamed = easel.paint(embedding, prompt="a cat")
    assert unnamed.rows == bare.rows
    assert unnamed.warnings == ["embeddings zorb.safetensors: not used (no prompt names it)"]


def test_models_without_a_part_are_told(easel: Easel, lora: Model) -> None:
    done = easel.paint(lora, ("hypernetworks", "hyper.pt", DEMO), ("Upscaler", "up.pth", DEMO))
    assert done.warnings == [
        "Lora ink.safetensors: not used (the prompt does not name it, as in <lora:NAME:1>)",
        "hypernetworks hyper.pt: not used",
    ]
    done = easel.paint(lora, prompt="<lora:ink:1> <hypernet:x:1>")
    assert done.warnings == ["prompt: <hypernet:…>: no effect here; lora and lyco have one"]


def test_a_refiner_takes_over_at_its_share(easel: Easel, other: Model) -> None:
    def painted(*models: Model, **body: Any) -> bytes:
        return easel.paint(*models, steps=8, **body).rows[0]

    both = (CHECKPOINT, other)
    assert painted(*both, refiner_checkpoint="other", refiner_switch_at=1) == painted()
    assert painted(*both, refiner_checkpoint="other", refiner_switch_at=0) == painted(other)
    half = painted(*both, refiner_checkpoint="other", refiner_switch_at=0.5)
    assert half not in (painted(), painted(other))
    done = easel.paint(*both, refiner_checkpoint="other")
    assert done.warnings == ["refiner_switch_at: not given, 0.8 was used"]
    for nothing in ("None", ""):
        assert painted(*both, refiner_checkpoint=nothing, refiner_switch_at=0.5) == painted()
    hires: dict[str, Any] = {"enable_hr": True, "hr_scale": 1, "refiner_checkpoint": "other"}
    for passes, told in (("second pass", None), ("both passes", "both passes")):
        settings = {"hires_fix_refiner_pass": passes, "img2img_extra_noise": 0.1}
        done = easel.paint(*both, **hires, refiner_switch_at=0.5, override_settings=settings)
        assert done.fields.get("Hires refiner") == told
        assert done.fields["Extra noise"] == "0.1"
    with pytest.raises(JobFailure, match=r"^refiner_checkpoint: third is no checkpoint of type"):
        painted(*both, refiner_checkpoint="third")


# Broken files


def test_broken_checkpoints_are_told_apart(easel: Easel, tmp_path: Path) -> None:
    tensors, configs = small.random_tensors(), small.CONFIGS
    whole = small.write(tmp_path / "whole", tensors, configs)
    lost = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    gap = {key: tensor for key, tensor in tensors.items() if key != lost}
    text_only = {k: t for k, t in tensors.items() if not k.startswith("first_stage_model.")}
    huge = {**configs, "unet": {**configs["unet"], "layers_per_block": 10**9}}
    small.write(tmp_path / "gap", gap, configs)
    small.write(tmp_path / "twisted", {**tensors, lost: torch.zeros(3)}, configs)
    small.write(tmp_path / "no vae", text_only, configs)
    small.write(tmp_path / "huge", tensors, huge)
    small.write_lora(tmp_path / "lora")
    small.write_embedding(tmp_path / "embedding")
    small.write_vae(tmp_path / "vae")
    small.write_controlnet_names(tmp_path / "control")
    (tmp_path / "garbage").write_bytes(b"x" + os.urandom(4095))
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "empty").write_bytes(b"")
    for name, reason in (
        ("gap", r"broken checkpoint: the unet in x.ckpt lacks 1 tensors, .*norm1.weight"),
        ("twisted", r"the unet in x.ckpt does not fit its config: size mismatch for .*norm1.weig"),
        ("no vae", r"the vae in x.ckpt is missing; name one in models: {\"VAE\": \[\"NAME\"\]}"),
        ("huge", r"broken checkpoint: darkroom.config in x.ckpt: .* at `\$.unet.layers_per_block"),
        ("lora", r"x.ckpt is a LoRA; a checkpoint of SD 1.x, SD 2.x, SDXL or an SDXL refiner is"),
        ("embedding", r"x.ckpt is a textual inversion embedding; a checkpoint of"),
        ("vae", r"x.ckpt is a VAE; a checkpoint of"),
        ("control", r"x.ckpt is a ControlNet for SD 1.x; a checkpoint of"),
        ("garbage", r"broken checkpoint: x.ckpt: it is no safetensors file \(4096 bytes\)"),
        ("cut", r"broken checkpoint: x.ckpt: it has .* upload it again"),
        ("empty", r"broken checkpoint: x.ckpt: it is no safetensors file \(0 bytes\)"),
    ):
        with pytest.raises(JobFailure, match=reason):
            easel.paint(("Stable-diffusion", "x.ckpt", tmp_path / name))
    assert easel.paint(("Stable-diffusion", "x.ckpt", whole)).pictures


def test_a_model_file_can_not_choose_code_or_sizes() -> None:
    def header(**text_encoder: object) -> Header:
        own = {**small.CONFIGS, "text_encoder": {**small.CONFIGS["text_encoder"], **text_encoder}}
        first = TensorSpec("F16", (4, 4, 3, 3))
        tensors = {"model.diffusion_model.input_blocks.0.0.weight": first}
        return Header(tensors, {"darkroom.config": json.dumps(own)})

    _, configs = configs_of(header(attn_implementation="org/kernel"), "x.safetensors")
    assert configs.text_encoder == small.CONFIGS["text_encoder"]
    with pytest.raises(JobFailure, match="max_position_embeddings"):
        configs_of(header(max_position_embeddings=300_000_000), "x.safetensors")


@pytest.mark.parametrize("beginning", [b"\x80", b"PK"])
def test_a_safetensors_file_may_begin_like_a_pickle(
    easel: Easel, beginning: bytes, tmp_path: Path
) -> None:
    """Its first bytes are a length, and every 32nd length begins like that."""
    data = DEMO.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    wanted = length
    while not struct.pack("<Q", wanted).startswith(beginning):
        wanted += 1
    header = data[8 : 8 + length].ljust(wanted)
    path = tmp_path / "padded"
    path.write_bytes(struct.pack("<Q", wanted) + header + data[8 + length :])
    padded: Model = ("Stable-diffusion", NAME, path)
    assert easel.paint(padded).rows == easel.paint().rows


def test_other_files_that_are_not_what_they_are_named_are_told(
    easel: Easel, lora: Model, tmp_path: Path
) -> None:
    wide = {"emb_params": torch.ones(2, 768)}
    for models, body, reason in (
        ([("Lora", "x", DEMO)], {"prompt": "<lora:x:1>"}, "x is a SD 1.x checkpoint; a LoRA is"),
        ([("embeddings", "x", DEMO)], {"prompt": "x"}, "x is no textual inversion embedding"),
        (
            [("embeddings", "x", small.write(tmp_path / "wide", wide))],
            {"prompt": "x"},
            f"x does not fit {NAME}: its vectors have 768 numbers, the text encoder clip_l takes",
        ),
        ([("VAE", "x", lora[2])], {}, "broken checkpoint: the vae in x lacks"),
        (
            [("Stable-diffusion", NAME, DEMO), ("Stable-diffusion", "x", lora[2])],
            {"refiner_checkpoint": "x"},
            "x is a LoRA; a checkpoint of",
        ),
    ):
        with pytest.raises(JobFailure) as failure:
            easel.paint(*models, **body)
        assert str(failure.value).startswith(reason)
    assert easel.paint().pictures


# img2img


def test_img2img_keeps_the_colors_of_its_picture(easel: Easel) -> None:
    body = {"prompt": "", "init_images": [base64_of(halves())], "cfg_scale": 1, "steps": 20}
    near, far = (easel.paint(denoising_strength=s, **body).pixels for s in (0.2, 0.9))
    upper, lower = near[4:28].mean((0, 1)), near[36:60].mean((0, 1))
    assert upper[0] > 140 > upper[2]
    assert lower[2] > 140 > lower[0]
    assert abs(far - near).mean() > 5


def test_pictures_that_are_none_are_refused(easel: Easel) -> None:
    with pytest.raises(JobFailure, match=r"^init_images: got none"):
        easel.paint(init_images=[])
    with pytest.raises(JobFailure, match=r"^init_images\[1\]: no base64"):
        easel.paint(init_images=[TEAL, "no base64!"], batch_size=2)
    with pytest.raises(JobFailure, match=r"^mask: no PNG"):
        easel.paint(init_images=[TEAL], mask="AAAA")


def test_several_pictures_to_start_from_are_one_batch(easel: Easel) -> None:
    """Each keeps its own colors, and has the seed of its place."""
    red, blue = (base64_of(Image.new("RGB", (64, 64), color)) for color in ("red", "blue"))
    body = {"denoising_strength": 0.2, "steps": 10, "prompt": ""}
    done = easel.paint(init_images=[red, blue], batch_size=4, n_iter=2, **body)
    assert done.info["all_seeds"] == [7, 8, 9, 10]
    assert done.info["batch_size"] == 2
    for number, (picture, color) in enumerate(zip(done.pictures, [0, 2, 0, 2], strict=True)):
        pixels = pixels_of(picture)
        assert int(pixels.mean((0, 1)).argmax()) == color
        alone = easel.paint(init_images=[(red, blue)[number % 2]], **body | {"seed": 7 + number})
        assert abs(pixels - alone.pixels).max() <= 1
    one = easel.paint(init_images=[red], batch_size=2, **body)
    assert len(one.pictures) == 2
    assert one.rows[0] != one.rows[1]


def test_transparent_pictures_stand_on_a_ground(easel: Easel) -> None:
    clear = base64_of(Image.new("RGBA", (64, 64), (0, 0, 0, 0)))
    body = {"init_images": [clear], "denoising_strength": 0.05, "steps": 10}
    assert easel.paint(**body).pixels.mean() > 200
    dark = easel.paint(override_settings={"img2img_background_color": "#000000"}, **body)
    assert dark.pixels.mean() < 60
    with pytest.raises(JobFailure, match=r"img2img_background_color: got no color"):
        easel.paint(override_settings={"img2img_background_color": "night"}, **body)


@pytest.mark.parametrize("resize_mode", [0, 1, 2, 3])
def test_pictures_of_any_size_are_taken(easel: Easel, resize_mode: int) -> None:
    for size in ((8, 8), (33, 50), (300, 20), (64, 64)):
        picture = Image.new("RGB", size, "teal")
        done = easel.paint(
            init_images=[base64_of(picture)],
            resize_mode=resize_mode,
            denoising_strength=0.05,
            width=128,
        )
        assert done.pictures[0].size == (128, 64)
        assert abs(done.pixels - np.array([0, 128, 128])).mean() < 40


def test_latents_can_not_be_made_of_pictures_of_every_size(easel: Easel) -> None:
    for size in ((7, 64), (64, 4097)):
        with pytest.raises(JobFailure) as failure:
            easel.paint(init_images=[base64_of(Image.new("1", size))], resize_mode=3)
        assert str(failure.value) == (
            f"init_images[0]: got {size[0]}x{size[1]} pixels, allowed in resize_mode 3 are sides"
            " from 8 to 4096"
        )


# Inpainting


def masked(*box: int, size: tuple[int, int] = (64, 64)) -> str:
    mask = Image.new("L", size)
    mask.paste(255, box)  # type: ignore[arg-type]
    return base64_of(mask)


@pytest.mark.parametrize("fill", [0, 1, 2, 3])
@pytest.mark.parametrize("resize_mode", [0, 1, 2, 3])
@pytest.mark.parametrize("only_masked", [False, True])
def test_what_is_not_masked_stays_exactly_as_it_was(
    easel: Easel, fill: int, resize_mode: int, only_masked: bool
) -> None:
    done = easel.paint(
        init_images=[base64_of(halves())],
        mask=masked(16, 16, 48, 40),
        mask_blur=0,
        inpainting_fill=fill,
        resize_mode=resize_mode,
        inpaint_full_res=only_masked,
        inpaint_full_res_padding=4,
        denoising_strength=1,
    )
    changed = (done.pixels != pixels_of(halves())).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 39, 16, 47)
    assert changed[16:40, 16:48].mean() > 0.95


def test_what_is_masked_begins_as_it_is_told(easel: Easel) -> None:
    """Nearly nothing is done to it: filled from around, as it was, noise, or nothing."""
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (16, 16, 48, 48))

    def begun(fill: int) -> np.ndarray[Any, Any]:
        done = easel.paint(
            init_images=[base64_of(picture)],
            mask=masked(16, 16, 48, 48),
            inpainting_fill=fill,
            inpaint_full_res=False,
            denoising_strength=0.01,
            steps=20,
        )
        middle: np.ndarray[Any, Any] = done.pixels[24:40, 24:40]
        return middle

    filled, original, noise, nothing = map(begun, range(4))
    assert filled.mean() > 190
    assert (original.mean((0, 1)) > [150, -1, -1]).all()
    assert original[..., 1:].mean() < 80
    assert noise.std() > 1.5 * max(filled.std(), nothing.std())
    assert abs(nothing.mean((0, 1)) - filled.mean((0, 1))).max() > 20


def test_a_mask_of_another_size_means_the_same_places(easel: Easel) -> None:
    picture = halves().resize((128, 96))
    done = easel.paint(
        init_images=[base64_of(picture)],
        mask=masked(16, 16, 32, 32, size=(64, 48)),
        mask_blur=0,
        denoising_strength=1,
        inpainting_fill=2,
    )
    changed = (done.pixels != pixels_of(picture)).any(axis=2)
    rows, columns = np.nonzero(changed)
    bounds = np.array([rows.min(), rows.max(), columns.min(), columns.max()])
    assert abs(bounds - [32, 63, 32, 63]).max() <= 3
    assert done.pixels[34:62, 34:62].max(2).min() > 0  # no hole


@pytest.mark.parametrize("resize_mode", [0, 1, 2, 3])
def test_a_mask_fits_its_picture_in_every_resize_mode(easel: Easel, resize_mode: int) -> None:
    """A masked square in the middle is painted over, and nothing beside it."""
    picture = Image.new("RGB", (128, 64), "white")
    picture.paste("red", (48, 16, 80, 48))
    done = easel.paint(
        init_images=[base64_of(picture)],
        mask=masked(44, 12, 84, 52, size=(128, 64)),
        mask_blur=0,
        inpaint_full_res=False,
        resize_mode=resize_mode,
        denoising_strength=0.05,
    )
    assert done.pictures[0].size == (64, 64)
    assert done.pixels[32, 32].min() > 120  # filled with what is around it
    assert done.pixels[:, :4].min() > 250


def test_a_mask_without_anything_in_it_is_told(easel: Easel) -> None:
    empty = base64_of(Image.new("L", (64, 64)))
    done = easel.paint(init_images=[base64_of(halves())], mask=empty)
    assert done.warnings == ["mask: nothing in it is masked, so the whole picture was painted anew"]
    kept = easel.paint(init_images=[base64_of(halves())], mask=empty, inpaint_full_res=False)
    assert kept.rows == [pixels_of(halves()).tobytes()]


def test_masks_may_be_as_wild_as_their_fields_allow(easel: Easel) -> None:
    for body in (
        {"mask_blur": 256},
        {"inpaint_full_res_padding": 1024},
        {"mask_blur_x": 256, "mask_blur_y": 0},
        {"width": 128, "height": 64},
        {"width": 64, "height": 192, "inpaint_full_res": False, "resize_mode": 2},
    ):
        done = easel.paint(init_images=[base64_of(halves())], mask=masked(0, 60, 1, 61), **body)
        full_res = body.get("inpaint_full_res", True)
        assert done.pictures[0].size == ((64, 64) if full_res else (64, 192))


# Hires fix


@pytest.mark.parametrize(
    "upscaler",
    [
        "Latent",
        "Latent (antialiased)",
        "Latent (bicubic)",
        "Latent (bicubic antialiased)",
        "Latent (nearest)",
        "Latent (nearest-exact)",
        "Lanczos",
        "Nearest",
        "None",
    ],
)
def test_a_second_pass_enlarges(easel: Easel, upscaler: str) -> None:
    first = easel.paint()
    done = easel.paint(enable_hr=True, hr_upscaler=upscaler, hr_scale=1.5, denoising_strength=0.3)
    assert done.pictures[0].size == (96, 96)
    assert (done.info["width"], done.info["height"]) == (64, 64)
    assert done.fields["Size"] == "64x64"
    assert done.fields["Hires upscale"] == "1.5"
    assert done.fields["Hires upscaler"] == upscaler
    small = pixels_of(done.pictures[0].resize((64, 64)))
    assert abs(small - first.pixels).mean() < 60


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos"])
@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"hr_scale": 1.3}, (80, 80)),
        ({"hr_resize_x": 128}, (128, 128)),
        ({"hr_resize_y": 80}, (80, 80)),
        ({"hr_resize_x": 128, "hr_resize_y": 72}, (128, 72)),
        ({"hr_resize_x": 72, "hr_resize_y": 128}, (72, 128)),
        ({"hr_resize_x": 100, "hr_resize_y": 70}, (96, 72)),
        ({"hr_resize_x": 1, "hr_resize_y": 64}, (8, 64)),
        ({"width": 128, "height": 96, "firstphase_width": 64, "firstphase_height": 64}, (128, 96)),
        ({"width": 72, "hr_scale": 2}, (144, 128)),
    ],
)
def test_the_second_pass_has_the_size_that_was_asked_for(
    easel: Easel, upscaler: str, body: dict[str, Any], size: tuple[int, int]
) -> None:
    for strength in (0, 0.5):
        done = easel.paint(
            enable_hr=True, hr_upscaler=upscaler, denoising_strength=strength, **body
        )
        assert done.pictures[0].size == size


def test_a_second_pass_may_have_an_upscaler_of_the_registry(easel: Easel, tmp_path: Path) -> None:
    path = small.write(tmp_path / "compact", small.compact_tensors())
    upscaler: Model = ("Upscaler", "compact.pth", path)
    done = easel.paint(
        upscaler, enable_hr=True, hr_upscaler="compact", denoising_strength=0.3, batch_size=2
    )
    assert [picture.size for picture in done.pictures] == [(128, 128)] * 2
    assert {"compact.pth", NAME} == {w["name"] for w in done.answer["receipt"]["weights"]}
    with pytest.raises(
        JobFailure, match=r"^hr_upscaler: got \"R-ESRGAN\", allowed is one of Latent"
    ):
        easel.paint(upscaler, enable_hr=True, hr_upscaler="R-ESRGAN")


def test_pictures_of_a_second_pass_do_not_depend_on_their_batch(easel: Easel) -> None:
    body: dict[str, Any] = {"enable_hr": True, "hr_sampler_name": "DPM adaptive", "hr_scale": 1.25}
    together = easel.paint(batch_size=2, **body)
    alone = easel.paint(seed=8, **body)
    # A sampler that chooses its steps makes a little more of rounding.
    assert abs(pixels_of(together.pictures[1]) - alone.pixels).max() <= 3
