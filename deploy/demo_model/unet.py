"""The denoising UNet: v-prediction on latents of several picture sizes, conditioned on text states.

Small pictures are cheap and teach what a caption means; larger ones, mixed in later, teach that a
shape grows with its picture instead of being repeated.
"""

import copy
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from deploy.demo_model.shapes import Scene, random_scene, render_batch, write_caption
from deploy.demo_model.text_encoder import CONFIG as TEXT_CONFIG
from deploy.demo_model.text_encoder import CaptionEncoder, tokenize
from deploy.demo_model.vae import SCALING_FACTOR

log = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 96, 96],
    "layers_per_block": 1,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
    "cross_attention_dim": TEXT_CONFIG["hidden_size"],
    "attention_head_dim": 8,  # SD 1.x means the number of heads by it
}
SCHEDULER_CONFIG: dict[str, Any] = {  # SD's noise schedule
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
EMPTY_CAPTIONS = 0.1  # share of pictures shown without a caption, for classifier-free guidance


@dataclass(frozen=True)
class Resolution:
    """How pictures of one size are trained on.

    The larger the picture, the more noise it takes to hide its content, so the times (0..1000) are
    drawn as 1000 * (1 - u ** time_bias) with u uniform in 0..1.
    """

    pixels: int
    batch_size: int
    pool_size: int
    refreshed: float  # pictures of the pool replaced per batch, on average
    time_bias: float


RESOLUTIONS = (
    Resolution(64, batch_size=64, pool_size=2048, refreshed=2, time_bias=1.4),
    Resolution(128, batch_size=16, pool_size=768, refreshed=0.5, time_bias=1.8),
    Resolution(256, batch_size=4, pool_size=256, refreshed=0.2, time_bias=2.2),
)
# Shares of the steps each resolution gets, from a share of the training time on.
PLAN = ((0.0, (1.0, 0.0, 0.0)), (0.3, (0.3, 0.35, 0.35)), (0.5, (0.25, 0.27, 0.48)))


class LatentPool:
    """Encoded pictures with their scenes, slowly replaced by new ones."""

    def __init__(self, vae: AutoencoderKL, resolution: Resolution, rng: random.Random) -> None:
        self._vae, self._rng, self.resolution = vae, rng, resolution
        side = resolution.pixels // 8
        self._latents = torch.zeros(resolution.pool_size, 4, side, side)
        self._scenes: list[Scene] = [random_scene(rng) for _ in range(resolution.pool_size)]
        self._next = 0
        while self._next < resolution.pool_size:
            self._replace(32)
        self._next = 0

    @torch.no_grad()
    def _replace(self, count: int) -> None:
        """Draws the next `count` pictures anew; at the end it starts over."""
        if self._next >= self.resolution.pool_size:
            self._next = 0
        count = min(count, self.resolution.pool_size - self._next)
        if count == 0:
            return
        scenes = [random_scene(self._rng) for _ in range(count)]
        pictures = render_batch(scenes, self.resolution.pixels, self._rng)
        latents = self._vae.encode(pictures).latent_dist.mean * SCALING_FACTOR
        end = self._next + len(scenes)
        self._latents[self._next : end] = latents
        self._scenes[self._next : end] = scenes
        self._next = end

    def batch(self) -> tuple[Tensor, list[Scene]]:
        """(batch_size, 4, pixels / 8, pixels / 8) latents of about unit variance, and scenes."""
        self._replace(int(self.resolution.refreshed + self._rng.random()))
        chosen = self._rng.sample(range(self.resolution.pool_size), self.resolution.batch_size)
        return self._latents[chosen], [self._scenes[index] for index in chosen]


@dataclass
class UNetTraining:
    """Everything that a training run continues from."""

    unet: UNet2DConditionModel
    averaged: UNet2DConditionModel  # moving average of the weights; the one to release
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    losses: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls) -> "UNetTraining":
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**CONFIG)
        nn.init.zeros_(unet.conv_out.weight)
        averaged = copy.deepcopy(unet).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=0, fused=True
        )
        return cls(unet, averaged, optimizer)

    def state(self) -> dict[str, Any]:
        return {
            "unet": self.unet.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def learning_rate(step: int, done: float) -> float:
    """Warms up over 200 steps, stays, and falls linearly in the last 40 % of the time."""
    peak_rate = 1e-3
    return peak_rate * min(1, (step + 1) / 200) * min(1, (1 - done) / 0.4 + 0.01)


def train_unet(
    training: UNetTraining,
    vae: AutoencoderKL,
    encoder: CaptionEncoder,
    tokenizer: CLIPTokenizer,
    seconds: float,
    every_two_minutes: Callable[[], None],
) -> None:
    """Trains until the run has taken `seconds` in all, earlier sessions included."""
    rng = random.Random()
    schedule = DDIMScheduler(**SCHEDULER_CONFIG)
    pools: dict[int, LatentPool] = {}
    saved = time.monotonic()
    while training.seconds < seconds:
        done = training.seconds / seconds
        shares = next(shares for since, shares in reversed(PLAN) if done >= since)
        resolution = rng.choices(RESOLUTIONS, shares)[0]
        if resolution.pixels not in pools:
            log.info("encoding pictures of %d px", resolution.pixels)
            pools[resolution.pixels] = LatentPool(vae, resolution, rng)

        started = time.monotonic()
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(training.step, done)
        loss = _train_step(training, pools[resolution.pixels], encoder, tokenizer, schedule, rng)
        training.step += 1
        training.seconds += time.monotonic() - started

        training.losses.setdefault(resolution.pixels, []).append(loss)
        if training.step % 100 == 0:
            means = {size: sum(some) / len(some) for size, some in training.losses.items()}
            text = ", ".join(f"{size} px {mean:.4f}" for size, mean in sorted(means.items()))
            log.info("unet step %d, %.0f s, loss %s", training.step, training.seconds, text)
            training.losses.clear()
        if time.monotonic() - saved > 120:
            every_two_minutes()
            saved = time.monotonic()


def _train_step(
    training: UNetTraining,
    pool: LatentPool,
    encoder: CaptionEncoder,
    tokenizer: CLIPTokenizer,
    schedule: DDIMScheduler,
    rng: random.Random,
) -> float:
    latents, scenes = pool.batch()
    captions = [
        "" if rng.random() < EMPTY_CAPTIONS else write_caption(scene, rng).text for scene in scenes
    ]
    with torch.no_grad():
        states = encoder(tokenize(tokenizer, captions))
    uniform = torch.rand(len(scenes))
    times = (1000 * (1 - uniform**pool.resolution.time_bias)).long().clamp(0, 999)
    noise = torch.randn_like(latents)
    noisy = schedule.add_noise(latents, noise, times)
    velocity = schedule.get_velocity(latents, noise, times)

    loss = functional.mse_loss(training.unet(noisy, times, states).sample, velocity)
    training.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(training.unet.parameters(), 1.0)
    training.optimizer.step()

    # The average forgets fast at first, then remembers about a thousand steps.
    weight = max(0.001, 10 / (training.step + 20))
    torch._foreach_lerp_(
        list(training.averaged.parameters()), list(training.unet.parameters()), weight
    )
    return loss.item()
