"""txt2img and img2img: from a webui body to finished PNGs."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Weights and configs come from the registry, never from a hub; read as the libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import msgspec
import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from services.inference.worker.pipelines import JobFailure, Progress, Result, file_of
from services.inference.worker.pipelines.checkpoints import Checkpoints, LoadedCheckpoint
from services.inference.worker.pipelines.images import fit, on_white, png, read_picture
from services.inference.worker.pipelines.infotext import infotext, param_json, timestamp
from services.inference.worker.pipelines.params import (
    PaintingParams,
    parse_painting,
    printable,
    short,
)
from services.inference.worker.pipelines.prompts import encode_pair, plain_prompt
from services.inference.worker.pipelines.samplers import build_scheduler
from shared.contracts.inference import RunJob

CHECKPOINT_TYPE = "Stable-diffusion"
_UNNOTICED = ("rembg",)
"""Types of models that a txt2img or img2img job may name without a word about it."""


class Conditioning(msgspec.Struct, frozen=True):
    """What steers the UNet, (1, 77 * chunks, width) each; and the pictures to start from, encoded:
    (1, 4, height / 8, width / 8) each."""

    positive: Tensor
    negative: Tensor
    init_latents: list[Tensor]


class Stopwatch:
    """Seconds per stage; a stage may come several times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)


class Painter:
    """Half precision on a GPU; full precision on a CPU, which is slower with halves."""

    def __init__(self, device: str, cache: Path) -> None:
        self._device = torch.device(device)
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        # The same body is to give the same pixels again.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        # DPM++ SDE asks torchsde for times that differ from its bounds in the last digit.
        warnings.filterwarnings("ignore", module="torchsde")
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._checkpoints = Checkpoints(self._device, dtype, cache)

    def paint(
        self, job: RunJob, body: bytes, files: Mapping[str, Path], progress: Progress
    ) -> Result:
        """Raises JobFailure; what `progress` raises comes through."""
        params, raw, remarks = parse_painting(body, job.task_type)
        file_name = _choose_checkpoint(job, params)
        remarks += [
            f"{model.type} {model.name}: no effect in this version"
            for model in job.models
            if model.type not in (CHECKPOINT_TYPE, *_UNNOTICED)
            and (model.type, model.name) not in (("VAE", "Automatic"), ("VAE", "None"))
        ]
        prompt, more = plain_prompt(params.prompt)
        negative, yet_more = plain_prompt(params.negative_prompt)
        remarks += list(dict.fromkeys(more + yet_more))
        seed = secrets.randbelow(2**32 - 1) if params.seed == -1 else params.seed
        params = msgspec.structs.replace(
            params, prompt=prompt.strip(), negative_prompt=negative.strip(), seed=seed
        )
        watch = Stopwatch()
        try:
            with watch.stage("load"):
                checkpoint = self._checkpoints.get(file_of(file_name, files), file_name)
            images, texts = self._paint(job.task_type, params, checkpoint, progress, watch)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._checkpoints.forget()
            raise JobFailure(
                f"not enough memory on {self._device} for {params.batch_size} picture(s) of"
                f" {params.width}x{params.height} at once; try a smaller batch_size or size"
            ) from error
        info = _info(job.task_type, params, checkpoint, texts)
        answer = param_json(printable({**raw, "seed": seed}), info, len(images))
        return Result(images, answer, watch.seconds, remarks)

    def _paint(
        self,
        task_type: str,
        params: PaintingParams,
        checkpoint: LoadedCheckpoint,
        progress: Progress,
        watch: Stopwatch,
    ) -> tuple[list[bytes], list[str]]:
        """The PNGs and their infotexts."""
        images: list[bytes] = []
        texts: list[str] = []
        with watch.stage("encode"):
            conditioning = self._condition(task_type, params, checkpoint)
        for round_ in range(params.n_iter):
            first = params.seed + round_ * params.batch_size
            seeds = [first + number for number in range(params.batch_size)]
            with watch.stage("render"):
                latents = _render(params, checkpoint, conditioning, seeds, round_, progress)
            for number, picture_seed in enumerate(seeds):
                with watch.stage("decode"):
                    picture = _decode(checkpoint, latents[number : number + 1])
                with watch.stage("save"):
                    text = _infotext(task_type, params, checkpoint, picture_seed)
                    images.append(png(picture, text))
                    texts.append(text)
        return images, texts

    def _condition(
        self, task_type: str, params: PaintingParams, checkpoint: LoadedCheckpoint
    ) -> Conditioning:
        positive, negative = encode_pair(
            params.prompt,
            params.negative_prompt,
            checkpoint.tokenizer,
            checkpoint.text_encoder,
            params.override_settings.CLIP_stop_at_last_layers,
        )
        pictures = params.init_images if task_type == "img2img" else []
        init_latents = []
        for number, text in enumerate(pictures):
            picture = on_white(read_picture(text, f"init_images[{number}]"))
            fitted = fit(picture, params.width, params.height, params.resize_mode)
            init_latents.append(_encode(checkpoint, fitted))
        return Conditioning(positive, negative, init_latents)


def _choose_checkpoint(job: RunJob, params: PaintingParams) -> str:
    """The one that `override_settings` asks for, else the first one that the job names."""
    names = [model.name for model in job.models if model.type == CHECKPOINT_TYPE]
    if not names:
        raise JobFailure(f"the job names no checkpoint of type {CHECKPOINT_TYPE} in models")
    wanted = params.override_settings.sd_model_checkpoint
    if not wanted:
        return names[0]
    # The webui's titles carry a hash: "name.safetensors [0123456789]".
    stem = Path(wanted.split(" [")[0]).name.removesuffix(".safetensors").removesuffix(".ckpt")
    for name in names:
        if Path(name).stem == stem:
            return name
    raise JobFailure(
        f"override_settings.sd_model_checkpoint: got {short(wanted)},"
        f" allowed is one that the job names in models: {', '.join(names)}"
    )


def _render(
    params: PaintingParams,
    checkpoint: LoadedCheckpoint,
    conditioning: Conditioning,
    seeds: list[int],
    round_: int,
    progress: Progress,
) -> Tensor:
    """(batch, 4, height / 8, width / 8). Pipeline and scheduler are made anew each time: both keep
    state, and a job that was stopped in the middle must leave none behind."""
    sampler, steps = params.sampler, params.steps
    image_to_image = bool(conditioning.init_latents)
    pipeline_type = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    pipeline = pipeline_type(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=build_scheduler(sampler, checkpoint.noise_schedule, steps, seeds),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def on_step(pipe: Any, step: int, _: object, state: dict[str, Any]) -> dict[str, Any]:
        progress(round_ * pipe.num_timesteps + step + 1, params.n_iter * pipe.num_timesteps)
        return state

    batch = len(seeds)
    # One generator per picture, on the CPU: a picture depends on its own seed alone, on any device
    # and in any batch.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments: dict[str, Any] = {
        "prompt_embeds": conditioning.positive.repeat(batch, 1, 1),
        "negative_prompt_embeds": conditioning.negative.repeat(batch, 1, 1),
        "num_inference_steps": steps,
        "guidance_scale": params.cfg_scale,
        "generator": generators,
        "output_type": "latent",
        "callback_on_step_end": on_step,
    }
    if image_to_image:
        starts = conditioning.init_latents
        taken = sampler.img2img_steps(steps, params.denoising_strength)
        arguments |= {
            "image": torch.cat([starts[number % len(starts)] for number in range(batch)]),
            "strength": min(1.0, (taken + 0.5) / steps),  # diffusers rounds steps * strength down
        }
    else:
        factor = pipeline.vae_scale_factor
        channels = checkpoint.unet.config.in_channels
        shape = (1, channels, params.height // factor, params.width // factor)
        noise = torch.cat([torch.randn(shape, generator=one) for one in generators])
        arguments["latents"] = noise.to(checkpoint.unet.device, checkpoint.unet.dtype)
    latents: Tensor = pipeline(**arguments).images
    if not torch.isfinite(latents).all():
        raise JobFailure(
            f"the picture came out as no numbers: {checkpoint.name} may be damaged,"
            f" or the attention in the prompt too strong"
        )
    return latents


@torch.no_grad()
def _encode(checkpoint: LoadedCheckpoint, picture: Image.Image) -> Tensor:
    """A picture's latents: the middle of what the VAE gives, so that no seed has a part in it."""
    vae = checkpoint.vae
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    pixels = pixels.to(vae.device, torch.float32) / 127.5 - 1
    latents: Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return latents * float(vae.config.scaling_factor)


@torch.no_grad()
def _decode(checkpoint: LoadedCheckpoint, latents: Tensor) -> Image.Image:
    vae = checkpoint.vae
    scaled = latents / vae.config.scaling_factor
    pixels: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    if not torch.isfinite(pixels).all() and vae.dtype == torch.float16:
        vae.float()  # some VAEs leave the range of halves; this one stays in full precision
        pixels = vae.decode(scaled.float(), return_dict=False)[0]
    unit = (pixels[0].float() * 0.5 + 0.5).clamp(0, 1)
    rows = (unit * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(rows)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )


def _infotext(
    task_type: str, params: PaintingParams, checkpoint: LoadedCheckpoint, seed: int
) -> str:
    clip_skip = params.override_settings.CLIP_stop_at_last_layers
    return infotext(
        params.prompt,
        params.negative_prompt,
        {
            "Steps": params.steps,
            "Sampler": params.sampler.name,
            "CFG scale": params.cfg_scale,
            "Seed": seed,
            "Size": f"{params.width}x{params.height}",
            "Model hash": checkpoint.short_hash,
            "Model": checkpoint.name,
            "Denoising strength": params.denoising_strength if task_type == "img2img" else None,
            "Clip skip": clip_skip if clip_skip > 1 else None,
            "RNG": "CPU",
        },
    )


def _info(
    task_type: str, params: PaintingParams, checkpoint: LoadedCheckpoint, texts: list[str]
) -> dict[str, Any]:
    """The fields of the webui's `Processed.js()` that mean something here."""
    count = len(texts)
    seeds = [params.seed + number for number in range(count)]
    return {
        "prompt": params.prompt,
        "all_prompts": [params.prompt] * count,
        "negative_prompt": params.negative_prompt,
        "all_negative_prompts": [params.negative_prompt] * count,
        "seed": params.seed,
        "all_seeds": seeds,
        "subseed": params.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": params.width,
        "height": params.height,
        "sampler_name": params.sampler.name,
        "cfg_scale": params.cfg_scale,
        "steps": params.steps,
        "batch_size": params.batch_size,
        "sd_model_name": checkpoint.name,
        "sd_model_hash": checkpoint.short_hash,
        "denoising_strength": params.denoising_strength if task_type == "img2img" else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": timestamp(datetime.now(UTC)),
        "clip_skip": params.override_settings.CLIP_stop_at_last_layers,
        "is_using_inpainting_conditioning": False,
    }
