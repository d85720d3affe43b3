"""The script "SD upscale": tiles to the pixel, and each of them painted as img2img paints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from services.inference.worker.pipelines import JobFailure, sd_upscale
from services.inference.worker.pipelines.params.painting import PaintingParams
from services.inference.worker.pipelines.pictures.tiles import tile_grid
from tests.unit.pipelines import by_hand, small, tiny
from tests.unit.pipelines.bench import Bench, Seen, base64_of, photo, worst
from tests.unit.pipelines.conftest import Checkpoints, Same
from tests.unit.pipelines.easel import Done, Easel, Model, read_back

# Tiles


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "lefts", "tops"),
    [
        ((1024, 1024), (512, 512), 64, [0, 256, 512], [0, 256, 512]),
        ((1000, 600), (512, 512), 64, [0, 244, 488], [0, 88]),
        ((960, 512), (512, 512), 64, [0, 448], [0]),
        ((961, 513), (512, 512), 64, [0, 224, 449], [0, 1]),
        ((200, 128), (64, 64), 0, [0, 45, 90, 136], [0, 64]),
        ((512, 512), (512, 512), 511, [0], [0]),
    ],
)
def test_tiles_lie_where_the_webui_cuts_them(
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: int,
    lefts: list[int],
    tops: list[int],
) -> None:
    grid = tile_grid(size, *tile, overlap)
    assert (grid.lefts, grid.tops) == (lefts, tops)


@pytest.mark.parametrize("overlap", [0, 1, 24, 48])
def test_tiles_that_nobody_changed_are_the_picture_again(overlap: int) -> None:
    picture = photo(150, 101)
    grid = tile_grid(picture.size, 64, 56, overlap)
    tiles = grid.split(picture)
    assert {tile.size for tile in tiles} == {(64, 56)}
    assert grid.combine(tiles).tobytes() == picture.tobytes()


def test_where_tiles_overlap_they_are_blended_to_the_pixel() -> None:
    grid = tile_grid((150, 101), 64, 56, 24)
    tiles = [photo(64, 56, seed=number) for number in range(grid.count)]
    theirs = combined([np.asarray(tile) for tile in tiles], grid.lefts, grid.tops, 24, (150, 101))
    assert (np.asarray(grid.combine(tiles)) == theirs).all()


def test_the_first_pixel_of_an_overlap_is_that_of_the_tile_before() -> None:
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    row = tile_grid((12, 8), 8, 8, 4).combine([black, white])
    levels = [0] * 4 + [0, 63, 127, 191] + [255] * 4
    assert np.asarray(row)[3, :, 0].tolist() == levels


def combined(
    tiles: list[NDArray[Any]],
    lefts: list[int],
    tops: list[int],
    overlap: int,
    size: tuple[int, int],
) -> NDArray[np.int64]:
    """By hand: a tile fades in over the one to its left, a row of them over the row above."""

    def faded(below: NDArray[Any], above: NDArray[Any], first: bool) -> NDArray[Any]:
        """Both (length, …): from the one to the other along the first axis."""
        strength = np.full(len(above), 255)
        if not first:
            strength[:overlap] = [255 * number // overlap for number in range(overlap)]
        strength = strength[:, None, None]
        blended: NDArray[Any] = above.astype(int) * strength + below * (255 - strength)
        return (blended + 127) // 255

    width, height = size
    tile_height, tile_width, _ = tiles[0].shape
    whole = np.zeros((height, width, 3), int)
    for number, top in enumerate(tops):
        row = np.zeros((tile_height, width, 3), int)
        for column, left in enumerate(lefts):
            tile, cut = tiles[number * len(lefts) + column], slice(left, left + tile_width)
            blended = faded(row[:, cut].swapaxes(0, 1), tile.swapaxes(0, 1), first=column == 0)
            row[:, cut] = blended.swapaxes(0, 1)
        rows = slice(top, top + tile_height)
        whole[rows] = faded(whole[rows], row, first=number == 0)
    return whole


# Pictures


def upscale(bench: Bench, path: Path, picture: Image.Image, args: list[Any], **body: Any) -> Seen:
    return bench.paint(
        path,
        task_type="img2img",
        init_images=[base64_of(picture)],
        script_name="SD Upscale",
        script_args=args,
        **body,
    )


@pytest.mark.parametrize(
    ("body", "seeds"),
    [
        # Each batch begins one seed on, whatever it had: so seeds come twice.
        ({}, [7, 8, 9, 10, 11, 12]),
        ({"batch_size": 4}, [7, 8, 9, 10, 8, 9]),
    ],
)
def test_every_tile_is_painted_as_img2img_paints_it(
    bench: Bench,
    checkpoints: Checkpoints,
    same: Same,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    seeds: list[int],
) -> None:
    """A picture of 96 x 72 pixels by 1.5 is 144 x 104, which is 3 x 2 tiles."""
    monkeypatch.setattr(sd_upscale, "TILES_AT_ONCE", 4)
    model, path = checkpoints["SD 1.x"]
    picture = photo(96, 72)
    larger = picture.resize((144, 104), Image.Resampling.LANCZOS)
    lefts, tops = [0, 40, 80], [0, 40]
    predict = by_hand.usually_guided(model)
    latents = []
    for seed, (top, left) in zip(seeds, [(y, x) for y in tops for x in lefts], strict=True):
        start = by_hand.encode_picture(model, larger.crop((left, top, left + 64, top + 64)))
        noise = by_hand.noise(seed)
        latents.append(by_hand.run(model, predict, noise, 10, picture=start, last=4))
    painted = [by_hand.decode(model, one) for one in latents]
    theirs = combined(painted, lefts, tops, 16, (144, 104))
    seen = upscale(
        bench,
        path,
        picture,
        ["", 16, "Lanczos", 1.5],
        steps=10,
        denoising_strength=0.35,
        **body,
    )
    assert len(seen.latents) == len(latents)
    for ours, one in zip(seen.latents, latents, strict=True):
        same("SD upscale", ours, one)
    assert worst(seen.pixels[0], theirs) <= 1
    assert seen.info["all_seeds"] == [7]
    assert seen.info["batch_size"] == body.get("batch_size", 1)


def test_variations_keep_the_seed_within_a_batch() -> None:
    """(seed, variation seed) of five tiles, two of which make a batch."""
    params = PaintingParams(batch_size=2, subseed=100, subseed_strength=0.5)
    pairs = [sd_upscale.seeds_of_tile(params, 7, tile) for tile in range(5)]
    assert pairs == [(7, 100), (7, 101), (8, 100), (8, 101), (9, 100)]


def enlarge(easel: Easel, *models: Model, args: list[Any], **body: Any) -> Done:
    usual = {
        "init_images": [base64_of(photo(64, 48))],
        "script_name": "SD upscale",
        "script_args": args,
        "denoising_strength": 0.5,
    }
    return easel.paint(*models, **{**usual, **body})


def test_a_picture_for_each_iteration_says_how_it_was_made(easel: Easel) -> None:
    done = enlarge(easel, args=["", 16, 1, 2], n_iter=2)
    assert [picture.size for picture in done.pictures] == [(128, 96)] * 2
    assert [image.name for image in done.result.images] == ["image_0.png", "image_1.png"]
    fields = [read_back(text) for text in done.texts]
    assert [one["Seed"] for one in fields] == ["7", "8"] == [str(s) for s in done.info["all_seeds"]]
    assert fields[0]["SD upscale overlap"] == "16"
    assert fields[0]["SD upscale upscaler"] == "Lanczos"
    assert fields[0]["Size"] == "64x64"  # of a tile, as in the webui
    assert done.info["infotexts"] == done.texts
    assert done.warnings == []
    assert done.rows[0] != done.rows[1]
    # 3 x 2 tiles at once, 2 steps each, twice.
    assert [*dict.fromkeys(easel.steps)] == [(n, 4) for n in range(1, 5)]


def test_without_an_upscaler_a_picture_keeps_its_size(easel: Easel) -> None:
    """Its sides need not be multiples of anything; they are rounded down where it is enlarged."""
    picture = [base64_of(photo(99, 77))]
    for upscaler, size in (("None", (99, 77)), (0, (99, 77)), (2, (144, 112))):
        done = enlarge(easel, args=["", 8, upscaler, 1.5], init_images=picture, steps=1)
        assert done.pictures[0].size == size


def test_an_upscaler_of_the_registry_enlarges(easel: Easel, tmp_path: Path) -> None:
    upscaler: Model = (
        "Upscaler",
        "four.pth",
        small.write(tmp_path / "four", small.esrgan_tensors()),
    )
    done = enlarge(easel, upscaler, args=["", 16, "four", 2], steps=1)
    assert done.pictures[0].size == (128, 96)
    assert done.fields["SD upscale upscaler"] == "four"
    assert [one["name"] for one in done.answer["receipt"]["weights"]][-1] == "four.pth"
    assert done.rows != enlarge(easel, args=["", 16, "Lanczos", 2], steps=1).rows


def test_a_controlnet_is_shown_each_tile(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """As if each had been a picture of its own; and a hint of the body's goes to all of them."""
    model, path = checkpoints["SD 1.x"]
    network, config = tiny.controlnet(model)
    control = tiny.save(
        tmp_path / "tile.safetensors", tiny.controlnet_tensors(network, config, "original"), config
    )
    picture = photo(112, 64)
    unit = {"module": "invert", "model": "tile", "processor_res": 64}
    body: dict[str, Any] = {"denoising_strength": 0.5, "beside": {control: "ControlNet"}}
    scripts = {"controlnet": {"args": [unit]}}
    seen = upscale(bench, path, picture, ["", 16, "None", 1], alwayson_scripts=scripts, **body)
    for number, left in enumerate((0, 48)):
        tile = picture.crop((left, 0, left + 64, 64))
        alone = bench.paint(
            path,
            task_type="img2img",
            init_images=[base64_of(tile)],
            seed=7 + number,
            alwayson_scripts=scripts,
            **body,
        )
        assert worst(seen.latents[number], alone.latents[0]) < 1e-4
    assert seen.result.warnings == []
    given = {**unit, "image": base64_of(photo(seed=3))}
    scripts = {"controlnet": {"args": [given]}}
    seen = upscale(bench, path, picture, ["", 16, "None", 1], alwayson_scripts=scripts, **body)
    (warning,) = seen.result.warnings
    assert warning.startswith("alwayson_scripts.controlnet.args[0].image: each tile is shown")


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        ({"init_images": [base64_of(photo())] * 2, "batch_size": 2}, "init_images: only the first"),
        ({"override_settings": {"return_grid": True}}, "override_settings.return_grid: no effect"),
    ],
)
def test_what_tiles_do_not_take_is_warned_of(
    easel: Easel, body: dict[str, Any], warning: str
) -> None:
    (told,) = enlarge(easel, args=["", 16, "Lanczos", 2], steps=1, **body).warnings
    assert told.startswith(warning)


ARGS = ["", 16, "Lanczos", 2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            {"args": [16, "Lanczos", 2]},
            "script_args: got 3 values, allowed are the 4 of SD",
        ),
        (
            {"args": ["", "much", 1, 2]},
            'script_args: overlap: got "much", allowed is a whole number',
        ),
        ({"args": ["", 64, 1, 2]}, "script_args: overlap: got 64, allowed is what is below width"),
        ({"args": ["", 16, 5, 2]}, "script_args: upscaler: got 5, allowed is the name of an"),
        ({"args": ["", 16, "best", 2]}, 'script_args: upscaler: got "best", allowed is one of Lan'),
        (
            {"args": ["", 16, 1, 0.5]},
            "script_args: scale_factor: got 0.5, allowed is a number",
        ),
        ({"args": ["", 16, 1, 1]}, "width and height: got tiles of 64x64, allowed are those that"),
        ({"args": ["", 63, 1, 8]}, "script_args: SD upscale: got 144129 tiles, allowed are"),
        ({"args": ARGS, "seed": 2**64 - 4}, "seed: got 18446744073709551612, allowed is what leav"),
        ({"args": ARGS, "mask": base64_of(photo())}, "mask: got one, allowed is none with SD ups"),
    ],
)
def test_what_can_not_be_tiled_is_refused(easel: Easel, body: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobFailure) as failure:
        enlarge(easel, **body)
    assert str(failure.value).startswith(reason)


@pytest.mark.parametrize("name", ["Loopback", "Outpainting mk2", "Prompt matrix", "sd upscale"])
def test_a_script_that_is_not_there_is_refused(easel: Easel, name: str) -> None:
    """A plain picture would be another one than was asked for."""
    with pytest.raises(JobFailure) as failure:
        easel.paint(script_name=name, script_args=ARGS)
    assert str(failure.value) == (
        f'script_name: got "{name}", allowed in txt2img is one of x/y/z plot'
    )
