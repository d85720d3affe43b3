"""Noise of one batch of pictures, drawn on the CPU from one generator per picture: a picture's
noise depends on its seed alone, on any device and in any batch.

What is drawn, and in which order, is as in the webui with its setting "random number generator
source: CPU" or "NV", so that the same seed starts from the same noise there and here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import torch
import torchsde
from torch import Tensor
from torchsde._brownian import brownian_interval

from services.inference.worker.pipelines.sampling.philox import PhiloxGenerator

RandnSource = Literal["CPU", "NV"]
"""CPU: torch's own generator there. NV: that of NVIDIA's GPUs."""

# DPM++ SDE asks torchsde for times that differ from its bounds in the last digit.
warnings.filterwarnings("ignore", module="torchsde")


class Generator(Protocol):
    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """float32, on the CPU."""


class TorchGenerator:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def generator(seed: int, source: RandnSource) -> Generator:
    return PhiloxGenerator(seed) if source == "NV" else TorchGenerator(seed)


_brownian_source: ContextVar[RandnSource] = ContextVar("brownian_source", default="CPU")


def _brownian_randn(size: tuple[int, ...], dtype: torch.dtype, device: Any, seed: int) -> Tensor:
    drawn = generator(int(seed), _brownian_source.get()).randn(size)
    return drawn.to(device=device, dtype=dtype)


# torchsde takes no generator, only seeds. This is how it draws on a CPU itself, but for the source.
brownian_interval._randn = _brownian_randn


@contextmanager
def _brownian_from(source: RandnSource) -> Iterator[None]:
    before = _brownian_source.set(source)
    try:
        yield
    finally:
        _brownian_source.reset(before)


class Noise:
    """`first()` is what the pictures start from; `next()` is what samplers add on the way."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        seeds: Sequence[int],
        device: torch.device,
        *,
        subseeds: Sequence[int] = (),
        subseed_strength: float = 0.0,
        resize_from: tuple[int, int] = (0, 0),
        later_seed_delta: int = 0,
        source: RandnSource = "CPU",
    ) -> None:
        """`shape`: channels, height, width of latents. `resize_from`: height and width, in
        latents, that the noise is first drawn for (0: as `shape`). `later_seed_delta`: added to the
        seeds of `next()` (the webui's "eta noise seed delta"). Seeds count in 64 bits, as torch's
        do."""
        self.shape = shape
        self.seeds = [seed % 2**64 for seed in seeds]
        self.device = device
        self._subseeds = [seed % 2**64 for seed in subseeds]
        self._strength = subseed_strength
        self._drawn_for = (shape[0], *resize_from) if all(resize_from) else shape
        self._later_seed_delta = later_seed_delta
        self.source = source
        self.generators = self._generators(self.seeds)

    def _generators(self, seeds: Sequence[int]) -> list[Generator]:
        return [generator(seed, self.source) for seed in seeds]

    def first(self) -> Tensor:
        """(pictures, *shape), float32."""
        drawn = [self._draw_first(number) for number in range(len(self.seeds))]
        if self._later_seed_delta:
            self.generators = self._generators(
                [(seed + self._later_seed_delta) % 2**64 for seed in self.seeds]
            )
        return torch.stack(drawn).to(self.device)

    def _draw_first(self, number: int) -> Tensor:
        mine, resized = self.generators[number], self._drawn_for != self.shape
        drawing = generator(self.seeds[number], self.source) if resized else mine
        noise = drawing.randn(self._drawn_for)
        if self._strength:
            other = generator(self._subseeds[number], self.source)
            noise = slerp(self._strength, noise, other.randn(self._drawn_for))
        if resized:
            noise = _put_into(mine.randn(self.shape), noise)
        return noise

    def next(self) -> Tensor:
        """(pictures, *shape), float32."""
        drawn = [one.randn(self.shape) for one in self.generators]
        return torch.stack(drawn).to(self.device)

    def brownian(self, sigmas: Sequence[float]) -> Brownian:
        return Brownian(self, sigmas)


class Brownian:
    """Noise for steps of an SDE: of any two steps that meet, the noises belong together, so that a
    run with more steps follows the same path (Brownian trees by torchsde, as in k-diffusion)."""

    def __init__(self, noise: Noise, sigmas: Sequence[float]) -> None:
        """`sigmas`: of the whole run, also where only its last steps are taken: its ends choose the
        path."""
        positive = [sigma for sigma in sigmas if sigma > 0]
        low, high = (torch.tensor(end(positive), dtype=torch.float32) for end in (min, max))
        self._device, self._source = noise.device, noise.source
        with _brownian_from(self._source):
            self._trees = (
                [
                    torchsde.BrownianTree(low, torch.zeros(noise.shape), high, entropy=seed)
                    for seed in noise.seeds
                ]
                if low < high
                else []
            )

    def __call__(self, sigma: float, next_sigma: float) -> Tensor:
        """(pictures, …), of variance 1, for the step from `sigma` down to `next_sigma`."""
        low, high = (torch.tensor(level, dtype=torch.float32) for level in (next_sigma, sigma))
        with _brownian_from(self._source):
            steps = torch.stack([tree(low, high) for tree in self._trees])
        return (-steps / (high - low).sqrt()).to(self._device)


def slerp(strength: float, low: Tensor, high: Tensor) -> Tensor:
    """Between two noises along the sphere that they lie on, so that the result is noise, too."""
    low_unit = low / torch.norm(low, dim=1, keepdim=True)
    high_unit = high / torch.norm(high, dim=1, keepdim=True)
    cosine = (low_unit * high_unit).sum(1)
    if cosine.mean() > 0.9995:
        return low * (1 - strength) + high * strength
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    return (torch.sin((1 - strength) * angle) / sine).unsqueeze(1) * low + (
        torch.sin(strength * angle) / sine
    ).unsqueeze(1) * high


def _put_into(ground: Tensor, noise: Tensor) -> Tensor:
    """`noise` in the middle of `ground`, or the middle of it where it is the larger one."""
    placed = ground.clone()
    (_, height, width), (_, noise_height, noise_width) = ground.shape, noise.shape
    down, right = (height - noise_height) // 2, (width - noise_width) // 2
    rows = noise_height if down >= 0 else noise_height + 2 * down
    columns = noise_width if right >= 0 else noise_width + 2 * right
    top, left = max(down, 0), max(right, 0)
    from_top, from_left = max(-down, 0), max(-right, 0)
    placed[:, top : top + rows, left : left + columns] = noise[
        :, from_top : from_top + rows, from_left : from_left + columns
    ]
    return placed
