"""Samplers that the webui runs through training times and not through levels: DDIM, PLMS, UniPC.

A run of n steps goes through every (1000 // n)th time, from 1 on, and so makes n - 1 steps where n
divides 1000, and n or more where it does not. What it ends with is the latents at time 1 (UniPC's:
at time 0), as a model of these samplers knows them: `sqrt(a) * picture + sqrt(1 - a) * noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import exp, expm1, log

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.inference.worker.pipelines.sampling.samplers import (
    Run,
    Sampling,
    euler_ancestral,
)
from services.inference.worker.pipelines.sampling.schedules import NoiseSchedule, Sigmas

Levels = Callable[[NoiseSchedule, list[int], bool], Sigmas]
"""The levels of a run through rising training times, which is a whole one or the end of one."""


def training_times(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Rising. A single step is from the last time to time 1, where the webui makes none."""
    count = len(schedule.sigmas)
    times = [min(time + 1, count - 1) for time in range(0, count, max(count // steps, 1))]
    return times if len(times) > 1 else [1, count - 1]


def levels_of_times(schedule: NoiseSchedule, times: list[int], whole: bool) -> Sigmas:
    return [schedule.sigmas[time] for time in reversed(times)]


def even_levels(schedule: NoiseSchedule, times: list[int], whole: bool) -> Sigmas:
    """Of UniPC: as many even steps down to time 0 as there are `times`, from the last of them, or
    in a whole run from the last time that the model knows."""
    start = len(schedule.sigmas) - 1 if whole else times[-1]
    even: list[float] = np.linspace(start, 0, len(times) + 1).tolist()
    return [schedule.sigma_by_alpha(time) for time in even]


def ddim(run: Run) -> Sampling:
    """https://arxiv.org/abs/2010.02502: in these latents, steps of Euler, on which `eta` puts the
    noise that ancestral samplers put there; 0 of it unless asked for."""
    options = msgspec.structs.replace(run.options, eta=run.options.eta or 0.0)
    x = yield from euler_ancestral(msgspec.structs.replace(run, options=options))
    return _scaled_down(x, run.sigmas[-1])


_ADAMS_BASHFORTH = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(run: Run) -> Sampling:
    """PNDM without its Runge-Kutta steps, https://arxiv.org/abs/2202.09778: the slopes of the last
    four steps; the first step is an improved Euler step."""
    x, slopes = run.x, list[Tensor]()
    for sigma, next_sigma in run.steps:
        slope = (x - (yield x, sigma)) / sigma
        slopes = [slope, *slopes][:4]
        if len(slopes) == 1:
            ahead = x + slope * (next_sigma - sigma)
            slope = (slope + (ahead - (yield ahead, next_sigma)) / next_sigma) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(slopes) - 2]
            terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True)]
            slope = torch.stack(terms).sum(0)
        x = x + slope * (next_sigma - sigma)
    return _scaled_down(x, run.sigmas[-1])


def unipc(run: Run) -> Sampling:
    """UniPC with B(h) = h, https://arxiv.org/abs/2302.04867: each step is predicted from the steps
    before it, and corrected by what the model says where it leads to, but for the last one."""
    x, steps = run.x, len(run.steps)
    order = min(run.options.order, steps)
    denoised = yield _at(run, x, run.sigmas[0])
    history = [(run.sigmas[0], denoised)]
    for number, (sigma, next_sigma) in enumerate(run.steps, 1):
        step_order = number if number < order else min(order, steps + 1 - number)
        step, latest = log(sigma / next_sigma), history[-1][1]
        earlier = history[-step_order:-1][::-1]
        ratios = [log(sigma / level) / step for level, _ in earlier]
        slopes = [(one - latest) / ratio for (_, one), ratio in zip(earlier, ratios, strict=True)]
        base = exp(-step) * x - expm1(-step) * latest
        predicted, corrected = _unipc_weights(ratios, step)
        x = base + step * _weighted(predicted, slopes, like=x)
        if number < steps:
            denoised = yield _at(run, x, next_sigma)
            x = base + step * _weighted(corrected, [*slopes, denoised - latest], like=x)
            history = [*history, (next_sigma, denoised)][-order:]
    return _scaled_down(x, run.sigmas[-1])


def _at(run: Run, x: Tensor, sigma: float) -> tuple[Tensor, float, float]:
    """The query, with the time between two training times that the model is told."""
    assert isinstance(run.schedule, NoiseSchedule)
    return x, sigma, run.schedule.time_by_alpha(sigma)


def _unipc_weights(ratios: list[float], step: float) -> tuple[list[float], list[float]]:
    """Of the slopes to earlier steps: those of the predictor, and, with one more for the slope to
    the predicted point, those of the corrector. Those of order 1 and 2 that do not depend on the
    step are the paper's."""
    points, order = np.array([*ratios, 1.0]), len(ratios) + 1
    function, factorial, wanted = expm1(-step) / -step - 1, 1, []
    for power in range(1, order + 1):
        wanted.append(function * factorial / -step)
        factorial *= power + 1
        function = function / -step - 1 / factorial
    powers = np.vander(points, order, increasing=True).T
    predicted = [0.5] * (order - 1)
    if order > 2:
        predicted = np.linalg.solve(powers[:-1, :-1], wanted[:-1]).tolist()
    corrected = [0.5] if order == 1 else np.linalg.solve(powers, wanted).tolist()
    return predicted, corrected


def _weighted(weights: list[float], tensors: list[Tensor], *, like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for weight, tensor in zip(weights, tensors, strict=True):
        total = total + weight * tensor
    return total


def _scaled_down(x: Tensor, sigma: float) -> Tensor:
    """Latents that end at a level above 0, as the models of these samplers know them."""
    return x / math.sqrt(1 + sigma**2)
