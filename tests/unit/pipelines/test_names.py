"""Models by the names that jobs and bodies use for them: which file acts, and what the receipt says
of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
from PIL import Image

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
