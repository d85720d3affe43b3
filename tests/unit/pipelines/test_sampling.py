"""Samplers where the right answer is known: pictures are numbers drawn from a normal distribution.

For pictures of variance s² the best guess at level sigma is `x * s² / (s² + sigma²)`, and the exact
solution that starts at x is `x * sqrt(s² + next²) / sqrt(s² + sigma²)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Generator, Tensor
from torchsde._brownian import brownian_interval

from services.inference.worker.pipelines.painting import MOST_STEPS, all_seeds, img2img_steps
from services.inference.worker.pipelines.params.painting import PaintingParams
from services.inference.worker.pipelines.sampling.names import SAMPLERS, Sampler
from services.inference.worker.pipelines.sampling.noise import Noise, slerp
from services.inference.worker.pipelines.sampling.philox import PhiloxGenerator
from services.inference.worker.pipelines.sampling.samplers import (
    Options,
    Run,
    SamplerFunction,
    split_ancestral,
)
from services.inference.worker.pipelines.sampling.schedules import (
    KINDS,
    NoiseSchedule,
    Sigmas,
    Spread,
    karras,
)

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012)
CPU = torch.device("cpu")
PLAIN = {name: sampler for name, sampler in SAMPLERS.items() if not name.endswith(("as", "ial"))}
"""Without the variants that only spread their levels differently."""
K_SAMPLERS = [name for name, sampler in PLAIN.items() if not sampler.levels]
RANDOM = [
    "Euler a",
    "DPM2 a",
    "DPM++ 2S a",
    "DPM++ SDE",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Heun",
    "DPM++ 3M SDE",
    "DPM fast",
    "DPM adaptive",
    "Restart",
]
"""Those that add noise on the way, unless told otherwise."""
BROWNIAN = ["DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"]


def best_guess(x: Tensor, sigma: float, spread: float = 1.0) -> Tensor:
    return x * (spread**2 / (spread**2 + sigma**2))


def exact(x: Tensor, sigma: float, next_sigma: float, spread: float = 1.0) -> Tensor:
    return x * math.sqrt((spread**2 + next_sigma**2) / (spread**2 + sigma**2))


Denoiser = Callable[[Tensor, float], Tensor]


def drive(
    sampler: SamplerFunction,
    x: Tensor,
    sigmas: Sigmas,
    *,
    seeds: Sequence[int] = (),
    denoise: Denoiser = best_guess,
    schedule: NoiseSchedule = SCHEDULE,
    whole: Sigmas | None = None,
    **options: Any,
) -> tuple[Tensor, list[float]]:
    """The last latents, and the levels that the model was asked at. `whole`: of a run that begins
    higher, unless it is said."""
    _, *shape = x.shape
    noise = Noise((shape[0], shape[1], shape[2]), seeds or range(len(x)), CPU)
    known = PLAIN["LCM"].schedule(schedule) if sampler is PLAIN["LCM"].function else schedule
    whole = whole or [sigmas[0] + 1, *sigmas]
    run = Run(x, sigmas, whole, noise, known, Options(**options))
    sampling, asked = sampler(run), list[float]()
    query = next(sampling)
    while True:
        asked.append(query[1])
        try:
            query = sampling.send(denoise(*query[:2]))
        except StopIteration as end:
            result: Tensor = end.value
            return result, asked


def noisy(
    sigma: float, size: int = 8, seed: int = 0, spread: float = 1.0, count: int = 1
) -> Tensor:
    """Pictures of the known distribution with noise of the level on them."""
    drawn = torch.randn(count, 4, size, size, generator=Generator().manual_seed(seed))
    return drawn.double() * math.sqrt(spread**2 + sigma**2)


# Levels


def test_a_schedule_has_the_levels_that_models_were_trained_with() -> None:
    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    ours = torch.tensor(SCHEDULE.sigmas)
    assert torch.allclose(ours, ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt())
    assert SCHEDULE.lowest == pytest.approx(0.0292, abs=1e-4)
    assert SCHEDULE.highest == pytest.approx(14.6146, abs=1e-3)
    linear = NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    assert linear.highest == pytest.approx(157.4, abs=0.1)


def test_times_and_levels_are_each_others_inverse() -> None:
    for time in (0, 1, 1.5, 500, 998.25, 999):
        assert SCHEDULE.time_of(SCHEDULE.sigma_at(time)) == pytest.approx(time, abs=1e-3)
    assert SCHEDULE.time_of(1000.0) == 999
    assert SCHEDULE.time_of(1e-6) == 0
    for time in (0, 77, 999):
        assert SCHEDULE.sigma_at(time) == pytest.approx(SCHEDULE.sigmas[time], rel=1e-6)


def test_a_schedule_without_signal_at_its_end_still_has_numbers() -> None:
    zero = NoiseSchedule(beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    assert zero.lowest == pytest.approx(SCHEDULE.lowest, rel=1e-4)
    assert zero.highest == pytest.approx(4518.8, rel=1e-3)
    assert all(math.isfinite(sigma) for sigma in zero.sigmas)
    assert all(low < high for low, high in pairwise(zero.sigmas))


@pytest.mark.parametrize("wrong", [{"prediction_type": "sample"}, {"beta_schedule": "cosine"}])
def test_a_schedule_that_is_not_known_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseSchedule(beta_start=0.00085, beta_end=0.012, **wrong)


def test_levels_are_spread_evenly_in_time() -> None:
    for kind in ("automatic", "uniform"):
        sigmas = Spread(kind).sigmas(SCHEDULE, 10)
        assert sigmas == [SCHEDULE.sigma_at(111 * n) for n in range(9, -1, -1)] + [0]
    sgm = Spread("sgm_uniform").sigmas(SCHEDULE, 9)
    assert sgm == [SCHEDULE.sigma_at(111 * n) for n in range(9, 0, -1)] + [0]


def test_levels_are_spread_as_karras_and_others_say() -> None:
    low, high = SCHEDULE.lowest, SCHEDULE.highest
    *sigmas, last = Spread("karras").sigmas(SCHEDULE, 11)
    assert last == 0
    roots = [sigma ** (1 / 7) for sigma in sigmas]
    even = [high ** (1 / 7) + n / 10 * (low ** (1 / 7) - high ** (1 / 7)) for n in range(11)]
    assert roots == pytest.approx(even)
    *sigmas, last = Spread("exponential").sigmas(SCHEDULE, 11)
    ratios = [b / a for a, b in pairwise(sigmas)]
    assert ratios == pytest.approx([(low / high) ** 0.1] * 10)
    *sigmas, last = Spread("polyexponential", rho=2).sigmas(SCHEDULE, 11)
    shares = [math.log(sigma / low) / math.log(high / low) for sigma in sigmas]
    assert shares == pytest.approx([(1 - n / 10) ** 2 for n in range(11)])
    usual = Spread("polyexponential").sigmas(SCHEDULE, 11)
    assert usual == pytest.approx(Spread("exponential").sigmas(SCHEDULE, 11))


@pytest.mark.parametrize("kind", ["karras", "exponential", "polyexponential"])
def test_levels_go_from_and_to_where_they_are_told(kind: str) -> None:
    sigmas = Spread(kind, sigma_min=0.1, sigma_max=10).sigmas(SCHEDULE, 6)
    assert (sigmas[0], sigmas[-2]) == pytest.approx((10, 0.1))
    assert sigmas[-1] == 0
    assert len(Spread(kind).sigmas(SCHEDULE, 1)) == 2
    assert Spread(kind).sigmas(SCHEDULE, 1)[0] == pytest.approx(SCHEDULE.highest)


def test_the_last_level_but_one_may_be_left_out() -> None:
    whole = Spread("karras").sigmas(SCHEDULE, 6)
    assert Spread("karras", drop_last_but_one=True).sigmas(SCHEDULE, 5) == [*whole[:5], 0]
    assert SAMPLERS["DPM2 a Karras"].sigmas(SCHEDULE, 5) == [*whole[:5], 0]


TIMES = {
    10: [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
    12: [997, 914, 831, 748, 665, 582, 499, 416, 333, 250, 167, 84, 1],
    15: [991, 925, 859, 793, 727, 661, 595, 529, 463, 397, 331, 265, 199, 133, 67, 1],
    30: [*range(991, 0, -33)],
    150: [*range(997, 0, -6)],
    300: [999, *range(997, 0, -3)],
}
"""What the webui goes through: every (1000 // steps)th time from 1 on, none above 999."""


@pytest.mark.parametrize("steps", TIMES)
def test_ddim_and_plms_run_through_the_times_of_the_webui(steps: int) -> None:
    for name in ("DDIM", "PLMS"):
        sampler = SAMPLERS[name]
        assert sampler.sigmas(SCHEDULE, steps) == [SCHEDULE.sigmas[time] for time in TIMES[steps]]
        assert sampler.sigmas(SCHEDULE, 1) == [SCHEDULE.highest, SCHEDULE.sigmas[1]]
        assert sampler.sigmas(SCHEDULE, 5, Spread("karras")) == sampler.sigmas(SCHEDULE, 5)
        less = Spread(drop_last_but_one=True)
        assert sampler.sigmas(SCHEDULE, 29, less) == sampler.sigmas(SCHEDULE, 30)


def test_unipc_makes_even_steps_in_time() -> None:
    """As many as the webui has times: 16 for 15."""
    for steps, count in ((10, 10), (15, 16), (30, 31)):
        sigmas = SAMPLERS["UniPC"].sigmas(SCHEDULE, steps)
        times = [SCHEDULE.time_by_alpha(sigma) for sigma in sigmas]
        assert times == pytest.approx([999 - 999 * n / count for n in range(count + 1)], abs=1e-6)
    # Between two training times it is the logarithm of alpha that is interpolated.
    zero, one = (1 + SCHEDULE.sigmas[time] ** 2 for time in (0, 1))
    between = math.sqrt(math.exp((math.log(zero) + math.log(one)) / 2) - 1)
    assert SCHEDULE.sigma_by_alpha(0.5) == pytest.approx(between)
    assert SCHEDULE.time_by_alpha(between) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "steps", "taken", "noised", "times"),
    [
        ("DDIM", 20, 16, 751, [*range(701, 0, -50)]),
        ("DDIM", 15, 8, 463, [397, 331, 265, 199, 133, 67, 1]),
        ("PLMS", 20, 3, 101, [51, 1]),
        ("DDIM", 20, 2, 51, [51, 1]),
        ("DDIM", 20, 1, 51, [51, 1]),
        ("DDIM", 1, 1, 999, [999, 1]),
        ("UniPC", 20, 16, 751, [701 - 701 * n / 15 for n in range(16)]),
    ],
)
def test_img2img_begins_one_time_below_its_noise(
    name: str, steps: int, taken: int, noised: int, times: list[float]
) -> None:
    """With samplers that go through training times, as in the webui; but at least one step."""
    level, sigmas = SAMPLERS[name].img2img_sigmas(SCHEDULE, steps, taken)
    assert level == SCHEDULE.sigmas[noised]
    assert [SCHEDULE.time_by_alpha(sigma) for sigma in sigmas] == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize(
    ("steps", "times"),
    [(4, [999, 672.33333, 345.66667, 19]), (3, [999, 509, 19]), (1, [999]), (2, [999, 19])],
)
def test_lcm_has_levels_between_every_20th_time(steps: int, times: list[float]) -> None:
    known = [SCHEDULE.sigmas[time] for time in range(19, 1000, 20)]
    wanted = []
    for time in times:
        place, part = divmod((time - 19) / 20, 1)
        two = known[int(place)], known[min(int(place) + 1, 49)]
        wanted.append(two[0] ** (1 - part) * two[1] ** part)
    assert SAMPLERS["LCM"].sigmas(SCHEDULE, steps) == pytest.approx([*wanted, 0], rel=1e-5)


def at_times(*times: int) -> list[float]:
    return [SCHEDULE.sigmas[time] for time in times] + [0]


@pytest.mark.parametrize(
    ("kind", "steps", "sigmas"),
    [
        ("normal", 10, at_times(*range(999, -1, -111))),
        ("simple", 8, at_times(999, 874, 749, 624, 499, 374, 249, 124)),
        ("simple", 3, at_times(999, 666, 333)),
        ("simple", 7, at_times(999, 857, 714, 571, 428, 285, 142)),
        ("ddim", 10, at_times(*range(901, 0, -100))),
        ("ddim", 12, at_times(*TIMES[12])),
        ("ddim", 30, at_times(*TIMES[30])),
        ("turbo", 4, at_times(999, 749, 499, 249)),
        ("turbo", 3, at_times(999, 666, 332)),
        (
            "align_your_steps",
            11,
            [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029, 0],
        ),
        ("align_your_steps", 6, [14.615, 3.861, 1.886, 0.963, 0.399, 0.029, 0]),
        ("align_your_steps", 3, [14.615, 1.396, 0.029, 0]),
        (
            "align_your_steps",
            4,
            [
                14.615,
                2.697 ** (2 / 3) * 1.886 ** (1 / 3),
                0.963 ** (1 / 3) * 0.652 ** (2 / 3),
                0.029,
                0,
            ],
        ),
    ],
)
def test_levels_are_those_of_the_table(kind: str, steps: int, sigmas: list[float]) -> None:
    assert Spread(kind).sigmas(SCHEDULE, steps) == pytest.approx(sigmas, rel=2e-3)


def test_other_levels_are_best_for_sdxl() -> None:
    sdxl = Spread("align_your_steps", sdxl=True).sigmas(SCHEDULE, 6)
    assert sdxl == pytest.approx([14.615, 3.771, 1.342, 0.555, 0.234, 0.029, 0])


def test_kl_optimal_levels_end_at_the_lowest_and_not_at_0() -> None:
    """Even steps of the angle whose tangent the level is."""
    sigmas = Spread("kl_optimal").sigmas(SCHEDULE, 15)
    angles = [math.degrees(math.atan(sigma)) for sigma in sigmas]
    first, last = (math.degrees(math.atan(x)) for x in (SCHEDULE.highest, SCHEDULE.lowest))
    assert (first, last) == pytest.approx((86.0857, 1.6705), abs=1e-3)
    assert angles == pytest.approx([first + (last - first) * n / 15 for n in range(16)], abs=1e-9)
    less = Spread("kl_optimal", drop_last_but_one=True).sigmas(SCHEDULE, 14)
    assert less == [*sigmas[:14], sigmas[15]]


def test_beta_levels_are_quantiles_of_the_distribution() -> None:
    """Of that of 0.5 and 0.5 they are known: squares of sines."""
    sigmas = Spread("beta", alpha=0.5, beta=0.5).sigmas(SCHEDULE, 9)
    low, high = SCHEDULE.lowest, SCHEDULE.highest
    shares = [(sigma - low) / (high - low) for sigma in sigmas[:-1]]
    assert shares == pytest.approx([math.sin(math.pi * n / 16) ** 2 for n in range(8, -1, -1)])
    even = Spread("beta", alpha=1, beta=1).sigmas(SCHEDULE, 3)
    assert even == pytest.approx([high, (low + high) / 2, low, 0])
    usual = Spread("beta").sigmas(SCHEDULE, 3)
    assert usual == Spread("beta", alpha=0.6, beta=0.6).sigmas(SCHEDULE, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_levels_depends_on_what_it_says(kind: str) -> None:
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "rho": 3.0, "alpha": 0.9, "beta": 0.3}
    usual = Spread(kind).sigmas(SCHEDULE, 7)
    for option, value in options.items():
        spread = Spread(kind, **{option: value})  # type: ignore[arg-type]
        assert (spread.sigmas(SCHEDULE, 7) != usual) is spread.follows(option)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50, 150])
def test_levels_of_every_kind_fall(kind: str, steps: int) -> None:
    for drops in (False, True):
        sigmas = Spread(kind, drop_last_but_one=drops).sigmas(SCHEDULE, steps)
        assert len(sigmas) >= steps + 1
        assert all(high > low >= 0 for high, low in pairwise(sigmas))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50, 150, 1000])
def test_levels_fall(name: str, steps: int) -> None:
    sampler = SAMPLERS[name]
    sigmas = sampler.sigmas(SCHEDULE, steps)
    if sampler.levels is None:
        assert len(sigmas) == steps + 1
    if steps == 1000 and name in ("DDIM", "PLMS"):
        del sigmas[0]  # 999 is there twice, in place of 1000
    assert all(high > low >= 0 for high, low in pairwise(sigmas))
    if steps >= 10:
        assert sigmas[0] > 4  # hardly anything of a picture is to be seen there


# Noise


def noise(*seeds: int, shape: tuple[int, int, int] = (4, 8, 8), **more: Any) -> Noise:
    return Noise(shape, seeds, CPU, **more)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_a_picture_s_noise_depends_on_its_seed_alone() -> None:
    both = noise(7, 8)
    first, then = both.first(), both.next()
    for number, seed in enumerate((7, 8)):
        alone = drawn(seed, (4, 8, 8), (4, 8, 8))
        assert torch.equal(first[number], alone[0])
        assert torch.equal(then[number], alone[1])


TORCH_CUDA = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]
"""`torch.randn(3, 4, device="cuda")` with the seed 0."""


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10, one number after the other."""
    for _ in range(10):
        one, two = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            two >> 32 ^ counter[1] ^ key[0],
            two % 2**32,
            one >> 32 ^ counter[3] ^ key[1],
            one % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_noise_of_a_gpu_is_that_of_its_generator() -> None:
    assert philox([0, 0, 0, 0], [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    drawn = PhiloxGenerator(0).randn((3, 4))
    assert drawn.dtype == torch.float32
    assert torch.allclose(drawn, torch.tensor(TORCH_CUDA), rtol=0, atol=3e-7)
    unit, turn = (float(np.float32(x)) for x in (2.3283064e-10, 2.3283064e-10 * 6.2831855))
    for seed in (7, 2**32 + 5, 2**64 - 1):
        generator = PhiloxGenerator(seed)
        for offset in (0, 1):
            wanted = []
            for number in range(20):
                first, second, *_ = philox([offset, 0, number, 0], [seed % 2**32, seed >> 32])
                radius = math.sqrt(-2 * math.log(first * unit + unit / 2))
                wanted.append(radius * math.sin(second * turn + turn / 2))
            assert generator.randn((20,)).tolist() == np.array(wanted, np.float32).tolist()


def test_all_noise_is_of_one_source() -> None:
    """Variations, other sizes, later noise and that of an SDE."""

    def gpu(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        generator = PhiloxGenerator(seed)
        return [generator.randn(shape) for shape in shapes]

    shape, small = (4, 8, 8), (4, 4, 4)
    plain = noise(7, source="NV")
    first, later = gpu(7, shape, shape)
    assert torch.equal(plain.first()[0], first)
    assert torch.equal(plain.next()[0], later)
    varied = noise(7, subseeds=[8], subseed_strength=0.3, source="NV").first()[0]
    assert torch.equal(varied, slerp(0.3, first, gpu(8, shape)[0]))
    resized = noise(7, resize_from=(4, 4), source="NV").first()[0]
    assert torch.equal(resized[:, 2:6, 2:6], gpu(7, small)[0])
    assert torch.equal(resized[:, :2], first[:, :2])
    delayed = noise(7, later_seed_delta=100, source="NV")
    assert torch.equal(delayed.first()[0], first)
    assert torch.equal(delayed.next()[0], gpu(107, shape)[0])


def test_the_path_of_an_sde_is_drawn_from_the_source_of_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the webui makes torchsde draw; and two paths may be asked in turn."""
    levels = [10.0, 4.0, 1.0, 0.0]
    cpu, gpu = noise(7).brownian(levels), noise(7, source="NV").brownian(levels)
    mixed = [path(high, low) for high, low in ((10, 4), (4, 1)) for path in (cpu, gpu)]

    def as_the_webui(size: Any, dtype: torch.dtype, device: Any, seed: int) -> Tensor:
        return PhiloxGenerator(int(seed)).randn(tuple(size)).to(dtype)

    def as_torchsde(size: Any, dtype: torch.dtype, device: Any, seed: int) -> Tensor:
        generator = Generator(device).manual_seed(int(seed))
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    for number, drawing in enumerate((as_torchsde, as_the_webui)):
        monkeypatch.setattr(brownian_interval, "_randn", drawing)
        tree = BrownianTreeNoiseSampler(torch.zeros(1, 4, 8, 8), 1.0, 10.0, seed=[7])
        for step, (high, low) in enumerate(((10.0, 4.0), (4.0, 1.0))):
            wanted = tree(torch.tensor(high), torch.tensor(low))
            assert torch.allclose(mixed[2 * step + number], wanted, atol=1e-6)


def test_variations_lie_between_two_seeds() -> None:
    def varied(strength: float) -> Tensor:
        return noise(7, subseeds=[8], subseed_strength=strength).first()[0]

    (one,), (other,) = drawn(7, (4, 8, 8)), drawn(8, (4, 8, 8))
    assert torch.equal(varied(0), one)
    assert torch.allclose(varied(1), other, atol=1e-5)
    nearness = [float((varied(n / 4) * other).sum()) for n in range(5)]
    assert nearness == sorted(nearness)
    large = noise(7, shape=(4, 64, 64), subseeds=[8], subseed_strength=0.5).first()
    assert float(large.std()) == pytest.approx(1, abs=0.02)  # a mean would have 0.71


def test_slerp_of_two_that_are_alike_is_a_mean() -> None:
    one = torch.randn(4, 8, 8, generator=Generator().manual_seed(0))
    assert torch.allclose(slerp(0.3, one, one), one)
    assert torch.isfinite(slerp(0.5, one, one * 1.0001)).all()


def test_variations_are_drawn_before_anything_else() -> None:
    """The noise of later steps is that of the seed, with and without a variation."""
    plain, varied = noise(7), noise(7, subseeds=[8], subseed_strength=0.5)
    plain.first(), varied.first()
    assert torch.equal(plain.next(), varied.next())


@pytest.mark.parametrize(
    ("resize_from", "place", "part"),
    [
        ((4, 6), (slice(2, 6), slice(1, 7)), (slice(0, 4), slice(0, 6))),
        ((12, 10), (slice(0, 8), slice(0, 8)), (slice(2, 10), slice(1, 9))),
        ((4, 12), (slice(2, 6), slice(0, 8)), (slice(0, 4), slice(2, 10))),
        ((5, 5), (slice(1, 6), slice(1, 6)), (slice(0, 5), slice(0, 5))),
    ],
)
def test_a_seed_of_another_size_keeps_its_middle(
    resize_from: tuple[int, int], place: tuple[slice, slice], part: tuple[slice, slice]
) -> None:
    resized = noise(7, resize_from=resize_from).first()[0]
    (original,) = drawn(7, (4, *resize_from))
    assert torch.equal(resized[:, *place], original[:, *part])
    (ground,) = drawn(7, (4, 8, 8))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[place] = False
    assert torch.equal(resized[:, outside], ground[:, outside])


def test_a_seed_of_the_same_size_or_of_none_is_as_it_was() -> None:
    (plain,) = drawn(7, (4, 8, 8))
    for resize_from in ((8, 8), (0, 0), (0, 4)):
        assert torch.equal(noise(7, resize_from=resize_from).first()[0], plain)


def test_later_noise_may_have_another_seed() -> None:
    """The webui's "eta noise seed delta"."""
    later = noise(7, 8, later_seed_delta=100)
    first, then = later.first(), later.next()
    assert torch.equal(first, noise(7, 8).first())
    assert torch.equal(then[0], drawn(107, (4, 8, 8))[0])
    assert torch.equal(then[1], drawn(108, (4, 8, 8))[0])


def test_noises_of_an_sde_belong_together() -> None:
    """From 10 to 4 and from 4 to 1 is from 10 to 1, in any order of asking."""
    path = noise(7, 8).brownian([10.0, 4.0, 1.0, 0.0])
    whole = path(10, 1) * math.sqrt(9)
    parts = path(10, 4) * math.sqrt(6) + path(4, 1) * math.sqrt(3)
    assert torch.allclose(whole, parts, atol=1e-4)
    again = noise(7, 8).brownian([10.0, 1.0])
    assert torch.allclose(again(4, 1), path(4, 1), atol=1e-4)
    alone = noise(8).brownian([10.0, 1.0])
    assert torch.allclose(alone(10, 4)[0], path(10, 4)[1], atol=1e-4)


def test_noise_of_an_sde_has_the_variance_of_noise() -> None:
    path = noise(7, shape=(4, 64, 64)).brownian([10.0, 1.0])
    for sigma, next_sigma in ((10, 1), (3, 2.9), (10, 9.999)):
        step = path(sigma, next_sigma)
        assert float(step.std()) == pytest.approx(1, abs=0.03)
        assert float(step.mean()) == pytest.approx(0, abs=0.03)
    assert abs(float((path(10, 5) * path(5, 1)).mean())) < 0.03  # steps know nothing of each other


def test_a_run_of_one_level_has_no_path() -> None:
    assert noise(7).brownian([1.0, 0.0])._trees == []


# Samplers

ORDERS = {
    "Euler a": 1,
    "Euler": 1,
    "LMS": 3,
    "Heun": 2,
    "DPM2": 2,
    "DPM2 a": 2,
    "DPM++ 2S a": 2,
    "DPM++ 2M": 2,
    "DPM++ SDE": 2,
    "DPM++ 2M SDE": 2,
    "DPM++ 2M SDE Heun": 2,
    "DPM++ 3M SDE": 2,  # its first two steps have less to look back at
    "DPM fast": 3,
    "Restart": 2,
    "DDIM": 1,
    "PLMS": 2,
    "UniPC": 2,  # of order 3, but in its first steps and in the last one
}
"""By which power of their length steps are wrong, for all but the ones that choose their steps."""


def test_orders_are_told_of_every_sampler() -> None:
    assert ORDERS.keys() == PLAIN.keys() - {"DPM adaptive", "LCM"}


@pytest.mark.parametrize("name", ORDERS)
def test_a_sampler_comes_nearer_with_more_steps_as_its_order_says(name: str) -> None:
    sampler, order = PLAIN[name], ORDERS[name]
    high, low = 10.0, 0.3
    x = noisy(high)
    wanted = exact(x, high, low)
    if sampler.levels:  # what ends at a level above 0 is scaled to it
        wanted = wanted / math.sqrt(1 + low**2)
    # DPM fast: in threes and a rest of two. Restart goes back up from 20 steps on.
    few, many = {"DPM fast": (23, 47), "Restart": (9, 18)}.get(name, (32, 64))
    errors = []
    for steps in (few, many):
        result, _ = drive(sampler.function, x, karras(steps + 1, low, high, 3.0), eta=0.0)
        errors.append(float((result - wanted).abs().max()))
    measured = math.log(errors[0] / errors[1]) / math.log(many / few)
    assert measured > order - 0.25
    assert errors[1] < {1: 0.2, 2: 0.05, 3: 0.01}[order]


@pytest.mark.parametrize("name", PLAIN)
def test_a_whole_run_ends_at_the_picture(name: str) -> None:
    """On its own levels, and without noise on the way."""
    if name in ("LCM", "Restart"):
        return  # never without noise; see below
    sampler = PLAIN[name]
    sigmas = sampler.sigmas(SCHEDULE, 60)
    x = noisy(sigmas[0])
    result, _ = drive(sampler.function, x, sigmas, eta=0.0)
    wanted = exact(x, sigmas[0], 0)
    bound = 0.12 if ORDERS.get(name) == 1 else 0.05
    assert float((result - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("name", RANDOM)
def test_pictures_vary_as_much_as_they_should_with_noise_on_the_way(
    name: str, spread: float
) -> None:
    sampler = PLAIN[name]
    kind = Spread("karras", drop_last_but_one=sampler.spread.drop_last_but_one)
    sigmas = sampler.sigmas(SCHEDULE, 150 if ORDERS.get(name) == 1 else 60, kind)
    x = noisy(sigmas[0], size=64, spread=spread).float()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return best_guess(x, sigma, spread)

    result, _ = drive(sampler.function, x, sigmas, seeds=[1], denoise=denoise)
    assert float(result.std()) == pytest.approx(spread, rel=0.04)
    assert float(result.mean()) == pytest.approx(0, abs=0.05 * spread)
    other, _ = drive(sampler.function, x, sigmas, seeds=[2], denoise=denoise)
    assert float((result - other).std()) > 0.1 * spread  # the noise really has its part


@pytest.mark.parametrize("name", RANDOM)
def test_the_noise_of_a_level_is_left_where_a_run_ends_there(name: str) -> None:
    if name == "Restart":
        return  # runs of the webui end at 0, and so it takes them
    sigmas = karras(150 if ORDERS.get(name) == 1 else 50, 1.0, 14.0)
    x = noisy(sigmas[0], size=64).float()
    result, _ = drive(PLAIN[name].function, x, sigmas, seeds=[1])
    assert float(result.std()) == pytest.approx(math.sqrt(2), rel=0.04)


@pytest.mark.parametrize("name", [name for name in RANDOM if name != "Restart"])
def test_without_eta_nothing_is_left_to_chance(name: str) -> None:
    assert PLAIN[name].uses_eta
    sigmas = karras(12, 0.3, 14.0)
    x = noisy(sigmas[0])
    results = [drive(PLAIN[name].function, x, sigmas, seeds=[s], eta=0.0)[0] for s in (1, 2)]
    assert torch.equal(*results)
    half, whole, usual = (
        drive(PLAIN[name].function, x, sigmas, seeds=[1], eta=eta)[0] for eta in (0.5, 1, None)
    )
    assert torch.equal(whole, usual)
    assert not torch.allclose(half, whole)


def test_ddim_leaves_nothing_to_chance_unless_it_is_told_to() -> None:
    ddim, sigmas = PLAIN["DDIM"], PLAIN["DDIM"].sigmas(SCHEDULE, 150)
    x = noisy(sigmas[0], size=64).float()
    one, two = (drive(ddim.function, x, sigmas, seeds=[seed])[0] for seed in (1, 2))
    assert torch.equal(one, two)
    noised, _ = drive(ddim.function, x, sigmas, seeds=[1], eta=1.0)
    assert not torch.allclose(noised, one)
    assert float(noised.std()) == pytest.approx(1, rel=0.04)


@pytest.mark.parametrize("name", BROWNIAN)
def test_more_steps_of_an_sde_follow_the_same_path(name: str) -> None:
    x = noisy(14.0, size=16).float()

    def run(steps: int, seed: int) -> Tensor:
        return drive(PLAIN[name].function, x, karras(steps, 0.1, 14.0), seeds=[seed])[0]

    near, far = (float((run(100, 1) - run(50, seed)).std()) for seed in (1, 2))
    assert near < 0.3 * far


def test_lcm_jumps_to_a_picture_and_back() -> None:
    """With a model that knows the end of every path, the pictures vary as they should."""
    lcm = PLAIN["LCM"]
    for steps in (1, 4, 8):
        sigmas = lcm.sigmas(SCHEDULE, steps)
        x = noisy(sigmas[0], size=64).float()
        result, asked = drive(
            lcm.function, x, sigmas, denoise=lambda x, sigma: exact(x, sigma, 0), seeds=[1]
        )
        assert asked == sigmas[:-1]
        assert float(result.std()) == pytest.approx(1, rel=0.03)
    other, _ = drive(lcm.function, x, sigmas, denoise=lambda x, s: exact(x, s, 0), seeds=[2])
    assert not torch.allclose(other, result)


def test_unipc_is_the_better_the_higher_its_order() -> None:
    unipc, sigmas = PLAIN["UniPC"], PLAIN["UniPC"].sigmas(SCHEDULE, 20)
    x = noisy(sigmas[0])
    wanted = exact(x, sigmas[0], 0)
    errors = [
        float((drive(unipc.function, x, sigmas, order=order)[0] - wanted).norm() / wanted.norm())
        for order in (1, 2, 3)
    ]
    assert errors[0] > errors[1]
    assert max(errors[1:]) < 0.05


def test_dpm_adaptive_chooses_its_steps() -> None:
    adaptive = PLAIN["DPM adaptive"].function
    x = noisy(14.0)
    results = []
    for steps in (2, 10, 150):
        result, asked = drive(adaptive, x, karras(steps, 0.1, 14.0), eta=0.0)
        results.append(result)
        wanted = exact(x, 14, 0.1)
        assert float((result - wanted).norm() / wanted.norm()) < 0.05
        assert asked[-1] > 0.1
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dpm_adaptive_ends_where_the_model_has_left_the_numbers() -> None:
    result, asked = drive(
        PLAIN["DPM adaptive"].function,
        noisy(14.0),
        karras(5, 0.1, 14.0),
        denoise=lambda x, sigma: x * math.nan,
    )
    assert not torch.isfinite(result).all()
    assert len(asked) == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_ends_at_a_picture(name: str) -> None:
    sampler = SAMPLERS[name]
    sigmas = sampler.sigmas(SCHEDULE, 1)
    x = noisy(sigmas[0], size=16).float()
    result, _ = drive(sampler.function, x, sigmas)
    assert torch.isfinite(result).all()
    if name != "PLMS":  # which reckons with the mean of the slopes at both ends
        assert float(result.std()) < 1.1  # of the noise of level 14 nothing is left


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 12, 20, 21, 36, 60])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_is_called_as_often_as_is_declared(name: str, steps: int) -> None:
    sampler = SAMPLERS[name]
    if name == "DPM adaptive":
        return
    sigmas = sampler.sigmas(SCHEDULE, steps)
    _, asked = drive(sampler.function, noisy(sigmas[0]), sigmas)
    if sampler.levels:  # PLMS improves its first step
        assert len(asked) == len(sigmas) - 1 + (name == "PLMS")
    else:  # nobody asks for the middle of the last step
        assert len(asked) == sampler.calls * steps - (sampler.calls - 1)
    assert all(sigma > 0 for sigma in asked)


def test_restart_goes_back_up() -> None:
    def run(steps: int) -> list[float]:
        sigmas = PLAIN["Restart"].sigmas(SCHEDULE, steps)
        return drive(PLAIN["Restart"].function, noisy(sigmas[0]), sigmas)[1]

    def climbs(asked: list[float]) -> list[tuple[float, float]]:
        return [(low, high) for low, high in pairwise(asked) if high > 1.5 * low]

    assert climbs(run(19)) == []
    assert len(climbs(run(20))) == len(climbs(run(35))) == 1
    assert len(climbs(run(36))) == 2
    for low, high in climbs(run(60)):
        assert low == pytest.approx(0.1, abs=0.05)
        assert high == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("name", [n for n in PLAIN if not PLAIN[n].per_picture])
def test_pictures_of_one_run_know_nothing_of_each_other(name: str) -> None:
    sampler = PLAIN[name]
    sigmas = sampler.sigmas(SCHEDULE, 6)
    both = noisy(sigmas[0], count=2).float()
    together, _ = drive(sampler.function, both, sigmas, seeds=[7, 8])
    for number, seed in enumerate((7, 8)):
        alone, _ = drive(sampler.function, both[number : number + 1], sigmas, seeds=[seed])
        assert torch.allclose(alone[0], together[number], atol=1e-5)


@pytest.mark.parametrize("name", K_SAMPLERS)
def test_churn_acts_where_it_is_declared_and_nowhere_else(name: str) -> None:
    sampler = PLAIN[name]
    sigmas = karras(20, 0.3, 14.0)
    x = noisy(14.0)

    def run(**options: Any) -> Tensor:
        return drive(sampler.function, x, sigmas, seeds=[1], **options)[0]

    plain, churned = run(), run(s_churn=5)
    assert torch.equal(plain, churned) is not sampler.churns
    if not sampler.churns:
        return
    assert torch.equal(run(s_churn=5, s_tmin=20), plain)
    assert torch.equal(run(s_churn=5, s_tmax=0.2), plain)
    assert torch.equal(run(s_churn=5, s_tmin=0.2, s_tmax=20), churned)
    assert not torch.equal(run(s_churn=5, s_tmin=2), churned)
    assert not torch.equal(run(s_churn=5, s_noise=1.1), churned)
    assert torch.equal(run(s_churn=1000), run(s_churn=900))  # there is a most


@pytest.mark.parametrize("name", ["Heun", "DPM2"])
def test_churned_pictures_vary_as_much_as_they_should(name: str) -> None:
    sigmas = [*karras(100, 0.05, 14.0), 0.0]
    x = noisy(14.0, size=64).float()
    result, _ = drive(PLAIN[name].function, x, sigmas, seeds=[1], s_churn=40)
    assert float(result.std()) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("name", RANDOM)
def test_the_strength_of_added_noise_can_be_chosen(name: str) -> None:
    sigmas = PLAIN[name].sigmas(SCHEDULE, 24)
    x = noisy(sigmas[0])

    def run(seed: int, s_noise: float) -> Tensor:
        return drive(PLAIN[name].function, x, sigmas, seeds=[seed], s_noise=s_noise)[0]

    assert torch.equal(run(1, 0), run(2, 0))
    assert not torch.equal(run(1, 0.5), run(1, 1))


def test_ancestral_steps_come_to_the_level_they_were_to_come_to() -> None:
    for sigma, next_sigma, eta in ((14, 10, 1), (1, 0.9, 1), (2, 0.01, 0.5), (3, 2, 2.0)):
        down, up = split_ancestral(sigma, next_sigma, eta)
        assert math.hypot(down, up) == pytest.approx(next_sigma)
        assert 0 <= down < next_sigma
    assert split_ancestral(14, 10, 0) == (10, 0)
    assert split_ancestral(14, 0, 1) == (0, 0)


# The steps of img2img


@pytest.mark.parametrize(
    ("steps", "strength", "all_steps", "wanted"),
    [
        (10, 0.0, False, (10, 1)),
        (10, 0.5, False, (10, 6)),
        (10, 0.75, False, (10, 8)),
        (10, 1.0, False, (10, 10)),
        (150, 1.0, False, (150, 150)),
        (1, 0.3, False, (1, 1)),
        (10, 0.5, True, (20, 10)),
        (10, 0.75, True, (13, 10)),
        (10, 1.0, True, (10, 10)),
        (20, 0.3, True, (66, 20)),
        (10, 0.0, True, (10, 1)),
        (150, 0.01, True, (MOST_STEPS, 150)),
    ],
)
def test_img2img_runs_the_steps_of_the_webui(
    steps: int, strength: float, all_steps: bool, wanted: tuple[int, int]
) -> None:
    """Of `int(strength * steps)` and one more, or as many as were asked for, of a longer run."""
    assert img2img_steps(steps, strength, all_steps) == wanted


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("steps", "taken"), [(30, 12), (30, 1), (2, 2), (2, 1), (1, 1), (MOST_STEPS, 9)]
)
def test_every_sampler_can_run_the_last_steps_alone(name: str, steps: int, taken: int) -> None:
    sampler = SAMPLERS[name]
    whole = sampler.sigmas(SCHEDULE, steps)
    _, sigmas = sampler.img2img_sigmas(SCHEDULE, steps, taken)
    clean = noisy(0, size=16).float()
    x = clean + torch.randn(clean.shape, generator=Generator().manual_seed(5)) * sigmas[0]
    result, _ = drive(sampler.function, x, sigmas, whole=whole)
    assert torch.isfinite(result).all()
    if steps > 2:  # some make much of their last step, from a level far above the lowest one
        assert 0.6 < float(result.std()) < 2


# Seeds


def test_seeds_are_counted_as_the_webui_counts_them() -> None:
    params = PaintingParams(seed=100, subseed=5, n_iter=2)
    assert all_seeds(params, 2) == ([100, 101, 102, 103], [5, 6, 7, 8])
    varied = PaintingParams(seed=100, subseed=5, n_iter=2, subseed_strength=0.1)
    assert all_seeds(varied, 2) == ([100] * 4, [5, 6, 7, 8])


def test_samplers_are_those_that_are_tested() -> None:
    variants = {name for name in SAMPLERS if name not in PLAIN}
    assert all(name.endswith((" Karras", " Exponential")) for name in variants)
    assert isinstance(next(iter(SAMPLERS.values())), Sampler)
    assert {name for name in PLAIN if PLAIN[name].uses_eta} == {*RANDOM, "DDIM"} - {"Restart"}
