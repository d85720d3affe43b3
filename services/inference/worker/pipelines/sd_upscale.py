"""The script "SD upscale": a picture enlarged, painted anew tile by tile with img2img, and put
together again. Sizes, tiles and seeds are the webui's.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from PIL import Image

from services.inference.worker.pipelines import Aside, JobFailure, Report, Work
from services.inference.worker.pipelines.controlling import Source
from services.inference.worker.pipelines.denoising import Asking
from services.inference.worker.pipelines.enlarging import (
    aside,
    enlarged_size,
    find_upscaler,
)
from services.inference.worker.pipelines.painting import (
    Painting,
    PaintingPlan,
    Pass,
    Start,
    Studio,
)
from services.inference.worker.pipelines.params.painting import HIGHEST_SEED, PaintingParams
from services.inference.worker.pipelines.params.reading import Body, convert
from services.inference.worker.pipelines.pictures.files import on_ground, read_picture
from services.inference.worker.pipelines.pictures.tiles import tile_grid
from shared.contracts.inference import RunJob

MULTIPLE = 8
"""Of what the sides of an enlarged picture are."""
MOST_TILES = 1024
"""That a job renders."""
TILES_AT_ONCE = 8
"""That are rendered side by side, whatever `batch_size` says of their seeds."""
INDEXED = ("None", "Lanczos", "Nearest")
"""With which the webui's list of upscalers begins; what follows depends on the installation."""


class SDUpscaleArgs(msgspec.Struct, frozen=True, kw_only=True):
    """`script_args`, whose first value says nothing. `overlap`: of tiles, in pixels. `upscaler`: a
    name, or the number of one of `INDEXED`."""

    overlap: Annotated[int, Meta(ge=0)]
    upscaler: str | int
    scale_factor: Annotated[float, Meta(ge=1, le=8)]

    @property
    def upscaler_name(self) -> str:
        """Raises JobFailure for the number of something that is only known to an installation."""
        if isinstance(self.upscaler, str):
            return self.upscaler
        if 0 <= self.upscaler < len(INDEXED):
            return INDEXED[self.upscaler]
        raise JobFailure(
            f"script_args: upscaler: got {self.upscaler}, allowed is the name of an upscaler, or"
            f" {', '.join(f'{number} for {name}' for number, name in enumerate(INDEXED))}"
        )


class SDUpscalePlan(PaintingPlan):
    def __init__(self, job: RunJob, raw: Body, files: Mapping[str, Path], studio: Studio) -> None:
        """Raises JobFailure."""
        super().__init__(job, raw, files, studio)
        params, settings = self.params, self.params.override_settings
        self.args = _parse_args(params)
        self.tile_upscaler = find_upscaler(
            self.args.upscaler_name, "script_args: upscaler", self.models, studio.library
        )
        if params.mask:
            raise JobFailure(
                "mask: got one, allowed is none with SD upscale, where each tile would have it"
            )
        self.picture = on_ground(
            read_picture(params.init_images[0], "init_images[0]"),
            settings.img2img_background_color,
            "override_settings.img2img_background_color",
        )
        if len(params.init_images) > 1:
            self.warnings.append("init_images: only the first one has an effect with SD upscale")
        if settings.return_grid:
            self.warnings.append("override_settings.return_grid: no effect with SD upscale")
        self.warnings += [
            f"{field}: each tile is shown the whole of it, as in the webui"
            for field in self.controls.own_pictures
        ]
        size = self.picture.size
        if self.tile_upscaler.name != "None":
            size = enlarged_size(size, self.args.scale_factor, MULTIPLE)
        self.grid = tile_grid(self._checked(size), params.width, params.height, self.args.overlap)
        count = self.grid.count * params.n_iter
        if count > MOST_TILES:
            raise JobFailure(
                f"script_args: SD upscale: got {count} tiles, allowed are {MOST_TILES}; choose"
                " larger ones (width, height) or less overlap"
            )
        last = params.seed + params.n_iter - 1
        highest = max(seeds_of_tile(params, last, n)[0] for n in range(self.grid.count))
        if highest > HIGHEST_SEED:
            raise JobFailure(
                f"seed: got {params.seed}, allowed is what leaves every tile one up to"
                f" {HIGHEST_SEED}"
            )

    def _checked(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the result, if there can be tiles of it."""
        params, most = self.params, self.studio.webui.max_pixels
        if self.args.overlap >= min(params.width, params.height):
            raise JobFailure(
                f"script_args: overlap: got {self.args.overlap}, allowed is what is below width"
                f" and height ({params.width}x{params.height})"
            )
        if size[0] < params.width or size[1] < params.height:
            raise JobFailure(
                f"width and height: got tiles of {params.width}x{params.height}, allowed are those"
                f" that fit into the enlarged picture ({size[0]}x{size[1]})"
            )
        if size[0] * size[1] > most:
            raise JobFailure(
                f"script_args: scale_factor: got a result of {size[0] * size[1] // 1_000_000}"
                f" million pixels, allowed are {most // 1_000_000} million"
            )
        return size

    def work(self, report: Report) -> Work:
        return _SDUpscale(self, report).work()


def _parse_args(params: PaintingParams) -> SDUpscaleArgs:
    """Raises JobFailure."""
    given = params.script_args
    if len(given) != 4:
        raise JobFailure(
            f"script_args: got {len(given)} values, allowed are the 4 of SD upscale: one that says"
            " nothing, overlap, upscaler, scale_factor"
        )
    _, overlap, upscaler, scale_factor = given
    raw = {"overlap": overlap, "upscaler": upscaler, "scale_factor": scale_factor}
    return convert(raw, SDUpscaleArgs, "script_args: ")


def seeds_of_tile(params: PaintingParams, seed: int, tile: int) -> tuple[int, int]:
    """(seed, variation seed): `batch_size` tiles make a batch, and each batch begins one seed on.
    `seed`: of the first tile."""
    batch, place = divmod(tile, params.batch_size)
    varied = params.subseed_strength != 0
    return seed + batch + (0 if varied else place), params.subseed + place


class _SDUpscale(Painting):
    def __init__(self, plan: SDUpscalePlan, report: Report) -> None:
        super().__init__(plan, report)
        self.sd_upscale = plan
        self.extra["SD upscale overlap"] = plan.args.overlap
        self.extra["SD upscale upscaler"] = plan.tile_upscaler.name
        self._sources: list[Source] = []

    def work(self) -> Work:
        params, grid = self.params, self.sd_upscale.grid
        with self.watch.stage("load"):
            self._load()
        with self.watch.stage("encode"):
            first = self._first_pass()
            self._texts(first.net, first)
        with self.watch.stage("enlarge"):
            tiles = grid.split((yield from self._enlarged()))
        images, texts = [], []
        seeds = [params.seed + number for number in range(params.n_iter)]
        for number, seed in enumerate(seeds):
            done: list[Image.Image] = []
            while len(done) < len(tiles):
                some = range(len(done), min(len(done) + TILES_AT_ONCE, len(tiles)))
                with self.watch.stage("render"):
                    start = self._start_of([tiles[tile] for tile in some])
                    self._sources = [Source(tile) for tile in start.pictures]
                    mine = [seeds_of_tile(params, seed, tile) for tile in some]
                    latents = yield from self._render(first, start, mine)
                with self.watch.stage("decode"):
                    works = zip(torch.split(latents, 1), self._sources, strict=True)
                    done += yield Aside([partial(self._finished, *work) for work in works])
                self.plan.controls.forget()
            whole = grid.combine(done)
            texts.append(self._infotext(seed, params.subseed))
            images.append(self._packed(f"image_{number}", whole, texts[-1]))
        info = self._info(texts, seeds, [params.subseed] * len(seeds), with_grid=False)
        return self._result(images, info | {"batch_size": params.batch_size})

    def _enlarged(self) -> Generator[Any, Any, Image.Image]:
        plan = self.sd_upscale
        if plan.tile_upscaler.name == "None":
            return plan.picture
        return (
            yield from aside(
                plan.tile_upscaler.by_factor(plan.picture, plan.args.scale_factor, MULTIPLE)
            )
        )

    def _runs(
        self, first: Pass, start: Start | None, seeds: Sequence[tuple[int, int]]
    ) -> list[Asking]:
        """One for each tile, which ControlNets are shown in place of the whole picture."""
        runs = []
        for number, (source, pair) in enumerate(zip(self._sources, seeds, strict=True)):
            self._source = source
            runs.append(self._begin(first, start, [pair], [number]))
        return runs

    @property
    def _all_steps(self) -> int:
        return super()._all_steps * math.ceil(self.sd_upscale.grid.count / TILES_AT_ONCE)
