"""The engine on a tiny random SD 1.x checkpoint: right, repeatable, clear about what is wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageDraw

from services.inference.worker.pipelines import Engine, JobFailure, Result
from services.inference.worker.pipelines.families import Header, configs_of, recognise
from services.inference.worker.pipelines.images import fit
from services.inference.worker.pipelines.params import parse_painting
from services.inference.worker.pipelines.samplers import SAMPLERS, find_sampler
from shared.contracts.inference import RunJob, UsedModel

DEMO = Path(__file__).parents[2] / "deploy/demo_model/darkroom-demo.safetensors"
NAME = "tiny.safetensors"

CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49_408,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "scheduler": {"prediction_type": "epsilon"},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Engine("cpu", tmp_path_factory.mktemp("cache"))


def tensors_of_tiny() -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from deploy.demo_model.ldm_layout import text_encoder_to_ldm, unet_to_ldm, vae_to_ldm

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(CONFIGS["unet"])
    vae = AutoencoderKL.from_config(CONFIGS["vae"])
    text_encoder = CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"]))
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("final_layer_norm.bias"):  # the mean that attention restores is not zero
            torch.nn.init.normal_(parameter, mean=0.5)
    tensors = {
        **unet_to_ldm(unet.state_dict(), CONFIGS["unet"]),
        **vae_to_ldm(vae.state_dict(), CONFIGS["vae"]),
        **text_encoder_to_ldm(text_encoder.state_dict(), 77),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Any], **configs: Any) -> Path:
    from safetensors.torch import save_file

    told = json.dumps({**CONFIGS, **configs})
    save_file(tensors, path, {"format": "pt", "darkroom.config": told})
    return path


@pytest.fixture(scope="module")
def tiny(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / NAME, tensors_of_tiny())


def job_of(task_type: str = "txt2img", *models: tuple[str, str]) -> RunJob:
    return RunJob(
        job_id="job",
        endpoint_id="endpoint",
        task_type=task_type,
        models=[
            UsedModel(type=type_, name=name)
            for type_, name in models or [("Stable-diffusion", NAME)]
        ],
        bucket="bucket",
        params_key="key",
        result_prefix="out/job/result/",
    )


def paint(engine: Engine, checkpoint: Path, task_type: str = "txt2img", **body: Any) -> Result:
    body = {"prompt": "a red ball", "steps": 3, "width": 64, "height": 64, "seed": 7, **body}
    return engine.run(
        job_of(task_type), json.dumps(body).encode(), {NAME: checkpoint}, lambda step, steps: None
    )


def pixels(packed: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(packed)).convert("RGB"), dtype=np.int16)


def base64_png(picture: Image.Image) -> str:
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return base64.b64encode(packed.getvalue()).decode()


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"steps": 0}', "steps: got 0, allowed is a whole number from 1 to 150"),
        ('{"steps": "many"}', 'steps: got "many", allowed is a whole number from 1 to 150'),
        ('{"steps": true}', "steps: got true, allowed is a whole number from 1 to 150"),
        ('{"cfg_scale": NaN}', "cfg_scale: got NaN, allowed is a number from 1 to 30"),
        ('{"cfg_scale": Infinity}', "cfg_scale: got Infinity, allowed is a number from 1 to 30"),
        ('{"width": 4096}', "width: got 4096, allowed is a whole number from 64 to 2048"),
        ('{"batch_size": 9}', "batch_size: got 9, allowed is a whole number from 1 to 8"),
        ('{"seed": -2}', "seed: got -2, allowed is a whole number from -1 to 9007199254740991"),
        (
            '{"prompt": ["a"]}',
            "prompt: got another value (list), allowed is a text of up to 20000 characters",
        ),
        (
            '{"override_settings": {"CLIP_stop_at_last_layers": 13}}',
            "override_settings.CLIP_stop_at_last_layers: got 13, allowed is a whole number from 1",
        ),
        ('{"sampler_name": "\\ud800"}', 'sampler_name: got "?", allowed is one of Euler a'),
        ('{"sampler_name": "Eular"}', 'sampler_name: got "Eular", allowed is one of Euler a, Eul'),
        ("[1]", "the params are no JSON object but [1]"),
        ('{"steps": ', "the params are no JSON: "),
        ('{"seed": 1' + "0" * 5000 + "}", "the params are no JSON: "),
        ('{"a":' * 100_000, "the params are no JSON: "),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(body: str, reason: str) -> None:
    with pytest.raises(JobFailure) as failure:
        parse_painting(body.encode(), "txt2img")
    assert str(failure.value).startswith(reason)


def test_bodies_of_real_clients_are_read() -> None:
    body = b"""{"prompt": "cat", "negative_prompt": null, "steps": "20", "cfg_scale": 7,
        "width": 515, "s_tmax": Infinity, "s_churn": NaN, "enable_hr": true, "foo": [1],
        "restore_faces": false,
        "sampler_name": "k_dpmpp_2m", "scheduler": "karras", "styles": [], "eta": null,
        "override_settings": {"sd_vae": "Automatic", "eta_noise_seed_delta": 31337},
        "alwayson_scripts": {"controlnet": {"args": []}}}"""
    params, _, warnings = parse_painting(body, "txt2img")
    assert (params.steps, params.width, params.sampler.name) == (20, 512, "DPM++ 2M Karras")
    assert [warning.split(":")[0] for warning in warnings] == [
        "enable_hr",
        "s_churn",
        "override_settings.eta_noise_seed_delta",
        "alwayson_scripts",
        "width 515",
    ]


def test_samplers_go_by_the_names_of_the_webui() -> None:
    assert len(SAMPLERS) == 31
    assert find_sampler("euler A") is find_sampler("k_euler_a") is SAMPLERS["Euler a"]
    assert find_sampler("k_euler_x") is None


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("plain, text", [("plain, text", 1)]),
        ("a (red:1.3) [ball]", [("a ", 1), ("red", 1.3), (" ", 1), ("ball", 1 / 1.1)]),
        ("((deep)) word", [("deep", 1.1 * 1.1), (" word", 1)]),
        (r"\(literal\) \[too\]", [("(literal) [too]", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("night:city (x:1.2.3)", [("night:city ", 1), ("x:1.2.3)", 1.1)]),
        ("one BREAK two", [("one", 1), (None, 1), ("two", 1)]),
        ("", [("", 1)]),
    ],
)
def test_attention_syntax(prompt: str, parts: list[tuple[str | None, float]]) -> None:
    from services.inference.worker.pipelines.prompts import parse_attention

    parsed = parse_attention(prompt)
    assert [part.text for part in parsed] == [text for text, _ in parts]
    assert [part.weight for part in parsed] == pytest.approx([weight for _, weight in parts])


def load(engine: Engine, path: Path) -> Any:
    return engine._painter._checkpoints.get(path, NAME)


def test_embeddings_of_a_plain_prompt_are_those_of_diffusers(engine: Engine, tiny: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from services.inference.worker.pipelines.prompts import encode_pair

    parts = load(engine, tiny)
    pipeline = StableDiffusionPipeline.encode_prompt
    theirs = pipeline(
        _Parts(parts.tokenizer, parts.text_encoder),
        "a blue cat, on a mat",
        torch.device("cpu"),
        1,
        True,
        "ugly",
    )
    ours = encode_pair("a blue cat, on a mat", "ugly", parts.tokenizer, parts.text_encoder)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class _Parts:
    """As much of a pipeline as `encode_prompt` looks at."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.text_encoder, self.unet = tokenizer, text_encoder, None


def test_attention_changes_its_tokens_and_keeps_the_mean(engine: Engine, tiny: Path) -> None:
    import torch

    from services.inference.worker.pipelines.prompts import encode_pair

    parts = load(engine, tiny)
    plain, strong = encode_pair("a cat", "a (cat:1.5)", parts.tokenizer, parts.text_encoder)
    ratio = (strong / plain)[0].mean(dim=1)  # token by token
    assert ratio[2] == pytest.approx(1.5 * ratio[1].item(), rel=1e-4)
    assert strong.mean().item() == pytest.approx(plain.mean().item(), rel=1e-4)
    skipped, _ = encode_pair("a cat", "", parts.tokenizer, parts.text_encoder, clip_skip=2)
    assert skipped.shape == plain.shape
    assert not torch.equal(skipped, plain)


def test_long_prompts_are_cut_at_a_comma(engine: Engine, tiny: Path) -> None:
    from services.inference.worker.pipelines.prompts import cut_chunks

    tokenizer = load(engine, tiny).tokenizer
    far, near = "cat " * 20 + ", " + "dog " * 70, "cat " * 60 + ", " + "dog " * 30
    assert [len(chunk.tokens) for chunk in cut_chunks(far, tokenizer)] == [75, 16]
    assert [len(chunk.tokens) for chunk in cut_chunks(near, tokenizer)] == [61, 30]
    assert [len(chunk.tokens) for chunk in cut_chunks("cat BREAK dog", tokenizer)] == [1, 1]


# --- pictures -------------------------------------------------------------------------------------


def test_txt2img_is_what_plain_diffusers_makes(engine: Engine, tiny: Path) -> None:
    """Same weights, noise and embeddings, computed without a line of ours after loading."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    parts = load(engine, tiny)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red ball",
        negative_prompt="blue",
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)),
        num_inference_steps=5,
        guidance_scale=6.5,
    ).images[0]
    ours = paint(engine, tiny, negative_prompt="blue", steps=5, cfg_scale=6.5, sampler_name="Euler")
    assert (pixels(ours.images[0]) == np.asarray(theirs)).all()


def test_the_same_body_gives_the_same_pixels(engine: Engine, tiny: Path) -> None:
    """Whatever ran in between, and after the checkpoint was loaded anew."""
    body: dict[str, Any] = {"sampler_name": "Euler a", "batch_size": 2}
    first = paint(engine, tiny, **body)
    paint(engine, tiny, sampler_name="DDIM", seed=1)
    engine._painter._checkpoints.forget()
    again = paint(engine, tiny, **body)
    assert [*map(_rows, first.images)] == [*map(_rows, again.images)]
    assert _rows(first.images[0]) != _rows(first.images[1])


def _rows(packed: bytes) -> bytes:
    return pixels(packed).tobytes()


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE Karras", "DPM++ 2M SDE"])
def test_a_picture_does_not_depend_on_its_batch(engine: Engine, tiny: Path, sampler: str) -> None:
    """Up to rounding in the last digit: a batch is computed in another order."""
    together = paint(engine, tiny, sampler_name=sampler, batch_size=2, n_iter=2, seed=100)
    info = json.loads(json.loads(together.param_json)["info"])
    assert info["all_seeds"] == [100, 101, 102, 103]
    for seed, packed in zip(info["all_seeds"], together.images, strict=True):
        alone = paint(engine, tiny, sampler_name=sampler, seed=seed)
        assert abs(pixels(packed) - pixels(alone.images[0])).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs(engine: Engine, tiny: Path, sampler: str) -> None:
    """From noise, from a picture, and in a single step; what is no number would be refused."""
    picture = base64_png(Image.new("RGB", (80, 64), "teal"))
    assert paint(engine, tiny, sampler_name=sampler, steps=4).images
    assert paint(engine, tiny, sampler_name=sampler, steps=1).images
    result = paint(engine, tiny, "img2img", sampler_name=sampler, steps=4, init_images=[picture])
    assert result.images


def test_img2img_runs_the_steps_of_the_webui(engine: Engine, tiny: Path) -> None:
    """int(denoising_strength * steps) and one more; none of it hangs on the picture's size."""
    picture = base64_png(Image.new("RGBA", (33, 50), (0, 128, 128, 100)))
    for strength, wanted in ((0.0, 1), (0.5, 6), (0.75, 8), (1.0, 10)):
        seen: list[tuple[int, int]] = []
        body = {
            "steps": 10,
            "denoising_strength": strength,
            "init_images": [f"data:image/png;base64,{picture}"],
            "width": 64,
            "height": 64,
            "seed": 1,
            "resize_mode": 2,
        }
        engine.run(
            job_of("img2img"),
            json.dumps(body).encode(),
            {NAME: tiny},
            lambda step, steps, seen=seen: seen.append((step, steps)),  # type: ignore[misc]
        )
        assert seen == [(step + 1, wanted) for step in range(wanted)]


@pytest.mark.skipif(not DEMO.exists(), reason=f"no {DEMO.name} yet")
def test_img2img_keeps_the_colors_of_its_picture(engine: Engine) -> None:
    picture = Image.new("RGB", (64, 64), (220, 40, 40))
    ImageDraw.Draw(picture).rectangle((0, 32, 64, 64), fill=(40, 40, 220))
    body = {"prompt": "", "init_images": [base64_png(picture)], "cfg_scale": 1, "steps": 20}
    near, far = (
        pixels(paint(engine, DEMO, "img2img", denoising_strength=strength, **body).images[0])
        for strength in (0.2, 0.9)
    )
    upper, lower = near[4:28].mean(axis=(0, 1)), near[36:60].mean(axis=(0, 1))
    assert upper[0] > 140 > upper[2]
    assert lower[2] > 140 > lower[0]
    assert abs(far - near).mean() > 5


def test_resize_modes(engine: Engine) -> None:
    wide = Image.new("RGB", (128, 64), "red")
    ImageDraw.Draw(wide).rectangle((32, 0, 95, 63), fill="blue")
    for extreme in ((9000, 1), (1, 9000)):
        for mode in (0, 1, 2, 3):
            assert fit(Image.new("RGB", extreme), 64, 128, mode).size == (64, 128)
    for mode, corner in ((0, "red"), (1, "blue"), (2, "red")):
        fitted = fit(wide, 64, 64, mode)
        assert fitted.size == (64, 64)
        assert fitted.getpixel((1, 1)) == Image.new("RGB", (1, 1), corner).getpixel((0, 0))


def test_the_infotext_can_be_read_back(engine: Engine, tiny: Path) -> None:
    import hashlib

    result = paint(
        engine,
        tiny,
        prompt="a café, (red:1.2)",
        negative_prompt="blue",
        cfg_scale=6.5,
        override_settings={"CLIP_stop_at_last_layers": 2},
    )
    picture = Image.open(io.BytesIO(result.images[0]))
    prompt, negative, last = picture.text["parameters"].split("\n")  # type: ignore[attr-defined]
    fields = dict(re.findall(r"([A-Z][\w ]*): ([^,]+)", last))
    assert (prompt, negative) == ("a café, (red:1.2)", "Negative prompt: blue")
    assert {key: fields[key] for key in ("Steps", "Sampler", "CFG scale", "Seed", "Size")} == {
        "Steps": "3",
        "Sampler": "Euler",
        "CFG scale": "6.5",
        "Seed": "7",
        "Size": "64x64",
    }
    assert fields["Model hash"] == hashlib.sha256(tiny.read_bytes()).hexdigest()[:10]
    assert (fields["Model"], fields["Clip skip"]) == ("tiny", "2")
    answer = json.loads(result.param_json)
    assert answer["images"] == ["image_0.png"]
    assert json.loads(answer["info"])["infotexts"] == [picture.text["parameters"]]  # type: ignore[attr-defined]


def test_any_text_is_a_prompt(engine: Engine, tiny: Path) -> None:
    for prompt in ("\ud800 half", "nul \0 in it", "(" * 30 + "a" + ")" * 30, ":)]((", "猫 🐈"):
        body = json.dumps({"prompt": prompt, "steps": 1, "width": 64, "height": 64, "seed": 1})
        result = engine.run(job_of(), body.encode(), {NAME: tiny}, lambda step, steps: None)
        assert Image.open(io.BytesIO(result.images[0])).text["parameters"]  # type: ignore[attr-defined]


def test_a_random_seed_is_written_down(engine: Engine, tiny: Path) -> None:
    first = paint(engine, tiny, seed=-1)
    seed = json.loads(json.loads(first.param_json)["info"])["seed"]
    assert seed >= 0
    assert _rows(paint(engine, tiny, seed=seed).images[0]) == _rows(first.images[0])


def test_a_job_stopped_by_its_progress_leaves_no_trace(engine: Engine, tiny: Path) -> None:
    class Stop(Exception): ...

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise Stop

    before = paint(engine, tiny, sampler_name="DPM++ 2M", steps=6)
    body = {"prompt": "x", "steps": 6, "width": 64, "height": 64, "sampler_name": "DPM++ 2M"}
    with pytest.raises(Stop):
        engine.run(job_of(), json.dumps(body).encode(), {NAME: tiny}, stop)
    after = paint(engine, tiny, sampler_name="DPM++ 2M", steps=6)
    assert _rows(before.images[0]) == _rows(after.images[0])


# --- checkpoints ----------------------------------------------------------------------------------


def test_broken_checkpoints_are_told_apart(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = tensors_of_tiny()
    gap, twisted, lora, pickled, garbage, cut, empty, halves = (
        tmp_path / f"{name}.safetensors"
        for name in ["gap", "twisted", "lora", "pickled", "garbage", "cut", "empty", "halves"]
    )
    lost = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    write(gap, {key: tensor for key, tensor in tensors.items() if key != lost})
    write(twisted, {**tensors, lost: torch.zeros(3)})
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
    torch.save({"state_dict": tensors}, pickled)
    garbage.write_bytes(os.urandom(4096))
    cut.write_bytes(tiny.read_bytes()[:-1000])
    empty.write_bytes(b"")
    text_only = {k: t for k, t in tensors.items() if not k.startswith("first_stage_model.")}
    write(halves, text_only)
    for path, reason in (
        (gap, rf"the unet in {NAME} lacks 1 tensors, .*norm1.weight"),
        (twisted, rf"the unet in {NAME} does not fit its config: size mismatch for .*norm1.weight"),
        (lora, f"{NAME} is a LoRA; this version runs Stable Diffusion 1.x"),
        (pickled, f"{NAME} is a pickled checkpoint"),
        (garbage, f"broken checkpoint: {NAME} is no safetensors file"),
        (cut, f"broken checkpoint: {NAME} has .* upload it again"),
        (empty, f"broken checkpoint: {NAME} is no safetensors file"),
        (halves, f"the vae in {NAME} lacks"),
    ):
        with pytest.raises(JobFailure, match=reason):
            paint(engine, path)
    assert paint(engine, tiny).images


def test_a_config_may_not_ask_for_the_impossible(
    engine: Engine, tiny: Path, tmp_path: Path
) -> None:
    huge = {**CONFIGS["unet"], "layers_per_block": 10**9}
    path = write(tmp_path / "huge.safetensors", tensors_of_tiny(), unet=huge)
    with pytest.raises(JobFailure, match="layers_per_block"):
        paint(engine, path)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ({"conditioner.embedders.1.model.ln_final.bias": ()}, "a Stable Diffusion XL checkpoint"),
        ({"conditioner.embedders.0.model.ln_final.bias": ()}, "a Stable Diffusion XL refiner"),
        ({"cond_stage_model.model.ln_final.bias": ()}, "a Stable Diffusion 2.x checkpoint"),
        ({"cond_stage_model.transformer.x": ()}, None),
    ],
)
def test_families_are_recognised(names: dict[str, tuple[int, ...]], kind: str | None) -> None:
    unet = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    assert recognise(Header({**unet, **names}, {})) == kind


def test_the_standard_configs_are_those_of_stable_diffusion(engine: Engine) -> None:
    """The published parameter counts of SD 1.5, with nothing allocated for them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from services.inference.worker.pipelines.families import SD15

    with torch.device("meta"):
        models = [
            UNet2DConditionModel.from_config(SD15.unet),
            AutoencoderKL.from_config(SD15.vae),
            CLIPTextModel(CLIPTextConfig(**SD15.text_encoder)),
        ]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


# --- pictures of strangers, and rembg -------------------------------------------------------------


def test_pictures_that_are_none_or_too_large_are_refused(engine: Engine, tiny: Path) -> None:
    """A PNG may say that it has billions of pixels: nothing is unpacked to find out."""
    size = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"
    chunk = b"IHDR" + size
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    bomb += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 99) + b"IDAT"
    for picture, reason in (
        ("not base64!", r"init_images\[0\]: no base64"),
        (base64.b64encode(b"no picture").decode(), r"init_images\[0\]: no PNG, JPEG"),
        (base64.b64encode(bomb).decode(), r"init_images\[0\]: .*(pixels|limit)"),
        ("https://example.org/x.png", r"init_images\[0\]: got a URL"),
    ):
        with pytest.raises(JobFailure, match=reason):
            paint(engine, tiny, "img2img", init_images=[picture])
    with pytest.raises(JobFailure, match="init_images: got none"):
        paint(engine, tiny, "img2img")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"model": "silueta"}, "upload it and name it in models"),
        ({"model": "withoutbg"}, 'model: got "withoutbg", allowed is one of u2net'),
        ({"model": "u2net"}, "input_image: got none"),
        ({"model": "u2net", "input_image": "AAAA"}, "input_image: no PNG, JPEG"),
        ({"alpha_matting_erode_size": -1}, "alpha_matting_erode_size: got -1"),
    ],
)
def test_rembg_says_what_it_lacks(engine: Engine, body: dict[str, Any], reason: str) -> None:
    job = job_of("rembg", ("rembg", "u2net.onnx"))
    with pytest.raises(JobFailure, match=reason):
        engine.run(job, msgspec.json.encode(body), {}, lambda step, steps: None)


@pytest.mark.skipif(
    "DARKROOM_U2NET" not in os.environ, reason="set DARKROOM_U2NET to the path of u2net.onnx"
)
def test_rembg_takes_the_background_away(engine: Engine) -> None:
    picture = Image.new("RGB", (256, 200), (120, 160, 90))
    ImageDraw.Draw(picture).ellipse((70, 40, 180, 160), fill=(200, 30, 30))
    job = job_of("rembg", ("rembg", "u2net.onnx"))
    files = {"u2net.onnx": Path(os.environ["DARKROOM_U2NET"])}

    def cut(**options: Any) -> Image.Image:
        body = msgspec.json.encode({"input_image": base64_png(picture), **options})
        result = engine.run(job, body, files, lambda step, steps: None)
        return Image.open(io.BytesIO(result.images[0]))

    plain, mask = cut(), cut(model="u2net", only_mask=True)
    green = cut(bgcolor="#00ff00")
    assert plain.getpixel((125, 100)) == (200, 30, 30, 255)
    assert plain.getpixel((5, 5))[3] == 0  # type: ignore[index]
    assert (mask.mode, mask.getpixel((125, 100)), mask.getpixel((5, 5))) == ("L", 255, 0)
    assert green.getpixel((5, 5)) == (0, 255, 0, 255)


def test_a_model_file_can_not_choose_code_or_sizes() -> None:
    def header(**text_encoder: object) -> Header:
        own = {
            "unet": {},
            "vae": {},
            "scheduler": {},
            "text_encoder": {"hidden_size": 48, **text_encoder},
        }
        names: dict[str, tuple[int, ...]] = {
            "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)
        }
        return Header(names, {"darkroom.config": json.dumps(own)})

    configs = configs_of(header(attn_implementation="org/kernel"), "x.safetensors")
    assert configs.text_encoder == {"hidden_size": 48}
    with pytest.raises(JobFailure, match="max_position_embeddings"):
        configs_of(header(max_position_embeddings=300_000_000), "x.safetensors")
