"""The webui's names of samplers (1.7, and LCM of 1.8) and of schedule types (1.10)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from services.inference.worker.pipelines.sampling import samplers, timesteps
from services.inference.worker.pipelines.sampling.samplers import SamplerFunction
from services.inference.worker.pipelines.sampling.schedules import (
    LCMSchedule,
    NoiseSchedule,
    Schedule,
    Sigmas,
    Spread,
)
from services.inference.worker.pipelines.sampling.timesteps import Levels, training_times

LABELS = {
    "automatic": "Automatic",
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps",
    "simple": "Simple",
    "normal": "Normal",
    "ddim": "DDIM",
    "beta": "Beta",
    "turbo": "Turbo",
}
"""What the webui calls the kinds of spreads. Turbo is of Forge, a fork."""
SPREADS = {
    **{label.lower(): kind for kind, label in LABELS.items()},
    **{kind: kind for kind in LABELS},
    "sgmuniform": "sgm_uniform",
}
"""The webui's names of schedule types, in lower case."""


class Sampler(msgspec.Struct, frozen=True):
    """`calls`: evaluations of the model per step. `spread`: of its levels, unless a job says
    otherwise; `later_kind`: what the webui spreads them by as of 1.9 if it is left to it. A sampler
    with `levels` goes through training times, and no job can say otherwise.
    `churns`: acts on `s_churn`, `s_tmin` and `s_tmax`. `uses_eta`: acts on `eta`. `uses_s_noise`:
    acts on `s_noise`, which the webui keeps from some that could. `per_picture`: can't take several
    pictures in one run. `own_steps`: chooses its steps between the ends by itself. `lcm`: for
    latent consistency models."""

    name: str
    function: SamplerFunction
    spread: Spread = Spread()
    aliases: Sequence[str] = ()
    calls: int = 1
    later_kind: str = "automatic"
    churns: bool = False
    uses_eta: bool = False
    uses_s_noise: bool = False
    per_picture: bool = False
    own_steps: bool = False
    lcm: bool = False
    levels: Levels | None = None
    schedule_type: str = ""
    """The label that stands behind the name."""

    @property
    def plain_name(self) -> str:
        return self.name.removesuffix(f" {self.schedule_type}")

    def schedule(self, trained: NoiseSchedule) -> Schedule:
        return LCMSchedule(trained) if self.lcm else trained

    def sigmas(self, trained: NoiseSchedule, steps: int, spread: Spread | None = None) -> Sigmas:
        """The levels of a whole run, and the one to end at. `spread` is in place of the sampler's
        own."""
        spread = spread or self.spread
        if self.levels:
            return self.levels(trained, self._times(trained, steps, spread), True)
        return spread.sigmas(self.schedule(trained), steps)

    def img2img_sigmas(
        self, trained: NoiseSchedule, steps: int, taken: int, spread: Spread | None = None
    ) -> tuple[float, Sigmas]:
        """(level of the noise to put on a picture, levels of the last `taken` of `steps` steps).
        Samplers that go through training times take that noise for that of one time earlier, in the
        webui and so here."""
        if not self.levels:
            sigmas = self.sigmas(trained, steps, spread)[steps - taken :]
            return sigmas[0], sigmas
        times = self._times(trained, steps, spread or self.spread)
        last = max(taken - 1, 1)
        return trained.sigmas[times[last]], self.levels(trained, times[: max(last, 2)], False)

    def _times(self, trained: NoiseSchedule, steps: int, spread: Spread) -> list[int]:
        return training_times(trained, steps + spread.drop_last_but_one)


_KARRAS = Spread("karras")

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
        later_kind="karras",
        churns=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM2 a",
        samplers.dpm_2_ancestral,
        Spread(drop_last_but_one=True),
        ("k_dpm_2_a",),
        calls=2,
        later_kind="karras",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2S a",
        samplers.dpmpp_2s_ancestral,
        aliases=("k_dpmpp_2s_a",),
        calls=2,
        later_kind="karras",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler("DPM++ 2M", samplers.dpmpp_2m, aliases=("k_dpmpp_2m",), later_kind="karras"),
    Sampler(
        "DPM++ SDE",
        samplers.dpmpp_sde,
        aliases=("k_dpmpp_sde",),
        calls=2,
        later_kind="karras",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2M SDE",
        samplers.dpmpp_2m_sde,
        aliases=("k_dpmpp_2m_sde",),
        later_kind="exponential",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 2M SDE Heun",
        samplers.dpmpp_2m_sde_heun,
        aliases=("k_dpmpp_2m_sde_heun",),
        later_kind="exponential",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM++ 3M SDE",
        samplers.dpmpp_3m_sde,
        Spread(drop_last_but_one=True),
        ("k_dpmpp_3m_sde",),
        later_kind="exponential",
        uses_eta=True,
        uses_s_noise=True,
    ),
    Sampler(
        "DPM fast",
        samplers.dpm_fast,
        aliases=("k_dpm_fast",),
        uses_eta=True,
        uses_s_noise=True,
        own_steps=True,
    ),
    Sampler(
        "DPM adaptive",
        samplers.dpm_adaptive,
        aliases=("k_dpm_ad",),
        uses_eta=True,
        per_picture=True,
        own_steps=True,
    ),
    Sampler("Restart", samplers.restart, _KARRAS, calls=2),
    Sampler("LCM", samplers.lcm, aliases=("k_lcm",), lcm=True),
)
_OTHERS = (
    Sampler("DDIM", timesteps.ddim, uses_eta=True, levels=timesteps.levels_of_times),
    Sampler("PLMS", timesteps.plms, levels=timesteps.levels_of_times),
    Sampler("UniPC", timesteps.unipc, levels=timesteps.even_levels),
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


def _variant(sampler: Sampler, kind: str, aliases: Sequence[str] = ()) -> Sampler:
    label = LABELS[kind]
    return msgspec.structs.replace(
        sampler,
        name=f"{sampler.name} {label}",
        spread=msgspec.structs.replace(sampler.spread, kind=kind),
        aliases=aliases,
        schedule_type=label,
    )


def _variants(names: Sequence[str], kind: str, short: str) -> list[Sampler]:
    plain = [_PLAIN[name] for name in names]
    return [_variant(one, kind, [f"{alias}_{short}" for alias in one.aliases]) for one in plain]


_PLAIN = {sampler.name: sampler for sampler in _K_SAMPLERS}
SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        *_K_SAMPLERS,
        *_variants(_WITH_KARRAS, "karras", "ka"),
        *_variants(_WITH_EXPONENTIAL, "exponential", "exp"),
        *_OTHERS,
    )
}

_BY_ANY_NAME = {
    name.lower(): sampler
    for sampler in SAMPLERS.values()
    for name in (sampler.name, *sampler.aliases)
}


def find_sampler(name: str) -> Sampler | None:
    """By the webui's name or one of its aliases, in upper or lower case, or a plain name with a
    schedule type behind it, as in `Euler SGM Uniform`."""
    name = name.strip().lower()
    if name in _BY_ANY_NAME:
        return _BY_ANY_NAME[name]
    for words, kind in SPREADS.items():
        plain = _BY_ANY_NAME.get(name.removesuffix(f" {words}"))
        if name.endswith(f" {words}") and plain and plain.name in _PLAIN:
            return plain if kind == "automatic" else _variant(plain, kind)
    return None
