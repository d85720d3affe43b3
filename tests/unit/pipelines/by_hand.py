"""The same pictures computed without the engine: plain diffusers and transformers, step by step.

Of our own code only constants are read, and the folder of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from services.inference.worker.pipelines.models.components import TOKENIZER
from shared.weights.kinds import REFINER, SD1, SDXL
from tests.unit.pipelines.bench import SIDE, USUAL, Pixels
from tests.unit.pipelines.tiny import Tiny

TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Predict = Callable[[Tensor, Any], Tensor]
"""(latents as the model sees them, training time) -> what it predicts of them, guided."""


# Noise and steps


def noise(seed: int = 7, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def euler(model: Tiny) -> Any:
    """The levels of k-diffusion: training times from the last to the first, both with them. Steps
    that divide them evenly (4, 10, 28) meet levels of the table, so nothing is interpolated."""
    prediction = model.configs["scheduler"]["prediction_type"]
    return EulerDiscreteScheduler(
        **TRAINED, timestep_spacing="linspace", steps_offset=1, prediction_type=prediction
    )


def run(
    model: Tiny,
    predict: Predict,
    drawn: Tensor,
    steps: int = 4,
    *,
    picture: Tensor | None = None,
    last: int = 0,
    after: Callable[[Tensor], Tensor] = lambda denoised: denoised,
) -> Tensor:
    """Euler from noise; or from the latents of a picture and noise, of which the `last` of the
    steps are run. `after`: what becomes of the denoised latents of a step."""
    scheduler = euler(model)
    scheduler.set_timesteps(steps)
    first = 0
    x: Tensor = drawn * scheduler.sigmas[0]
    if picture is not None:
        first = steps - last
        scheduler.set_begin_index(first)
        x = picture + drawn * scheduler.sigmas[first]
    for sigma, time in zip(scheduler.sigmas[first:], scheduler.timesteps[first:], strict=False):
        prediction = predict(scheduler.scale_model_input(x, time), time)
        denoised = scheduler.step(prediction, time, x).pred_original_sample
        changed = after(denoised)
        # The scheduler takes predictions, so a step to changed latents is one of a changed one.
        if changed is not denoised:
            prediction = (x - changed) / sigma
            if scheduler.config.prediction_type == "v_prediction":
                prediction = (x / (sigma**2 + 1) - changed) * (sigma**2 + 1).sqrt() / sigma
        scheduler._step_index -= 1
        x = scheduler.step(prediction, time, x, return_dict=False)[0]
    return x


def ddim(
    model: Tiny,
    predict: Predict,
    x: Tensor,
    times: Sequence[int],
    *,
    before: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """From the first of the training times to the last one. `x`: as models know latents. `before`:
    what becomes of them before the model is asked."""
    shares = EulerDiscreteScheduler(**TRAINED).alphas_cumprod.double()
    for time, then in pairwise(times):
        share, next_share = shares[time], shares[then]
        seen = before(x)
        noise = predict(seen.float(), torch.tensor(time))
        if model.configs["scheduler"]["prediction_type"] == "v_prediction":
            noise = share**0.5 * noise + (1 - share) ** 0.5 * seen
        picture = (x - (1 - share) ** 0.5 * noise) / share**0.5
        x = next_share**0.5 * picture + (1 - next_share) ** 0.5 * noise
    return x.float()


def lcm(
    predict: Predict, levels: Sequence[float], times: Sequence[int], prediction_type: str
) -> Tensor:
    """Jumps to the picture, of which a little is what it came from, and puts new noise on it."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator) * levels[0]
    for number, (level, time) in enumerate(zip(levels, times, strict=True)):
        square = 1 + level**2
        said = predict(x / square**0.5, torch.tensor(time))
        denoised = x - level * said
        if prediction_type == "v_prediction":
            denoised = x / square - said * (level / square**0.5)
        scaled = 10 * time
        x = denoised * scaled / (scaled**2 + 0.25) ** 0.5 + x * 0.25 / (scaled**2 + 0.25)
        if number < len(times) - 1:
            x = x + levels[number + 1] * torch.randn(x.shape, generator=generator)
    return x


# Texts


class Text(msgspec.Struct, frozen=True):
    """`pooled`: of SDXL and its refiner."""

    context: Tensor
    pooled: Tensor | None = None

    def zeros(self) -> Text:
        assert self.pooled is not None
        return Text(torch.zeros_like(self.context), torch.zeros_like(self.pooled))


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    return CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True, pad_token=pad)


def words(text: str) -> list[int]:
    """The tokens of a text alone."""
    tokens: list[int] = tokenizer()(text, add_special_tokens=False).input_ids
    return tokens


def filled_up(tokens: Sequence[int], pad: int) -> list[int]:
    """77, with those for start and end."""
    start, end = 49_406, 49_407
    return [start, *tokens, end, *[pad] * (75 - len(tokens))]


def encode(
    model: Tiny,
    text: str | Sequence[int],
    *,
    clip_skip: int = 1,
    weights: Sequence[float] = (),
    restores_mean: bool = True,
) -> Text:
    """A text of up to 75 tokens, or its tokens. `weights`: the attention of each."""
    tokens = words(text) if isinstance(text, str) else text
    outputs = {
        name: _outputs(encoder, filled_up(tokens, _PADS[name]))
        for name, encoder in model.modules.items()
        if name in _PADS
    }
    if model.family in (SDXL, REFINER):
        states = [output.hidden_states[-2] for output in outputs.values()]
        pooled = outputs["text_encoder_2"].text_embeds
        attended = [_attended(one, weights, restores_mean) for one in states]
        return Text(torch.cat(attended, -1), pooled)
    states = [output.last_hidden_state for output in outputs.values()]
    if clip_skip > 1:
        states = [_norm(model.text_encoder)(outputs["text_encoder"].hidden_states[-clip_skip])]
    return Text(_attended(states[0], weights, restores_mean))


_PADS = {"text_encoder": 49_407, "text_encoder_2": 0}


def one_after_the_other(texts: Sequence[Text]) -> Text:
    """Chunks of one long text; it goes by the name of the first."""
    return Text(torch.cat([text.context for text in texts], 1), texts[0].pooled)


def _attended(states: Tensor, weights: Sequence[float], restores_mean: bool) -> Tensor:
    """Each token's states times its weight, and then all so that their mean is what it was."""
    factors = torch.tensor([1.0, *weights, *[1.0] * (76 - len(weights))])
    changed = states * factors[None, :, None]
    if not restores_mean:
        return changed
    return changed * (states.mean() / changed.mean())


@torch.no_grad()
def _outputs(encoder: Any, tokens: Sequence[int]) -> Any:
    return encoder(torch.tensor([tokens]), output_hidden_states=True)


def _norm(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).final_layer_norm


# UNets


@torch.no_grad()
def ask(
    model: Tiny, x: Tensor, time: Any, text: Text, sizes: Sequence[float] = (), **more: Any
) -> Tensor:
    """One UNet about one text. `sizes`: what SDXL is told, if not the usual."""
    if text.pooled is not None:
        usual = (SIDE, SIDE, 0, 0, SIDE, SIDE) if model.family == SDXL else (SIDE, SIDE, 0, 0, 6)
        ids = torch.tensor([list(sizes or usual)], dtype=torch.float32)
        more["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids}
    prediction: Tensor = model.unet(x, time, text.context, return_dict=False, **more)[0]
    return prediction


def guided(
    model: Tiny,
    positive: Text | Sequence[tuple[Text, float]],
    negative: Text,
    *,
    scale: float = USUAL["cfg_scale"],
    sizes: Sequence[float] = (),
    negative_sizes: Sequence[float] = (),
    beside: Tensor | None = None,
) -> Predict:
    """Classifier-free guidance, by one text or by several with weights. `beside`: what inpainting
    models see beside the latents."""
    wanted = [(positive, 1.0)] if isinstance(positive, Text) else positive

    def predict(x: Tensor, time: Any) -> Tensor:
        if beside is not None:
            x = torch.cat([x, beside], 1)
        no = ask(model, x, time, negative, negative_sizes or sizes)
        result = no.clone()
        for text, weight in wanted:
            result += scale * weight * (ask(model, x, time, text, sizes) - no)
        return result

    return predict


def usually_guided(model: Tiny, **more: Any) -> Predict:
    """By the texts that a test's body has if it says nothing else."""
    texts = encode(model, USUAL["prompt"]), encode(model, USUAL["negative_prompt"])
    return guided(model, *texts, **more)


def in_turn(predictions: Sequence[Predict]) -> Predict:
    """One for each call."""
    left = list(predictions)
    return lambda x, time: left.pop(0)(x, time)


# Pictures


@torch.no_grad()
def decode(model: Tiny, latents: Tensor) -> Pixels:
    pixels = model.vae.decode(latents / model.vae.config.scaling_factor, return_dict=False)[0]
    unit = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    levels: Pixels = (unit * 255).round().astype(np.int16)
    return levels


def picture_of(levels: Pixels) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8))


def tensor_of(picture: Image.Image) -> Tensor:
    """(1, 3, height, width), -1 to 1."""
    levels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    return levels / 127.5 - 1


@torch.no_grad()
def encode_picture(model: Tiny, picture: Image.Image | Tensor) -> Tensor:
    """The middle of what the VAE gives."""
    pixels = picture if isinstance(picture, Tensor) else tensor_of(picture)
    latents: Tensor = model.vae.encode(pixels).latent_dist.mode()
    return latents * float(model.vae.config.scaling_factor)


# Whole pipelines


def pipeline(model: Tiny, scheduler: Any = None) -> Any:
    """diffusers' own for text to image."""
    scheduler = scheduler or euler(model)
    if model.family == SDXL:
        made = StableDiffusionXLPipeline(
            model.vae,
            model.text_encoder,
            model.text_encoder_2,
            tokenizer(),
            tokenizer("!"),
            model.unet,
            scheduler,
            add_watermarker=False,
        )
    else:
        made = StableDiffusionPipeline(
            model.vae,
            model.text_encoder or model.text_encoder_2,
            tokenizer() if model.family == SD1 else tokenizer("!"),
            model.unet,
            scheduler,
            None,
            None,
            requires_safety_checker=False,
        )
    made.set_progress_bar_config(disable=True)
    return made
