"""The sampler names of AUTOMATIC1111's webui 1.7 (and LCM), and the diffusers scheduler of each.

The steps are spread evenly over the training times ("linspace"), as k-diffusion spreads them in the
webui; DDIM, PLMS and LCM keep the times of their papers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_KARRAS = {"use_karras_sigmas": True}
_EXPONENTIAL = {"use_exponential_sigmas": True}
_SDE2 = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
_SDE2_HEUN = {**_SDE2, "solver_type": "heun"}
_SDE3 = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
_ORDER2 = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_ORDER3 = {"algorithm_type": "dpmsolver++", "solver_order": 3}
_LEADING = {"timestep_spacing": "leading", "set_alpha_to_one": False}

_TIMESTEP_SAMPLERS = ("DDIM", "PLMS", "UniPC")
"""Those that the webui runs over training times and not over noise levels."""


class Sampler(msgspec.Struct, frozen=True):
    """`nearest` says what runs instead where diffusers has no twin of the webui's sampler."""

    name: str
    scheduler: str
    options: Mapping[str, Any] = {}
    aliases: Sequence[str] = ()
    nearest: str = ""

    def img2img_steps(self, steps: int, denoising_strength: float) -> int:
        """How many of `steps` the webui runs from a picture (its `t_enc`; samplers over noise
        levels take one more step, from the level that the noised picture starts at)."""
        encoded = int(min(denoising_strength, 0.999) * steps)
        return max(1, encoded) if self.name in _TIMESTEP_SAMPLERS else min(encoded + 1, steps)


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "Euler a", "EulerAncestralDiscreteScheduler", {}, ("k_euler_a", "k_euler_ancestral")
        ),
        Sampler("Euler", "EulerDiscreteScheduler", {}, ("k_euler",)),
        Sampler("LMS", "LMSDiscreteScheduler", {}, ("k_lms",)),
        Sampler("Heun", "HeunDiscreteScheduler", {}, ("k_heun",)),
        Sampler("DPM2", "KDPM2DiscreteScheduler", {}, ("k_dpm_2",)),
        Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, ("k_dpm_2_a",)),
        Sampler(
            "DPM++ 2S a",
            "DPMSolverSinglestepScheduler",
            _ORDER2,
            ("k_dpmpp_2s_a",),
            nearest="DPM++ 2S, which adds no noise on the way",
        ),
        Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", _ORDER2, ("k_dpmpp_2m",)),
        Sampler("DPM++ SDE", "DPMSolverSDEScheduler", {}, ("k_dpmpp_sde",)),
        Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", _SDE2, ("k_dpmpp_2m_sde",)),
        Sampler(
            "DPM++ 2M SDE Heun", "DPMSolverMultistepScheduler", _SDE2_HEUN, ("k_dpmpp_2m_sde_heun",)
        ),
        Sampler("DPM++ 3M SDE", "DPMSolverMultistepScheduler", _SDE3, ("k_dpmpp_3m_sde",)),
        Sampler(
            "DPM fast",
            "DPMSolverSinglestepScheduler",
            _ORDER3,
            ("k_dpm_fast",),
            nearest="DPM++ 3S with the steps asked for",
        ),
        Sampler(
            "DPM adaptive",
            "DPMSolverMultistepScheduler",
            _ORDER3,
            ("k_dpm_ad",),
            nearest="DPM++ 3M with the steps asked for",
        ),
        Sampler("LMS Karras", "LMSDiscreteScheduler", _KARRAS, ("k_lms_ka",)),
        Sampler("DPM2 Karras", "KDPM2DiscreteScheduler", _KARRAS, ("k_dpm_2_ka",)),
        Sampler("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", _KARRAS, ("k_dpm_2_a_ka",)),
        Sampler(
            "DPM++ 2S a Karras",
            "DPMSolverSinglestepScheduler",
            {**_ORDER2, **_KARRAS},
            ("k_dpmpp_2s_a_ka",),
            nearest="DPM++ 2S Karras, which adds no noise on the way",
        ),
        Sampler(
            "DPM++ 2M Karras",
            "DPMSolverMultistepScheduler",
            {**_ORDER2, **_KARRAS},
            ("k_dpmpp_2m_ka",),
        ),
        Sampler("DPM++ SDE Karras", "DPMSolverSDEScheduler", _KARRAS, ("k_dpmpp_sde_ka",)),
        Sampler(
            "DPM++ 2M SDE Karras",
            "DPMSolverMultistepScheduler",
            {**_SDE2, **_KARRAS},
            ("k_dpmpp_2m_sde_ka",),
        ),
        Sampler(
            "DPM++ 2M SDE Exponential",
            "DPMSolverMultistepScheduler",
            {**_SDE2, **_EXPONENTIAL},
            ("k_dpmpp_2m_sde_exp",),
        ),
        Sampler(
            "DPM++ 2M SDE Heun Karras",
            "DPMSolverMultistepScheduler",
            {**_SDE2_HEUN, **_KARRAS},
            ("k_dpmpp_2m_sde_heun_ka",),
        ),
        Sampler(
            "DPM++ 2M SDE Heun Exponential",
            "DPMSolverMultistepScheduler",
            {**_SDE2_HEUN, **_EXPONENTIAL},
            ("k_dpmpp_2m_sde_heun_exp",),
        ),
        Sampler(
            "DPM++ 3M SDE Karras",
            "DPMSolverMultistepScheduler",
            {**_SDE3, **_KARRAS},
            ("k_dpmpp_3m_sde_ka",),
        ),
        Sampler(
            "DPM++ 3M SDE Exponential",
            "DPMSolverMultistepScheduler",
            {**_SDE3, **_EXPONENTIAL},
            ("k_dpmpp_3m_sde_exp",),
        ),
        Sampler("Restart", "HeunDiscreteScheduler", _KARRAS, nearest="Heun Karras"),
        Sampler("DDIM", "DDIMScheduler", {**_LEADING, "clip_sample": False}),
        Sampler("PLMS", "PNDMScheduler", {**_LEADING, "skip_prk_steps": True}),
        Sampler("UniPC", "UniPCMultistepScheduler", {"solver_order": 3}),
        Sampler("LCM", "LCMScheduler", {}, ("k_lcm",)),
    )
}

_BY_ANY_NAME = {
    name.lower(): sampler
    for sampler in SAMPLERS.values()
    for name in (sampler.name, *sampler.aliases)
}


def find_sampler(name: str) -> Sampler | None:
    """By the webui's name or one of its aliases, in upper or lower case."""
    return _BY_ANY_NAME.get(name.strip().lower())


def build_scheduler(
    sampler: Sampler, noise_schedule: Mapping[str, Any], steps: int, seeds: Sequence[int]
) -> Any:
    """A fresh scheduler (they keep state) for a batch of pictures with these seeds.

    `noise_schedule`: beta_start, beta_end, beta_schedule, num_train_timesteps, prediction_type.
    """
    import diffusers

    scheduler_type = getattr(diffusers, sampler.scheduler)
    options = {
        # One evenly spread time would be the first one, with hardly any noise in it.
        "timestep_spacing": "linspace" if steps > 1 else "trailing",
        "steps_offset": 1,  # counts for "leading" only; pipelines warn about any other
        "original_inference_steps": max(50, steps),
        **noise_schedule,
        **sampler.options,
    }
    known = inspect.signature(scheduler_type).parameters
    scheduler = scheduler_type(**{key: options[key] for key in options.keys() & known.keys()})
    if sampler.scheduler == "DPMSolverSDEScheduler":
        scheduler.noise_sampler_seed = list(seeds)  # it takes no generator
    return scheduler
