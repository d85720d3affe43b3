"""Samplers as generators: `denoised = yield x, sigma`, and the last latents are what they return.

Latents are k-diffusion's: picture + sigma * noise. The algorithms are those of k-diffusion, which
the webui runs; their sources stand with each. Levels are Python floats: no step waits for a GPU,
but those of DPM adaptive, which must look at its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from math import exp, expm1, log

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.inference.worker.pipelines.sampling.noise import Noise
from services.inference.worker.pipelines.sampling.schedules import Schedule, Sigmas, karras

Query = tuple[Tensor, float] | tuple[Tensor, float, float]
"""Latents (pictures, channels, height, width) and their level: what is to be denoised. The training
time that the model is told, where that is not the one of the level."""
Sampling = Generator[Query, Tensor, Tensor]


class Options(msgspec.Struct, frozen=True):
    """The webui's fields of these names. `eta`: how much of the noise of ancestral and SDE samplers
    is added; None is the sampler's own. `order`: of UniPC."""

    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    order: int = 3


class Run(msgspec.Struct, frozen=True):
    """What a sampler is given: latents at level `sigmas[0]`, and where to go from there.
    `whole`: the levels of a whole run, of which img2img steps through the last ones alone."""

    x: Tensor
    sigmas: Sigmas
    whole: Sigmas
    noise: Noise
    schedule: Schedule
    options: Options = Options()

    @property
    def steps(self) -> list[tuple[float, float]]:
        return list(zip(self.sigmas[:-1], self.sigmas[1:], strict=True))

    @property
    def ends(self) -> tuple[float, float]:
        """(highest level, lowest one above 0): the model's own in a whole run, as in the webui, for
        samplers that choose their own levels in between."""
        if self.sigmas == self.whole:
            return self.schedule.highest, self.schedule.lowest
        return self.sigmas[0], min(sigma for sigma in self.sigmas if sigma > 0)

    @property
    def eta(self) -> float:
        return 1.0 if self.options.eta is None else self.options.eta


SamplerFunction = Callable[[Run], Sampling]


def split_ancestral(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """(level to step down to, level of the noise to add then), which make up `next_sigma`."""
    if not eta or not next_sigma:
        return next_sigma, 0.0
    up = eta * math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2)
    up = min(next_sigma, up)
    return math.sqrt(max(next_sigma**2 - up**2, 0.0)), up


def _towards(x: Tensor, denoised: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """An Euler step."""
    return x + (x - denoised) / sigma * (next_sigma - sigma)


def _exponential_step(x: Tensor, denoised: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """The exact solution of a step on which the prediction does not change (DPM-Solver++)."""
    if next_sigma == 0:
        return denoised
    return next_sigma / sigma * x - expm1(log(next_sigma / sigma)) * denoised


def _churned(run: Run, x: Tensor, sigma: float) -> tuple[Tensor, float]:
    """Noise added before a step (Karras et al. 2022, algorithm 2), and the level it leads to."""
    options = run.options
    if not options.s_churn:
        return x, sigma
    drawn = run.noise.next()  # for every step, as in k-diffusion, whether it is used or not
    if not options.s_tmin <= sigma <= options.s_tmax:
        return x, sigma
    higher = sigma * (1 + min(options.s_churn / len(run.steps), math.sqrt(2) - 1))
    return x + drawn * options.s_noise * math.sqrt(higher**2 - sigma**2), higher


def euler(run: Run) -> Sampling:
    """Karras et al. 2022, algorithm 2 without its correction."""
    x = run.x
    for sigma, next_sigma in run.steps:
        x, higher = _churned(run, x, sigma)
        denoised = yield x, higher
        x = _towards(x, denoised, higher, next_sigma)
    return x


def euler_ancestral(run: Run) -> Sampling:
    x = run.x
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        down, up = split_ancestral(sigma, next_sigma, run.eta)
        x = _towards(x, denoised, sigma, down)
        if up:
            x = x + run.noise.next() * (run.options.s_noise * up)
    return x


def heun(run: Run) -> Sampling:
    """Karras et al. 2022, algorithm 2."""
    x = run.x
    for sigma, next_sigma in run.steps:
        x, higher = _churned(run, x, sigma)
        denoised = yield x, higher
        ahead = _towards(x, denoised, higher, next_sigma)
        if next_sigma > 0:
            slope = (x - denoised) / higher
            denoised = yield ahead, next_sigma
            slope = (slope + (ahead - denoised) / next_sigma) / 2
            ahead = x + slope * (next_sigma - higher)
        x = ahead
    return x


def dpm_2(run: Run) -> Sampling:
    """DPM-Solver-2, https://arxiv.org/abs/2206.00927: a midpoint method in logarithms."""
    x = run.x
    for sigma, next_sigma in run.steps:
        x, higher = _churned(run, x, sigma)
        denoised = yield x, higher
        x = yield from _through_the_middle(x, denoised, higher, next_sigma)
    return x


def dpm_2_ancestral(run: Run) -> Sampling:
    x = run.x
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        down, up = split_ancestral(sigma, next_sigma, run.eta)
        x = yield from _through_the_middle(x, denoised, sigma, down)
        if up:
            x = x + run.noise.next() * (run.options.s_noise * up)
    return x


def _through_the_middle(x: Tensor, denoised: Tensor, sigma: float, next_sigma: float) -> Sampling:
    """With the slope of the midpoint; an Euler step down to 0, where no logarithm leads."""
    if next_sigma == 0:
        return _towards(x, denoised, sigma, 0.0)
    middle = math.sqrt(sigma * next_sigma)
    halfway = _towards(x, denoised, sigma, middle)
    denoised = yield halfway, middle
    return x + (halfway - denoised) / middle * (next_sigma - sigma)


LMS_ORDER = 4


def lms(run: Run) -> Sampling:
    """Linear multistep: the slopes of the last four steps, weighed by exact integrals."""
    x, slopes = run.x, list[Tensor]()
    for number, (sigma, next_sigma) in enumerate(run.steps):
        denoised = yield x, sigma
        slopes = [(x - denoised) / sigma, *slopes][:LMS_ORDER]
        levels = run.sigmas[number - len(slopes) + 1 : number + 1][::-1]
        weights = _lms_weights(levels, sigma, next_sigma)
        for weight, slope in zip(weights, slopes, strict=True):
            x = x + weight * slope
    return x


def _lms_weights(levels: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from `start` to `end` of the Lagrange polynomials on `levels`."""
    weights = []
    for one in levels:
        others = [other for other in levels if other != one]
        polynomial = np.poly1d(others, r=True) / math.prod(one - other for other in others)
        whole = polynomial.integ()
        weights.append(float(whole(end) - whole(start)))
    return weights


def dpmpp_2s_ancestral(run: Run) -> Sampling:
    """DPM-Solver++(2S), https://arxiv.org/abs/2211.01095, with ancestral noise."""
    x = run.x
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        down, up = split_ancestral(sigma, next_sigma, run.eta)
        if down == 0:
            x = _towards(x, denoised, sigma, down)
        else:
            middle = math.sqrt(sigma * down)
            halfway = _exponential_step(x, denoised, sigma, middle)
            denoised = yield halfway, middle
            x = _exponential_step(x, denoised, sigma, down)
        if up:
            x = x + run.noise.next() * (run.options.s_noise * up)
    return x


def dpmpp_2m(run: Run) -> Sampling:
    """DPM-Solver++(2M), https://arxiv.org/abs/2211.01095."""
    x, before, last_step = run.x, None, 0.0
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        if next_sigma == 0:
            return denoised
        step = log(sigma / next_sigma)
        ahead = denoised
        if before is not None:
            ahead = denoised + (denoised - before) * (step / (2 * last_step))
        x = _exponential_step(x, ahead, sigma, next_sigma)
        before, last_step = denoised, step
    return x


def dpmpp_sde(run: Run) -> Sampling:
    """DPM-Solver++ (stochastic), two evaluations per step."""
    x, brownian, s_noise = run.x, run.noise.brownian(run.whole), run.options.s_noise
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        if next_sigma == 0:
            return denoised
        middle = math.sqrt(sigma * next_sigma)
        down, up = split_ancestral(sigma, middle, run.eta)
        halfway = _exponential_step(x, denoised, sigma, down)
        if up:
            halfway = halfway + brownian(sigma, middle) * (s_noise * up)
        denoised = yield halfway, middle
        down, up = split_ancestral(sigma, next_sigma, run.eta)
        x = _exponential_step(x, denoised, sigma, down)
        if up:
            x = x + brownian(sigma, next_sigma) * (s_noise * up)
    return x


def dpmpp_2m_sde(run: Run, *, heun: bool = False) -> Sampling:
    """DPM-Solver++(2M) (stochastic)."""
    x, before, last_step, eta = run.x, None, 0.0, run.eta
    brownian = run.noise.brownian(run.whole)
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        if next_sigma == 0:
            return denoised
        step = log(sigma / next_sigma)
        whole = step * (1 + eta)
        reached = -expm1(-whole)
        x = next_sigma / sigma * exp(-eta * step) * x + reached * denoised
        if before is not None:
            weight = (1 - reached / whole) if heun else reached / 2
            x = x + (denoised - before) * (weight * step / last_step)
        if eta:
            added = next_sigma * math.sqrt(-expm1(-2 * eta * step)) * run.options.s_noise
            x = x + brownian(sigma, next_sigma) * added
        before, last_step = denoised, step
    return x


def dpmpp_2m_sde_heun(run: Run) -> Sampling:
    return dpmpp_2m_sde(run, heun=True)


def dpmpp_3m_sde(run: Run) -> Sampling:
    """DPM-Solver++(3M) (stochastic)."""
    x, eta = run.x, run.eta
    history: list[Tensor] = []
    steps: list[float] = []
    brownian = run.noise.brownian(run.whole)
    for sigma, next_sigma in run.steps:
        denoised = yield x, sigma
        if next_sigma == 0:
            return denoised
        step = log(sigma / next_sigma)
        whole = step * (1 + eta)
        x = exp(-whole) * x - expm1(-whole) * denoised
        second = expm1(-whole) / whole + 1
        if len(history) == 2:
            ratio, older_ratio = steps[0] / step, steps[1] / step
            slope = (denoised - history[0]) / ratio
            older_slope = (history[0] - history[1]) / older_ratio
            curve = (slope - older_slope) / (ratio + older_ratio)
            third = second / whole - 0.5
            x = x + second * (slope + curve * ratio) - third * curve
        elif history:
            x = x + second * (denoised - history[0]) * (step / steps[0])
        if eta:
            added = next_sigma * math.sqrt(-expm1(-2 * eta * step)) * run.options.s_noise
            x = x + brownian(sigma, next_sigma) * added
        history, steps = [denoised, *history][:2], [step, *steps][:2]
    return x


# DPM-Solver, https://arxiv.org/abs/2206.00927: single steps of order 1 to 3 in the time -log(sigma)


def _dpm_solver_step(
    x: Tensor, eps: Tensor, start: float, end: float, order: int
) -> Generator[Query, Tensor, tuple[Tensor, Tensor]]:
    """(the result of `order`, that of the order below with the same first points)."""
    step = end - start
    first = x - exp(-end) * expm1(step) * eps
    if order == 1:
        return first, first
    one, two = (0.5, 0.0) if order == 2 else (1 / 3, 2 / 3)
    time = start + one * step
    point = x - exp(-time) * expm1(one * step) * eps
    eps_one = (point - (yield point, exp(-time))) * exp(time)
    second = first - exp(-end) / (2 * one) * expm1(step) * (eps_one - eps)
    if order == 2:
        return second, first
    time = start + two * step
    bend = exp(-time) * (two / one) * (expm1(two * step) / (two * step) - 1)
    point = x - exp(-time) * expm1(two * step) * eps - bend * (eps_one - eps)
    eps_two = (point - (yield point, exp(-time))) * exp(time)
    third = first - exp(-end) / two * (expm1(step) / step - 1) * (eps_two - eps)
    return third, second


def _split_times(start: float, end: float, last: float, eta: float) -> tuple[float, float]:
    """As `split_ancestral`, for times; no further than `last`."""
    if not eta:
        return end, 0.0
    down, _ = split_ancestral(exp(-start), exp(-end), eta)
    time = min(last, -log(down)) if down > 0 else last
    return time, math.sqrt(max(exp(-2 * end) - exp(-2 * time), 0.0))


def dpm_fast(run: Run) -> Sampling:
    """DPM-Solver-fast: as many evaluations as there are steps, in steps of order 3 and a rest."""
    x, calls = run.x, len(run.steps)
    start, end = (-log(sigma) for sigma in run.ends)
    if end <= start:
        return (yield x, run.sigmas[0])
    count = calls // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    times = [start + (end - start) * number / count for number in range(count + 1)]
    for order, (time, next_time) in zip(orders, pairwise(times), strict=True):
        down, up = _split_times(time, next_time, end, run.eta)
        eps = (x - (yield x, exp(-time))) * exp(time)
        x, _ = yield from _dpm_solver_step(x, eps, time, down, order)
        if up:
            x = x + run.noise.next() * (run.options.s_noise * up)
    return x


def dpm_adaptive(run: Run) -> Sampling:
    """DPM-Solver-12/23 with a step size that follows the error; steps asked for count for nothing.

    Made for one picture: with several, one step size would have to fit all of them."""
    assert run.x.shape[0] == 1
    rtol, atol, order, safety = 0.05, 0.0078, 3, 0.81
    x = before = run.x
    highest, lowest = run.ends
    if lowest == highest:
        lowest = run.schedule.lowest
    time, end = -log(highest), -log(lowest)
    if time >= end - 1e-5:
        return (yield x, run.sigmas[0])
    step = 0.05
    while time < end - 1e-5:
        next_time = min(end, time + step)
        down, up = _split_times(time, next_time, end, run.eta)
        eps = (x - (yield x, exp(-time))) * exp(time)
        high, low = yield from _dpm_solver_step(x, eps, time, down, order)
        scale = torch.maximum(low.abs(), before.abs()).mul(rtol).clamp(min=atol)
        error = float(torch.linalg.vector_norm((low - high) / scale)) / math.sqrt(x.numel())
        if not math.isfinite(error):
            return high  # the model has left the numbers; whoever reads the result sees it
        factor = (1 / (error + 1e-8)) ** (1 / (1.5 if run.eta else order))
        factor = 1 + math.atan(factor - 1)
        step *= factor
        if factor >= safety:
            before, x, time = low, high, next_time
            if up:
                x = x + run.noise.next() * (run.options.s_noise * up)
    return x


def restart(run: Run) -> Sampling:
    """Heun steps, some of which go back up and down again, https://arxiv.org/abs/2306.14878."""
    x, last = run.x, None
    for sigma, next_sigma in _restart_steps(run.sigmas):
        if last is not None and last < sigma:
            added = run.options.s_noise * math.sqrt(sigma**2 - last**2)
            x = x + run.noise.next() * added
        denoised = yield x, sigma
        ahead = _towards(x, denoised, sigma, next_sigma)
        if next_sigma > 0:
            slope = (x - denoised) / sigma
            denoised = yield ahead, next_sigma
            slope = (slope + (ahead - denoised) / next_sigma) / 2
            ahead = x + slope * (next_sigma - sigma)
        x, last = ahead, next_sigma
    return x


def _restart_steps(sigmas: Sigmas) -> list[tuple[float, float]]:
    """From 20 steps on, the steps between level 2 and level 0.1 are done again, as the webui does
    it: once with 9 steps, from 36 steps on twice with a quarter of the steps."""
    steps = len(sigmas) - 1
    if steps < 20:
        return list(pairwise(sigmas))
    again, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    sigmas = [*karras(steps - again * times, sigmas[-2], sigmas[0]), 0.0]
    low, high = (
        min(range(len(sigmas)), key=lambda n, level=level: abs(sigmas[n] - level))  # type: ignore[misc]
        for level in (0.1, 2.0)
    )
    pairs = list(pairwise(sigmas))
    if high >= low:
        return pairs
    loop = karras(again + 1, sigmas[low], sigmas[high])
    return pairs[:low] + list(pairwise(loop)) * times + pairs[low:]


def lcm(run: Run) -> Sampling:
    """https://arxiv.org/abs/2310.04378: what is denoised gets new noise. `run.schedule`: that of
    such a model."""
    x = run.x
    for sigma, next_sigma in run.steps:
        time = run.schedule.time_of(sigma)
        denoised = yield x, sigma, time
        scaled = time * 10
        x = (denoised * scaled / math.hypot(scaled, 0.5)) + x * 0.25 / (scaled**2 + 0.25)
        if next_sigma > 0:
            x = x + run.noise.next() * next_sigma
    return x
