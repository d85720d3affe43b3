"""Samplers that are diffusers' schedulers behind the interface of `samplers`.

A scheduler chooses training times; it keeps latents as `sqrt(a) * picture + sqrt(1 - a) * noise`.
"""

from __future__ import annotations

import math
from typing import Any

from diffusers import LCMScheduler, UniPCMultistepScheduler

from services.inference.worker.pipelines.sampling.samplers import Run, Sampling
from services.inference.worker.pipelines.sampling.schedules import NoiseSchedule, Sigmas

LCM_STEPS = 50
"""Steps of the run that latent consistency models were distilled from."""


def unipc(run: Run) -> Sampling:
    """https://arxiv.org/abs/2302.04867"""
    return (yield from _sample(run, _unipc(run.schedule, run.of_steps, run.options.order)))


def lcm(run: Run) -> Sampling:
    """https://arxiv.org/abs/2310.04378"""
    return (
        yield from _sample(run, _lcm(run.schedule, run.of_steps), generator=run.noise.generators)
    )


def unipc_levels(schedule: NoiseSchedule, steps: int) -> Sigmas:
    return [*_levels(schedule, _unipc(schedule, steps, 3)), schedule.lowest]


def lcm_levels(schedule: NoiseSchedule, steps: int) -> Sigmas:
    return [*_levels(schedule, _lcm(schedule, steps)), 0.0]


def _unipc(schedule: NoiseSchedule, steps: int, order: int) -> Any:
    scheduler = UniPCMultistepScheduler(
        **_trained(schedule),
        solver_order=order,
        solver_type="bh1",
        final_sigmas_type="sigma_min",  # bh1 has no step down to 0
        # One evenly spread time would be the first one, with hardly any noise in it.
        timestep_spacing="linspace" if steps > 1 else "trailing",
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _lcm(schedule: NoiseSchedule, steps: int) -> Any:
    scheduler = LCMScheduler(**_trained(schedule), original_inference_steps=max(LCM_STEPS, steps))
    scheduler.set_timesteps(steps)
    return scheduler


def _trained(schedule: NoiseSchedule) -> dict[str, Any]:
    """Schedulers are given noise predictions, whatever the model predicts."""
    return {**schedule.config, "prediction_type": "epsilon"}


def _levels(schedule: NoiseSchedule, scheduler: Any) -> Sigmas:
    return [schedule.sigmas[int(time)] for time in scheduler.timesteps]


def _sample(run: Run, scheduler: Any, **more: Any) -> Sampling:
    begin = len(scheduler.timesteps) - len(run.steps)
    scheduler.set_begin_index(begin)
    latents = run.x / math.sqrt(1 + run.sigmas[0] ** 2)
    for time, (sigma, _) in zip(scheduler.timesteps[begin:], run.steps, strict=True):
        x = latents * math.sqrt(1 + sigma**2)
        eps = (x - (yield x, sigma)) / sigma
        latents = scheduler.step(eps, time, latents, return_dict=False, **more)[0]
    return latents
