"""Model files: each kind is known for what it is, loaded bit for bit, or refused with a reason."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models import layouts
from services.inference.worker.pipelines.models.checkpoints import Checkpoint
from services.inference.worker.pipelines.models.families import STANDARD, TEXT_PREFIXES
from services.inference.worker.pipelines.models.files import ModelFile
from shared.weights.headers import Header, TensorSpec
from shared.weights.kinds import REFINER, SD1, SD2, SDXL, Kind, recognise
from tests.unit.pipelines import tiny
from tests.unit.pipelines.bench import Bench, worst
from tests.unit.pipelines.conftest import Checkpoints
from tests.unit.pipelines.tiny import Tiny

DEMO = Path(__file__).parents[3] / "deploy/demo_model/darkroom-demo.safetensors"
LOST = "model.diffusion_model.middle_block.0.in_layers.0.weight"


def load(bench: Bench, path: Path) -> Checkpoint:
    library = bench.engine.library
    return library.checkpoint(library.open(path, path.name))


def modules_of(checkpoint: Checkpoint) -> dict[str, Any]:
    texts = {
        "text_encoder" if encoder.name == "clip_l" else "text_encoder_2": encoder.model
        for encoder in checkpoint.text_encoders
    }
    return {"unet": checkpoint.unet, "vae": checkpoint.vae, **texts}


def assert_same_weights(one: Any, other: Any, as_stored: Callable[[Tensor], Tensor]) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], as_stored(tensor)), name


def kind_of(path: Path) -> Kind:
    return recognise(ModelFile(path, path.name).header)


# What loads


@pytest.mark.parametrize("kind", tiny.CHECKPOINTS)
def test_a_checkpoint_is_loaded_bit_for_bit(
    bench: Bench, checkpoints: Checkpoints, kind: str
) -> None:
    model, path = checkpoints[kind]
    loaded = load(bench, path)
    assert (loaded.family, loaded.kind.inpainting) == (model.family, "inpainting" in kind)
    assert loaded.schedule.prediction_type == model.configs["scheduler"]["prediction_type"]
    modules = modules_of(loaded)
    assert modules.keys() == model.modules.keys()
    for name, module in model.modules.items():
        assert_same_weights(modules[name], module, lambda tensor: tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_of_every_precision_are_computed_with_in_full_precision(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, _ = checkpoints["SD 1.x"]
    tensors = {name: tensor.to(dtype) for name, tensor in model.tensors().items()}
    loaded = load(bench, model.save(tmp_path / "halves.safetensors", tensors))
    for name, module in model.modules.items():
        assert_same_weights(
            modules_of(loaded)[name], module, lambda tensor: tensor.to(dtype).float()
        )


@pytest.mark.parametrize("kind", tiny.CHECKPOINTS)
def test_the_original_layout_is_the_one_that_diffusers_reads(
    checkpoints: Checkpoints, kind: str
) -> None:
    """The files of these tests are written with our own names of tensors: diffusers' converters,
    which are not ours, find the same tensors in them."""
    model, _ = checkpoints[kind]
    tensors = model.tensors()
    unet = single_file_utils.convert_ldm_unet_checkpoint(
        dict(tensors), {**model.unet.config, "class_embed_type": None}
    )
    if model.unet.config.time_cond_proj_dim:  # has no place in diffusers' converter
        name = "time_embed.cond_proj.weight"
        unet["time_embedding.cond_proj.weight"] = tensors[f"model.diffusion_model.{name}"]
    converted = {
        "unet": unet,
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), model.vae.config),
    }
    clip, open_clip = TEXT_PREFIXES[model.family]
    if model.text_encoder is not None:
        converted["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(
            dict(tensors), remove_prefix=clip
        )
    if model.text_encoder_2 is not None:
        converted["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            model.text_encoder_2, dict(tensors), prefix=open_clip
        )
    for name, module in model.modules.items():
        theirs = {
            key.removeprefix("text_model."): tensor for key, tensor in converted[name].items()
        }
        for key, tensor in module.state_dict().items():
            found = theirs[key.removeprefix("text_model.")]
            assert torch.equal(found.reshape(tensor.shape), tensor), f"{name} {key}"


def test_the_demo_checkpoint_has_every_tensor_in_its_place(bench: Bench) -> None:
    """What is loaded of it, written again, is the file: `deploy/demo_model` writes with the same
    names."""
    loaded = load(bench, DEMO)
    model = Tiny(SD1, {"unet": {}, "vae": {}, "text_encoder": {}}, **modules_of(loaded))
    for name in model.configs:
        model.configs[name] |= getattr(loaded.configs, name)
    written, there = model.tensors(), loaded.file.read()
    del there["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert written.keys() == there.keys()
    for name, tensor in there.items():
        assert torch.equal(written[name], tensor.float()), name


def test_text_encoders_of_older_files_lack_a_level_of_names(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, path = checkpoints["SD 1.x"]
    older = {name.replace(".text_model.", "."): t for name, t in model.tensors().items()}
    positions = "cond_stage_model.transformer.embeddings.position_ids"
    older[positions] = torch.arange(77)[None]
    old = model.save(tmp_path / "old.safetensors", older)
    assert worst(bench.paint(old).pixels[0], bench.paint(path).pixels[0]) == 0


def test_what_training_left_in_a_file_is_passed_over(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """And the other half of CLIP, which conversions keep."""
    model, path = checkpoints["SD 1.x"]
    clip = "cond_stage_model.transformer."
    more = {
        "betas": torch.zeros(1000),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
        "alphas_cumprod_prev": torch.zeros(1000),
        "posterior_log_variance_clipped": torch.zeros(1000),
        "denoiser.sigmas": torch.zeros(1000),
        "logvar": torch.ones(9),
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modelinput_blocks00bias": torch.ones(3),
        "first_stage_model.model_ema.decay": torch.ones(()),
        "first_stage_model.loss.logvar": torch.ones(()),
        "cond_stage_model.logit_scale": torch.ones(()),
        f"{clip}logit_scale": torch.ones(()),
        f"{clip}text_projection.weight": torch.zeros(32, 32),
        f"{clip}visual_projection.weight": torch.zeros(32, 32),
        f"{clip}vision_model.embeddings.class_embedding": torch.zeros(32),
        f"{clip}text_model.embeddings.position_ids": torch.arange(77).half()[None],
    }
    full = model.save(tmp_path / "full.safetensors", {**model.tensors(), **more})
    seen = bench.paint(full)
    assert worst(seen.pixels[0], bench.paint(path).pixels[0]) == 0
    assert not seen.result.warnings


def test_what_else_is_left_of_a_checkpoint_is_counted(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """As the webui it leaves out what has no place in the model, but not without a word."""
    model, path = checkpoints["SD 1.x"]
    tensors = model.tensors()
    ids = torch.arange(77)
    ids[41] = 40
    more = {
        f"{UNET}motion_modules.0.weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": ids[None],
    }
    full = model.save(tmp_path / "full.safetensors", {**tensors, **more})
    refined = bench.paint(
        path, beside={full: "Stable-diffusion"}, refiner_checkpoint="full", refiner_switch_at=0.5
    )
    for seen in (bench.paint(full), refined):
        assert worst(seen.pixels[0], bench.paint(path).pixels[0]) == 0
        assert seen.result.warnings == [
            f"full.safetensors: 1 of its {len(tensors) + 2} tensors have no part in what it makes"
            f" here, {UNET}motion_modules.0.weight among them",
            "full.safetensors: its position_ids are damaged; texts are read as if they were whole",
        ]


PUBLISHED = {
    (SD1, "unet"): 859_520_964,
    (SD1, "vae"): 83_653_863,
    (SD1, "text_encoder"): 123_060_480,
    (SD2, "unet"): 865_910_724,
    # OpenCLIP ViT-H/14 has 24 layers, 354,032,641 parameters with its projection and scale; without
    # these and without its last layer, which is not used:
    (SD2, "text_encoder_2"): 340_387_840,
    (SDXL, "unet"): 2_567_463_684,
    (SDXL, "vae"): 83_653_863,
    (SDXL, "text_encoder"): 123_060_480,
    (SDXL, "text_encoder_2"): 694_659_840,  # OpenCLIP bigG/14
    # Computed from the published config: with the VAE and the text encoder it comes to 6.08 GB of
    # halves, which is the size of the published file.
    (REFINER, "unet"): 2_259_526_660,
    (REFINER, "text_encoder_2"): 694_659_840,
}
TENSORS = {(SD1, "unet"): 686, (SD1, "vae"): 248, (SD1, "text_encoder"): 196, (SDXL, "unet"): 1680}
"""In the published files, less the position ids."""


def standard(family: str, component: str) -> Any:
    config = getattr(STANDARD[family], component)
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        if component == "vae":
            return AutoencoderKL.from_config(config)
        pooled = component == "text_encoder_2" and family != SD2
        model = CLIPTextModelWithProjection if pooled else CLIPTextModel
        return model(CLIPTextConfig(**config))


@pytest.mark.parametrize(("family", "component"), PUBLISHED)
def test_the_standard_configs_have_the_published_sizes(family: str, component: str) -> None:
    """A config that is off by a layer would refuse every real file."""
    model = standard(family, component)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[family, component]


@pytest.mark.parametrize(("family", "component"), TENSORS)
def test_the_standard_models_have_the_published_number_of_tensors(
    family: str, component: str
) -> None:
    sources = {
        "unet": layouts.unet_sources(STANDARD[family].unet),
        "vae": layouts.vae_sources(STANDARD[family].vae),
        "text_encoder": layouts.clip_sources(TEXT_PREFIXES[family][0]),
    }
    written = layouts.to_original(standard(family, component).state_dict(), sources[component])
    assert len(written) == TENSORS[family, component]


# What other files are


ATTENTION = "attentions_0_transformer_blocks_0_attn2_to_k"
CONTROL = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
HINT = "control_model.input_hint_block.0.weight"
KINDS: list[tuple[dict[str, tuple[int, ...]], str, str]] = [
    ({CONTROL: (320, 768), HINT: (16, 3, 3, 3)}, "ControlNet", SD1),
    ({CONTROL: (320, 1024), HINT: (16, 3, 3, 3)}, "ControlNet", SD2),
    (
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        },
        "ControlNet",
        SDXL,
    ),
    ({f"lora_unet_down_blocks_0_{ATTENTION}.lora_down.weight": (8, 768)}, "Lora", SD1),
    (
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (8, 2048)},
        "Lora",
        SDXL,
    ),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 1280)}, "Lora", SDXL),
    (
        {
            f"lora_unet_down_blocks_0_{ATTENTION}.lora_down.weight": (8, 768),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 768),
        },
        "Lora",
        SD1,
    ),
    ({"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}, "VAE", ""),
    ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "VAE", ""),
    ({"emb_params": (3, 768)}, "embeddings", ""),
    ({"string_to_param.*": (3, 768)}, "embeddings", ""),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embeddings", ""),
]


@pytest.mark.parametrize(("shapes", "type_", "family"), KINDS)
def test_other_models_are_known_for_what_they_are(
    shapes: dict[str, tuple[int, ...]], type_: str, family: str
) -> None:
    kind = recognise(Header({name: TensorSpec("F16", shape) for name, shape in shapes.items()}))
    assert (kind.type, kind.family) == (type_, family)


UNET = "model.diffusion_model."
FOREIGN: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SD3": (
        {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (6, 2)},
        "a Stable Diffusion 3 checkpoint",
    ),
    "Flux": (
        {"double_blocks.0.img_attn.qkv.weight": (6, 2), "single_blocks.0.linear1.weight": (6, 2)},
        "a Flux checkpoint",
    ),
    "Flux in a whole checkpoint": (
        {f"{UNET}double_blocks.0.img_attn.qkv.weight": (6, 2)},
        "a Flux checkpoint",
    ),
    "LoRA": (
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 2)},
        "a LoRA",
    ),
    "VAE": ({"first_stage_model.encoder.conv_in.weight": (2, 3, 3, 3)}, "a VAE"),
    "VAE of diffusers": (
        {"encoder.conv_in.weight": (2, 3, 3, 3), "encoder.conv_norm_out.weight": (2,)},
        "a VAE",
    ),
    "ControlNet": ({CONTROL: (2, 768), HINT: (2, 3, 3, 3)}, "a ControlNet for SD 1.x"),
    "embedding": ({"emb_params": (2, 768)}, "a textual inversion embedding"),
    "UNet of diffusers": (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (2, 2)},
        "a UNet in diffusers' own layout",
    ),
    "InstructPix2Pix": (
        {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)},
        "an InstructPix2Pix checkpoint",
    ),
    "unCLIP": (
        {
            f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            f"{UNET}label_emb.0.0.weight": (1280, 2048),
            "cond_stage_model.model.ln_final.weight": (1024,),
        },
        "an SD 2.x unCLIP checkpoint",
    ),
    "depth": ({f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}, "5 channels"),
    "something else": ({"classifier.weight": (10, 2)}, "no model that is known here"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_checkpoint_is_refused_by_what_it_is(
    bench: Bench, tmp_path: Path, what: str
) -> None:
    shapes, words = FOREIGN[what]
    path = tmp_path / "upload.safetensors"
    tiny.save(path, {name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(JobFailure, match=words) as refused:
        bench.paint(path)
    assert "upload.safetensors" in str(refused.value)


def test_damaged_files_are_told_apart(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, whole = checkpoints["SD 1.x"]
    tensors = model.tensors()
    path = tmp_path / "damaged.safetensors"
    name = f"broken checkpoint: .*{path.name}"

    def refused(reason: str) -> None:
        with pytest.raises(JobFailure, match=reason):
            bench.paint(path)
        path.unlink()

    path.write_bytes(whole.read_bytes()[:-1000])
    refused(f"{name}: it has .* upload it again")
    path.write_bytes(b"<" + os.urandom(4095))  # of which some would begin like a pickle
    refused(f"{name}: it is no safetensors file")
    path.write_bytes(b"")
    refused(f"{name}: it is no safetensors file")
    path.write_bytes((50).to_bytes(8, "little") + b"{" * 50)
    refused(f"{name}: its header can't be read")
    model.save(path, {key: tensor for key, tensor in tensors.items() if key != LOST})
    refused(f"the unet in {path.name} lacks 1 tensors, .*norm1.weight")
    model.save(path, {**tensors, LOST: tensors[LOST].to(torch.int8)})
    refused(f"the unet in {path.name} has .*norm1.weight in int8 and not in floating point")
    model.save(path, {**tensors, LOST: torch.zeros(3)})
    refused(f"the unet in {path.name} does not fit its config: size mismatch for .*norm1.weight")


def test_a_checkpoint_without_a_vae_runs_with_one_beside_it(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, whole = checkpoints["SD 1.x"]
    tensors = model.tensors()
    vae = {name: t for name, t in tensors.items() if name.startswith("first_stage_model.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in vae}
    path = model.save(tmp_path / "pruned.safetensors", rest)
    with pytest.raises(JobFailure, match=f"the vae in {path.name} is missing; name one"):
        bench.paint(path)
    beside = tiny.save(tmp_path / "vae.safetensors", vae)
    seen = bench.paint(path, beside={beside: "VAE"})
    assert worst(seen.pixels[0], bench.paint(whole).pixels[0]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers_per_block": 10**9}, r"<= 64 - at `\$.unet.layers_per_block`"),
        ({"in_channels": 10**9}, r"<= 100000 - at `\$.unet.in_channels`"),
        ({"down_block_types": True}, r"Expected `array`, got `bool` - at `\$.unet.down_block_t"),
        ({"down_block_types": ["DownBlock3D"]}, r"Invalid enum value 'DownBlock3D'"),
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types has 1 entries, 2 are needed"),
        ({"norm_num_groups": 7}, r"16 can't be 7 equal groups"),
        ({"addition_embed_type": "text_time"}, r"addition_time_embed_dim is missing"),
        ({"block_out_channels": None}, r"Expected `array`, got `null`"),
    ],
)
def test_a_config_may_not_ask_for_the_impossible(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path, change: Any, reason: str
) -> None:
    model, _ = checkpoints["SD 1.x"]
    path = tmp_path / "odd.safetensors"
    tiny.save(path, model.tensors(), {**model.configs, "unet": {**model.configs["unet"], **change}})
    with pytest.raises(JobFailure, match=f"darkroom.config in odd.safetensors: .*{reason}"):
        bench.paint(path)


def test_parts_that_a_config_cuts_apart_are_refused(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = tmp_path / "odd.safetensors"
    model, _ = checkpoints["SD 1.x"]
    text = {**model.configs["text_encoder"], "hidden_size": 3}
    tiny.save(path, model.tensors(), {**model.configs, "text_encoder": text})
    with pytest.raises(JobFailure, match=r"hidden_size: 3 can't be . equal heads"):
        bench.paint(path)
    model, _ = checkpoints["SDXL"]
    unet = {**model.configs["unet"], "addition_time_embed_dim": 3}
    tiny.save(path, model.tensors(), {**model.configs, "unet": unet})
    with pytest.raises(JobFailure, match=r"the parts of odd.safetensors do not fit together"):
        bench.paint(path)


def test_a_consistency_model_whose_guidance_has_no_place_is_refused(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, _ = checkpoints["SD 1.x"]
    path = tmp_path / "odd.safetensors"
    tiny.save(path, {**model.tensors(), f"{UNET}time_embed.cond_proj.weight": torch.zeros(8)})
    with pytest.raises(JobFailure, match=r"cond_proj.weight in odd.safetensors is no matrix"):
        bench.paint(path)


# Pickles


def zipped(tensors: dict[str, Tensor]) -> bytes:
    packed = io.BytesIO()
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 470_000}, packed)
    return packed.getvalue()


def of_old_torch(tensors: dict[str, Tensor]) -> bytes:
    packed = io.BytesIO()
    torch.save({"state_dict": tensors}, packed, _use_new_zipfile_serialization=False)
    return packed.getvalue()


def with_its_training(tensors: dict[str, Tensor]) -> bytes:
    """As PyTorch Lightning saved SD 1.4: with callbacks under their classes, which nobody has
    installed who only wants to paint."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kept: Any = type("ModelCheckpoint", (), {"__module__": name})
    callback = kept()
    callback.best_model_score = np.float32(0.1)
    packed = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for end in (1, 2, 3):
            package = ".".join(name.split(".")[:end])
            patch.setitem(sys.modules, package, types.SimpleNamespace(ModelCheckpoint=kept))
        torch.save({"state_dict": tensors, "callbacks": {kept: {"last": callback}}}, packed)
    return packed.getvalue()


@pytest.mark.parametrize("packed", [zipped, of_old_torch, with_its_training])
@pytest.mark.parametrize("kind", ["SD 1.x"])
def test_a_harmless_pickle_paints_as_its_safetensors(
    bench: Bench,
    checkpoints: Checkpoints,
    tmp_path: Path,
    kind: str,
    packed: Callable[[dict[str, Tensor]], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, path = checkpoints[kind]
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(packed(model.tensors()))
    # A pickle has no metadata: that the model is smaller than the published ones is told here.
    configs = ModelFile(path, path.name).header.metadata
    read = ModelFile.__init__

    def told(file: ModelFile, path: Path, name: str) -> None:
        read(file, path, name)
        file.header = Header(file.header.tensors, configs)

    monkeypatch.setattr(ModelFile, "__init__", told)
    seen = bench.paint(pickled)
    assert worst(seen.pixels[0], bench.paint(path).pixels[0]) == 0


class Calls:
    """What it is made of says: call this when you are opened."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.called


ATTACKS: dict[str, tuple[Callable[[str], Calls], str]] = {
    "os.system": (lambda at: Calls(os.system, f"touch {at}"), "system"),
    "exec": (lambda at: Calls(builtins.exec, f"open({at!r}, 'w')"), "exec"),
    "subprocess": (lambda at: Calls(subprocess.Popen, ["touch", at]), "Popen"),
    "known to no scanner": (lambda at: Calls(zipfile.ZipFile, at, "w"), "ZipFile"),
    "copy": (lambda at: Calls(shutil.copyfile, __file__, at), "copyfile"),
    "torch itself": (lambda at: Calls(torch.save, {}, at), "torch.serialization.save"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["zip", "bare", "hidden in a tensor's place"])
def test_a_malicious_pickle_is_never_run(
    bench: Bench, tmp_path: Path, attack: str, form: str
) -> None:
    """And is refused by the name of what it would have called."""
    make, named = ATTACKS[attack]
    marker = tmp_path / "ran"
    evil = make(str(marker))
    path = tmp_path / "evil.ckpt"
    if form == "bare":
        path.write_bytes(pickle.dumps({"state_dict": {"x": evil}}, 2))
    elif form == "zip":
        torch.save({"state_dict": {}, "callbacks": evil}, path)
    else:
        torch.save({"state_dict": {f"{UNET}input_blocks.0.0.weight": evil}}, path)
    with pytest.raises(JobFailure) as refused:
        bench.paint(path)
    assert re.search(rf"would run \S*{named} when", str(refused.value))
    assert path.name in str(refused.value)
    assert not marker.exists()


def test_a_pickle_that_is_cut_off_is_refused(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = tmp_path / "cut.ckpt"
    for whole in (zipped, of_old_torch):
        path.write_bytes(whole(checkpoints["SD 1.x"][0].tensors())[:-5000])
        with pytest.raises(
            JobFailure, match=r"broken checkpoint: cut.ckpt: (its ZIP|it was cut off)"
        ):
            bench.paint(path)


def test_whatever_a_pickle_holds_it_is_read_or_refused(tmp_path: Path) -> None:
    """A file must not bring a worker down: an error of any other type would."""
    path, chance = tmp_path / "odd.ckpt", random.Random(0)
    tensors = {"a.b": torch.zeros(20), "c": torch.ones(3, 3)}
    for number in range(150):
        damaged = bytearray((zipped, of_old_torch)[number % 2](tensors))
        for _ in range(chance.choice((1, 2, 5))):
            damaged[chance.randrange(2, 500)] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(JobFailure), warnings.catch_warnings(action="ignore"):
            ModelFile(path, path.name).read()
