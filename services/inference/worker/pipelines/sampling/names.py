"""The webui's sampler names (1.7, and LCM of 1.8), each with its sampler and spread of levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from services.inference.worker.pipelines.sampling import samplers, schedulers
from services.inference.worker.pipelines.sampling.samplers import SamplerFunction
from services.inference.worker.pipelines.sampling.schedules import NoiseSchedule, Sigmas, Spread

SPREADS = {
    "automatic": "automatic",
    "uniform": "uniform",
    "karras": "karras",
    "exponential": "exponential",
    "polyexponential": "polyexponential",
    "sgm uniform": "sgm_uniform",
}
"""The webui's names of schedule types, in lower case."""


class Sampler(msgspec.Struct, frozen=True):
    """`calls`: evaluations of the model per step. `spread`: of its levels, unless a job says
    otherwise; a sampler with `levels` has them from its own paper, and no job can say otherwise.
    `churns`: acts on `s_churn`, `s_tmin` and `s_tmax`. `uses_eta`: acts on `eta`. `uses_s_noise`:
    acts on `s_noise`, which the webui keeps from some that could. `per_picture`: can't take several
    pictures in one run."""

    name: str
    function: SamplerFunction
    spread: Spread = Spread()
    aliases: Sequence[str] = ()
    calls: int = 1
    churns: bool = False
    uses_eta: bool = False
    uses_s_noise: bool = False
    per_picture: bool = False
    levels: Callable[[NoiseSchedule, int], Sigmas] | None = None

    def sigmas(self, schedule: NoiseSchedule, steps: int, spread: Spread | None = None) -> Sigmas:
        """`steps` levels and the one to end at. `spread` is in place of the sampler's own."""
        if self.levels:
            return self.levels(schedule, steps)
        return (spread or self.spread).sigmas(schedule, steps)


def _ddim_levels(schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Training times one even stride apart, from 1 on, and time 0 to end at; a single step starts
    at the last time, where there is only noise."""
    count = len(schedule.sigmas)
    times = np.clip(np.arange(0, count, count // steps)[:steps] + 1, 0, count - 1)[::-1].tolist()
    if steps == 1:
        times = [count - 1]
    return [*(schedule.sigmas[time] for time in times), schedule.lowest]


_KARRAS, _EXPONENTIAL = Spread("karras"), Spread("exponential")

_K_SAMPLERS = (
    Sampler(
        "Euler a",
        samplers.euler_ancestral,
        aliases=("k_euler_a", "k_euler_ancestral"),
        uses_eta=True,
    ),
    Sampler("Euler", samplers.euler, aliases=("k_euler",), churns=True, uses_s_noise=True),
    Sampler("LMS", samplers.lms, aliases=("k_lms",)),
    Sampler("Heun", samplers.heun, aliases=("k_heun",), calls=2, churns=True, uses_s_noise=True),
    Sampler(
        "DPM2",
        samplers.dpm_2,
        Spread(drop_last_but_one=True),
        ("k_dpm_2",),
        calls=2,
        churns=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM2 a",
        samplers.dpm_2_ancestral,
        Spread(drop_last_but_one=True),
        ("k_dpm_2_a",),
        calls=2,
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2S a",
        samplers.dpmpp_2s_ancestral,
        aliases=("k_dpmpp_2s_a",),
        calls=2,
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler("DPM++ 2M", samplers.dpmpp_2m, aliases=("k_dpmpp_2m",)),
    Sampler(
        "DPM++ SDE",
        samplers.dpmpp_sde,
        aliases=("k_dpmpp_sde",),
        calls=2,
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2M SDE",
        samplers.dpmpp_2m_sde,
        aliases=("k_dpmpp_2m_sde",),
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2M SDE Heun",
        samplers.dpmpp_2m_sde_heun,
        aliases=("k_dpmpp_2m_sde_heun",),
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 3M SDE",
        samplers.dpmpp_3m_sde,
        Spread(drop_last_but_one=True),
        ("k_dpmpp_3m_sde",),
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM fast",
        samplers.dpm_fast,
        aliases=("k_dpm_fast",),
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM adaptive",
        samplers.dpm_adaptive,
        aliases=("k_dpm_ad",),
        uses_eta=True,
        per_picture=True,
    ),
    Sampler("Restart", samplers.restart, _KARRAS, calls=2),
)
_OTHERS = (
    Sampler("DDIM", samplers.ddim, uses_eta=True, levels=_ddim_levels),
    Sampler("PLMS", samplers.plms, levels=_ddim_levels),
    Sampler("UniPC", schedulers.unipc, levels=schedulers.unipc_levels),
    Sampler("LCM", schedulers.lcm, aliases=("k_lcm",), levels=schedulers.lcm_levels),
)
_WITH_KARRAS = (
    "LMS",
    "DPM2",
    "DPM2 a",
    "DPM++ 2S a",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Heun",
    "DPM++ 3M SDE",
)
_WITH_EXPONENTIAL = ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE")


def _variant(sampler: Sampler, word: str, short: str, spread: Spread) -> Sampler:
    spread = msgspec.structs.replace(spread, drop_last_but_one=sampler.spread.drop_last_but_one)
    aliases = [f"{alias}_{short}" for alias in sampler.aliases]
    return msgspec.structs.replace(
        sampler, name=f"{sampler.name} {word}", spread=spread, aliases=aliases
    )


_PLAIN = {sampler.name: sampler for sampler in _K_SAMPLERS}
SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        *_K_SAMPLERS,
        *(_variant(_PLAIN[name], "Karras", "ka", _KARRAS) for name in _WITH_KARRAS),
        *(_variant(_PLAIN[name], "Exponential", "exp", _EXPONENTIAL) for name in _WITH_EXPONENTIAL),
        *_OTHERS,
    )
}

_BY_ANY_NAME = {
    name.lower(): sampler
    for sampler in SAMPLERS.values()
    for name in (sampler.name, *sampler.aliases)
}


def find_sampler(name: str) -> Sampler | None:
    """By the webui's name or one of its aliases, in upper or lower case. A plain name that a
    schedule type is put behind, as in `Euler SGM Uniform`, is one of our own making and known, too.
    """
    name = name.strip().lower()
    if name in _BY_ANY_NAME:
        return _BY_ANY_NAME[name]
    for words, kind in SPREADS.items():
        plain = _BY_ANY_NAME.get(name.removesuffix(f" {words}"))
        if name.endswith(f" {words}") and plain and plain.name in _PLAIN:
            if kind == "automatic":
                return plain
            spread = Spread(kind, drop_last_but_one=plain.spread.drop_last_but_one)
            title = f"{plain.name} {words.title()}".replace("Sgm", "SGM")
            return msgspec.structs.replace(plain, name=title, spread=spread)
    return None
