"""The peer of the job benchmark: plain diffusers on the same checkpoint, prompt and threads.

Reads a line, renders one picture to PNG, writes how many milliseconds it took.
"""

from __future__ import annotations

import io
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import EulerDiscreteScheduler

from deploy.demo_model.check import load_pipeline
from deploy.local.demo import CHECKPOINT
from deploy.local.installation import REPOSITORY

TOKENIZER = REPOSITORY / "services" / "inference" / "worker" / "pipelines" / "tokenizer"


def main(prompt: str, size: int, steps: int) -> None:
    pipeline = load_pipeline(CHECKPOINT, TOKENIZER)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        picture = pipeline(
            prompt,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(int(line)),
        ).images[0]
        picture.save(io.BytesIO(), "PNG")
        print((time.perf_counter() - started) * 1000, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
