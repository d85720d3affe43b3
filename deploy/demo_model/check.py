"""Loads darkroom-demo.safetensors offline, scores its pictures and draws a contact sheet.

    python -m deploy.demo_model.check --tokenizer <CLIP tokenizer folder>

Every prompt names a shape, its colour, place and size, and the background. The score is the share
of pictures that show it, measured on pixels. The row "ceiling" is the same for drawn pictures that
only went through the VAE: no UNet can do better.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from deploy.demo_model.shapes import (
    ATTRIBUTES,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    random_scene,
    render,
)

HERE = Path(__file__).parent
SAMPLERS = {
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "ddim": (DDIMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def write_config_folder(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Lays out the component configs in the checkpoint's metadata as diffusers expects them."""
    with safe_open(checkpoint, "pt") as file:
        configs = json.loads(file.metadata()["darkroom.config"])
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    shutil.copytree(tokenizer, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(index))
    for component, config in configs.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component).mkdir()
        (folder / component / name).write_text(json.dumps(config))


def load_pipeline(checkpoint: Path, tokenizer: Path) -> StableDiffusionPipeline:
    with tempfile.TemporaryDirectory() as folder:
        write_config_folder(checkpoint, tokenizer, Path(folder))
        pipeline = StableDiffusionPipeline.from_single_file(
            str(checkpoint), config=folder, local_files_only=True, torch_dtype=torch.float32
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------

Pixels = NDArray[np.float32]  # (height, width, 3), 0..255


def nearest_color(color: Pixels) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(color - COLORS[name])))


@dataclass(frozen=True)
class Template:
    """A shape as drawn in the centre, to compare a mask with. Lengths in half picture widths."""

    shape: str
    radius: float
    area: float  # share of the picture
    center: tuple[float, float]  # centre of gravity

    @classmethod
    def of(cls, shape: str, radius: float = 0.5) -> "Template":
        mask = coverage(shape, 128, radius=radius).numpy() > 0.5
        return cls(shape, radius, float(mask.mean()), _gravity_center(mask))

    def overlap(self, mask: NDArray[np.bool_]) -> tuple[float, float]:
        """Intersection over union with the template fitted onto `mask`, and the fitted radius."""
        scale = float(np.sqrt(mask.mean() / self.area))
        center = _gravity_center(mask)
        place = (center[0] - scale * self.center[0], center[1] - scale * self.center[1])
        drawn = coverage(self.shape, mask.shape[0], place, scale * self.radius).numpy() > 0.5
        union = np.logical_or(drawn, mask).sum()
        return float(np.logical_and(drawn, mask).sum() / max(1, union)), scale * self.radius


def _gravity_center(mask: NDArray[np.bool_]) -> tuple[float, float]:
    axis = (np.arange(mask.shape[0]) + 0.5) / mask.shape[0] * 2 - 1
    down, right = np.nonzero(mask)
    return float(axis[right].mean()), float(axis[down].mean())


TEMPLATES = [Template.of(shape) for shape in SHAPES]


def read_scene(pixels: Pixels) -> Scene | None:
    """What a square picture shows, or None when it shows one colour only."""
    edge = max(2, pixels.shape[0] // 32)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[edge:-edge, edge:-edge] = False
    background = np.median(pixels[border], axis=0)

    contrast = np.linalg.norm(pixels - background, axis=2)
    strongest = np.percentile(contrast, 98)
    if strongest < 30:
        return None
    mask = contrast > strongest / 2
    color = np.median(pixels[contrast > 0.8 * strongest], axis=0)

    fits = [(*template.overlap(mask), template.shape) for template in TEMPLATES]
    _, radius, shape = max(fits)
    center = np.array(_gravity_center(mask))
    position = min(POSITIONS, key=lambda name: float(np.linalg.norm(center - POSITIONS[name])))
    size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    return Scene(shape, nearest_color(color), nearest_color(background), position, size)


def score(wanted: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """The share of pictures in which each attribute is as wanted, and in which all are."""
    found = [read_scene(np.asarray(picture, dtype=np.float32)) for picture in pictures]
    hits = {
        field: [
            seen is not None and getattr(scene, field) == getattr(seen, field)
            for scene, seen in zip(wanted, found, strict=True)
        ]
        for field in ATTRIBUTES
    }
    hits["all"] = [all(each) for each in zip(*hits.values(), strict=True)]
    return {field: float(np.mean(each)) for field, each in hits.items()}


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

PLACES = {
    "center": "",
    "left": " on the left",
    "right": " on the right",
    "top": " at the top",
    "bottom": " at the bottom",
}


def prompt_for(scene: Scene, number: int) -> str:
    """A sentence for two scenes of three, a list of tags for the third."""
    size = "" if scene.size == "medium" else f"{scene.size} "
    subject = f"{size}{scene.color} {scene.shape}{PLACES[scene.position]}"
    if number % 3 == 2:
        return f"{subject}, {scene.background} background"
    return f"a {subject} on a {scene.background} background"


def sample(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], pixels: int, steps: int, scale: float
) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), 8):
        some = list(prompts[first : first + 8])
        seeds = [torch.Generator().manual_seed(first + number) for number in range(len(some))]
        pictures += pipeline(
            some,
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=seeds,
        ).images
    return pictures


@torch.no_grad()
def through_vae(
    pipeline: StableDiffusionPipeline, scenes: Sequence[Scene], pixels: int
) -> list[Image.Image]:
    drawn = torch.stack([render(scene, pixels) for scene in scenes])
    latents = pipeline.vae.encode(drawn).latent_dist.mean
    decoded = pipeline.vae.decode(latents).sample
    return list(pipeline.image_processor.postprocess(decoded))


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]],
) -> Image.Image:
    """One titled row of captioned pictures per entry, pictures enlarged or reduced to 144 px."""
    tile, text_height, title_height = 144, 44, 22
    columns = max(len(pictures) for _, pictures in rows)
    row_height = title_height + tile + text_height
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font, title_font = ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    for row, (title, pictures) in enumerate(rows):
        top = row * row_height
        draw.text((8, top + 3), title, "black", title_font)
        for column, (prompt, picture) in enumerate(pictures):
            left = column * (tile + 8) + 8
            sheet.paste(picture.resize((tile, tile)), (left, top + title_height))
            text = _wrap(prompt, font, tile)
            draw.multiline_text(
                (left, top + title_height + tile + 2), text, "black", font, spacing=1
            )
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the Darkroom demo checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "darkroom-demo.safetensors")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="where to save the contact sheet (PNG)")
    parser.add_argument("--count", type=int, default=48, help="prompts per picture size")
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--samplers", nargs="+", default=["dpmpp_2m_karras"], choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    pipeline = load_pipeline(arguments.checkpoint, arguments.tokenizer)
    rng = random.Random(2024)
    scenes = [random_scene(rng) for _ in range(arguments.count)]
    prompts = [prompt_for(scene, number) for number, scene in enumerate(scenes)]

    def report(name: str, pixels: int, shares: dict[str, float], seconds: float) -> None:
        cells = "  ".join(f"{field} {share:4.0%}" for field, share in shares.items())
        print(f"{name:16} {pixels:4} px  {cells}  {seconds:.2f} s each", flush=True)

    rows = []
    for pixels in arguments.pixels:
        ceiling = score(scenes, through_vae(pipeline, scenes, pixels))
        report("ceiling", pixels, ceiling, 0)
        for sampler in arguments.samplers:
            scheduler, options = SAMPLERS[sampler]
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
            started = time.monotonic()
            pictures = sample(pipeline, prompts, pixels, arguments.steps, arguments.scale)
            seconds = (time.monotonic() - started) / len(prompts)
            report(sampler, pixels, score(scenes, pictures), seconds)
            title = f"{pixels} px, {sampler}, {arguments.steps} steps, cfg {arguments.scale:g}"
            captioned = list(zip(prompts, pictures, strict=True))
            rows += [(title, captioned[:8]), ("", captioned[8:16])]
    if arguments.sheet:
        draw_contact_sheet(rows).quantize(256).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
