"""Noise levels (sigmas): those a model was trained with, and those that a run steps through.

Latents are in the form of k-diffusion: `x = picture + sigma * noise`. A model that was trained on
`sqrt(a) * picture + sqrt(1 - a) * noise` knows the level `sqrt((1 - a) / a)` as its time t.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import scipy.stats
import torch
from torch import Tensor

Sigmas = list[float]
"""From high to low; the last one is usually 0."""

KARRAS_RHO = 7.0
LCM_STEPS = 50
"""Of the run that latent consistency models were distilled from."""
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGN_YOUR_STEPS_SDXL = (
    *(14.615, 6.315, 3.771, 2.181, 1.342, 0.862),
    *(0.555, 0.380, 0.234, 0.113, 0.029),
)
"""Levels found to be best for SD 1.5 and for SDXL, https://arxiv.org/abs/2404.14507"""


class NoiseSchedule:
    """What a model was trained with. `sigmas[t]` for the training times t, rising."""

    def __init__(
        self,
        *,
        beta_start: float,
        beta_end: float,
        beta_schedule: str = "scaled_linear",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        """`prediction_type`: epsilon or v_prediction. Raises ValueError for another one."""
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type}")
        if beta_schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"beta_schedule {beta_schedule}")
        self.prediction_type = prediction_type
        root = beta_schedule == "scaled_linear"
        first, last = (beta_start**0.5, beta_end**0.5) if root else (beta_start, beta_end)
        betas = torch.linspace(first, last, num_train_timesteps, dtype=torch.float32)
        betas = betas**2 if root else betas
        alphas = torch.cumprod(1 - betas, 0)
        if rescale_betas_zero_snr:
            alphas = _with_zero_snr(alphas)
        self.alphas_cumprod: Tensor = alphas
        self.config = {
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "num_train_timesteps": num_train_timesteps,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        self.sigmas: list[float] = ((1 - alphas) / alphas).sqrt().tolist()
        self._rising = np.asarray(self.sigmas)
        self._logs = np.log(self._rising)
        self._log_alphas = np.log(alphas.double().numpy()) / 2

    @property
    def lowest(self) -> float:
        return self.sigmas[0]

    @property
    def highest(self) -> float:
        return self.sigmas[-1]

    def time_of(self, sigma: float) -> float:
        """The training time of a level, between two where it lies between them."""
        return float(np.interp(math.log(sigma), self._logs, np.arange(len(self._logs))))

    def sigma_at(self, time: float) -> float:
        """The inverse of `time_of`: logarithms of levels are interpolated."""
        return math.exp(float(np.interp(time, np.arange(len(self._logs)), self._logs)))

    def nearest_time(self, sigma: float) -> int:
        """The training time of the level that is nearest."""
        return int(np.abs(self._rising - sigma).argmin())

    def sigma_by_alpha(self, time: float) -> float:
        """As `sigma_at`, but it is the logarithms of alphas that are interpolated, as DPM-Solver
        and UniPC do it."""
        log_alpha = float(np.interp(time, np.arange(len(self._log_alphas)), self._log_alphas))
        return math.sqrt(math.expm1(-2 * log_alpha))

    def time_by_alpha(self, sigma: float) -> float:
        """The inverse of `sigma_by_alpha`."""
        times = np.arange(len(self._log_alphas))[::-1]
        return float(np.interp(-math.log1p(sigma**2) / 2, self._log_alphas[::-1], times))


class LCMSchedule:
    """What latent consistency models know: every 20th of the 1000 training times of `trained`."""

    def __init__(self, trained: NoiseSchedule) -> None:
        self._stride = len(trained.sigmas) // LCM_STEPS
        self.sigmas: list[float] = trained.sigmas[self._stride - 1 :: self._stride]
        self._logs = np.log(np.asarray(self.sigmas))

    @property
    def lowest(self) -> float:
        return self.sigmas[0]

    @property
    def highest(self) -> float:
        return self.sigmas[-1]

    def time_of(self, sigma: float) -> float:
        """The nearest of the times that the model knows."""
        nearest = int(np.abs(self._logs - math.log(sigma)).argmin())
        return float(nearest * self._stride + self._stride - 1)

    def sigma_at(self, time: float) -> float:
        """Logarithms of levels are interpolated."""
        place = (time - (self._stride - 1)) / self._stride
        return math.exp(float(np.interp(place, np.arange(len(self._logs)), self._logs)))


Schedule = NoiseSchedule | LCMSchedule


def _with_zero_snr(alphas: Tensor) -> Tensor:
    """Algorithm 1 of https://arxiv.org/abs/2305.08891, but for a last alpha that is not quite 0, so
    that its level is a number."""
    roots = alphas.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    roots = (roots - last) * first / (first - last)
    alphas = roots**2
    alphas[-1] = 4.8973451890853435e-08  # what the webui puts there
    return alphas


class Spread(msgspec.Struct, frozen=True):
    """How levels are spread: the webui's "schedule type". `kind`: one of `KINDS`. 0 stands for the
    model's own lowest and highest level, and for the usual `rho`. `alpha`, `beta`: of the
    distribution of the kind beta. `sdxl`: whether the model is one, for align_your_steps."""

    kind: str = "automatic"
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    rho: float = 0.0
    alpha: float = 0.6
    beta: float = 0.6
    drop_last_but_one: bool = False
    sdxl: bool = False

    def follows(self, option: str) -> bool:
        """Whether levels of this kind depend on `sigma_min`, `sigma_max`, `rho`, `alpha` or
        `beta`."""
        return option in KINDS[self.kind]

    def sigmas(self, schedule: Schedule, steps: int) -> Sigmas:
        """The levels of `steps` steps, and what is left in the end: 0, but of kl_optimal. Of the
        kind ddim there may be more steps."""
        count = steps + 1 if self.drop_last_but_one else steps
        sigmas = self._all(schedule, count)
        if self.drop_last_but_one:
            del sigmas[-2]
        return sigmas

    def _all(self, schedule: Schedule, count: int) -> Sigmas:
        low, high = self.sigma_min or schedule.lowest, self.sigma_max or schedule.highest
        trained = schedule.sigmas
        match self.kind:
            case "karras":
                sigmas = karras(count, low, high, self.rho or KARRAS_RHO)
            case "exponential":
                sigmas = _exponential(count, low, high, 1.0)
            case "polyexponential":
                sigmas = _exponential(count, low, high, self.rho or 1.0)
            case "sgm_uniform":
                sigmas = _even_times(schedule, low, high, count + 1)[:-1]
            case "normal":
                sigmas = _even_times(schedule, low, high, count)
            case "simple":
                stride = len(trained) / count
                sigmas = [trained[-(1 + int(number * stride))] for number in range(count)]
            case "ddim":
                sigmas = trained[1 :: max(len(trained) // count, 1)][::-1]
            case "turbo":
                times = np.arange(count, 0, -1) * (len(trained) / count) - 1
                sigmas = [trained[int(time)] for time in np.round(times).clip(0, len(trained) - 1)]
            case "beta":
                shares = scipy.stats.beta.ppf(1 - np.linspace(0, 1, count), self.alpha, self.beta)
                sigmas = (low + shares * (high - low)).tolist()
            case "align_your_steps":
                best = np.log(ALIGN_YOUR_STEPS_SDXL if self.sdxl else ALIGN_YOUR_STEPS)
                places = np.linspace(0, len(best) - 1, count)
                sigmas = np.exp(np.interp(places, np.arange(len(best)), best)).tolist()
            case "kl_optimal":
                angles = np.linspace(math.atan(high), math.atan(low), count + 1)
                return [float(sigma) for sigma in np.tan(angles)]
            case _:
                sigmas = _even_times(schedule, schedule.lowest, schedule.highest, count)
        return [*sigmas, 0.0]


_ENDS = ("sigma_min", "sigma_max")
KINDS: dict[str, tuple[str, ...]] = {
    "automatic": (),
    "uniform": (),
    "karras": (*_ENDS, "rho"),
    "exponential": _ENDS,
    "polyexponential": (*_ENDS, "rho"),
    "sgm_uniform": _ENDS,
    "kl_optimal": _ENDS,
    "align_your_steps": (),
    "simple": (),
    "normal": _ENDS,
    "ddim": (),
    "beta": (*_ENDS, "alpha", "beta"),
    "turbo": (),
}
"""How levels may be spread, and what each way depends on besides the model.

automatic, uniform: training times evenly from the last to the first. normal: as these, between the
ends. sgm_uniform: with one more time at the low end that is left out. karras: Karras et al. 2022,
eq. 5. exponential, polyexponential: even steps of the logarithm, as k-diffusion has them.
kl_optimal: even steps of the arcus tangent, to the lowest level and not to 0,
https://arxiv.org/abs/2404.14507. align_your_steps: between the levels that were found
best. simple, ddim, turbo: training times that are picked at one stride. beta:
https://arxiv.org/abs/2407.12173"""


def karras(count: int, low: float, high: float, rho: float = KARRAS_RHO) -> Sigmas:
    """Without the 0 at the end."""
    ramp = np.linspace(0, 1, count)
    first, last = high ** (1 / rho), low ** (1 / rho)
    sigmas: Sigmas = ((first + ramp * (last - first)) ** rho).tolist()
    return sigmas


def _exponential(count: int, low: float, high: float, rho: float) -> Sigmas:
    ramp = np.linspace(1, 0, count) ** rho
    sigmas: Sigmas = np.exp(ramp * (math.log(high) - math.log(low)) + math.log(low)).tolist()
    return sigmas


def _even_times(schedule: Schedule, low: float, high: float, count: int) -> Sigmas:
    """Without the 0 at the end."""
    first, last = (round(schedule.time_of(sigma), 9) for sigma in (high, low))
    times: list[float] = np.linspace(first, last, count).tolist()
    return [schedule.sigma_at(time) for time in times]
