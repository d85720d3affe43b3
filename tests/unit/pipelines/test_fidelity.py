"""Whole pictures: the engine makes what plain diffusers makes of the same weights and noise.

Compared is what the VAE is given to decode, before anything is rounded to 256 levels, and then the
pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, leaky_relu

from services.inference.worker.pipelines import Listener, Result
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.pipelines.sampling.noise import Noise
from services.inference.worker.pipelines.sampling.philox import PhiloxGenerator
from services.inference.worker.settings import EngineOptions
from shared.webui.settings import WebuiSettings
from tests.unit.pipelines import by_hand, tiny
from tests.unit.pipelines.bench import SIDE, USUAL, Bench, Seen, base64_of, photo, pixels_of, worst
from tests.unit.pipelines.conftest import Checkpoints, Same
from tests.unit.pipelines.tiny import Tiny
from tests.weights import files_of

PROMPT, NEGATIVE = USUAL["prompt"], USUAL["negative_prompt"]


def assert_shows(seen: Seen, model: Tiny, *latents: Tensor) -> None:
    """Pixels: a latent that is off by its last digit may round to the next level."""
    for ours, one in zip(seen.pixels, latents, strict=True):
        assert worst(ours, by_hand.decode(model, one)) <= 1


# Text to image


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x", "SD 2.x v", "SDXL"])
def test_txt2img_is_what_diffusers_makes(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str
) -> None:
    model, path = checkpoints[kind]
    theirs = by_hand.pipeline(model)(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=by_hand.noise(height=8, width=12),
        height=64,
        width=96,
        num_inference_steps=4,
        guidance_scale=6.5,
        output_type="latent",
    ).images
    seen = bench.paint(path, width=96)
    same(f"txt2img {kind}", seen.latents[0], theirs)
    assert_shows(seen, model, theirs)


def test_sdxl_is_given_zeros_for_an_empty_negative_prompt(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """SDXL was trained on zeros, and not on the embedding of an empty text."""
    model, path = checkpoints["SDXL"]
    pipeline = by_hand.pipeline(model)
    body: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 6.5}
    theirs = pipeline(
        PROMPT, latents=by_hand.noise(), height=64, width=64, output_type="latent", **body
    ).images
    seen = bench.paint(path, negative_prompt="")
    same("SDXL, empty negative prompt", seen.latents[0], theirs)
    empty = by_hand.encode(model, "")
    assert not torch.equal(empty.context, empty.zeros().context)


def test_sdxl_is_told_what_is_cut_off(bench: Bench, checkpoints: Checkpoints, same: Same) -> None:
    model, path = checkpoints["SDXL"]
    theirs = by_hand.pipeline(model)(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=by_hand.noise(),
        height=64,
        width=64,
        crops_coords_top_left=(16, 200),
        negative_crops_coords_top_left=(16, 200),
        negative_original_size=(64, 64),
        negative_target_size=(64, 64),
        num_inference_steps=4,
        guidance_scale=6.5,
        output_type="latent",
    ).images
    settings = {"sdxl_crop_top": 16, "sdxl_crop_left": 200}
    seen = bench.paint(path, override_settings=settings)
    same("SDXL, crop", seen.latents[0], theirs)
    assert worst(seen.latents[0], bench.paint(path).latents[0]) > 0.1


def test_a_latent_consistency_model_is_told_its_guidance(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    model, path = checkpoints["SD 1.x LCM"]
    alphas = LCMScheduler(**by_hand.TRAINED).alphas_cumprod.double().numpy()[19::20]
    times = [999, 672.3333333, 345.6666667, 19]
    known = np.log((1 - alphas) / alphas) / 2
    levels = np.exp(np.interp(times, np.arange(19, 1000, 20), known)).tolist()
    text = by_hand.encode(model, PROMPT)
    for scale in (1.5, 6.5):
        told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, torch.tensor([scale - 1]), model.unet.config.time_cond_proj_dim
        )

        def predict(x: Tensor, time: Any, told: Tensor = told) -> Tensor:
            return by_hand.ask(model, x, time, text, timestep_cond=told)

        theirs = by_hand.lcm(predict, levels, [999, 679, 339, 19], "epsilon")
        seen = bench.paint(path, sampler_name="LCM", cfg_scale=scale)
        same("LCM with guidance embedding", seen.latents[0], theirs)


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_the_refiner_takes_over(
    bench: Bench, checkpoints: Checkpoints, same: Same, negative: str
) -> None:
    """At half of the steps, with texts of its own encoder, and told how good it is to be."""
    (base, path), (refiner, refiner_path) = checkpoints["SDXL"], checkpoints["SDXL refiner"]
    predictions = []
    for model in (base, refiner):
        positive, other = (by_hand.encode(model, text) for text in (PROMPT, negative))
        sizes = (64, 64, 0, 0, 64, 64) if model is base else (64, 64, 0, 0, 6)
        low = (64, 64, 0, 0, 64, 64) if model is base else (64, 64, 0, 0, 2.5)
        predictions.append(
            by_hand.guided(
                model,
                positive,
                other if negative else other.zeros(),
                sizes=sizes,
                negative_sizes=low,
            )
        )
    first, then = predictions
    predict = by_hand.in_turn([first, first, then, then])
    theirs = by_hand.run(base, predict, by_hand.noise())
    seen = bench.paint(
        path,
        beside={refiner_path: "Stable-diffusion"},
        refiner_checkpoint=refiner_path.name,
        refiner_switch_at=0.5,
        negative_prompt=negative,
    )
    same("SDXL, refiner from half of the steps on", seen.latents[0], theirs)
    assert_shows(seen, base, theirs)


def test_late_steps_can_do_without_the_negative_prompt(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """`s_min_uncond`: every second call below a level; several texts then add up without it."""
    model, path = checkpoints["SD 1.x"]
    one, other = by_hand.encode(model, "a cat"), by_hand.encode(model, "a dog")
    negative = by_hand.encode(model, NEGATIVE)
    levels = by_hand.euler(model)
    levels.set_timesteps(10)
    for prompt, texts in (("a cat", [(one, 1.0)]), ("a cat AND a dog", [(one, 1.0), (other, 1.0)])):
        usual = by_hand.guided(model, texts, negative)
        # Guided by the first text in place of the negative one, and once.
        short = by_hand.guided(model, texts, one, scale=1.0)
        calls = [
            short if number % 2 and level < 2 else usual
            for number, level in enumerate(levels.sigmas[:-1])
        ]
        assert short in calls
        theirs = by_hand.run(model, by_hand.in_turn(calls), by_hand.noise(), 10)
        seen = bench.paint(path, prompt=prompt, s_min_uncond=2, steps=10)
        same("s_min_uncond", seen.latents[0], theirs)


@pytest.mark.parametrize(
    ("settings", "skipped"),
    [
        ({"s_min_uncond": 2, "s_min_uncond_all": True}, range(4, 10)),
        ({"s_min_uncond": 2}, (5, 7, 9)),
        ({"skip_early_cond": 0.3}, range(4)),
        ({"skip_early_cond": 0.05, "s_min_uncond": 0.2}, (0, 9)),
    ],
)
def test_settings_say_where_the_negative_prompt_is_left_out(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    settings: dict[str, Any],
    skipped: Sequence[int],
) -> None:
    """Of calls 0 to 9, at levels 14.6, 8.6, 5.2, 3.2, 2, 1.3, 0.8, 0.5, 0.3 and 0.03."""
    model, path = checkpoints["SD 1.x"]
    usual, text = by_hand.usually_guided(model), by_hand.encode(model, PROMPT)
    short = by_hand.guided(model, text, text, scale=1.0)
    calls = [short if number in skipped else usual for number in range(10)]
    theirs = by_hand.run(model, by_hand.in_turn(calls), by_hand.noise(), 10)
    seen = bench.paint(path, steps=10, override_settings=settings)
    same("left out", seen.latents[0], theirs)


def test_a_field_goes_before_the_setting_of_its_name(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    _, path = checkpoints["SD 1.x"]
    told = bench.paint(path, s_min_uncond=0, override_settings={"s_min_uncond": 15})
    assert torch.equal(told.latents[0], bench.paint(path).latents[0])


@pytest.mark.parametrize(("by_steps", "first_calls"), [(True, 2), (False, 1), (None, 2)])
def test_the_refiner_may_take_over_by_training_time(
    bench: Bench, checkpoints: Checkpoints, same: Same, by_steps: bool | None, first_calls: int
) -> None:
    """From 0.3 on: of 4 steps, at 0, 0.25, …, or of the times 999, 666, 333 and 0."""
    (base, path), (refiner, refiner_path) = checkpoints["SDXL"], checkpoints["SDXL refiner"]
    first = by_hand.usually_guided(base)
    then = by_hand.usually_guided(refiner, negative_sizes=(64, 64, 0, 0, 2.5))
    calls = [first] * first_calls + [then] * (4 - first_calls)
    theirs = by_hand.run(base, by_hand.in_turn(calls), by_hand.noise())
    seen = bench.paint(
        path,
        beside={refiner_path: "Stable-diffusion"},
        refiner_checkpoint=refiner_path.name,
        refiner_switch_at=0.3,
        override_settings={} if by_steps is None else {"refiner_switch_by_sample_steps": by_steps},
    )
    same("refiner by training time", seen.latents[0], theirs)


def test_a_deployment_may_follow_a_later_webui_and_draw_as_a_gpu(
    checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    """As of 1.9, Automatic is Karras for DPM++ 2M, and for the second pass what it says."""
    model, path = checkpoints["SD 1.x"]
    later = Bench(tmp_path, WebuiSettings(webui_version="1.10", randn_source="GPU"))
    seen = later.paint(path, sampler_name="DPM++ 2M")
    fields = seen.info["infotexts"][0]
    assert "Sampler: DPM++ 2M, Schedule type: Karras, " in fields
    assert "RNG: NV, " in fields
    assert seen.info["sampler_name"] == "DPM++ 2M"
    by_name = later.paint(path, sampler_name="DPM++ 2M Karras")
    by_field = later.paint(path, sampler_name="DPM++ 2M", scheduler="karras")
    for other in (by_name, by_field):
        assert torch.equal(other.latents[0], seen.latents[0])
    uniform = later.paint(path, sampler_name="Euler")
    drawn = PhiloxGenerator(7).randn((1, 4, 8, 8))
    theirs = by_hand.run(model, by_hand.usually_guided(model), drawn)
    same("noise of a GPU", uniform.latents[0], theirs)
    assert "Sampler: Euler, Schedule type: Automatic, " in uniform.info["infotexts"][0]
    hires: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "sampler_name": "DPM++ 2M"}
    second = later.paint(path, hr_scheduler="Simple", **hires)
    assert "Hires schedule type: Simple" in second.info["infotexts"][0]
    assert worst(second.latents[-1], later.paint(path, **hires).latents[-1]) > 0.01


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"k_sched_type": "karras"}, (14.6146, 0.0291675, 7.0)),
        ({"k_sched_type": "karras", "sigma_max": 10, "sigma_min": 0.1}, (10.0, 0.1, 7.0)),
        ({"k_sched_type": "karras", "rho": 3}, (14.6146, 0.0291675, 3.0)),
        ({"k_sched_type": "exponential"}, (14.6146, 0.0291675, None)),
    ],
)
def test_levels_can_be_spread_in_another_way(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    settings: dict[str, Any],
    levels: tuple[float, float, float | None],
) -> None:
    model, path = checkpoints["SD 1.x"]
    high, low, rho = levels
    if rho is None:
        sigmas = np.exp(np.linspace(np.log(high), np.log(low), 4))
    else:
        sigmas = np.linspace(high ** (1 / rho), low ** (1 / rho), 4) ** rho
    scheduler = EulerDiscreteScheduler(**by_hand.TRAINED, use_karras_sigmas=True)
    scheduler._convert_to_karras = lambda in_sigmas, num_inference_steps: sigmas
    scheduler.set_timesteps(4)
    predict, x = by_hand.usually_guided(model), by_hand.noise() * float(sigmas[0])
    for time in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, time), time), time, x)[0]
    seen = bench.paint(path, override_settings=settings)
    # The model's own highest and lowest level are given here with six digits.
    same("k_sched_type", seen.latents[0], x, within=2e-4)


# Image to image


@pytest.mark.parametrize(("strength", "last"), [(0.25, 3), (0.5, 6), (0.75, 8), (1.0, 10)])
def test_img2img_is_what_diffusers_makes(
    bench: Bench, checkpoints: Checkpoints, same: Same, strength: float, last: int
) -> None:
    """Of 10 steps the webui runs `int(10 * strength)` and one more."""
    model, path = checkpoints["SD 1.x"]
    picture = photo()
    pipeline = StableDiffusionImg2ImgPipeline(**by_hand.pipeline(model).components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=by_hand.encode_picture(model, picture),
        strength=last / 10,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=10,
        guidance_scale=6.5,
        output_type="latent",
    ).images
    seen = paint_over(bench, path, picture, steps=10, denoising_strength=strength)
    same("img2img", seen.latents[0], theirs)
    assert_shows(seen, model, theirs)


def paint_over(bench: Bench, path: Path, picture: Image.Image, **body: Any) -> Seen:
    return bench.paint(path, task_type="img2img", init_images=[base64_of(picture)], **body)


def test_img2img_can_run_all_the_steps(bench: Bench, checkpoints: Checkpoints, same: Same) -> None:
    """`img2img_fix_steps`: 4 steps, the last of 10; with more noise than usual, and some extra."""
    model, path = checkpoints["SD 2.x v"]
    picture = photo()
    latents, noise = by_hand.encode_picture(model, picture), by_hand.noise()
    levels = by_hand.euler(model)
    levels.set_timesteps(10)
    # The extra noise is put on top of the usual amount, but the level is not told of it.
    more = 1.2 + 0.3 * 1.2 / float(levels.sigmas[6])
    predict = by_hand.usually_guided(model)
    theirs = by_hand.run(model, predict, noise * more, 10, picture=latents, last=4)
    settings = {"img2img_fix_steps": True, "img2img_extra_noise": 0.3}
    seen = paint_over(
        bench,
        path,
        picture,
        denoising_strength=0.4,
        initial_noise_multiplier=1.2,
        override_settings=settings,
    )
    same("img2img, all steps, more noise", seen.latents[0], theirs)


# Inpainting: a mask that ends where latents end


def mask_of(box: tuple[int, int, int, int], side: int = SIDE) -> Image.Image:
    mask = Image.new("L", (side, side))
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


BOX = (16, 24, 48, 56)
MASK = mask_of(BOX)
KEEP = torch.ones(1, 1, 8, 8)
KEEP[..., 3:7, 2:6] = 0
MASKED = np.asarray(MASK)[..., None] > 0


def inpaint(bench: Bench, path: Path, picture: Image.Image, **body: Any) -> Seen:
    usual: dict[str, Any] = {
        "steps": 10,
        "denoising_strength": 0.5,
        "mask": base64_of(MASK),
        "mask_blur": 0,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
    }
    return paint_over(bench, path, picture, **{**usual, **body})


def by_hand_inpainted(
    model: Tiny, latents: Tensor, *, keep: Tensor = KEEP, beside: Tensor | None = None
) -> Tensor:
    """The last 6 of 10 steps, of each of which what is not masked is put back."""
    predict = by_hand.usually_guided(model, beside=beside)

    def put_back(denoised: Tensor) -> Tensor:
        return latents * keep + denoised * (1 - keep)

    drawn = by_hand.noise()
    made = by_hand.run(model, predict, drawn, 10, picture=latents, last=6, after=put_back)
    return put_back(made)


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x v", "SDXL"])
def test_inpainting_paints_what_is_masked(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str
) -> None:
    """And not a single pixel of what is not."""
    model, path = checkpoints[kind]
    picture = photo()
    theirs = by_hand_inpainted(model, by_hand.encode_picture(model, picture))
    seen = inpaint(bench, path, picture)
    same("inpainting", seen.latents[0], theirs)
    before, painted = np.asarray(picture, np.int16), by_hand.decode(model, theirs)
    assert worst(seen.pixels[0], np.where(MASKED, painted, before)) <= 1
    assert worst(np.where(MASKED, 0, seen.pixels[0]), np.where(MASKED, 0, before)) == 0


@pytest.mark.parametrize("kind", ["SD 1.x", "SD 2.x v"])
@pytest.mark.parametrize(("steps", "times"), [(10, (501, 401)), (12, (499, 416))])
def test_ddim_puts_the_mask_on_before_it_asks(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    kind: str,
    steps: int,
    times: tuple[int, int],
) -> None:
    """The picture without noise, as in the webui; it is put back once more in the end. `times`: of
    the noise, and the one that it is taken for."""
    model, path = checkpoints[kind]
    latents = by_hand.encode_picture(model, photo())
    shares = DDIMScheduler(**by_hand.TRAINED).alphas_cumprod
    noised, started = times

    def put_back(x: Tensor) -> Tensor:
        return latents * KEEP + x * (1 - KEEP)

    drawn = shares[noised] ** 0.5 * latents + (1 - shares[noised]) ** 0.5 * by_hand.noise()
    run = range(started, 0, -(1000 // steps))
    predict = by_hand.usually_guided(model)
    theirs = put_back(by_hand.ddim(model, predict, drawn, run, before=put_back))
    seen = inpaint(bench, path, photo(), sampler_name="DDIM", steps=steps)
    same("inpainting, DDIM", seen.latents[0], theirs)


def test_what_is_masked_may_begin_as_something_else(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """As noise, as nothing, or as the colors around it."""
    model, path = checkpoints["SD 1.x"]
    plain = Image.new("RGB", (SIDE, SIDE), (200, 40, 90))
    marked = plain.copy()
    marked.paste((0, 255, 0), BOX)
    latents = by_hand.encode_picture(model, plain)
    noisy = latents * KEEP + by_hand.noise() * (1 - KEEP)
    for fill, started in ((0, latents), (2, noisy), (3, latents * KEEP)):
        seen = inpaint(bench, path, marked, inpainting_fill=fill)
        # The colors around are blurred first, and rounded to 256 levels each time.
        theirs = by_hand_inpainted(model, started)
        same(f"inpainting, fill {fill}", seen.latents[0], theirs, within=0.02)


def test_the_mask_can_be_turned_around(bench: Bench, checkpoints: Checkpoints) -> None:
    """White is kept then, and what `mask_blur` reaches is mixed; the rest stays as it was."""
    _, path = checkpoints["SD 1.x"]
    before = np.asarray(photo(), np.int16)
    seen = inpaint(bench, path, photo(), inpainting_mask_invert=1, mask_blur=2)
    inside = np.s_[BOX[1] + 6 : BOX[3] - 6, BOX[0] + 6 : BOX[2] - 6]
    assert worst(seen.pixels[0][inside], before[inside]) == 0
    assert worst(seen.pixels[0][:10], before[:10]) > 20


def test_only_what_is_masked_is_rendered(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """The box around the mask, with its padding and as high as the ratio needs it, is painted as a
    picture of its own and put back."""
    model, path = checkpoints["SD 1.x"]
    picture, mask = photo(128, 128), mask_of((40, 56, 72, 72), 128)
    box = (24, 32, 88, 96)  # as large as what is rendered, so nothing is stretched
    keep = torch.ones(1, 1, 8, 8)
    keep[..., 3:5, 2:6] = 0
    latents = by_hand.encode_picture(model, picture.crop(box))
    theirs = by_hand_inpainted(model, latents, keep=keep)
    seen = inpaint(
        bench,
        path,
        picture,
        mask=base64_of(mask),
        inpaint_full_res=True,
        inpaint_full_res_padding=16,
    )
    same("inpainting, only masked", seen.latents[0], theirs)
    before = np.asarray(picture, np.int16)
    painted = before.copy()
    painted[32:96, 24:88] = by_hand.decode(model, theirs)
    masked = np.asarray(mask)[..., None] > 0
    assert worst(seen.pixels[0], np.where(masked, painted, before)) <= 1
    assert worst(np.where(masked, 0, seen.pixels[0]), np.where(masked, 0, before)) == 0


@pytest.mark.parametrize("kind", ["SD 1.x inpainting", "SDXL inpainting"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_an_inpainting_model_sees_mask_and_picture(
    bench: Bench, checkpoints: Checkpoints, same: Same, kind: str, weight: float
) -> None:
    """Beside the latents: the mask, and the latents of the picture without what is masked."""
    model, path = checkpoints[kind]
    picture = photo()
    pixels = by_hand.tensor_of(picture)
    masked = torch.from_numpy(np.asarray(MASK) > 127)[None, None]
    dimmed = torch.where(masked, pixels * (1 - weight), pixels)
    beside = torch.cat([1 - KEEP, by_hand.encode_picture(model, dimmed)], 1)
    latents = by_hand.encode_picture(model, picture)
    theirs = by_hand_inpainted(model, latents, beside=beside)
    settings = {"inpainting_mask_weight": weight}
    seen = inpaint(bench, path, picture, override_settings=settings)
    same(f"inpainting, {kind}", seen.latents[0], theirs)


def test_an_inpainting_model_paints_from_nothing(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    """All is masked then, and nothing is seen."""
    model, path = checkpoints["SD 1.x inpainting"]
    grey = by_hand.encode_picture(model, torch.zeros(1, 3, SIDE, SIDE))
    beside = torch.cat([torch.ones(1, 1, 8, 8), grey], 1)
    theirs = by_hand.run(model, by_hand.usually_guided(model, beside=beside), by_hand.noise())
    same("txt2img, SD 1.x inpainting", bench.paint(path).latents[0], theirs)


# Hires fix


def second_pass(model: Tiny, started: Tensor, **more: Any) -> Tensor:
    """4 steps, the last of 10 (a strength of 0.4), at twice the size."""
    predict = by_hand.usually_guided(model, **more)
    drawn = by_hand.noise(height=16, width=16)
    return by_hand.run(model, predict, drawn, 10, picture=started, last=4)


HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.4}
LATENT: dict[str, dict[str, Any]] = {
    "Latent": {"mode": "bilinear"},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic"},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest"},
    "Latent (nearest-exact)": {"mode": "nearest-exact"},
}


@pytest.mark.parametrize("upscaler", LATENT)
def test_hires_fix_enlarges_latents(
    bench: Bench, checkpoints: Checkpoints, same: Same, upscaler: str
) -> None:
    model, path = checkpoints["SD 1.x"]
    first = by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())
    larger = interpolate(first, (16, 16), **LATENT[upscaler])
    theirs = second_pass(model, larger)
    seen = bench.paint(path, hr_upscaler=upscaler, **HIRES)
    same("hires fix, latents", seen.latents[-1], theirs)
    assert_shows(seen, model, theirs)


@pytest.mark.parametrize(
    ("upscaler", "resampling"),
    [("Lanczos", Image.Resampling.LANCZOS), ("Nearest", Image.Resampling.NEAREST)],
)
def test_hires_fix_enlarges_pictures(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    upscaler: str,
    resampling: Image.Resampling,
) -> None:
    model, path = checkpoints["SD 1.x"]
    first = by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())
    picture = by_hand.picture_of(by_hand.decode(model, first)).resize((128, 128), resampling)
    theirs = second_pass(model, by_hand.encode_picture(model, picture))
    seen = bench.paint(path, hr_upscaler=upscaler, **HIRES)
    # The picture in between has 256 levels, of which one is the next where a latent is off.
    same("hires fix, pictures", seen.latents[-1], theirs, within=5e-3)


def enlarged_by_hand(tensors: dict[str, Tensor], picture: Image.Image) -> Image.Image:
    """ESRGAN, https://arxiv.org/abs/1809.00219."""

    def conv(name: str, x: Tensor) -> Tensor:
        return conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)

    def dense(name: str, x: Tensor) -> Tensor:
        seen = x
        for layer in range(1, 5):
            seen = torch.cat([seen, leaky_relu(conv(f"{name}.conv{layer}.0", seen), 0.2)], 1)
        return x + 0.2 * conv(f"{name}.conv5.0", seen)

    first = conv("model.0", (by_hand.tensor_of(picture) + 1) / 2)
    block = first
    for number in (1, 2, 3):
        block = dense(f"model.1.sub.0.RDB{number}", block)
    x = first + conv("model.1.sub.1", first + 0.2 * block)
    x = leaky_relu(conv("model.3", interpolate(x, scale_factor=2.0)), 0.2)
    x = conv("model.7", leaky_relu(conv("model.5", x), 0.2))
    levels = x[0].permute(1, 2, 0).clamp(0, 1) * 255
    return Image.fromarray(levels.round().to(torch.uint8).numpy())


def test_hires_fix_enlarges_with_an_upscaler(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    tensors = tiny.esrgan()
    file = tmp_path / "sharp.pth"
    torch.save(tensors, file)
    first = by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())
    picture = enlarged_by_hand(tensors, by_hand.picture_of(by_hand.decode(model, first)))
    assert np.asarray(picture).std() > 10
    theirs = second_pass(model, by_hand.encode_picture(model, picture))
    seen = bench.paint(path, beside={file: "Upscaler"}, hr_upscaler="sharp", **HIRES)
    same("hires fix, upscaler", seen.latents[-1], theirs, within=5e-3)  # 256 levels, as above


def test_hires_fix_tells_sdxl_of_the_larger_size(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    model, path = checkpoints["SDXL"]
    first = by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())
    larger = interpolate(first, (16, 16), mode="bilinear")
    theirs = second_pass(model, larger, sizes=(128, 128, 0, 0, 128, 128))
    same("hires fix, SDXL", bench.paint(path, **HIRES).latents[-1], theirs)


def test_the_second_pass_has_its_own_checkpoint_and_texts(
    bench: Bench, checkpoints: Checkpoints, same: Same, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    other = tiny.sd1(seed=20)
    other_path = other.save(tmp_path / "other.safetensors")
    first = by_hand.run(model, by_hand.usually_guided(model), by_hand.noise())
    larger = interpolate(first, (16, 16), mode="bilinear")
    texts = by_hand.encode(other, "a green hat"), by_hand.encode(other, "yellow")
    drawn = by_hand.noise(height=16, width=16)
    theirs = by_hand.run(other, by_hand.guided(other, *texts), drawn, 10, picture=larger, last=4)
    seen = bench.paint(
        path,
        beside={other_path: "Stable-diffusion"},
        hr_checkpoint_name="other",
        hr_prompt="a green hat",
        hr_negative_prompt="yellow",
        **HIRES,
    )
    same("hires fix, another checkpoint", seen.latents[-1], theirs)


# Noise


def on_the_sphere(strength: float, one: Tensor, other: Tensor) -> Tensor:
    """Spherical interpolation, row by row as the webui does it."""
    mixed = torch.empty_like(one)
    for channel in range(4):
        for column in range(one.shape[3]):
            a, b = one[0, channel, :, column], other[0, channel, :, column]
            angle = torch.acos(torch.dot(a, b) / (a.norm() * b.norm()))
            mixed[0, channel, :, column] = (
                torch.sin((1 - strength) * angle) * a + torch.sin(strength * angle) * b
            ) / torch.sin(angle)
    return mixed


def test_variations_mix_the_noise_of_two_seeds(
    bench: Bench, checkpoints: Checkpoints, same: Same
) -> None:
    model, path = checkpoints["SD 1.x"]
    seen = bench.paint(path, subseed=99, subseed_strength=0.3, batch_size=2)
    predict = by_hand.usually_guided(model)
    for number, latents in enumerate(seen.latents):
        drawn = on_the_sphere(0.3, by_hand.noise(7), by_hand.noise(99 + number))
        same("variation seed", latents, by_hand.run(model, predict, drawn))


@pytest.mark.parametrize(("width", "height"), [(32, 48), (96, 40), (96, 96)])
def test_a_seed_keeps_its_noise_at_another_size(
    bench: Bench, checkpoints: Checkpoints, same: Same, width: int, height: int
) -> None:
    """What was drawn for that size lies in the middle of what is drawn for this one, or its middle
    is taken."""
    model, path = checkpoints["SD 1.x"]
    seen = bench.paint(path, seed_resize_from_w=width, seed_resize_from_h=height)
    drawn, inner = by_hand.noise(7), by_hand.noise(7, height // 8, width // 8)
    rows, columns = min(8, height // 8), min(8, width // 8)
    top, left = (8 - rows) // 2, (8 - columns) // 2
    from_top, from_left = (height // 8 - rows) // 2, (width // 8 - columns) // 2
    drawn[..., top : top + rows, left : left + columns] = inner[
        ..., from_top : from_top + rows, from_left : from_left + columns
    ]
    theirs = by_hand.run(model, by_hand.usually_guided(model), drawn)
    same("seed resized", seen.latents[0], theirs)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE", "DPM fast", "LCM", "DDIM"])
def test_a_picture_does_not_depend_on_its_batch(
    bench: Bench, checkpoints: Checkpoints, sampler: str
) -> None:
    """Up to rounding: a batch is computed in another order."""
    _, path = checkpoints["SD 1.x"]
    body: dict[str, Any] = {"sampler_name": sampler, "eta": 0.5 if sampler == "DDIM" else None}
    together = bench.paint(path, batch_size=2, n_iter=2, seed=100, **body)
    assert together.info["all_seeds"] == [100, 101, 102, 103]
    for seed, ours in zip(together.info["all_seeds"], together.pixels, strict=True):
        assert worst(ours, bench.paint(path, seed=seed, **body).pixels[0]) <= 1
    assert worst(together.pixels[0], together.pixels[1]) > 20


def test_several_pictures_to_start_from_are_painted_each_on_its_own(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    _, path = checkpoints["SD 1.x"]
    pictures = [photo(seed=1), photo(seed=2)]
    given = [base64_of(picture) for picture in pictures]
    together = bench.paint(path, task_type="img2img", init_images=given, batch_size=2)
    for number, picture in enumerate(pictures):
        alone = paint_over(bench, path, picture, seed=7 + number)
        assert worst(together.pixels[number], alone.pixels[0]) <= 1


def test_the_noise_of_later_steps_has_a_seed_of_its_own(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    """`eta_noise_seed_delta`: nothing but samplers that add noise notice it."""
    _, path = checkpoints["SD 1.x"]
    for sampler, notices in (("Euler", False), ("Euler a", True)):
        usual = bench.paint(path, sampler_name=sampler)
        settings = {"eta_noise_seed_delta": 31_337}
        shifted = bench.paint(path, sampler_name=sampler, override_settings=settings)
        assert (worst(shifted.pixels[0], usual.pixels[0]) > 0) == notices


# Tiling


def test_the_edges_of_a_tile_meet(
    bench: Bench, checkpoints: Checkpoints, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile has no edges: with its noise moved around, it is the same tile moved around."""
    _, path = checkpoints["SD 1.x"]
    moved = {"shifts": (2, -4), "dims": (2, 3)}  # as far as the UNet's coarsest level can tell
    tile, picture = bench.paint(path, tiling=True), bench.paint(path)
    first = Noise.first
    monkeypatch.setattr(Noise, "first", lambda noise: torch.roll(first(noise), **moved))
    moved_tile, moved_picture = bench.paint(path, tiling=True), bench.paint(path)
    same("tiling", torch.roll(moved_tile.latents[0], (-2, 4), (2, 3)), tile.latents[0])
    rolled = np.roll(moved_tile.pixels[0], (-16, 32), (0, 1))
    assert worst(rolled, tile.pixels[0]) <= 1
    assert worst(np.roll(moved_picture.pixels[0], (-16, 32), (0, 1)), picture.pixels[0]) > 20


def test_tiling_leaves_no_trace(bench: Bench, checkpoints: Checkpoints) -> None:
    _, path = checkpoints["SD 1.x"]
    before = bench.paint(path)
    assert worst(bench.paint(path, tiling=True).pixels[0], before.pixels[0]) > 20
    assert torch.equal(bench.paint(path).latents[0], before.latents[0])


# Beside others


class Noting(Listener):
    """Keeps what jobs came to."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}

    def done(self, job_id: str, result: Result) -> None:
        self.results[job_id] = result

    def unfit(self, job_id: str, reason: str) -> None:
        raise AssertionError(reason)


def test_a_picture_does_not_depend_on_who_else_is_painted(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Jobs that run side by side share batches, each at its own step and with its own texts."""
    _, path = checkpoints["SD 1.x"]
    bodies: dict[str, dict[str, Any]] = {
        "plain": {},
        "longer": {"prompt": "cat " * 80, "steps": 7, "seed": 8},
        "two calls": {"sampler_name": "Heun", "seed": 9, "cfg_scale": 3},
        "noisy": {"sampler_name": "DPM++ SDE Karras", "seed": 10, "batch_size": 2},
        "several": {"prompt": "a cat AND a dog [in:on:0.5] grass", "seed": 11},
    }
    noting = Noting()
    engine = Engine("cpu", tmp_path, noting, EngineOptions(preview_seconds=0))
    for name, body in bodies.items():
        job = bench.job("txt2img", {path: "Stable-diffusion"}, name)
        engine.submit(job, json.dumps({**USUAL, **body}).encode(), files_of(job))
    while not engine.idle:
        engine.advance()
    for name, body in bodies.items():
        alone = bench.paint(path, **body).pixels
        for ours, image in zip(alone, noting.results[name].images, strict=True):
            assert worst(ours, pixels_of(image.data)) <= 1, name
