"""Faces: found, turned upright, restored by a small model of random weights, and put back."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image

from services.inference.worker.pipelines import JobFailure, faces
from services.inference.worker.pipelines.models.image_models import import_spandrel
from services.inference.worker.pipelines.params.painting import PaintingParams
from tests.unit.pipelines import small, tiny
from tests.unit.pipelines.bench import Bench, photo
from tests.unit.pipelines.conftest import Checkpoints
from tests.unit.pipelines.easel import Done, Easel, Model, base64_of, pixels_of, read_back

EXTRA = importlib.util.find_spec("spandrel_extra_arches") is not None


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A photo of NASA's that comes with scikit-image: 512 x 512, one face, about 90 pixels wide."""
    return Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")


@pytest.fixture
def gfpgan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Of the real architecture, but for its width."""
    module = import_spandrel().architectures.GFPGAN
    real = module.GFPGAN
    monkeypatch.setattr(module, "GFPGAN", lambda **sizes: real(**sizes | small.GFPGAN_SIZE))
    path = small.write(tmp_path / "gfpgan", small.gfpgan_tensors())
    return "FaceRestoration", "GFPGANv1.4.pth", path


# Found


EYES = (np.array([200.0, 102.0]), np.array([247.0, 103.0]))


@pytest.mark.parametrize("scale", [0.25, 1, 4])
def test_a_face_is_found_at_any_size(portrait: Image.Image, scale: float) -> None:
    side = round(512 * scale)
    (landmarks,) = faces.find_faces(np.asarray(portrait.resize((side, side))))
    for found, eye in zip(landmarks, EYES, strict=False):
        assert np.linalg.norm(found / scale - eye) < 6


def test_every_face_of_a_large_picture_is_found_once(portrait: Image.Image) -> None:
    """A large one, and small ones that can't be seen where the picture is made smaller."""
    sheet = Image.new("RGB", (2400, 1600), "gray")
    sheet.paste(portrait.resize((1200, 1200)), (0, 0))
    for number in range(5):
        sheet.paste(portrait.resize((160, 160)), (1300 + 200 * number, 100 + 250 * number))
    assert len(faces.find_faces(np.asarray(sheet))) == 6


def test_where_there_is_no_face_none_is_found() -> None:
    data = Path(skimage.__file__).parent / "data"
    for name in ("chelsea.png", "coffee.png", "motorcycle_left.png"):
        assert faces.find_faces(np.asarray(Image.open(data / name).convert("RGB"))) == []


# Turned upright, and back


@pytest.mark.parametrize(("turned", "scale"), [(0, 1), (30, 0.25), (-120, 1.5)])
def test_a_face_is_brought_to_where_models_want_it(turned: float, scale: float) -> None:
    angle = np.radians(turned)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (scale * faces.TEMPLATE @ rotation.T + [300, 200]).astype(np.float32)
    matrix = faces.to_template(landmarks)
    assert np.allclose(landmarks @ matrix[:, :2].T + matrix[:, 2], faces.TEMPLATE, atol=0.01)


@pytest.mark.parametrize("turned", [0, 25])
def test_a_face_that_nobody_changed_is_the_picture_again(
    portrait: Image.Image, turned: float
) -> None:
    pixels = np.asarray(portrait.rotate(turned))
    (landmarks,) = faces.find_faces(pixels)
    matrix = faces.to_template(landmarks)
    result = pixels.astype(np.float32)
    faces.put_back(result, faces.aligned(pixels, matrix), matrix)
    off = abs(result - pixels)
    assert off.mean() < 0.3
    assert (off > 16).mean() < 1e-4


def soft_profile(length: int, edge: int) -> NDArray[np.float64]:
    """Of a row through a face of that many pixels: how much of it is seen, by hand."""
    kept = np.zeros(length)
    kept[1 + edge : length - edge + 1] = 1  # the first pixel goes before, then `edge` on each side
    width = 2 * edge + 1
    sigma = 0.3 * ((width - 1) * 0.5 - 1) + 0.8
    bell = np.exp(-((np.arange(width) - edge) ** 2) / (2 * sigma**2))
    return np.convolve(kept, bell / bell.sum(), "same")


def test_a_face_fades_into_its_picture() -> None:
    """At no angle and its own size, 64 pixels away from the corner."""
    matrix = np.array([[1.0, 0, -64], [0, 1, -64]])
    result = np.zeros((700, 700, 3), np.float32)
    white = np.full((512, 512, 3), 255, np.uint8)
    faces.put_back(result, white, matrix)
    profile = soft_profile(512, edge=511 // 20)
    theirs = np.zeros((700, 700))
    theirs[64:576, 64:576] = 255 * np.outer(profile, profile)
    assert abs(result - theirs[:, :, None]).max() < 0.01
    assert result[320, 320, 0] == 255


def test_a_face_at_the_border_is_put_back_as_far_as_it_can_be_seen() -> None:
    matrix = np.array([[1.0, 0, 200], [0, 1, 150]])
    result = np.zeros((400, 300, 3), np.float32)
    faces.put_back(result, np.full((512, 512, 3), 255, np.uint8), matrix)
    assert result[0, 0, 0] == 255
    assert result[-1, -1, 0] < 255  # its lower right corner is at (312, 362)
    assert result[380, 290].tolist() == [0, 0, 0]


# Jobs


def restore(easel: Easel, picture: Image.Image, *models: Model, **body: Any) -> Done:
    return easel.run("extra-single-image", models, {"image": base64_of(picture), **body})


def test_a_face_is_restored_as_visibly_as_it_is_asked_for(
    easel: Easel, gfpgan: Model, portrait: Image.Image
) -> None:
    whole = restore(easel, portrait, gfpgan, gfpgan_visibility=1)
    assert whole.warnings == []
    assert [one["name"] for one in whole.answer["receipt"]["weights"]] == ["GFPGANv1.4.pth"]
    changed = abs(whole.pixels - pixels_of(portrait)).max(2)
    assert changed[100:140, 200:245].mean() > 10
    assert not changed[250:].any()
    assert not changed[:, :100].any()
    half = restore(easel, portrait, gfpgan, gfpgan_visibility=0.5)
    wanted = (whole.pixels + pixels_of(portrait)) / 2
    assert abs(half.pixels - wanted).max() <= 1
    assert half.info["html_info"].endswith("GFPGAN visibility: 0.5")
    again = restore(easel, portrait, gfpgan, gfpgan_visibility=1)
    assert again.rows == whole.rows


def test_a_picture_is_enlarged_before_its_faces_are_restored(
    easel: Easel, gfpgan: Model, portrait: Image.Image
) -> None:
    """Which keeps its transparency."""
    clear = portrait.copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    body = {"upscaler_1": "Lanczos", "upscaling_resize": 1.5, "gfpgan_visibility": 1}
    done = restore(easel, clear, gfpgan, **body)
    larger = clear.resize((768, 768), Image.Resampling.LANCZOS)
    theirs = restore(easel, larger, gfpgan, gfpgan_visibility=1)
    assert done.rows == theirs.rows
    assert done.pictures[0].getchannel("A").tobytes() == larger.getchannel("A").tobytes()


def test_a_face_is_computed_by_the_model_of_the_file(gfpgan: Model, easel: Easel) -> None:
    """Of what it is given between -1 and 1, with the noise of the file, and rounded."""
    _, name, path = gfpgan
    library = easel.engine.library
    restorer = faces.FaceRestorer("GFPGAN", library, library.open(path, name))
    face = np.asarray(photo(512, 512))
    network = import_spandrel().architectures.GFPGAN.GFPGAN(
        out_size=512, decoder_load_path=None, fix_decoder=False
    )
    network.load_state_dict(small.gfpgan_tensors())
    levels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        image, _ = network(levels, randomize_noise=False)
    theirs = ((image[0].clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 0).numpy()
    assert abs(restorer._restored(face) - theirs).max() <= 0.51


def restoreformer(*, double_z: bool = False) -> Any:
    """A small one of random weights."""
    sizes = {
        "n_embed": 8,
        "embed_dim": 8,
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1,) * 6,
        "num_res_blocks": 1,
        "attn_resolutions": (16,),
        "dropout": 0.0,
        "in_channels": 3,
        "resolution": 512,
        "z_channels": 8,
        "double_z": double_z,
        "enable_mid": True,
        "head_size": 8,
    }
    torch.manual_seed(0)
    return import_spandrel().architectures.RestoreFormer.RestoreFormer(**sizes)


def test_a_restoreformer_is_known_and_computes(easel: Easel, tmp_path: Path) -> None:
    network = restoreformer()
    path = small.write(tmp_path / "former", network.state_dict())
    library = easel.engine.library
    restorer = faces.FaceRestorer("RestoreFormer", library, library.open(path, "former.pth"))
    face = np.asarray(photo(512, 512))
    levels = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        theirs = ((network(levels)[0][0].clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 0).numpy()
    assert abs(restorer._restored(face) - theirs).max() <= 0.51


def test_a_model_that_is_none_is_told_from_what_its_file_says(
    easel: Easel, tmp_path: Path, portrait: Image.Image
) -> None:
    names = ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_in.weight")
    path = small.write(tmp_path / "broken", {name: torch.zeros(32, 3, 3, 3) for name in names})
    broken: Model = ("FaceRestoration", "broken.pth", path)
    body = {"init_images": [base64_of(portrait)], "restore_faces": True}
    library = easel.engine.library
    restorer = faces.FaceRestorer("RestoreFormer", library, library.open(path, "broken.pth"))
    with pytest.raises(JobFailure, match=r"^broken.pth is no model that restores faces of a form"):
        restorer.restore(portrait)
    assert easel.paint(broken, **body).warnings == ["restore_faces: no face was found"]


def test_a_network_that_fits_no_face_is_told(
    easel: Easel, portrait: Image.Image, tmp_path: Path
) -> None:
    """One half of it makes twice as many channels as the other takes."""
    path = small.write(tmp_path / "former", restoreformer(double_z=True).state_dict())
    library = easel.engine.library
    restorer = faces.FaceRestorer("RestoreFormer", library, library.open(path, "former.pth"))
    with pytest.raises(JobFailure, match=r"^former.pth can't take a face: "):
        restorer.restore(portrait)


def test_a_painted_face_is_restored(
    bench: Bench, checkpoints: Checkpoints, gfpgan: Model, portrait: Image.Image, tmp_path: Path
) -> None:
    """A ControlNet puts a face back into a picture of noise, and then it is restored."""
    model, path = checkpoints["SD 1.x"]
    network, config = tiny.controlnet(model)
    tensors = tiny.controlnet_tensors(network, config, "original")
    control = tiny.save(tmp_path / "keep.safetensors", tensors, config)
    corner = Image.new("L", (256, 256))
    corner.paste(255, (0, 0, 40, 40))
    unit = {
        "module": "inpaint_only",
        "model": "keep",
        "image": base64_of(portrait.crop((110, 0, 366, 256))),
        "mask": base64_of(corner),
    }
    paint = partial(
        bench.paint,
        path,
        beside={control: "ControlNet", gfpgan[2]: "FaceRestoration"},
        steps=1,
        width=256,
        height=256,
        alwayson_scripts={"controlnet": {"args": [unit]}},
    )
    restored, plain = paint(restore_faces=True), paint()
    assert restored.result.warnings == []
    changed = abs(restored.pixels[0] - plain.pixels[0]).max(2)
    assert changed[100:140, 90:135].mean() > 10
    assert not changed[:, 240:].any()
    assert (restored.info["restore_faces"], plain.info["restore_faces"]) == (True, False)
    assert plain.result.warnings == [
        f"FaceRestoration {gfpgan[2].name}: not used (the body does not say restore_faces)"
    ]


def test_a_picture_without_a_face_is_what_it_was(easel: Easel, gfpgan: Model) -> None:
    plain = easel.paint(gfpgan, override_settings={"face_restoration": True}, restore_faces=False)
    assert "Face restoration" not in plain.fields
    settings = {"face_restoration": True, "face_restoration_model": "gfpgan"}
    done = easel.paint(gfpgan, override_settings=settings)
    assert done.rows == plain.rows
    assert done.warnings == ["restore_faces: no face was found"]
    assert done.fields["Face restoration"] == done.info["face_restoration_model"] == "GFPGAN"
    extra = restore(easel, photo(), gfpgan, gfpgan_visibility=1)
    assert extra.warnings == ["GFPGAN: no face was found in image_0"]
    assert extra.rows == [pixels_of(photo()).tobytes()]


def test_a_plot_varies_what_restores_faces(easel: Easel, gfpgan: Model) -> None:
    args = ["Face restore", "GFPGAN, yes, no", [], 0, "", [], 0, "", [], True, True, False, False]
    done = easel.paint(gfpgan, script_name="X/Y/Z plot", script_args=[*args, 0], steps=1)
    told = [read_back(text).get("Face restoration") for text in done.texts[1:]]
    assert told == ["GFPGAN", "GFPGAN", None]


def test_a_body_that_leaves_it_out_is_told_by_its_settings() -> None:
    assert not PaintingParams().restores_faces
    assert PaintingParams(restore_faces=True).restores_faces


CODEFORMER = ("position_emb", "quantize.embedding.weight", "encoder.blocks.0.weight")
"""What tells one, and nothing else of it."""


@pytest.fixture
def codeformer(tmp_path: Path) -> Model:
    tensors = {name: torch.zeros(4, 4) for name in CODEFORMER}
    return "FaceRestoration", "codeformer.pth", small.write(tmp_path / "codeformer", tensors)


@pytest.mark.skipif(EXTRA, reason="with this package, CodeFormer works")
def test_codeformer_is_refused_by_name(easel: Easel, codeformer: Model) -> None:
    reason = "CodeFormer needs the package spandrel_extra_arches, which is not installed here"
    with pytest.raises(JobFailure, match=f"^restore_faces: {reason}"):
        easel.paint(codeformer, restore_faces=True)
    with pytest.raises(JobFailure, match=f"^codeformer_visibility: {reason}"):
        restore(easel, photo(), codeformer, codeformer_visibility=0.5)


def test_without_a_model_that_restores_faces_a_job_is_refused(
    easel: Easel, gfpgan: Model, tmp_path: Path
) -> None:
    upscaler: Model = (
        "FaceRestoration",
        "four.pth",
        small.write(tmp_path / "four", small.esrgan_tensors()),
    )
    for models, settings, reason in (
        ([], {}, "restore_faces: it takes GFPGAN, RestoreFormer, CodeFormer or a file, by a check"),
        ([], {"face_restoration_model": "GFPGAN"}, 'restore_faces: got "GFPGAN", allowed is GFPGA'),
        (
            [gfpgan],
            {"face_restoration_model": "CodeFormer"},
            'restore_faces: got "CodeFormer", allowed is',
        ),
        ([upscaler], {}, "restore_faces: four.pth is no model that is known here; a model for fac"),
    ):
        with pytest.raises(JobFailure) as failure:
            easel.paint(*models, restore_faces=True, override_settings=settings)
        assert str(failure.value).startswith(reason)
    with pytest.raises(JobFailure) as failure:
        restore(easel, photo(), gfpgan, codeformer_visibility=1)
    assert str(failure.value).endswith("(it names GFPGANv1.4.pth)")
