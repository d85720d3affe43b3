"""A 1M-parameter VAE in SD's layout: 8 pixels to a latent, 4 latent channels.

Random weights need hours to learn what a colour is. `warm_start` therefore sets the weights so that
the untrained VAE already is "average each 8x8 block, enlarge it smoothly", and training only has to
add the edges.
"""

import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from deploy.demo_model.shapes import random_scene, render

log = logging.getLogger(__name__)

SCALING_FACTOR = 0.18215  # SD 1.x multiplies encoded latents by this to bring them to unit variance
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 1,
    "sample_size": 128,
    "scaling_factor": SCALING_FACTOR,
}
LOG_VARIANCE = -17.0  # of every latent: the encoder is deterministic, like SD's nearly is
LATENT_NOISE = 0.1  # what the decoder learns to bear; raw latents have a deviation of about 3
PATCH = 64  # pixels, the side of a training picture


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(**CONFIG)


# ---------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------

# The hidden layers carry +RGB in channels 0-2 and -RGB in 3-5, because silu(u) - silu(-u) = u:
# the pair passes through the activation unharmed. Channels 6 and 7 hold +-OFFSET, far larger than
# any colour, so that the group norm divides by (almost) a constant.
CARRIED = 8
OFFSET = 8.0


@torch.no_grad()
def warm_start(vae: AutoencoderKL) -> None:
    """Sets the weights so that the VAE averages 8x8 blocks and enlarges them smoothly."""
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    for name, layer in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):  # residual branches add nothing yet
            _clear(layer, len(layer.weight))
        elif name.endswith("conv_shortcut"):
            _carry(layer, torch.ones(1, 1))
        elif name.endswith("downsamplers.0.conv"):
            _carry(layer, average)
        elif name.endswith("upsamplers.0.conv"):
            _carry(layer, torch.outer(binomial, binomial))
            center = torch.zeros(3, 3)
            center[1, 1] = 1
            for channel in (6, 7):  # smoothing the offset would weaken it at the border
                layer.weight[channel, channel] = center
    for half in (vae.encoder, vae.decoder):
        _split_colors(half.conv_in)
        _join_colors(half.conv_out)
    for mixer in (vae.quant_conv, vae.post_quant_conv):
        _clear(mixer, len(mixer.weight))
        for channel in range(4):
            mixer.weight[channel, channel] = 1
    _fix_variance(vae)


def _clear(layer: Any, first: int) -> None:
    """Zeroes the biases and the first output channels, and halves the weights of the others."""
    layer.weight[:first] = 0
    layer.weight[first:] *= 0.5
    layer.bias.zero_()


def _carry(layer: Any, kernel: Tensor) -> None:
    """Passes the carried channels through `kernel`, each to itself."""
    _clear(layer, CARRIED)
    for channel in range(CARRIED):
        layer.weight[channel, channel] = kernel


def _split_colors(layer: Any) -> None:
    _clear(layer, CARRIED)
    for color in range(3):
        layer.weight[color, color, 1, 1] = 1
        layer.weight[3 + color, color, 1, 1] = -1
    layer.bias[6], layer.bias[7] = OFFSET, -OFFSET


def _join_colors(layer: Any) -> None:
    """The norm before this layer divided by the deviation of all channels; undo that."""
    _clear(layer, 3)
    deviation = OFFSET * (2 / layer.in_channels) ** 0.5
    for color in range(3):
        layer.weight[color, color, 1, 1] = deviation
        layer.weight[color, 3 + color, 1, 1] = -deviation


@torch.no_grad()
def _fix_variance(vae: AutoencoderKL) -> None:
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = LOG_VARIANCE


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def load_photos(folder: Path) -> list[Tensor]:
    """Every photo at three sizes (short side 160, 256, 384 px), (3, h, w) in -1..1."""
    photos = []
    for path in sorted(folder.iterdir()):
        picture = Image.open(path).convert("RGB")
        for short_side in (160, 256, 384):
            scale = short_side / min(picture.size)
            smaller = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            pixels = torch.from_numpy(np.array(smaller)).permute(2, 0, 1)
            photos.append(pixels / 127.5 - 1)
    return photos


def _random_patch(picture: Tensor, rng: random.Random) -> Tensor:
    top, left = (rng.randint(0, extent - PATCH) for extent in picture.shape[1:])
    return picture[:, top : top + PATCH, left : left + PATCH]


def _training_batch(photos: list[Tensor], rng: random.Random) -> Tensor:
    """Eight (3, 64, 64) pictures: whole small ones, parts of larger ones, parts of photos."""
    batch = [render(random_scene(rng), PATCH, rng) for _ in range(5)]
    batch += [_random_patch(render(random_scene(rng), 128, rng), rng) for _ in range(2)]
    if photos:
        batch.append(_random_patch(rng.choice(photos), rng))
    return torch.stack(batch)


def _edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=2), pictures.diff(dim=3)


def train_vae(
    vae: AutoencoderKL, seconds: float, photos: list[Tensor], peak_rate: float = 2e-3
) -> None:
    """Trains for a wall-clock time; the learning rate falls to almost nothing over it.

    `photos` (see `load_photos`) may be empty: the VAE then knows flat shapes only, and
    image-to-image on photos comes out blurred.
    """
    rng = random.Random()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, (step + 1) / 30) * (1 - done) ** 0.8 + 1e-5
        pictures = _training_batch(photos, rng)
        latents = vae.encode(pictures).latent_dist.mean
        decoded = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        pixel_loss = functional.l1_loss(decoded, pictures) + functional.mse_loss(decoded, pictures)
        edge_loss = sum(
            functional.l1_loss(got, wanted)
            for got, wanted in zip(_edges(decoded), _edges(pictures), strict=True)
        )
        loss = pixel_loss + 0.5 * edge_loss + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        _fix_variance(vae)
        step += 1
        if step % 50 == 0:
            log.info("vae step %d, %.0f%%, loss %.4f", step, 100 * done, loss.item())


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Rescales the latents so that SD's scaling factor brings those of `pictures` to unit variance.

    Only the two 1x1 convolutions around the latents change; decoded pictures stay the same.
    """
    latents = vae.encode(pictures).latent_dist.mean
    scale = 1 / (SCALING_FACTOR * latents.std())
    vae.quant_conv.weight[:4] *= scale
    vae.quant_conv.bias[:4] *= scale
    vae.post_quant_conv.weight /= scale
