"""Makes darkroom-demo.safetensors from nothing: VAE, text encoder, UNet, export.

    python -m deploy.demo_model.train --tokenizer <CLIP tokenizer folder> --work <state folder>

Each stage leaves its result in the work folder, and a stage whose result lies there is not run
again. The UNet stage saves its state every two minutes and continues from it; `--export-only`
writes the checkpoint from the state as it is.
"""

import argparse
import json
import logging
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from deploy.demo_model import text_encoder, unet, vae
from deploy.demo_model.shapes import random_scene, render_batch
from deploy.demo_model.text_encoder import CaptionEncoder, train_text_encoder
from deploy.demo_model.unet import UNetTraining, train_unet
from deploy.demo_model.vae import build_vae, load_photos, standardize_latents, train_vae, warm_start
from services.inference.worker.pipelines.models.families import TEXT_PREFIXES
from services.inference.worker.pipelines.models.layouts import (
    clip_sources,
    to_original,
    unet_sources,
    vae_sources,
)
from shared.weights.kinds import SD1

log = logging.getLogger("train")
HERE = Path(__file__).parent


def make_vae(work: Path, minutes: float, photos: Path | None) -> AutoencoderKL:
    path = work / "vae.pt"
    model = build_vae()
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()
    torch.manual_seed(0)
    warm_start(model)
    train_vae(model, 60 * minutes, load_photos(photos) if photos else [])
    rng = random.Random(0)
    standardize_latents(model, render_batch([random_scene(rng) for _ in range(256)], 64, rng))
    torch.save(model.state_dict(), path)
    return model.eval()


def make_text_encoder(work: Path, minutes: float, tokenizer: CLIPTokenizer) -> CaptionEncoder:
    path = work / "text_encoder.pt"
    if path.exists():
        saved = torch.load(path)
        encoder = CaptionEncoder(saved["tokens"])
        encoder.load_state_dict(saved["state"])
        return encoder.eval()
    torch.manual_seed(0)
    encoder = train_text_encoder(tokenizer, 60 * minutes)
    torch.save({"tokens": encoder.tokens, "state": encoder.state_dict()}, path)
    return encoder


def write_atomically(training: UNetTraining, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(training.state(), part)
    part.replace(path)


def export(
    path: Path,
    unet_model: UNet2DConditionModel,
    vae_model: AutoencoderKL,
    encoder: CaptionEncoder,
) -> None:
    """Writes the fp16 checkpoint; a reader of the old file never sees half of the new one.

    `darkroom.config` in the metadata holds the config of each component: their sizes are not SD's,
    and tensors alone do not tell the number of heads or the prediction type.
    """
    text_model = encoder.expand_vocabulary()
    text, _ = TEXT_PREFIXES[SD1]
    positions = torch.arange(text_encoder.CONFIG["max_position_embeddings"])[None]
    tensors = {
        **to_original(unet_model.state_dict(), unet_sources(unet.CONFIG)),
        **to_original(vae_model.state_dict(), vae_sources(vae.CONFIG)),
        **to_original(text_model.state_dict(), clip_sources(text)),
        f"{text}text_model.embeddings.position_ids": positions,
    }
    halved = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel", **unet.CONFIG},
        "vae": {"_class_name": "AutoencoderKL", **vae.CONFIG},
        "text_encoder": text_encoder.CONFIG,
        "scheduler": {"_class_name": "DDIMScheduler", **unet.SCHEDULER_CONFIG},
    }
    metadata = {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.prediction_type": "v",
        "modelspec.title": "Darkroom demo",
        "darkroom.config": json.dumps(configs),
    }
    part = path.with_suffix(".part")
    save_file(halved, part, metadata)
    part.chmod(0o644)
    part.replace(path)
    log.info("wrote %s, %.1f MB", path, path.stat().st_size / 1e6)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the Darkroom demo checkpoint.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="see make_tokenizer.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for the training state")
    parser.add_argument("--output", type=Path, default=HERE / "darkroom-demo.safetensors")
    parser.add_argument("--photos", type=Path, help="folder of photos for the VAE; optional")
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--text-minutes", type=float, default=3)
    parser.add_argument("--unet-minutes", type=float, default=78)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)

    vae_model = make_vae(work, arguments.vae_minutes, arguments.photos)
    encoder = make_text_encoder(work, arguments.text_minutes, tokenizer)
    training = UNetTraining.start()
    state_path = work / "unet.pt"
    if state_path.exists():
        training.load(torch.load(state_path))
        log.info("continuing at step %d, %.0f s", training.step, training.seconds)
    if not arguments.export_only:
        train_unet(
            training,
            vae_model,
            encoder,
            tokenizer,
            60 * arguments.unet_minutes,
            lambda: write_atomically(training, state_path),
        )
        write_atomically(training, state_path)
    export(arguments.output, training.averaged, vae_model, encoder)


if __name__ == "__main__":
    main()
