"""Models by the names that jobs and bodies use for them: which file acts, and what the receipt says
of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.library import Models
from tests.unit.pipelines import small
from tests.unit.pipelines.easel import CHECKPOINT, Done, Easel, Model, base64_of, job_of


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three that differ."""
    folder = tmp_path_factory.mktemp("loras")
    return [
        small.write_lora(
            folder / f"{number}", strength=1 + number, ss_output_name=f"author's {number}"
        )
        for number in range(3)
    ]


def weights_of(done: Done) -> list[tuple[str, str]]:
    return [(one["name"], one["sha256"]) for one in done.answer["receipt"]["weights"]][1:]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_one_checkpoint_are_told_apart(easel: Easel, loras: list[Path]) -> None:
    names = ("a.safetensors", "b.safetensors")
    named: list[Model] = [("Lora", name, path) for name, path in zip(names, loras, strict=False)]
    one_checkpoint, files = job_of("txt2img", [CHECKPOINT, *named])
    one_checkpoint = msgspec.structs.replace(
        one_checkpoint,
        models=[
            msgspec.structs.replace(m, checkpoint_id="the same") for m in one_checkpoint.models
        ],
    )
    found = Models(one_checkpoint, files, easel.engine.library)
    for _, name, path in named:
        model = found.find("Lora", name)
        assert model is not None
        assert model.path == path
        done = easel.paint(*named, prompt=f"a red circle <lora:{name[:1]}:1>")
        assert weights_of(done) == [(name, sha256_of(path))]
        alone = easel.paint(("Lora", "x.safetensors", path), prompt="a red circle <lora:x:1>")
        assert done.rows == alone.rows


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (("style [v1].safetensors", "style [v2].safetensors"), ("style [v1]", "style [v2]")),
        (("style.pt", "style.safetensors"), ("style.pt", "style.safetensors")),
        (("one.safetensors", "other.safetensors"), ("author's 0", "AUTHOR'S 1")),
    ],
)
def test_a_network_is_the_one_that_the_prompt_names(
    easel: Easel, loras: list[Path], names: tuple[str, str], written: tuple[str, str]
) -> None:
    named: list[Model] = [("Lora", name, path) for name, path in zip(names, loras, strict=False)]
    for number in (1, 0):
        done = easel.paint(*named, steps=1, prompt=f"a red circle <lora:{written[number]}:1>")
        assert weights_of(done) == [(names[number], sha256_of(loras[number]))]
        assert done.fields["Lora hashes"].startswith(f"{written[number]}: ")


def test_a_checkpoint_is_told_by_its_registered_hash_alone(
    easel: Easel, tmp_path: Path, loras: list[Path]
) -> None:
    first: Model = (CHECKPOINT[0], "first.safetensors", small.write_random(tmp_path / "first"))
    job, files = job_of("txt2img", [first, CHECKPOINT])
    digest = sha256_of(CHECKPOINT[2])
    job.models[1] = msgspec.structs.replace(job.models[1], sha256=digest.upper())
    found = Models(job, files | {digest: CHECKPOINT[2]}, easel.engine.library)
    model = found.find(CHECKPOINT[0], digest[:10])
    assert model is not None
    assert model.name == CHECKPOINT[1]


def test_an_upscaler_is_told_by_the_webuis_name_for_it(easel: Easel, tmp_path: Path) -> None:
    file = small.write(tmp_path / "upscaler", small.compact_tensors())
    upscaler: Model = ("Upscaler", "RealESRGAN_x4plus.safetensors", file)
    done = easel.run(
        "extra-single-image",
        [upscaler],
        {"image": base64_of(Image.new("RGB", (8, 8))), "upscaler_1": "R-ESRGAN 4x+"},
    )
    assert done.answer["receipt"]["weights"][0]["name"] == upscaler[1]


# What is kept by its content, whatever it is called


def test_an_embedding_acts_by_each_of_its_names(easel: Easel, tmp_path: Path) -> None:
    path = small.write_embedding(tmp_path / "vectors")
    done = {}
    for word in ("zorb", "blub", "zorb (v2)"):
        model: Model = ("embeddings", f"{word}.safetensors", path)
        prompt = "a red " + word.replace("(", r"\(").replace(")", r"\)")
        done[word] = easel.paint(model, prompt=prompt, steps=1)
        assert weights_of(done[word]) == [(model[1], sha256_of(path))]
        assert done[word].fields["TI hashes"] == f"{word}: {sha256_of(path)[:12]}"
        assert done[word].rows != easel.paint(prompt=prompt, steps=1).rows
    assert done["zorb"].rows == done["blub"].rows == done["zorb (v2)"].rows


def test_a_network_brings_embeddings_with_it(
    easel: Easel, loras: list[Path], tmp_path: Path
) -> None:
    """They act in the texts of a pass that has the network, and only there."""
    alone = small.write_embedding(tmp_path / "vectors")
    (vectors,) = load_file(alone).values()
    words = {
        "zorb.string_to_param.*": vectors,
        "zorb.two.clip_l": -vectors,
        "bad.clip_l": vectors.T,
    }
    bundle = load_file(loras[0]) | {f"bundle_emb.{word}": v for word, v in words.items()}
    lora: Model = ("Lora", "style.safetensors", small.write(tmp_path / "bundle", bundle))
    bare: Model = ("Lora", "style.safetensors", loras[0])
    vectors_of: Model = ("embeddings", "zorb.safetensors", alone)
    worn, steps = "<lora:style:1>", {"steps": 1}
    for field in ("prompt", "negative_prompt"):
        body = {**steps, "prompt": f"a red circle{worn}", field: f"a zorb{worn}"}
        if field == "negative_prompt":
            body[field] = "a zorb"
        done = easel.paint(lora, **body)
        assert done.rows == easel.paint(bare, vectors_of, **body).rows
        assert done.rows != easel.paint(bare, **body).rows
        assert [name for name, _ in weights_of(done)] == [lora[1]]
        assert "TI hashes" not in done.fields
        assert not done.warnings
    other = easel.paint(lora, prompt=f"a zorb.two{worn}", **steps)
    assert other.rows != easel.paint(bare, prompt=f"a zorb.two{worn}", **steps).rows
    with pytest.raises(JobFailure, match=r"bad in style.safetensors .* vectors"):
        easel.paint(lora, prompt=f"a bad{worn}", **steps)
    both = easel.paint(lora, vectors_of, prompt=f"a zorb{worn}", **steps)
    assert both.warnings == ["zorb in style.safetensors has no effect; zorb.safetensors has"]
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7, **steps}
    second = {"prompt": "a zorb", "hr_prompt": f"a zorb{worn}", **hires}
    with_both = easel.paint(bare, vectors_of, **{**second, "prompt": "a red"})
    assert easel.paint(lora, **{**second, "prompt": "a red"}).rows == with_both.rows
    assert easel.paint(lora, **second).rows != easel.paint(bare, vectors_of, **second).rows


@pytest.mark.parametrize("prompt", ["a red zorbing <lora:zorb:1>", "a red circle", "a :zorb-less"])
def test_an_embedding_that_no_text_names_has_no_part(
    easel: Easel, loras: list[Path], tmp_path: Path, prompt: str
) -> None:
    wide = small.write(tmp_path / "wide", {"emb_params": torch.zeros(2, 768)})
    foreign: Model = ("embeddings", "zorb.safetensors", wide)
    named = [foreign, ("Lora", "zorb.safetensors", loras[0])]
    if "less" in prompt:
        with pytest.raises(JobFailure, match=f"zorb.safetensors does not fit {CHECKPOINT[1]}"):
            easel.paint(*named, prompt=prompt, steps=1)
        return
    done = easel.paint(*named, prompt=prompt, steps=1)
    assert foreign[1] not in [
        one["name"] for one in done.answer["receipt"]["weights"] if one["type"] == "embeddings"
    ]
    assert "TI hashes" not in done.fields
    assert "embeddings zorb.safetensors: not used (no prompt names it)" in done.warnings


def test_an_embedding_is_used_where_a_text_of_the_second_pass_names_it(
    easel: Easel, tmp_path: Path
) -> None:
    model: Model = ("embeddings", "zorb.safetensors", small.write_embedding(tmp_path / "vectors"))
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7, "steps": 1}
    for more in ({"hr_prompt": "a zorb"}, {"hr_negative_prompt": "zorb"}):
        done = easel.paint(model, **hires, **more)
        assert [name for name, _ in weights_of(done)] == [model[1]]
        assert done.rows != easel.paint(**hires, **more).rows
    changing = {"prompt": "a red [circle:zorb:2]", "sampler_name": "Euler"}
    assert weights_of(easel.paint(model, **changing, steps=1)) == []
    assert weights_of(easel.paint(model, **changing, steps=3)) != []


def test_a_vae_is_that_of_the_checkpoint_that_it_is_used_with(easel: Easel, tmp_path: Path) -> None:
    library = easel.engine.library
    file = library.open(small.write_vae(tmp_path / "vae"), "vae")
    config = small.demo_configs()["vae"]
    vaes = [
        library.vae(file, {**config, "scaling_factor": factor}) for factor in (0.25, 0.125, 0.25)
    ]
    assert [vae.config.scaling_factor for vae in vaes] == [0.25, 0.125, 0.25]
    assert vaes[0] is vaes[2]


def test_a_reason_has_the_names_of_its_own_job(
    easel: Easel, loras: list[Path], tmp_path: Path
) -> None:
    module = "lora_unet_mid_block_attentions_0_attn2_to_k"
    elsewhere = {
        f"{module}.lora_down.weight": torch.zeros(2, 768),
        f"{module}.lora_up.weight": torch.zeros(4, 2),
    }
    lora = small.write(tmp_path / "lora", elsewhere)
    for name in ("mine", "yours"):
        checkpoint: Model = (CHECKPOINT[0], f"{name}.safetensors", CHECKPOINT[2])
        with pytest.raises(JobFailure, match=f"^{name}.pt does not fit {name}.safetensors"):
            easel.paint(checkpoint, ("Lora", f"{name}.pt", lora), prompt=f"a <lora:{name}:1>")


# What only the params name


def paint_with(
    easel: Easel, listed: list[Model], found: list[Model], **body: Any
) -> tuple[list[bytes], list[tuple[str, str]], list[str]]:
    """Its pictures, weights and warnings; `found`: in the registry, since the params name them."""
    job, files = job_of("txt2img", [*listed, *found])
    models = [
        msgspec.structs.replace(model, from_params=number >= len(listed))
        for number, model in enumerate(job.models)
    ]
    usual = {"prompt": "a red circle", "steps": 1, "width": 64, "height": 64, "seed": 7}
    job = msgspec.structs.replace(job, models=models)
    done = Done(easel.engine.run(job, json.dumps(usual | body).encode(), files))
    weights = [(one["type"], one["name"]) for one in done.answer["receipt"]["weights"]]
    return done.rows, weights, done.warnings


def test_what_only_the_params_name_is_nobodys_default(
    easel: Easel, tmp_path: Path, loras: list[Path]
) -> None:
    vae: Model = ("VAE", "v.safetensors", small.write_vae(tmp_path / "vae", redder=2.0))
    lora: Model = ("Lora", "l.safetensors", loras[0])
    plain, weights, warnings = paint_with(easel, [CHECKPOINT], [vae, lora])
    assert weights == [CHECKPOINT[:2]]
    assert warnings == []
    assert plain == easel.paint(steps=1).rows
    body = {"override_settings": {"sd_vae": "v"}, "prompt": "a red circle <lora:l:1>"}
    _, weights, warnings = paint_with(easel, [CHECKPOINT], [vae, lora], **body)
    assert sorted(weights) == sorted(model[:2] for model in (CHECKPOINT, vae, lora))
    assert warnings == []


def test_a_checkpoint_that_only_the_params_name_begins_pictures_where_they_say_so(
    easel: Easel,
) -> None:
    settings = {"sd_model_checkpoint": CHECKPOINT[1]}
    _, weights, _ = paint_with(easel, [], [CHECKPOINT], override_settings=settings)
    assert weights == [CHECKPOINT[:2]]
    with pytest.raises(JobFailure, match="names no checkpoint of type Stable-diffusion"):
        paint_with(easel, [], [CHECKPOINT], refiner_checkpoint=CHECKPOINT[1])


def test_an_embedding_of_another_family_that_nobody_listed_is_a_word(
    easel: Easel, tmp_path: Path
) -> None:
    """Somebody has called one by a word that others write."""
    wide = small.write(tmp_path / "wide", {"emb_params": torch.ones(2, 1024)})
    circle: Model = ("embeddings", "circle.safetensors", wide)
    rows, weights, warnings = paint_with(easel, [CHECKPOINT], [circle])
    assert weights == [CHECKPOINT[:2]]
    assert warnings == []
    assert rows == easel.paint(steps=1).rows
    with pytest.raises(JobFailure, match=r"circle\.safetensors does not fit"):
        paint_with(easel, [CHECKPOINT, circle], [])
