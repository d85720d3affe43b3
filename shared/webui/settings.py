"""What a deployment decides about the bodies of its jobs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Emphasis = Literal["None", "Ignore", "Original", "No norm"]
"""What becomes of attention in prompts. None: there is no such syntax. Ignore: it has no effect. No
norm: as the original one, but the mean of embeddings is not restored."""
AtLeastOne = Annotated[int, Meta(ge=1)]


class WebuiSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the worker, of which the endpoints service hands on what is not the default.

    The webui's API takes any number, its pages do not: here the deployment says what is too much.

    - `webui_version`: whose ways a body is read by, where they differ.
    - `styles`: JSON `{"name": {"prompt": …, "negative_prompt": …}}`, or the path of such a file or
      of a webui's styles.csv, which is read once.
    - `randn_source`: of noise, where a job says nothing; GPU is taken for NV.
    - `max_steps`: of a pass; models know no more than 1000.
    - `max_side`: of what is rendered, hires fix included, in pixels.
    - `max_upscaled_side`: of what extra-single-image and extra-batch-images make.
    - `max_pixels`: of what extra-single-image and SD upscale make, and of the grid of an X/Y/Z
      plot.
    - `max_batch_size`, `max_n_iter`: of the fields of these names; `max_pictures`: their product,
      the cells of an X/Y/Z plot, and the list of extra-batch-images.
    - `max_prompt_length`: in characters, of each prompt.
    - `max_eta`: of `eta`, `eta_ancestral` and `eta_ddim`.
    """

    webui_version: Literal["1.7", "1.10"] = "1.7"
    styles: str = ""
    randn_source: Literal["CPU", "NV", "GPU"] = "CPU"
    max_steps: Annotated[int, Meta(ge=1, le=1000)] = 1000
    max_side: Annotated[int, Meta(ge=64)] = 4096
    max_upscaled_side: AtLeastOne = 16_384
    max_pixels: AtLeastOne = 100_000_000
    max_batch_size: AtLeastOne = 128
    max_n_iter: AtLeastOne = 1000
    max_pictures: AtLeastOne = 1000
    max_prompt_length: AtLeastOne = 20_000
    max_eta: Annotated[float, Meta(ge=0)] = 10.0
