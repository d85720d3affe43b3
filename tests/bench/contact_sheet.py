"""Every sampler and every feature on the demo checkpoint, as one sheet to look at.

python -m tests.bench.contact_sheet [FILE.png]
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from deploy.local.demo import CHECKPOINT
from services.inference.worker.pipelines import Listener
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.pipelines.sampling.names import SAMPLERS
from shared.contracts.inference import RunJob
from tests.weights import files_of, used

SIZE, COLUMNS, LABEL = 128, 8, 30
HEART = "a red heart on a yellow background"
BODY: dict[str, Any] = {
    "prompt": HEART,
    "steps": 20,
    "sampler_name": "Euler a",
    "cfg_scale": 4,
    "seed": 7,
    "width": SIZE,
    "height": SIZE,
}


def main(file: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        pictures = list(_pictures(Engine("cpu", Path(cache), Listener())))
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * (SIZE + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, picture) in enumerate(pictures):
        x, y = number % COLUMNS * SIZE, number // COLUMNS * (SIZE + LABEL)
        sheet.paste(picture.resize((SIZE, SIZE)), (x, y + LABEL))
        lines = textwrap.fill(name, 18)
        draw.text((x + SIZE // 2, y + LABEL // 2), lines, "black", font, "mm", align="center")
    sheet.save(file)
    print(f"{len(pictures)} pictures in {file}")


def _pictures(engine: Engine) -> Any:
    for name in SAMPLERS:
        yield name, _paint(engine, sampler_name=name)
    heart = _paint(engine)
    mask = Image.new("L", heart.size)
    ImageDraw.Draw(mask).ellipse((34, 30, 94, 100), fill=255)
    inpaint = {"prompt": "a blue star on a yellow background", "mask": _packed(mask)}
    features: dict[str, dict[str, Any]] = {
        "(yellow:0.2)": {"prompt": "a red heart on a (yellow:0.2) background"},
        "[red:blue:0.3]": {"prompt": "a [red:blue:0.3] heart on a yellow background"},
        "[red|green]": {"prompt": "a [red|green] heart on a yellow background"},
        "heart AND star": {"prompt": f"{HEART} AND a red star on a yellow background"},
        "negative: yellow": {"negative_prompt": "yellow background"},
        "clip skip 2": {"override_settings": {"CLIP_stop_at_last_layers": 2}},
        "variation 0.3": {"subseed": 1, "subseed_strength": 0.3},
        "from 64x64": {"seed_resize_from_w": 64, "seed_resize_from_h": 64},
        "tiling": {"tiling": True, "prompt": "a red ring on a blue background"},
        "s_churn 20": {"sampler_name": "Euler", "s_churn": 20},
        "hires, Latent": {"enable_hr": True, "denoising_strength": 0.6},
        "hires, Lanczos": {"enable_hr": True, "hr_upscaler": "Lanczos", "denoising_strength": 0.5},
        "hires, blue": {
            "enable_hr": True,
            "denoising_strength": 0.9,
            "hr_prompt": HEART.replace("red", "blue"),
        },
        "img2img 0.4": {"init_images": [_packed(heart)], "denoising_strength": 0.4},
        "img2img 0.8, blue": {
            "init_images": [_packed(heart)],
            "denoising_strength": 0.8,
            "prompt": HEART.replace("red", "blue"),
        },
        "inpaint, fill": {**inpaint, "init_images": [_packed(heart)], "inpaint_full_res": False},
        "inpaint, noise": {
            **inpaint,
            "init_images": [_packed(heart)],
            "inpaint_full_res": False,
            "inpainting_fill": 2,
            "denoising_strength": 1,
        },
        "inpaint, only masked": {
            **inpaint,
            "init_images": [_packed(heart)],
            "inpaint_full_res_padding": 16,
            "denoising_strength": 0.9,
        },
    }
    for name, body in features.items():
        yield name, _paint(engine, **body)
    plot = [4, "5, 20", "", 9, "", ["Euler a", "DPM++ 2M"], 0, "", "", True, False, False, False]
    yield "X/Y/Z plot", _paint(engine, script_name="X/Y/Z plot", script_args=plot)


def _paint(engine: Engine, **body: Any) -> Image.Image:
    job = RunJob(
        job_id="sheet",
        endpoint_id="",
        task_type="img2img" if "init_images" in body else "txt2img",
        models=[used(CHECKPOINT)],
        bucket="",
        params_key="",
        result_prefix="",
    )
    asked = json.dumps({**BODY, **body}).encode()
    result = engine.run(job, asked, files_of(job))
    return Image.open(io.BytesIO(result.images[0].data)).convert("RGB")


def _packed(picture: Image.Image) -> str:
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return base64.b64encode(packed.getvalue()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "contact_sheet.png"))
