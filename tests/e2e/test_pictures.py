"""From upload to picture through the whole product, and the picture looked at."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from deploy.local.client import Client, Failed
from deploy.local.demo import CHECKPOINT
from deploy.local.weights import fetch_u2net
from tests.weights import weights

MODEL = {"Stable-diffusion": [CHECKPOINT.name], "VAE": ["Automatic"]}
ENDPOINT, REALTIME = "pictures", "pictures-now"

Picture = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def artist(admin: Client) -> Iterator[Client]:
    """Somebody with the demo checkpoint uploaded and two pools to render on."""
    if admin.find_checkpoint("Stable-diffusion", CHECKPOINT.name) is None:
        admin.upload_checkpoint("Stable-diffusion", CHECKPOINT)
    admin.create_endpoint(ENDPOINT)
    admin.create_endpoint(REALTIME, type_="Real-time")
    admin.wait_for_endpoint(ENDPOINT)
    admin.wait_for_endpoint(REALTIME)
    yield admin
    names = {"delete_endpoint_list": [ENDPOINT, REALTIME], "username": "admin"}
    assert admin.call("DELETE", "/endpoints", names) == {}


def params(prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "negative_prompt": "",
        "steps": 16,
        "sampler_name": "Euler a",
        "cfg_scale": 5,
        "seed": 5,
        "width": 64,
        "height": 64,
        "s_tmax": float("inf"),
        "some_unknown_key": {"is": "ignored"},
        **more,
    }


def images(client: Client, job: dict[str, Any]) -> list[Picture]:
    assert job["status"] == "succeed", job["error"]
    return [decode(client.download(url)) for url in job["img_presigned_urls"]]


def decode(png: bytes) -> Picture:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def encode(picture: Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def near(picture: Picture, colour: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pixels look like the colour."""
    distance = np.abs(picture.astype(int) - np.array(colour)).sum(axis=-1)
    return np.asarray(distance < 150)


RED, BLUE, YELLOW, BLACK = (220, 30, 30), (40, 70, 220), (245, 215, 30), (12, 12, 12)


@pytest.mark.parametrize(
    ("prompt", "shape", "background"),
    [
        ("a red circle on a yellow background", RED, YELLOW),
        ("a blue square on a black background", BLUE, BLACK),
        ("a yellow star on a blue background", YELLOW, BLUE),
    ],
)
def test_a_picture_follows_its_prompt(
    artist: Client,
    prompt: str,
    shape: tuple[int, int, int],
    background: tuple[int, int, int],
) -> None:
    job = artist.run_job("txt2img", MODEL, params(prompt))
    (picture,) = images(artist, job)
    assert picture.shape == (64, 64, 3)
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3)])
    assert near(border, background).mean() > 0.8
    middle = picture[24:40, 24:40]
    assert near(middle, shape).mean() > 0.6


def test_position_follows_the_prompt(artist: Client) -> None:
    def centre(where: str) -> float:
        prompt = f"a red circle {where} on a black background"
        (picture,) = images(artist, artist.run_job("txt2img", MODEL, params(prompt)))
        columns = np.nonzero(near(picture, RED))[1]
        assert len(columns) > 40
        return float(columns.mean())

    assert centre("on the left") + 10 < centre("on the right")


def test_the_same_body_gives_the_same_pixels_and_another_seed_others(artist: Client) -> None:
    body = params("a green heart on a white background", steps=6)
    (first,) = images(artist, artist.run_job("txt2img", MODEL, body))
    (again,) = images(artist, artist.run_job("txt2img", MODEL, body))
    (other,) = images(artist, artist.run_job("txt2img", MODEL, {**body, "seed": 6}))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_batch_counts_seeds_up_and_names_its_images(artist: Client) -> None:
    body = params("a red star on a white background", steps=4, batch_size=2, n_iter=2, seed=40)
    job = artist.run_job("txt2img", MODEL, body)
    pictures = images(artist, job)
    assert job["image_names"] == [f"image_{n}.png" for n in range(4)]
    info = json.loads(artist.download(job["output_presigned_urls"][0]))
    assert json.loads(info["info"])["all_seeds"] == [40, 41, 42, 43]
    alone = artist.run_job("txt2img", MODEL, {**body, "batch_size": 1, "n_iter": 1, "seed": 42})
    difference = np.abs(pictures[2].astype(int) - images(artist, alone)[0].astype(int))
    assert difference.max() <= 1


def test_the_png_tells_how_it_was_made(artist: Client) -> None:
    job = artist.run_job("txt2img", MODEL, params("a pink ring", steps=4, negative_prompt="blue"))
    text = Image.open(io.BytesIO(artist.download(job["img_presigned_urls"][0]))).info["parameters"]
    assert text.startswith("a pink ring\nNegative prompt: blue\nSteps: 4, Sampler: Euler a")
    for part in ("CFG scale: 5", "Seed: 5", "Size: 64x64", "Model hash: "):
        assert part in text
    assert f"out/{job['InferenceJobId']}/result/image_0.png" in job["img_presigned_urls"][0]
    assert job["output_presigned_urls"][0].count(f"{job['InferenceJobId']}_param.json") == 1


def test_img2img_keeps_more_of_the_picture_the_less_it_may_change(artist: Client) -> None:
    start = np.full((64, 64, 3), (245, 215, 30), np.uint8)
    start[20:44, 20:44] = (220, 30, 30)

    def changed(strength: float) -> float:
        body = params(
            "a blue square on a white background",
            init_images=[f"data:image/png;base64,{encode(start)}"],
            denoising_strength=strength,
            steps=12,
        )
        (picture,) = images(artist, artist.run_job("img2img", MODEL, body))
        return float(np.abs(picture.astype(int) - start.astype(int)).mean())

    little, much = changed(0.1), changed(0.95)
    assert little * 2 < much


def test_rembg_cuts_the_foreground_out(artist: Client) -> None:
    if artist.find_checkpoint("rembg", "u2net.onnx") is None:
        artist.upload_checkpoint("rembg", fetch_u2net())
    scene = np.full((256, 256, 3), (70, 140, 210), np.uint8)
    y, x = np.mgrid[:256, :256]
    scene[(y - 128) ** 2 + (x - 128) ** 2 < 70**2] = (210, 60, 40)
    body = {"input_image": encode(scene), "model": "u2net"}
    job = artist.run_job("rembg", {"rembg": ["u2net.onnx"]}, body, seconds=200)
    assert job["status"] == "succeed", job["error"]
    cut = Image.open(io.BytesIO(artist.download(job["img_presigned_urls"][0])))
    assert cut.mode == "RGBA"
    alpha = np.asarray(cut)[..., 3]
    assert alpha[100:156, 100:156].mean() > 230
    assert alpha[:20].mean() < 20


def test_a_real_time_start_answers_with_the_finished_job(artist: Client) -> None:
    job_id = artist.create_job(
        "txt2img", MODEL, params("a cyan cross", steps=4), inference_type="Real-time"
    )
    response = artist.request("PUT", f"/inferences/{job_id}/start")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["statusCode"], answer["data"]["status"]) == (200, "succeed")
    assert decode(artist.download(answer["data"]["img_presigned_urls"][0])).shape == (64, 64, 3)


def test_a_real_time_start_answers_at_once_when_its_job_is_cancelled(artist: Client) -> None:
    body = params("a cyan cross", steps=150)
    job_id = artist.create_job("txt2img", MODEL, body, inference_type="Real-time")
    told = artist.events(f"/inferences/{job_id}/events")
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(artist.start_job, job_id)
        assert any(event.name == "progress" for event in told)
        artist.cancel_job(job_id)
        job = starting.result(3)["data"]
    assert (job["status"], job["error"]) == ("failed", 'cancelled by "admin"')
    assert [event.name for event in told][-1] == "inference.job_cancelled.v1"
    assert artist.get_job(job_id)["img_presigned_urls"] == []


def test_a_real_time_start_that_takes_too_long_answers_that_it_goes_on(artist: Client) -> None:
    body = params("a cyan cross", steps=150, n_iter=16)
    job_id = artist.create_job("txt2img", MODEL, body, inference_type="Real-time")
    response = artist.request("PUT", f"/inferences/{job_id}/start")
    assert response.status_code == 202
    inference = response.json()["data"]["inference"]
    assert (inference["inference_id"], inference["status"]) == (job_id, "inprogress")
    artist.call("DELETE", "/inferences", {"inference_id_list": [job_id]})
    assert artist.request("GET", f"/inferences/{job_id}").status_code == 404


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps"),
        ({"sampler_name": "Oiler"}, "Oiler"),
        ({"width": 100_000}, "width"),
        ({"cfg_scale": "much"}, "cfg_scale"),
        ({"batch_size": 10_000}, "batch_size"),
    ],
)
def test_params_out_of_range_fail_the_job_with_a_reason(
    artist: Client, change: dict[str, Any], reason: str
) -> None:
    job = artist.run_job("txt2img", MODEL, params("a red heart", **change), seconds=30)
    assert job["status"] == "failed"
    assert reason in job["error"]
    assert "Traceback" not in job["error"]


def test_a_job_without_params_fails_with_a_reason(artist: Client) -> None:
    body = {"inference_type": "Async", "task_type": "txt2img", "models": MODEL}
    job_id = artist.call("POST", "/inferences", body)["data"]["inference"]["id"]
    artist.start_job(job_id)
    job = artist.wait_for_job(job_id, seconds=10)
    assert job["status"] == "failed"
    assert "params" in job["error"]


def test_a_checkpoint_that_was_cut_off_is_refused(artist: Client, tmp_path: Path) -> None:
    cut = tmp_path / f"cut-{uuid4().hex[:8]}.safetensors"
    cut.write_bytes(CHECKPOINT.read_bytes()[:100_000])
    with pytest.raises(Failed, match=rf"{cut.name}: .* upload it again") as refused:
        artist.upload_checkpoint("Stable-diffusion", cut)
    assert refused.value.status == 400
    assert artist.find_checkpoint("Stable-diffusion", cut.name) is None


def test_a_broken_checkpoint_fails_the_job_and_not_the_worker(
    artist: Client, tmp_path: Path
) -> None:
    """The registry looks at headers only: this one is whole, but lacks most of a checkpoint."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights("Stable-diffusion"))
    if artist.find_checkpoint("Stable-diffusion", broken.name) is None:
        artist.upload_checkpoint("Stable-diffusion", broken)
    models = {"Stable-diffusion": [broken.name]}
    job = artist.run_job("txt2img", models, params("a red heart"), seconds=30)
    assert job["status"] == "failed"
    assert broken.name in job["error"]
    assert "Traceback" not in job["error"]
    after = artist.run_job("txt2img", MODEL, params("a red heart", steps=2), seconds=60)
    assert after["status"] == "succeed"


def test_a_running_job_is_cancelled_and_the_next_one_is_rendered(artist: Client) -> None:
    """It is seen coming to be until then, and none of it stays."""
    job_id = artist.create_job("txt2img", MODEL, params("a cyan cross", steps=150, n_iter=50))
    artist.start_job(job_id)
    names = []
    for event in artist.events(f"/inferences/{job_id}/events"):
        names.append(event.name)
        if event.name == "progress":
            assert event.data["eta_seconds"] is None or event.data["eta_seconds"] > 0
        if event.name == "preview":
            preview = Image.open(io.BytesIO(base64.b64decode(event.data["image"])))
            assert preview.size == (8, 8)
            break
    assert "progress" in names
    cancelled = artist.cancel_job(job_id)
    assert (cancelled["status"], cancelled["error"]) == ("failed", 'cancelled by "admin"')
    assert cancelled["img_presigned_urls"] == []
    following = artist.run_job("txt2img", MODEL, params("a red heart", steps=2), seconds=15)
    assert following["status"] == "succeed"


def test_hires_fix_renders_a_larger_picture(artist: Client) -> None:
    body = params("a red circle on a yellow background", enable_hr=True, hr_scale=2)
    body |= {"hr_upscaler": "Lanczos", "denoising_strength": 0.5, "hr_second_pass_steps": 6}
    job = artist.run_job("txt2img", MODEL, body)
    (picture,) = images(artist, job)
    assert picture.shape == (128, 128, 3)
    assert near(picture[48:80, 48:80], RED).mean() > 0.6


def test_a_picture_is_enlarged(artist: Client) -> None:
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, 30:] = 255
    body = {"image": encode(picture), "upscaling_resize": 3, "upscaler_1": "Nearest"}
    job = artist.run_job("extra-single-image", {}, body)
    (enlarged,) = images(artist, job)
    assert (enlarged == picture.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_a_lora_from_the_registry_changes_the_picture(artist: Client, tmp_path: Path) -> None:
    """And what it was made with is written down, also where only the prompt names it."""
    lora = tmp_path / "bright.safetensors"
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    with safe_open(CHECKPOINT, "pt") as file:
        block = "model.diffusion_model.middle_block.1.transformer_blocks.0"
        width, context = file.get_tensor(f"{block}.attn2.to_v.weight").shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{key}.lora_down.weight": torch.randn(4, context, generator=generator),
        f"{key}.lora_up.weight": torch.randn(width, 4, generator=generator),
    }
    save_file(tensors, lora)
    if artist.find_checkpoint("Lora", lora.name) is None:
        artist.upload_checkpoint("Lora", lora)
    body = params("a red heart <lora:bright:0.8>")
    job = artist.run_job("txt2img", {**MODEL, "Lora": [lora.name]}, body)
    (changed,) = images(artist, job)
    (plain,) = images(artist, artist.run_job("txt2img", MODEL, params("a red heart")))
    assert np.abs(changed.astype(int) - plain.astype(int)).mean() > 2
    told = json.loads(artist.download(job["output_presigned_urls"][0]))
    assert 'Lora hashes: "bright: ' in json.loads(told["info"])["infotexts"][0]
    weights = {weight["name"]: weight["sha256"] for weight in told["receipt"]["weights"]}
    assert weights == {
        CHECKPOINT.name: hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest(),
        lora.name: hashlib.sha256(lora.read_bytes()).hexdigest(),
    }
    body["override_settings"] = {"sd_model_checkpoint": CHECKPOINT.stem}
    unlisted = artist.run_job("txt2img", {}, body)
    assert np.array_equal(images(artist, unlisted)[0], changed)
    again = json.loads(artist.download(unlisted["output_presigned_urls"][0]))
    assert sorted(map(str, again["receipt"]["weights"])) == sorted(
        map(str, told["receipt"]["weights"])
    )
    names = {
        type_: [model["model_name"] for model in models]
        for type_, models in unlisted["params"]["used_models"].items()
    }
    assert names == {"Stable-diffusion": [CHECKPOINT.name], "Lora": [lora.name]}
    mistaken = artist.create_job("txt2img", MODEL, params("a red heart <lora:brihgt:1>"))
    with pytest.raises(
        Failed, match=r"brihgt, type Lora is not found.*bright\.safetensors"
    ) as not_found:
        artist.start_job(mistaken)
    assert not_found.value.status == 404
    assert artist.get_job(mistaken)["status"] == "created"
