"""`just bench-gpu`: the engine beside plain diffusers, and beside what the device can do at best.

Weights have true size and random values. Both render the same job in the same process, one after
the other. The bound: the UNet's multiplications at the rate that large matrices are measured to
multiply at, or its weights at the rate that memory is measured to copy at, whichever is longer.
With `--small` models and pictures are tiny, to try the benchmark itself on any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch.utils.flop_counter import FlopCounterMode

from services.inference.worker.pipelines import Listener, Result
from services.inference.worker.pipelines.engine import Engine
from services.inference.worker.settings import EngineOptions
from shared.contracts.inference import RunJob
from shared.weights.kinds import SD1, SDXL
from tests.bench.report import Row, print_table
from tests.bench.true_size import small, write_checkpoint, write_lora
from tests.weights import files_of, used

PROMPT = "a red heart on a yellow background"
MODELS, LORAS, TRACE = 3, 20, 60


class Case(msgspec.Struct, frozen=True):
    """One job, measured. `size` in pixels."""

    family: str
    size: int
    steps: int
    batch: int

    @property
    def name(self) -> str:
        kind = "SDXL" if self.family == SDXL else "SD 1.5"
        return f"{kind} {self.size}², {self.steps} steps, batch {self.batch}"


CASES = (
    Case(SD1, 512, 50, 1),
    Case(SD1, 512, 50, 8),
    Case(SD1, 512, 50, 32),
    Case(SDXL, 1024, 20, 1),
    Case(SDXL, 1024, 30, 1),
)
SMALL_CASES = (Case(SD1, 64, 4, 1), Case(SD1, 64, 4, 4), Case(SDXL, 64, 4, 1))


class Limits(msgspec.Struct, frozen=True):
    """`multiplies`: floating point operations a second. `copies`: bytes moved a second."""

    multiplies: float
    copies: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", default="", help="as DARKROOM_COMPILE")
    parser.add_argument("--compile-mode", default="reduce-overhead")
    parser.add_argument("--folder", type=Path, help="keeps the models here, for the next run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(torch.device(given.device), folder, given.small, given)
        limits = bench.limits()
        print(
            f"{bench.device_name}: {limits.multiplies / 1e12:.1f} Tflop/s in matrices,"
            f" {limits.copies / 1e9:.0f} GB/s of copies, torch {torch.__version__}"
        )
        rows = []
        for case in SMALL_CASES if given.small else CASES:
            rows += bench.measure(case, limits)
        print_table("Pictures a second", "plain diffusers", rows)
        print_table("A mixed trace", "plain diffusers", bench.trace())


class Bench:
    def __init__(self, device: torch.device, folder: Path, is_small: bool, given: Any) -> None:
        self.device, self.folder, self.small = device, folder, is_small
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        options = EngineOptions(
            jobs=16, preview_seconds=0, compile=given.compile, compile_mode=given.compile_mode
        )
        self.done = _Done()
        self.engine = Engine(str(device), folder / "cache", self.done, options)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def limits(self) -> Limits:
        side = 8192 if self.device.type == "cuda" else 1024
        one, two = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        multiplied = self._seconds(lambda: one @ two)
        large = torch.empty(2**28 if self.device.type == "cuda" else 2**24, device=self.device)
        copied = self._seconds(large.clone)
        return Limits(2 * side**3 / multiplied, 2 * large.numel() * 4 / copied)

    def measure(self, case: Case, limits: Limits) -> list[Row]:
        path = self._checkpoint(case.family, 0)
        body = self._body(case, seed=1)
        self._run("warm", path, body)
        ours = self._seconds(lambda: self._run("job", path, body), times=3)
        render = self.done.results["job"].seconds["render"]
        pipeline = self._plain(path, case)
        theirs = self._seconds(lambda: _render_plain(pipeline, case), times=3)
        bound = self._bound(case, limits)
        self.engine.memory.release()
        rate, peer = case.batch / ours, case.batch / theirs
        return [
            Row(case.name, f"{rate:.2f}/s", f"{peer:.2f}/s", f"{rate / peer:.2f}×"),
            Row(
                "  steps alone, of the bound", f"{bound / render:.0%}", "", f"{bound:.2f} s at best"
            ),
        ]

    def trace(self) -> list[Row]:
        """Jobs of several models and LoRAs, in an order that nobody arranged."""
        case = SMALL_CASES[0] if self.small else msgspec.structs.replace(CASES[0], steps=20)
        paths = [self._checkpoint(SD1, seed) for seed in range(MODELS)]
        unet = self.engine.library.checkpoint(
            self.engine.library.open(paths[0], paths[0].name)
        ).unet
        loras = []
        for seed in range(LORAS):
            loras.append(self.folder / f"lora-{seed}{'-small' * self.small}.safetensors")
            if not loras[-1].exists():
                write_lora(loras[-1], unet, seed)
        order = random.Random(0)
        jobs = [(order.choice(paths), order.choice(loras)) for _ in range(TRACE)]
        started = time.perf_counter()
        for number, (path, lora) in enumerate(jobs):
            body = self._body(case, seed=number, prompt=f"{PROMPT} <lora:{lora.stem}:0.8>")
            self._submit(f"trace-{number}", path, body, lora)
        self.done.wait(self.engine, TRACE)
        ours = time.perf_counter() - started
        pipelines = {path: self._plain(path, case) for path in paths}
        started = time.perf_counter()
        for path, lora in jobs:
            pipelines[path].load_lora_weights(str(lora), adapter_name="one")
            pipelines[path].set_adapters(["one"], [0.8])
            _render_plain(pipelines[path], case)
            pipelines[path].unload_lora_weights()
        self._synchronize()
        theirs = time.perf_counter() - started
        name = f"{TRACE} jobs, {MODELS} models, {LORAS} LoRAs, {case.steps} steps"
        rate, peer = TRACE / ours, TRACE / theirs
        return [Row(name, f"{rate:.2f}/s", f"{peer:.2f}/s", f"{rate / peer:.2f}×")]

    def _bound(self, case: Case, limits: Limits) -> float:
        """Seconds for all steps of a case, if nothing were slower than the device."""
        file = self._checkpoint(case.family, 0)
        checkpoint = self.engine.library.checkpoint(self.engine.library.open(file, file.name))
        unet = checkpoint.unet
        kind = {"device": self.device, "dtype": unet.dtype}
        rows, side = 2 * case.batch, case.size // 8
        x = torch.randn(rows, 4, side, side, **kind)
        context = torch.randn(rows, 77, unet.config.cross_attention_dim, **kind)
        added = None
        if case.family == SDXL:
            pooled = checkpoint.text_encoders[-1].model.config.projection_dim
            added = {
                "text_embeds": torch.randn(rows, pooled, **kind),
                "time_ids": torch.ones(rows, 6, **kind),
            }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(x, torch.tensor(500.0, device=self.device), context, added_cond_kwargs=added)
        weights = sum(p.numel() * p.element_size() for p in unet.parameters())
        step = max(counter.get_total_flops() / limits.multiplies, weights / limits.copies)
        return float(step * case.steps)

    def _checkpoint(self, family: str, seed: int) -> Path:
        kind = "sdxl" if family == SDXL else "sd15"
        path = self.folder / f"{kind}-{seed}{'-small' * self.small}.safetensors"
        if not path.exists():
            configs = small(family) if self.small else None
            write_checkpoint(path, family, self.device, configs=configs, seed=seed)
        return path

    def _body(self, case: Case, *, seed: int, prompt: str = PROMPT) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "steps": case.steps,
            "sampler_name": "Euler",
            "cfg_scale": 7.0,
            "seed": seed,
            "width": case.size,
            "height": case.size,
            "batch_size": case.batch,
        }

    def _run(self, job_id: str, path: Path, body: dict[str, Any]) -> None:
        self._submit(job_id, path, body)
        self.done.wait(self.engine, 1)

    def _submit(self, job_id: str, path: Path, body: dict[str, Any], *loras: Path) -> None:
        models = [used(path), *(used(lora, "Lora") for lora in loras)]
        job = RunJob(
            job_id=job_id,
            endpoint_id="bench",
            task_type="txt2img",
            models=models,
            bucket="",
            params_key="",
            result_prefix="",
        )
        self.engine.submit(job, json.dumps(body).encode(), files_of(job))

    def _plain(self, path: Path, case: Case) -> Any:
        """diffusers' own pipeline on a copy of the same weights, in the layout it would load."""
        loaded = self.engine.library.checkpoint(self.engine.library.open(path, path.name))
        loaded.wardrobe.take_off()
        unet = copy.deepcopy(loaded.unet).to(memory_format=torch.contiguous_format)
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        encoders, tokenizers = (
            [getattr(encoder, name) for encoder in loaded.text_encoders]
            for name in ("model", "tokenizer")
        )
        if case.family == SDXL:
            pipeline = StableDiffusionXLPipeline(
                loaded.vae, *encoders, *tokenizers, unet, scheduler, add_watermarker=False
            )
        else:
            pipeline = StableDiffusionPipeline(
                loaded.vae,
                *encoders,
                *tokenizers,
                unet,
                scheduler,
                None,
                None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        _render_plain(pipeline, msgspec.structs.replace(case, steps=2))
        return pipeline

    def _seconds(self, work: Callable[[], Any], times: int = 5) -> float:
        """The best of several."""
        best = float("inf")
        for _ in range(times):
            self._synchronize()
            started = time.perf_counter()
            work()
            self._synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Done(Listener):
    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self._count = 0

    def done(self, job_id: str, result: Result) -> None:
        self.results[job_id] = result
        self._count += 1

    def unfit(self, job_id: str, reason: str) -> None:
        raise RuntimeError(reason)

    def wait(self, engine: Engine, count: int) -> None:
        self._count = 0
        while self._count < count:
            engine.advance()


def _render_plain(pipeline: Any, case: Case) -> None:
    pipeline(
        PROMPT,
        negative_prompt="",
        height=case.size,
        width=case.size,
        num_inference_steps=case.steps,
        guidance_scale=7.0,
        num_images_per_prompt=case.batch,
        generator=torch.Generator("cpu").manual_seed(1),
    )


if __name__ == "__main__":
    main()
