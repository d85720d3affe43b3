"""Every sampler on the trained demo checkpoint, against its twin in diffusers.

The twin runs its own steps on the same UNet, the same first noise and the same noise on the way. It
is given the levels of k-diffusion, or the training times of the webui, computed here from their
formulas: diffusers' own are for other numbers of steps, and it rounds training times. Samplers
without a twin are tested on data for which the solution is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines.sampling.names import SAMPLERS
from services.inference.worker.pipelines.sampling.noise import Noise
from services.inference.worker.pipelines.sampling.samplers import Options, Run
from services.inference.worker.pipelines.sampling.schedules import NoiseSchedule
from tests.unit.pipelines import by_hand
from tests.unit.pipelines.bench import Bench, base64_of, worst
from tests.unit.pipelines.by_hand import Predict
from tests.unit.pipelines.conftest import Same
from tests.unit.pipelines.test_families import DEMO, load, modules_of
from tests.unit.pipelines.tiny import Tiny

Levels = NDArray[np.float64]
TRAINED = {**by_hand.TRAINED, "prediction_type": "v_prediction"}
BODY: dict[str, Any] = {
    "prompt": "a yellow star on a blue background",
    "negative_prompt": "red",
    "cfg_scale": 4,
    "steps": 10,
}


@pytest.fixture(scope="module")
def demo(bench: Bench) -> Tiny:
    loaded = load(bench, DEMO)
    configs: dict[str, Any] = {"unet": {}, "vae": {}, "text_encoder": {}}
    return Tiny(loaded.family, configs, **modules_of(loaded))


@pytest.fixture(scope="module")
def predict(demo: Tiny) -> Predict:
    texts = (by_hand.encode(demo, BODY[field]) for field in ("prompt", "negative_prompt"))
    return by_hand.guided(demo, *texts, scale=BODY["cfg_scale"])


# Levels


def trained_levels() -> Levels:
    """In single precision, as k-diffusion has them: noise of an SDE is looked up by level."""
    alphas = EulerDiscreteScheduler(**TRAINED).alphas_cumprod
    rising: Levels = ((1 - alphas) / alphas).sqrt().double().numpy()
    return rising


def even_times(count: int) -> Levels:
    """Logarithms of levels are interpolated between training times."""
    rising = trained_levels()
    times = np.linspace(999, 0, count)
    levels: Levels = np.exp(np.interp(times, np.arange(1000), np.log(rising)))
    return levels


def karras(count: int) -> Levels:
    """Karras et al. 2022, equation 5, with rho 7."""
    rising = trained_levels()
    ramp, high, low = np.linspace(0, 1, count), rising[-1] ** (1 / 7), rising[0] ** (1 / 7)
    levels: Levels = (high + ramp * (low - high)) ** 7
    return levels


def exponential(count: int) -> Levels:
    rising = trained_levels()
    levels: Levels = np.exp(np.linspace(np.log(rising[-1]), np.log(rising[0]), count))
    return levels


def even_alphas(steps: int, start: float = 999) -> Levels:
    """Logarithms of alphas are interpolated between training times, and the last is time 0, which
    diffusers puts there itself. As many as the webui has times for so many steps."""
    count = len(stride(steps)) if start == 999 else steps
    alphas = np.log(np.asarray(EulerDiscreteScheduler(**TRAINED).alphas_cumprod, np.float64))
    times = np.linspace(start, 0, count + 1)[:-1]
    levels: Levels = np.sqrt(np.expm1(-np.interp(times, np.arange(1000), alphas)))
    return levels


def stride(steps: int) -> list[int]:
    """Every so manieth training time from 1 on, falling."""
    return [*range(1, 1001, 1000 // steps)][::-1]


def improved(times: list[int]) -> list[int]:
    """PNDM asks twice for the second one."""
    return [times[0], times[1], *times[1:]]


def less_the_last_but_one(spread: Callable[[int], Levels]) -> Callable[[int], Levels]:
    return lambda count: spread(count + 1)[:-1]


# Twins


class Twin(msgspec.Struct, frozen=True):
    """`levels` or training `times`: given to the scheduler. `by_alpha`: how it comes from levels to
    times. `brownian`: the noise of a step is given to it. `within`: see `Same`."""

    scheduler: Any
    options: dict[str, Any] = {}
    levels: Callable[[int], Levels] | None = None
    times: Callable[[int], list[int]] | None = None
    by_alpha: bool = False
    brownian: bool = False
    within: float = 1e-4


class ThirdOrder(DPMSolverMultistepScheduler):  # type: ignore[misc]
    """diffusers 0.42.1 has a wrong sign in the weight of the curvature, for samplers with noise."""

    def multistep_dpm_solver_third_order_update(self, outputs: Any, *rest: Any, **more: Any) -> Any:
        at = self.step_index
        times = -torch.log(self.sigmas[at - 2 : at + 2].double())
        step, last, one_before = times[3] - times[2], times[2] - times[1], times[1] - times[0]
        slope, older = (outputs[-1] - outputs[-2]) / last, (outputs[-2] - outputs[-3]) / one_before
        curve = (slope - older) * step**2 / (last + one_before)
        alpha = 1 / (1 + self.sigmas[at + 1] ** 2) ** 0.5
        result = super().multistep_dpm_solver_third_order_update(outputs, *rest, **more)
        return result + alpha * curve.float()


SDE = {"algorithm_type": "sde-dpmsolver++", "lower_order_final": False}
SDE_HEUN = {**SDE, "solver_type": "heun"}
SDE_3 = {**SDE_HEUN, "solver_order": 3}
PLUS = {"algorithm_type": "dpmsolver++", "lower_order_final": False}
ONE_STRIDE = {"steps_offset": 1, "set_alpha_to_one": False}
QUADRATURE = 1e-3
"""diffusers integrates the polynomials of LMS numerically, to four digits."""

TWINS: dict[str, Twin] = {
    "Euler": Twin(EulerDiscreteScheduler, {}, even_times),
    "Euler a": Twin(EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "Heun": Twin(HeunDiscreteScheduler, {}, even_times),
    "LMS": Twin(LMSDiscreteScheduler, {}, even_times, within=QUADRATURE),
    "LMS Karras": Twin(LMSDiscreteScheduler, {}, karras, within=QUADRATURE),
    "DPM2": Twin(KDPM2DiscreteScheduler, {}, less_the_last_but_one(even_times)),
    "DPM2 Karras": Twin(KDPM2DiscreteScheduler, {}, less_the_last_but_one(karras)),
    "DPM2 a": Twin(KDPM2AncestralDiscreteScheduler, {}, less_the_last_but_one(even_times)),
    "DPM2 a Karras": Twin(KDPM2AncestralDiscreteScheduler, {}, less_the_last_but_one(karras)),
    "DPM++ 2M": Twin(DPMSolverMultistepScheduler, PLUS, even_times),
    "DPM++ 2M Karras": Twin(DPMSolverMultistepScheduler, PLUS, karras),
    "DPM++ SDE": Twin(DPMSolverSDEScheduler, {"noise_sampler_seed": [7]}, even_times),
    "DPM++ SDE Karras": Twin(DPMSolverSDEScheduler, {"noise_sampler_seed": [7]}, karras),
    "DDIM": Twin(
        DDIMScheduler,
        {**ONE_STRIDE, "clip_sample": False},
        times=lambda steps: stride(steps)[:-1],  # the last one is where it ends
    ),
    # PNDM averages what the model says; in its paper, and here, that is noise.
    "PLMS": Twin(
        PNDMScheduler,
        {**ONE_STRIDE, "skip_prk_steps": True, "prediction_type": "epsilon"},
        times=lambda steps: improved(stride(steps)[:-1]),
    ),
    "UniPC": Twin(
        UniPCMultistepScheduler,
        {
            "solver_order": 3,
            "solver_type": "bh1",
            "final_sigmas_type": "sigma_min",
            "prediction_type": "epsilon",
        },
        even_alphas,
        by_alpha=True,
    ),
}
TRAINING_TIMES = ["DDIM", "PLMS", "UniPC"]
for ending, spread in (("", even_times), (" Karras", karras), (" Exponential", exponential)):
    for name, options, levels_of in (
        ("DPM++ 2M SDE", SDE, spread),
        ("DPM++ 2M SDE Heun", SDE_HEUN, spread),
        ("DPM++ 3M SDE", SDE_3, less_the_last_but_one(spread)),
    ):
        # The larger the last steps, the more noise is looked up at levels that differ in a digit.
        TWINS[name + ending] = Twin(ThirdOrder, options, levels_of, brownian=True, within=2e-4)
WITHOUT_TWIN = {"DPM++ 2S a", "DPM++ 2S a Karras", "DPM fast", "DPM adaptive", "Restart"}
BY_HAND = {"LCM"}


def test_every_sampler_is_tested() -> None:
    assert SAMPLERS.keys() == TWINS.keys() | WITHOUT_TWIN | BY_HAND


def scheduler_of(twin: Twin, steps: int) -> Any:
    if twin.levels is None:
        scheduler = twin.scheduler(**{**TRAINED, **twin.options})
        scheduler.set_timesteps(steps)
        if twin.times is not None:
            scheduler.timesteps = torch.tensor(twin.times(steps))
        return scheduler
    scheduler = twin.scheduler(**{**TRAINED, "use_karras_sigmas": True, **twin.options})
    levels = twin.levels(steps)
    scheduler._convert_to_karras = lambda in_sigmas, num_inference_steps=None: levels
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    # Some schedulers round to whole training times; k-diffusion does not.
    exact = np.interp(np.log(levels), np.log(trained_levels()), np.arange(1000))
    if twin.by_alpha:
        alphas = np.log1p(trained_levels() ** 2)  # their negative logarithms
        exact = np.interp(np.log1p(levels**2), alphas, np.arange(1000))
        scheduler.sigmas[-1] = trained_levels()[0]
    times = scheduler.timesteps.double()
    if len(times) == len(levels):
        times = torch.from_numpy(exact)
    elif isinstance(scheduler, KDPM2DiscreteScheduler | KDPM2AncestralDiscreteScheduler):
        times[::2] = torch.from_numpy(exact)  # the others are those of midpoints
    scheduler.timesteps = times
    return scheduler


def by_twin(
    twin: Twin,
    predict: Predict,
    steps: int = 10,
    *,
    picture: Tensor | None = None,
    noised: int | None = None,
    whole: Levels | None = None,
    **more: Any,
) -> Tensor:
    """Its own loop: from noise, or from a picture's latents with noise of the first level, or of
    the training time `noised`. `whole`: the levels of the run whose last steps are taken. Returns
    the last latents."""
    scheduler = scheduler_of(twin, steps)
    generator = torch.Generator().manual_seed(7)
    x: Tensor = torch.randn(1, 4, 8, 8, generator=generator)
    levels: Any = scheduler.sigmas if twin.levels is not None else None
    if noised is not None:
        share = scheduler.alphas_cumprod[noised]
        x = share**0.5 * picture + (1 - share) ** 0.5 * x
    elif picture is not None:
        x = scheduler.add_noise(picture, x, scheduler.timesteps[:1])
    elif isinstance(scheduler, DPMSolverMultistepScheduler):  # x / sqrt(1 + level**2) there
        x = x * levels[0] / (1 + levels[0] ** 2) ** 0.5
    else:
        x = x * scheduler.init_noise_sigma
    takes = twin.scheduler.step.__code__.co_varnames
    if "generator" in takes:
        more["generator"] = generator
    if twin.brownian:
        ends = levels[levels > 0] if whole is None else torch.tensor(whole)
        tree = BrownianTreeNoiseSampler(x, ends.min(), ends.max(), seed=[7])
    for number, time in enumerate(scheduler.timesteps):
        if twin.brownian:
            now, then = levels[number], levels[number + 1]
            more["variance_noise"] = tree(now, then) if then > 0 else torch.zeros_like(x)
        prediction = predict(scheduler.scale_model_input(x, time), time)
        if scheduler.config.prediction_type == "epsilon":  # the model predicts v
            share = scheduler.alphas_cumprod[int(time + 1e-4)]
            prediction = share**0.5 * prediction + (1 - share) ** 0.5 * x
        x = scheduler.step(prediction, time, x, return_dict=False, **more)[0]
    return x


@pytest.mark.parametrize("sampler", TWINS)
def test_a_sampler_does_what_its_twin_does(
    bench: Bench, demo: Tiny, predict: Predict, same: Same, sampler: str
) -> None:
    theirs = by_twin(TWINS[sampler], predict)
    seen = bench.paint(DEMO, sampler_name=sampler, **BODY)
    same(sampler, seen.latents[0], theirs, within=TWINS[sampler].within)
    assert worst(seen.pixels[0], by_hand.decode(demo, theirs)) <= 1


WITHOUT_NOISE = {
    "DPM++ 2M SDE": {**PLUS, "solver_order": 2},
    "DPM++ 2M SDE Heun": {**PLUS, "solver_order": 2, "solver_type": "heun"},
    "DPM++ 3M SDE": {**PLUS, "solver_order": 3, "solver_type": "heun"},
}


@pytest.mark.parametrize("sampler", WITHOUT_NOISE)
def test_without_noise_an_sde_is_a_plain_solver(
    bench: Bench, predict: Predict, same: Same, sampler: str
) -> None:
    twin = Twin(DPMSolverMultistepScheduler, WITHOUT_NOISE[sampler], TWINS[sampler].levels)
    theirs = by_twin(twin, predict)
    seen = bench.paint(DEMO, sampler_name=sampler, eta=0, **BODY)
    same(f"{sampler}, eta 0", seen.latents[0], theirs, within=1e-4)


def test_ddim_adds_as_much_noise_as_it_is_told(bench: Bench, predict: Predict, same: Same) -> None:
    theirs = by_twin(TWINS["DDIM"], predict, eta=0.7)
    seen = bench.paint(DEMO, sampler_name="DDIM", eta=0.7, **BODY)
    same("DDIM, eta 0.7", seen.latents[0], theirs, within=1e-4)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        *((sampler, 7) for sampler in ("Euler", "Heun", "DPM++ 2M", "DPM2")),
        *((sampler, steps) for sampler in TRAINING_TIMES for steps in (7, 12, 15)),
    ],
)
def test_other_numbers_of_steps_have_levels_in_between(
    bench: Bench, predict: Predict, same: Same, sampler: str, steps: int
) -> None:
    """Those that go through training times may make more steps than were asked for."""
    theirs = by_twin(TWINS[sampler], predict, steps)
    seen = bench.paint(DEMO, sampler_name=sampler, **{**BODY, "steps": steps})
    same(f"{sampler}, {steps} steps", seen.latents[0], theirs, within=1e-4)


@pytest.mark.parametrize(
    ("steps", "times", "asked"),
    [
        (4, [999, 672.3333, 345.6667, 19], [999, 679, 339, 19]),
        (3, [999, 509, 19], [999, 499, 19]),
    ],
)
def test_lcm_has_levels_between_the_times_that_its_models_are_asked_at(
    bench: Bench, predict: Predict, same: Same, steps: int, times: list[float], asked: list[int]
) -> None:
    """They know every 20th time, from 19 on, and are asked at the nearest one."""
    known = np.arange(19, 1000, 20)
    levels = np.exp(np.interp(times, known, np.log(trained_levels()[known])))
    theirs = by_hand.lcm(predict, levels.tolist(), asked, "v_prediction")
    seen = bench.paint(DEMO, sampler_name="LCM", **{**BODY, "steps": steps})
    same(f"LCM, {steps} steps", seen.latents[0], theirs, within=1e-4)


@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
def test_churn_adds_noise_between_two_levels(
    bench: Bench, predict: Predict, same: Same, sampler: str
) -> None:
    """From the second step on, but noise is drawn for the first one, too."""
    levels = [*even_times(10).tolist(), 0.0]
    scheduler = scheduler_of(TWINS["Euler"], 10)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator) * levels[0]
    for level, then in pairwise(levels):
        drawn = torch.randn(1, 4, 8, 8, generator=generator)
        higher = level
        if 0.3 <= level <= 10:
            higher = level * (1 + min(3 / 10, 2**0.5 - 1))
            x = x + drawn * 1.01 * (higher**2 - level**2) ** 0.5
        slope = (x - denoised_of(predict, scheduler, x, higher)) / higher
        ahead = x + slope * (then - higher)
        if sampler == "Heun" and then > 0:
            other = (ahead - denoised_of(predict, scheduler, ahead, then)) / then
            ahead = x + (slope + other) / 2 * (then - higher)
        x = ahead
    churn: dict[str, Any] = {"s_churn": 3, "s_tmin": 0.3, "s_tmax": 10, "s_noise": 1.01}
    seen = bench.paint(DEMO, sampler_name=sampler, **BODY, **churn)
    same(f"{sampler}, churn", seen.latents[0], x, within=1e-4)


def denoised_of(predict: Predict, scheduler: Any, x: Tensor, level: float) -> Tensor:
    """For a model that predicts v."""
    time = np.interp(np.log(level), np.log(trained_levels()), np.arange(1000))
    root = math.sqrt(1 + level**2)
    said = predict(x / root, torch.tensor(time))
    return x / root**2 - said * (level / root)


# From a picture


@pytest.mark.parametrize("sampler", ["DDIM", "UniPC", "DPM++ 2M", "DPM++ 2M SDE", "LMS"])
def test_a_sampler_begins_in_the_middle_as_its_twin_does(
    bench: Bench, demo: Tiny, predict: Predict, same: Same, sampler: str
) -> None:
    """img2img: the last 6 of 10 steps. k-diffusion knows nothing of those before, but the webui
    draws the noise of an SDE for the whole run. Those that go through training times begin one
    time below that of the noise, and UniPC makes as many even steps of what is left."""
    picture = Image.new("RGB", (64, 64), (200, 60, 30))
    picture.paste((30, 60, 200), (0, 30, 64, 64))
    latents, twin = by_hand.encode_picture(demo, picture), TWINS[sampler]
    if sampler == "DDIM":
        last = msgspec.structs.replace(twin, times=lambda steps: [401, 301, 201, 101])
        theirs = by_twin(last, predict, picture=latents, noised=501)
    elif sampler == "UniPC":
        last = msgspec.structs.replace(twin, levels=lambda steps: even_alphas(5, 401))
        theirs = by_twin(last, predict, 5, picture=latents, noised=501)
    else:
        last = msgspec.structs.replace(twin, levels=lambda steps: even_times(10)[4:])
        theirs = by_twin(last, predict, 6, picture=latents, whole=even_times(10))
    seen = bench.paint(
        DEMO,
        task_type="img2img",
        sampler_name=sampler,
        init_images=[base64_of(picture)],
        denoising_strength=0.5,
        **BODY,
    )
    same(f"{sampler}, img2img", seen.latents[0], theirs, within=1e-4)


# Without a twin: data that are a Gaussian cloud, for which what is best to predict is known, and so
# is where every point of the noise ends if nothing is added on the way.

MEAN, WIDTH = 0.5, 0.8
Calls = list[float]


def cloud_denoised(x: Tensor, level: float) -> Tensor:
    return (WIDTH**2 * x + level**2 * MEAN) / (WIDTH**2 + level**2)


def cloud_at(x: Tensor, level: float, end: float) -> Tensor:
    """Where the flow takes a point from one level to another."""
    return MEAN + (x - MEAN) * math.sqrt((WIDTH**2 + end**2) / (WIDTH**2 + level**2))


def sample_cloud(name: str, steps: int, *, eta: float | None, side: int = 8) -> Any:
    """(noise, result, levels that the sampler asked about). In full precision."""
    schedule = NoiseSchedule(beta_start=0.00085, beta_end=0.012)
    sampler = SAMPLERS[name]
    noise = Noise((4, side, side), [7], torch.device("cpu"))
    levels = sampler.sigmas(schedule, steps)
    x = (noise.first() * levels[0]).double()
    sampling = sampler.function(Run(x, levels, levels, noise, schedule, Options(eta=eta)))
    asked: Calls = []
    query = next(sampling)
    while True:
        asked.append(query[1])
        try:
            query = sampling.send(cloud_denoised(*query))
        except StopIteration as end:
            return x, end.value, asked


def error_of(name: str, steps: int) -> float:
    """Without noise on the way. Samplers end at level 0 with an Euler step, or above it."""
    x, result, _ = sample_cloud(name, steps, eta=0)
    high, low = trained_levels()[[-1, 0]].tolist()
    exact = cloud_at(x, high, low)
    if name.startswith("DPM++ 2S a"):
        exact = cloud_denoised(exact, low)
    return worst(result, exact)


@pytest.mark.parametrize(
    ("name", "gain"), [("DPM++ 2S a", 3), ("DPM++ 2S a Karras", 3.5), ("DPM fast", 6)]
)
def test_more_steps_come_nearer_to_the_solution(name: str, gain: float) -> None:
    """Twice as many are nearly 4 times as near with a method of order 2, 8 times with order 3."""
    coarse, fine = error_of(name, 62), error_of(name, 125)
    assert coarse < 0.01
    assert coarse / fine > gain


def test_dpm_adaptive_keeps_to_its_tolerance() -> None:
    """A twentieth of the latents at each step, however many steps are asked for."""
    assert error_of("DPM adaptive", 5) < 0.15
    assert error_of("DPM adaptive", 5) == error_of("DPM adaptive", 50)


@pytest.mark.parametrize("name", sorted(WITHOUT_TWIN))
def test_noise_on_the_way_leaves_the_cloud_as_it_is(name: str) -> None:
    _, result, _ = sample_cloud(name, 60, eta=None, side=64)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(result.std()) == pytest.approx(WIDTH, rel=0.03)


@pytest.mark.parametrize("steps", [4, 7, 8, 9, 20])
def test_dpm_fast_asks_as_often_as_there_are_steps(steps: int) -> None:
    assert len(sample_cloud("DPM fast", steps, eta=0)[2]) == steps


@pytest.mark.parametrize(("steps", "again", "times"), [(20, 9, 1), (35, 9, 1), (40, 10, 2)])
def test_restart_goes_back_up(steps: int, again: int, times: int) -> None:
    """From the level nearest to 0.1 to that nearest to 2, and down again in so many steps."""
    levels = [*karras(steps - again * times).tolist(), 0.0]
    low, high = (min(levels, key=lambda level: abs(level - wanted)) for wanted in (0.1, 2.0))
    down = [*pairwise(levels)]
    ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), again + 1) ** 7
    loop = [*pairwise(ramp.tolist())]
    place = levels.index(low)
    pairs = [*down[:place], *loop * times, *down[place:]]
    expected = [level for pair in pairs for level in pair if level > 0]  # Heun asks at both
    assert sample_cloud("Restart", steps, eta=None)[2] == pytest.approx(expected, rel=1e-5)


def test_restart_with_few_steps_is_heun(bench: Bench, predict: Predict, same: Same) -> None:
    theirs = by_twin(Twin(HeunDiscreteScheduler, {}, karras), predict)
    seen = bench.paint(DEMO, sampler_name="Restart", **BODY)
    same("Restart, 10 steps", seen.latents[0], theirs, within=1e-4)


@pytest.fixture(scope="module")
def solution(predict: Predict) -> Tensor:
    """Where the demo's own flow ends: Heun in very many steps."""
    return by_twin(TWINS["Heun"], predict, 60)


@pytest.mark.parametrize(
    ("sampler", "steps", "within"),
    [
        ("DPM++ 2S a", 28, 0.05),
        ("DPM++ 2S a Karras", 28, 0.05),
        ("DPM fast", 60, 0.05),
        ("DPM adaptive", 10, 0.1),
    ],
)
def test_a_sampler_without_a_twin_ends_where_the_flow_does(
    bench: Bench, same: Same, solution: Tensor, sampler: str, steps: int, within: float
) -> None:
    seen = bench.paint(DEMO, sampler_name=sampler, eta=0, **{**BODY, "steps": steps})
    same(f"{sampler}, fine solution", seen.latents[0], solution, within=within)


def test_dpm_adaptive_paints_the_same_in_any_batch(bench: Bench) -> None:
    """Its step sizes follow its errors, rounding included."""
    body: dict[str, Any] = {**BODY, "sampler_name": "DPM adaptive", "eta": 0}
    together = bench.paint(DEMO, batch_size=2, **body)
    for number, ours in enumerate(together.pixels):
        alone = bench.paint(DEMO, **body, seed=7 + number)
        assert worst(ours, alone.pixels[0]) <= 2
