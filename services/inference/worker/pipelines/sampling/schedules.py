"""Noise levels (sigmas): those a model was trained with, and those that a run steps through.

Latents are in the form of k-diffusion: `x = picture + sigma * noise`. A model that was trained on
`sqrt(a) * picture + sqrt(1 - a) * noise` knows the level `sqrt((1 - a) / a)` as its time t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

Sigmas = list[float]
"""From high to low; the last one is usually 0."""

KARRAS_RHO = 7.0


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
        self._logs = np.log(np.asarray(self.sigmas))

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
    """How levels are spread. `kind`: automatic, uniform, karras, exponential, polyexponential or
    sgm_uniform. 0 stands for the model's own lowest and highest level, and for the usual `rho`."""

    kind: str = "automatic"
    sigma_min: float = 0.0
    sigma_max: float = 0.0
    rho: float = 0.0
    drop_last_but_one: bool = False

    def follows(self, option: str) -> bool:
        """Whether levels of this kind depend on `sigma_min`, `sigma_max` or `rho`."""
        kinds = ("karras", "exponential", "polyexponential")
        return self.kind in kinds and not (option == "rho" and self.kind == "exponential")

    def sigmas(self, schedule: NoiseSchedule, steps: int) -> Sigmas:
        """`steps` levels and a 0.

        automatic, uniform: training times evenly from the last to the first. sgm_uniform: as these,
        with one more time at the low end that is left out. The others: Karras et al. 2022, eq. 5,
        and even steps of the logarithm, as k-diffusion has them.
        """
        count = steps + 1 if self.drop_last_but_one else steps
        low, high = self.sigma_min or schedule.lowest, self.sigma_max or schedule.highest
        if self.kind == "karras":
            sigmas = karras(count, low, high, self.rho or KARRAS_RHO)
        elif self.kind == "exponential":
            sigmas = _exponential(count, low, high, 1.0)
        elif self.kind == "polyexponential":
            sigmas = _exponential(count, low, high, self.rho or 1.0)
        else:
            sigmas = _even_times(schedule, count, self.kind == "sgm_uniform")
        if self.drop_last_but_one:
            del sigmas[-1]
        return [*sigmas, 0.0]


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


def _even_times(schedule: NoiseSchedule, count: int, one_more: bool) -> Sigmas:
    last = len(schedule.sigmas) - 1
    times: Sequence[float] = np.linspace(last, 0, count + one_more).tolist()
    return [schedule.sigma_at(time) for time in times[:count]]
