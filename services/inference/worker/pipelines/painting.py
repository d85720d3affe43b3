"""txt2img and img2img: from a webui body to finished pictures.

`PaintingPlan` looks at the body and at the headers of the files, and refuses what can't be done,
before anything is loaded. `Painting` is the job under way.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from services.inference.worker.pipelines import (
    Aside,
    JobFailure,
    Report,
    Result,
    ResultImage,
    Work,
)
from services.inference.worker.pipelines.controlling import Controls, Source
from services.inference.worker.pipelines.denoising import (
    Asking,
    Control,
    Guidance,
    Mask,
    Net,
    Prompted,
    Skips,
    sample,
    together,
)
from services.inference.worker.pipelines.enlarging import Upscaler, find_upscaler
from services.inference.worker.pipelines.faces import FaceRestorer, find_face_restorer
from services.inference.worker.pipelines.library import Library, Models, Shelved, receipt
from services.inference.worker.pipelines.models.checkpoints import Checkpoint, set_tiling
from services.inference.worker.pipelines.models.components import tokenizer
from services.inference.worker.pipelines.models.embeddings import Embedding
from services.inference.worker.pipelines.models.families import configs_of
from services.inference.worker.pipelines.models.files import ModelFile
from services.inference.worker.pipelines.models.networks import Worn, bundled_words
from services.inference.worker.pipelines.params.painting import (
    OverrideSettings,
    PaintingParams,
    parse_painting,
)
from services.inference.worker.pipelines.params.reading import Body, printable, short
from services.inference.worker.pipelines.pictures import masks
from services.inference.worker.pipelines.pictures.files import (
    Format,
    on_ground,
    read_picture,
    result_image,
)
from services.inference.worker.pipelines.pictures.fitting import fit
from services.inference.worker.pipelines.pictures.grids import grid
from services.inference.worker.pipelines.pictures.infotext import (
    infotext,
    param_json,
    timestamp,
)
from services.inference.worker.pipelines.pictures.previews import Mixes
from services.inference.worker.pipelines.prompts.encoding import Encoded, Words, words_in
from services.inference.worker.pipelines.prompts.syntax import (
    BadPrompt,
    Network,
    Part,
    plan_phases,
    split_parts,
    take_networks,
)
from services.inference.worker.pipelines.sampling.names import LABELS, Sampler
from services.inference.worker.pipelines.sampling.noise import Noise
from services.inference.worker.pipelines.sampling.samplers import Options, Run
from services.inference.worker.pipelines.sampling.schedules import Sigmas, Spread
from services.inference.worker.pipelines.stopwatch import Stopwatch
from shared.contracts.inference import RunJob
from shared.webui.body_names import NETWORKS
from shared.webui.settings import WebuiSettings
from shared.weights.kinds import FACE_RESTORATION, REFINER, SDXL, describe, embedding_fits

CHECKPOINT, VAE, LORA, EMBEDDING = "Stable-diffusion", "VAE", "Lora", "embeddings"
MOST_STEPS = 1000
"""Of a run of which only the last steps are run: models know no more levels."""
LEAST_FALL = 1 - 1e-6
"""Of levels of noise: samplers divide by the difference."""
NO_FILE = ("", "automatic", "none")
"""Names of a VAE that stand for a choice and not for a file."""
LATENT_UPSCALERS: dict[str, dict[str, Any]] = {
    "Latent": {"mode": "bilinear", "antialias": False},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic", "antialias": False},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest", "antialias": False},
    "Latent (nearest-exact)": {"mode": "nearest-exact", "antialias": False},
}


class Studio(msgspec.Struct, frozen=True, eq=False):
    """What jobs share. `format`: of pictures, unless a job says otherwise. `webui`: what bodies may
    say. `vae_lock`: held while a VAE works, whose precision and borders may change."""

    library: Library
    mixes: Mixes
    format: Format = Format()
    webui: WebuiSettings = WebuiSettings()
    vae_lock: Any = msgspec.field(default_factory=threading.Lock)


class EmbeddingSource(msgspec.Struct, frozen=True, eq=False):
    """Where the vectors of a word are. `bundled`: in the file of a network."""

    word: str
    file: ModelFile
    bundled: bool = False

    @property
    def name(self) -> str:
        return f"{self.word} in {self.file.name}" if self.bundled else self.file.name


class PaintingPlan:
    def __init__(self, job: RunJob, raw: Body, files: Mapping[str, Path], studio: Studio) -> None:
        """Raises JobFailure."""
        params, self.warnings = parse_painting(raw, job.task_type, studio.webui)
        self.raw = raw
        self.task_type = job.task_type
        self.studio = studio
        self.models = Models(job, files, studio.library)
        self.params = _settled(params, self.warnings)
        library = studio.library
        self.checkpoint = self._open(_choose_checkpoint(self.models, self.params))
        self.kind, self.configs = configs_of(self.checkpoint.header, self.checkpoint.name)
        if self.kind.family == REFINER and job.task_type == "txt2img":
            self.warnings.append(
                f"{self.checkpoint.name} is a refiner, made to finish pictures, not to begin them"
            )
        self.vae = self._choose_vae()
        self.prompt, networks = _without_networks(self.params.prompt)
        self.networks = self._find_networks(networks, "prompt")
        hr_prompt, hr_networks = _without_networks(self.params.hr_prompt or self.params.prompt)
        self.hr_prompt = hr_prompt
        self.hr_networks = self.networks
        if self.params.enable_hr:
            self.hr_networks = self._find_networks(hr_networks, "hr_prompt")
        first = self.params.steps * self.params.sampler.calls
        self.embeddings = self._find_embeddings(
            self.prompt, self.params.negative_prompt, self.networks, first
        )
        self.hr_embeddings: Mapping[str, EmbeddingSource] = {}
        if self.params.enable_hr:
            steps = self.params.hr_second_pass_steps or self.params.steps
            self.hr_embeddings = self._find_embeddings(
                self.hr_prompt,
                self.params.hr_negative_prompt,
                self.hr_networks,
                steps * self.params.hr_sampler.calls,
                done_before=first,
            )
        self.refiner = self._find_second("refiner_checkpoint", self.params.refiner_checkpoint)
        self.hr_checkpoint = None
        if self.params.enable_hr:
            self.hr_checkpoint = self._find_second(
                "hr_checkpoint_name", self.params.hr_checkpoint_name
            )
        self.upscaler: Upscaler | None = None
        if self.params.enable_hr and self.params.hr_upscaler not in LATENT_UPSCALERS:
            self.upscaler = find_upscaler(
                self.params.hr_upscaler, "hr_upscaler", self.models, library, [*LATENT_UPSCALERS]
            )
        self.face_restorer: FaceRestorer | None = None
        if self.params.restores_faces:
            settings = self.params.override_settings
            self.face_restorer = find_face_restorer(
                settings.face_restoration_model,
                "restore_faces",
                self.models,
                library,
                settings.code_former_weight,
            )
        self.controls = Controls(self.params.units, self.models, library, self.kind.family)
        self.warnings += self._unused()
        self.key = (
            self.checkpoint.identity(),
            tuple((f.identity(), n.text_weight, n.unet_weight) for f, n in self.networks),
            self.params.width,
            self.params.height,
            self.params.tiling,
        )

    def work(self, report: Report) -> Work:
        return Painting(self, report).work()

    def _open(self, model: Shelved) -> ModelFile:
        return self.studio.library.open(model.path, model.name)

    def _choose_vae(self) -> ModelFile | None:
        """None for the checkpoint's own."""
        wanted = self.params.override_settings.sd_vae
        if wanted.lower() not in NO_FILE:
            return self._open(self.models.get(VAE, wanted, "override_settings.sd_vae"))
        if wanted.lower() == "none":
            return None
        among = self.models.of(VAE) if wanted else self.models.listed(VAE)
        like_checkpoint = [m for m in among if m.stem.removesuffix(".vae") == self.checkpoint.stem]
        chosen = like_checkpoint if wanted else like_checkpoint or among
        return self._open(self.models.use(chosen[0])) if chosen else None

    def _find_networks(
        self, networks: Sequence[Network], field: str
    ) -> list[tuple[ModelFile, Network]]:
        found = []
        if self.params.disable_extra_networks:
            return []
        for network in networks:
            if network.kind not in NETWORKS:
                kind = f"{field}: <{network.kind[:20]}:…>"
                self.warnings.append(f"{kind}: no effect here; lora and lyco have one")
                continue
            model = self.models.get(LORA, network.name, f"{field}: <{network.kind}:…>")
            self.warnings += [
                f"{field}: {argument} in <{network.kind}:{model.stem}:…>: no effect here"
                for argument in network.ignored
            ]
            found.append((self._open(model), network))
        return found

    def _find_embeddings(
        self,
        prompt: str,
        negative: str,
        networks: Sequence[tuple[ModelFile, Network]],
        calls: int,
        *,
        done_before: int | None = None,
    ) -> dict[str, EmbeddingSource]:
        """Those that a pass of so many calls reads in one of its texts, by their words: those that
        the job names, then those that its networks bring, as in the webui. One that only the
        params name and that is for another family is just a word."""
        named: dict[str, Shelved] = {}
        for model in self.models.of(EMBEDDING):
            if not model.from_params or self._may_fit(model):
                named.setdefault(model.stem, model)
        bundled: dict[str, list[ModelFile]] = {}
        for file, _ in networks:
            for word in bundled_words(file.header):
                bundled.setdefault(word, []).append(file)
        if not named and not bundled:
            return {}
        texts = [
            phase.text
            for part in (*split_parts(prompt), Part(negative))
            for phase in plan_phases(part.text, calls, done_before=done_before)
        ]
        found: dict[str, EmbeddingSource] = {}
        emphasis = self.params.override_settings.emphasis_mode
        for word in words_in(texts, tokenizer(), [*(named | bundled)], emphasis):
            sources = [EmbeddingSource(word, file, bundled=True) for file in bundled.get(word, [])]
            if word in named:
                sources.insert(0, EmbeddingSource(word, self._open(self.models.use(named[word]))))
            found[word], *others = sources
            for other in others:
                if other.file != found[word].file:
                    self.warn(f"{other.name} has no effect; {found[word].name} has")
        return found

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _may_fit(self, embedding: Shelved) -> bool:
        return embedding_fits(describe(self._open(embedding).header).widths, [self.kind.family])

    def _find_second(self, field: str, title: str) -> ModelFile | None:
        if title.lower() in ("", "none", "use same checkpoint"):
            return None
        file = self._open(self.models.get(CHECKPOINT, title, field))
        configs_of(file.header, file.name)
        return file

    def _unused(self) -> list[str]:
        hints = {
            LORA: "the prompt does not name it, as in <lora:NAME:1>",
            EMBEDDING: "no prompt names it",
            FACE_RESTORATION: "the body does not say restore_faces",
        }
        return [
            f"{model.type} {model.name}: not used" + f" ({hint})" * bool(hint)
            for model in self.models.all
            if model not in self.models.used and not model.from_params
            for hint in [hints.get(model.type, "")]
            if model.type not in ("rembg", "Upscaler")
        ]


def _settled(params: PaintingParams, warnings: list[str]) -> PaintingParams:
    """With seeds drawn where the body left them open, and with the second pass's own texts."""
    if params.refiner_checkpoint and params.refiner_switch_at is None:
        params = msgspec.structs.replace(params, refiner_switch_at=0.8)
        warnings.append("refiner_switch_at: not given, 0.8 was used")
    draw = secrets.randbelow
    return msgspec.structs.replace(
        params,
        prompt=params.prompt.strip(),
        negative_prompt=params.negative_prompt.strip(),
        hr_prompt=params.hr_prompt.strip(),
        hr_negative_prompt=params.hr_negative_prompt.strip() or params.negative_prompt.strip(),
        seed=draw(2**32 - 1) if params.seed == -1 else params.seed,
        subseed=draw(2**32 - 1) if params.subseed == -1 else params.subseed,
    )


def _choose_checkpoint(models: Models, params: PaintingParams) -> Shelved:
    """The one that `override_settings` asks for, else the first one that the job names."""
    named, listed = models.of(CHECKPOINT), models.listed(CHECKPOINT)
    wanted = params.override_settings.sd_model_checkpoint
    if not (listed or (wanted and named)):
        raise JobFailure(f"the job names no checkpoint of type {CHECKPOINT} in models")
    if not wanted:
        return models.use(listed[0])
    found = models.find(CHECKPOINT, wanted)
    if found is None:
        raise JobFailure(
            f"override_settings.sd_model_checkpoint: got {short(wanted)}, allowed is one that the"
            f" job names in models: {', '.join(model.name for model in named)}"
        )
    return found


def _without_networks(prompt: str) -> tuple[str, list[Network]]:
    try:
        return take_networks(prompt)
    except BadPrompt as error:
        raise JobFailure(str(error)) from None


class Start(msgspec.Struct, frozen=True, eq=False):
    """What img2img starts from, one of each per picture of a batch."""

    latents: Tensor
    mask: Mask | None
    beside: Tensor | None
    overlays: list[Image.Image]
    paste: masks.Box | None
    pictures: list[Image.Image]


class Pass(msgspec.Struct, frozen=True, eq=False):
    """One run of a sampler: of the first pass, or of hires fix."""

    net: Net
    width: int
    height: int
    sampler: Sampler
    spread: Spread
    steps: int
    parts: Sequence[Part]
    negative: str
    refiner: Net | None
    words: Words
    done_before: int | None = None

    @property
    def calls(self) -> int:
        return self.steps * self.sampler.calls


class Painting:
    """The job under way: everything that is loaded for it, and how far it has come."""

    def __init__(self, plan: PaintingPlan, report: Report) -> None:
        self.plan = plan
        self.params = plan.params
        self.settings = plan.params.override_settings
        self.library = plan.studio.library
        self.report = report
        self.watch = Stopwatch()
        self.extra: dict[str, object] = {}
        """What the infotext says beside the usual fields."""
        self._source = Source()
        self._found_faces = False
        self._steps_before = 0

    def work(self) -> Work:
        params = self.params
        with self.watch.stage("load"):
            self._load()
        with self.watch.stage("encode"):
            first = self._first_pass()
            self._texts(first.net, first)
            start = self._start(first.net.checkpoint) if params.init_images else None
        pictures: list[Image.Image | None] = []
        images: list[ResultImage] = []
        texts: list[str] = []
        seeds, subseeds = all_seeds(params, self._batch_size(start))
        for round_ in range(params.n_iter):
            batch = range(round_ * self._batch_size(start), (round_ + 1) * self._batch_size(start))
            mine = [(seeds[number], subseeds[number]) for number in batch]
            with self.watch.stage("render"):
                latents = yield from self._render(first, start, mine)
            finishers = []
            for number, (seed, subseed) in enumerate(mine):
                texts.append(self._infotext(seed, subseed))
                latent, stem = latents[number : number + 1], f"image_{len(texts) - 1}"
                finishers.append(self._finisher(latent, start, number, texts[-1], stem))
            with self.watch.stage("decode"):
                finished = yield Aside(finishers)
            images += [image for image, _ in finished]
            pictures += [picture for _, picture in finished]
        if self.settings.return_grid and not params.do_not_save_grid and len(images) > 1:
            images, texts = self._with_grid(images, pictures, texts)
        return self._result(images, self._info(texts, seeds, subseeds, len(images) > len(seeds)))

    def _result(self, images: list[ResultImage], info: dict[str, Any]) -> Result:
        plan, params = self.plan, self.params
        if plan.face_restorer is not None and not self._found_faces:
            self._warn("restore_faces: no face was found")
        answer = param_json(
            printable({**plan.raw, "seed": params.seed, "subseed": params.subseed}),
            info,
            [image.name for image in images],
            receipt(plan.models, self.library),
        )
        return Result(images, answer, self.watch.seconds, plan.warnings)

    # What is loaded

    def _load(self) -> None:
        plan, library = self.plan, self.library
        self.checkpoint = library.checkpoint(plan.checkpoint)
        self._warn_of_rests(plan.checkpoint, self.checkpoint)
        if plan.vae is not None:
            self.vae = library.vae(plan.vae, self.checkpoint.configs.vae)
            self._warn_unused(plan.vae, self.vae.unused)
        elif self.checkpoint.vae is not None:
            self.vae = self.checkpoint.vae
        else:
            raise JobFailure(
                f"broken checkpoint: the vae in {plan.checkpoint.name} is missing; name one in"
                ' models: {"VAE": ["NAME"]}'
            )
        self.worn = self._wear(plan.networks, self.checkpoint, plan.checkpoint)
        self.refiner: Net | None = None
        if plan.refiner is not None:
            refiner = library.checkpoint(plan.refiner)
            self._warn_of_rests(plan.refiner, refiner)
            same = refiner.family == self.checkpoint.family
            self.refiner = Net(refiner, self.worn if same else (), self.params.tiling)
        plan.controls.load(self.checkpoint.unet, plan.checkpoint.name)
        for file, unused in plan.controls.unused():
            self._warn_unused(file, unused)

    def _warn_of_rests(self, file: ModelFile, checkpoint: Checkpoint) -> None:
        self._warn_unused(file, checkpoint.unused)
        if checkpoint.has_own_positions:
            self._warn(
                f"{file.name}: its position_ids are damaged; texts are read as if they were whole"
            )

    def _warn_unused(self, file: ModelFile, unused: Sequence[str]) -> None:
        if unused:
            self._warn(
                f"{file.name}: {len(unused)} of its {len(file.header.tensors)} tensors have no part"
                f" in what it makes here, {unused[0][:100]} among them"
            )

    def _wear(
        self,
        networks: Sequence[tuple[ModelFile, Network]],
        checkpoint: Checkpoint,
        checkpoint_file: ModelFile,
    ) -> list[Worn]:
        """`checkpoint_file`: as the job calls it, which the checkpoint may know by another name."""
        worn = []
        for file, wanted in networks:
            network = self.library.network(file)
            if network.family and network.family != checkpoint.family:
                raise JobFailure(
                    f"{file.name} is a LoRA for {network.family}; {checkpoint_file.name} is"
                    f" {checkpoint.kind.title}"
                )
            unplaced = checkpoint.wardrobe.unplaced(network)
            if len(unplaced) == len(network.modules):
                raise JobFailure(f"{file.name} does not fit {checkpoint_file.name}: no part of it")
            if unplaced:
                self._warn(
                    f"{file.name}: {len(unplaced)} of its {len(network.modules)} parts have no"
                    f" place in {checkpoint_file.name}, {unplaced[0][:100]} among them"
                )
            self._warn_unused(file, network.unknown)
            worn.append(Worn(network, file.name, wanted.text_weight, wanted.unet_weight))
        return worn

    def _warn(self, text: str) -> None:
        self.plan.warn(text)

    # Passes

    def _first_pass(self) -> Pass:
        params = self.params
        wants_refiner = (
            not params.enable_hr or self.settings.hires_fix_refiner_pass != "second pass"
        )
        refiner = self.refiner if wants_refiner else None
        return Pass(
            net=Net(self.checkpoint, self.worn, params.tiling),
            width=params.width,
            height=params.height,
            sampler=params.sampler,
            spread=params.spread(params.sampler),
            steps=params.steps,
            parts=split_parts(self.plan.prompt),
            negative=params.negative_prompt,
            refiner=refiner,
            words=self._words(self.plan.embeddings, self.checkpoint, self.plan.checkpoint, refiner),
        )

    def _hires_pass(self, first: Pass) -> Pass:
        params = self.params
        file, checkpoint = self.plan.checkpoint, self.checkpoint
        if self.plan.hr_checkpoint is not None:
            file = self.plan.hr_checkpoint
            checkpoint = self.library.checkpoint(file)
            self._warn_of_rests(file, checkpoint)
        width, height, columns, rows = params.hires_size
        worn = self._wear(self.plan.hr_networks, checkpoint, file)
        refiner = self.refiner if self.settings.hires_fix_refiner_pass != "first pass" else None
        return Pass(
            net=Net(checkpoint, worn, params.tiling),
            width=width // 8 * 8 - columns * 8,
            height=height // 8 * 8 - rows * 8,
            sampler=params.hr_sampler,
            spread=params.spread(params.hr_sampler),
            steps=params.hr_second_pass_steps or params.steps,
            parts=split_parts(self.plan.hr_prompt),
            negative=params.hr_negative_prompt,
            refiner=refiner,
            words=self._words(self.plan.hr_embeddings, checkpoint, file, refiner),
            done_before=first.calls,
        )

    def _words(
        self,
        sources: Mapping[str, EmbeddingSource],
        checkpoint: Checkpoint,
        checkpoint_file: ModelFile,
        refiner: Net | None,
    ) -> Words:
        """`sources`: of embeddings, by their words. Raises JobFailure for one that does not fit a
        checkpoint that reads the texts."""
        embeddings = {word: self._embedding(source) for word, source in sources.items()}
        readers = [(checkpoint, checkpoint_file)]
        if refiner is not None and self.plan.refiner is not None:
            readers.append((refiner.checkpoint, self.plan.refiner))
        for reader, reader_file in readers:
            for word, embedding in embeddings.items():
                embedding.check_fits(reader.text_encoders, sources[word].name, reader_file.name)
        return Words(
            self.settings.CLIP_stop_at_last_layers,
            self.settings.comma_padding_backtrack,
            embeddings,
            self.settings.emphasis_mode,
        )

    def _embedding(self, source: EmbeddingSource) -> Embedding:
        if source.bundled:
            return self.library.network(source.file).embedding(source.word, source.name)
        return self.library.embedding(source.file)

    def _render(self, first: Pass, start: Start | None, seeds: Sequence[tuple[int, int]]) -> Asking:
        """Latents of one batch, ready for the VAE: (pictures, 4, height / 8, width / 8)."""
        latents = yield from together(self._runs(first, start, seeds))
        self._steps_before += self._steps_of(first, start is not None)
        if self.params.enable_hr:
            latents = yield from self._hires(first, latents, seeds)
        if not torch.isfinite(latents).all():
            raise JobFailure(
                f"the picture came out as no numbers: {self.plan.checkpoint.stem} may be damaged,"
                " or the attention in the prompt too strong"
            )
        return latents

    def _runs(
        self, first: Pass, start: Start | None, seeds: Sequence[tuple[int, int]]
    ) -> list[Asking]:
        """The first pass for a batch, one run for all that may share it."""
        pictures = [[number] for number in range(len(seeds))]
        if not first.sampler.per_picture:
            pictures = [[number for one in pictures for number in one]]
        return [self._begin(first, start, [seeds[n] for n in some], some) for some in pictures]

    def _begin(
        self,
        run: Pass,
        start: Start | None,
        seeds: Sequence[tuple[int, int]],
        numbers: Sequence[int],
    ) -> Asking:
        """The first pass for some pictures of a batch."""
        noise = self._noise(run, seeds)
        if start is None:
            beside = None
            if self.checkpoint.kind.inpainting:
                beside = self._nothing_beside(run, len(seeds))
            guidance = self._guidance(run, beside=beside)
            sigmas = self._sigmas(run, run.steps)
            x = noise.first() * self._first_scale(run.sampler, sigmas[0])
            return self._sample(run, guidance, x, sigmas, sigmas, noise)
        mask = start.mask
        if mask is not None:
            mask = Mask(mask.init[list(numbers)], mask.keep[list(numbers)])
        beside = None if start.beside is None else start.beside[list(numbers)]
        guidance = self._guidance(run, mask=mask, beside=beside)
        return self._from_latents(
            run,
            guidance,
            start.latents[list(numbers)],
            noise,
            multiplier=self.params.noise_multiplier,
            all_steps=self.settings.img2img_fix_steps,
            mask=mask,
        )

    def _spread(self, run: Pass) -> Spread:
        sdxl = run.net.checkpoint.family in (SDXL, REFINER)
        return msgspec.structs.replace(run.spread, sdxl=sdxl)

    def _sigmas(self, run: Pass, steps: int) -> Sigmas:
        """Raises JobFailure for settings that make no way down from noise to a picture."""
        sigmas = run.sampler.sigmas(run.net.checkpoint.schedule, steps, self._spread(run))
        falls = all(after < before * LEAST_FALL for before, after in pairwise(sigmas))
        if not (falls and math.isfinite(sigmas[0])) and run.sampler.levels is None:
            raise JobFailure(
                "override_settings: with this schedule type and these sigma_min, sigma_max, rho,"
                " beta_dist_alpha and beta_dist_beta, noise does not become less with each of"
                f" {steps} steps"
            )
        return sigmas

    def _first_scale(self, sampler: Sampler, sigma: float) -> float:
        """Of the first noise: k-diffusion's samplers begin with as much of it as their first level
        has, the others, as their papers do, with nothing else in the latents."""
        if sampler.levels or self.settings.sgm_noise_multiplier:
            return float((1 + sigma**2) ** 0.5)
        return sigma

    def _from_latents(
        self,
        run: Pass,
        guidance: Guidance,
        latents: Tensor,
        noise: Noise,
        *,
        multiplier: float = 1.0,
        all_steps: bool = False,
        mask: Mask | None = None,
    ) -> Asking:
        """img2img: noise is put on the latents, and the last steps of a run take it off again.
        `all_steps`: as many as were asked for, of a run that has accordingly more."""
        steps, taken = img2img_steps(run.steps, self.params.denoising_strength, all_steps)
        whole = self._sigmas(run, steps)
        level, sigmas = run.sampler.img2img_sigmas(
            run.net.checkpoint.schedule, steps, taken, self._spread(run)
        )
        drawn = noise.first() * multiplier
        x = latents + drawn * level + drawn * self.settings.img2img_extra_noise
        if level != sigmas[0]:  # what models know keeps its size, whatever its level is taken for
            x = x * math.sqrt((1 + sigmas[0] ** 2) / (1 + level**2))
        guidance.calls = taken * run.sampler.calls
        result = yield from self._sample(run, guidance, x, sigmas, whole, noise)
        return mask.apply(result) if mask else result

    def _sample(
        self,
        run: Pass,
        guidance: Guidance,
        x: Tensor,
        sigmas: Sigmas,
        whole: Sigmas,
        noise: Noise,
    ) -> Asking:
        params, sampler = self.params, run.sampler
        eta = params.eta
        if eta is None:
            settings = self.settings
            eta = settings.eta_ddim if sampler.name == "DDIM" else settings.eta_ancestral
        options = Options(
            eta=eta,
            s_churn=params.s_churn,
            s_tmin=params.s_tmin,
            s_tmax=params.highest_churn,
            s_noise=params.s_noise if sampler.uses_s_noise else 1.0,
            order=self.settings.uni_pc_order,
        )
        schedule = sampler.schedule(run.net.checkpoint.schedule)
        sampling = sampler.function(Run(x, sigmas, whole, noise, schedule, options))
        # Of what is made, which may be another number of steps than was asked for.
        steps, calls = guidance.calls // sampler.calls, (len(sigmas) - 1) * sampler.calls

        def on_denoised(denoised: Tensor) -> None:
            done = min(steps, -(-guidance.calls_made * steps // calls))
            self.report.step(self._steps_before + done, self._all_steps)
            self.report.preview(
                lambda: self.plan.studio.mixes.preview(denoised, run.net.checkpoint, self.vae)
            )

        return (yield from sample(sampling, guidance, on_denoised))

    @property
    def _all_steps(self) -> int:
        params = self.params
        steps = params.steps
        if params.init_images:
            steps = img2img_steps(
                params.steps, params.denoising_strength, self.settings.img2img_fix_steps
            )[1]
        if params.enable_hr and params.denoising_strength > 0:
            steps += params.hr_second_pass_steps or params.steps
        return steps * params.n_iter

    def _steps_of(self, run: Pass, from_picture: bool) -> int:
        if not from_picture:
            return run.steps
        strength, all_steps = self.params.denoising_strength, self.settings.img2img_fix_steps
        return img2img_steps(run.steps, strength, all_steps)[1]

    def _hires(self, first: Pass, latents: Tensor, seeds: Sequence[tuple[int, int]]) -> Asking:
        params = self.params
        width, height, columns, rows = params.hires_size
        if self.plan.upscaler is None:
            size = (height // 8, width // 8)
            mode = LATENT_UPSCALERS[params.hr_upscaler]
            latents = torch.nn.functional.interpolate(latents, size, **mode)
        else:
            latents = yield from self._upscaled(latents, width, height)
        latents = latents[
            :,
            :,
            rows // 2 : latents.shape[2] - (rows + 1) // 2,
            columns // 2 : latents.shape[3] - (columns + 1) // 2,
        ]
        if params.denoising_strength == 0:
            return latents
        with self.watch.stage("load"):
            run = self._hires_pass(first)
        beside = (
            self._nothing_beside(run, len(latents)) if run.net.checkpoint.kind.inpainting else None
        )
        runs = []
        groups = (
            [[n] for n in range(len(seeds))] if run.sampler.per_picture else [range(len(seeds))]
        )
        for some in groups:
            guidance = self._guidance(run, beside=None if beside is None else beside[list(some)])
            noise = self._noise(run, [seeds[n] for n in some])
            runs.append(
                self._from_latents(run, guidance, latents[list(some)], noise, all_steps=True)
            )
        result = yield from together(runs)
        self._steps_before += run.steps
        return result

    def _upscaled(self, latents: Tensor, width: int, height: int) -> Generator[Any, Any, Tensor]:
        """By way of pixels and an upscaler of pictures."""
        upscaler = self.plan.upscaler
        assert upscaler is not None
        works = [
            partial(self._enlarge, one, upscaler, width, height) for one in torch.split(latents, 1)
        ]
        larger = yield Aside(works)
        return torch.cat([self._encode(picture) for picture in larger])

    def _enlarge(self, latents: Tensor, upscaler: Upscaler, width: int, height: int) -> Image.Image:
        return upscaler.to_size(self._decode(latents), width, height)

    # Noise, texts, pictures to start from

    def _noise(self, run: Pass, seeds: Sequence[tuple[int, int]]) -> Noise:
        params = self.params
        return Noise(
            (4, run.height // 8, run.width // 8),
            [seed for seed, _ in seeds],
            self.library.place.device,
            subseeds=[subseed for _, subseed in seeds],
            subseed_strength=params.subseed_strength,
            resize_from=(
                max(params.seed_resize_from_h, 0) // 8,
                max(params.seed_resize_from_w, 0) // 8,
            ),
            later_seed_delta=self.settings.eta_noise_seed_delta,
            source=self.settings.noise_source,
        )

    def _guidance(
        self, run: Pass, *, mask: Mask | None = None, beside: Tensor | None = None
    ) -> Guidance:
        params = self.params
        then = None
        if run.refiner is not None and params.refiner_switch_at is not None:
            then = (
                params.refiner_switch_at,
                self._guidance_of(run.refiner, run, mask=mask, beside=None, controlled=False),
            )
        return self._guidance_of(run.net, run, mask=mask, beside=beside, then=then)

    def _guidance_of(
        self,
        net: Net,
        run: Pass,
        *,
        mask: Mask | None,
        beside: Tensor | None,
        then: tuple[float, Guidance] | None = None,
        controlled: bool = True,
    ) -> Guidance:
        positive, negative = self._texts(net, run)
        return Guidance(
            net,
            positive,
            negative,
            scale=self.params.cfg_scale,
            calls=run.calls,
            a_step=run.sampler.calls,
            sizes=self._sizes(net.checkpoint.family, run.width, run.height),
            beside=beside,
            mask=mask,
            skips=self._skips,
            controls=self._controls(run) if controlled else (),
            filler=self._encode_texts(net, run, [""])[0] if self.settings.pad_cond_uncond else None,
            then=then,
            then_by_time=not self.params.refiner_by_steps,
            by_time=run.sampler.levels is not None,
        )

    @property
    def _skips(self) -> Skips:
        settings = self.settings
        return Skips(self.params.least_uncond, settings.s_min_uncond_all, settings.skip_early_cond)

    def _controls(self, run: Pass) -> list[Control]:
        hires = run.done_before is not None
        return self.plan.controls.of(run.width, run.height, self._source, hires=hires)

    def _encode_texts(self, net: Net, run: Pass, texts: Sequence[str]) -> list[Encoded]:
        net.put_in_place()
        checkpoint = net.checkpoint
        weights = (checkpoint.file.identity(), checkpoint.wardrobe.key)
        encodings = self.library.encodings
        return encodings.encode(texts, checkpoint.text_encoders, run.words, weights)

    def _texts(self, net: Net, run: Pass) -> tuple[list[Prompted], Prompted]:
        def prompted(text: str, weight: float = 1.0) -> Prompted:
            phases = plan_phases(text, run.calls, done_before=run.done_before)
            texts = [phase.text for phase in phases]
            return Prompted(phases, self._encode_texts(net, run, texts), weight)

        positive = [prompted(part.text, part.weight) for part in run.parts]
        negative = prompted(run.negative)
        if net.checkpoint.family in (SDXL, REFINER) and not run.negative:
            negative = Prompted(negative.phases, [one.zeros() for one in negative.encoded])
        return positive, negative

    def _sizes(
        self, family: str, width: int, height: int
    ) -> tuple[Sequence[float], Sequence[float]] | None:
        """What SDXL is told: the size, what is cut off, and the size again; its refiner is told how
        good the picture is to be."""
        settings = self.settings
        size = (height, width, settings.sdxl_crop_top, settings.sdxl_crop_left)
        if family == SDXL:
            return (*size, height, width), (*size, height, width)
        if family == REFINER:
            high = settings.sdxl_refiner_high_aesthetic_score
            return (*size, high), (*size, settings.sdxl_refiner_low_aesthetic_score)
        return None

    def _batch_size(self, start: Start | None) -> int:
        """Several pictures to start from are one batch, as in the webui."""
        given = len(self.params.init_images)
        return given if start is not None and given > 1 else self.params.batch_size

    def _start(self, checkpoint: Checkpoint) -> Start:
        params, settings = self.params, self.settings
        inpainting = None
        pictures, overlays, encoded = [], [], []
        for number, text in enumerate(params.init_images):
            field = f"init_images[{number}]"
            picture = on_ground(
                read_picture(text, field),
                settings.img2img_background_color,
                "override_settings.img2img_background_color",
            )
            if number == 0:
                inpainting = self._inpainting(picture.size)
                self._source = Source(
                    picture,
                    params.resize_mode,
                    inpainting.whole if inpainting else None,
                    inpainting.paste if inpainting else None,
                )
            if inpainting is None or inpainting.paste is None:
                picture = self._fitted(picture, field)
            if inpainting is not None:
                kept = picture
                if inpainting.paste is None:
                    kept = fit(picture, params.width, params.height, 0)
                overlays.append(masks.overlay_of(kept, inpainting))
                if inpainting.paste is not None:
                    picture = fit(picture.crop(inpainting.paste), params.width, params.height, 2)
                if params.inpainting_fill != 1:
                    picture = masks.filled(picture, inpainting.mask.resize(picture.size))
            pictures.append(picture)
            encoded.append(self._encode(picture))
        count = params.batch_size if len(pictures) == 1 else len(pictures)
        size = (params.height // 8, params.width // 8)
        latents = torch.cat(encoded)
        if latents.shape[2:] != size:
            latents = torch.nn.functional.interpolate(latents, size, mode="bilinear")
        if len(pictures) == 1:
            latents = latents.expand(count, -1, -1, -1)
            pictures, overlays = pictures * count, overlays * count
        mask = None
        if inpainting is not None:
            mask = self._latent_mask(inpainting, latents)
            latents = mask.init
        beside = None
        if checkpoint.kind.inpainting:
            beside = self._beside(pictures, inpainting, latents)
        paste = inpainting.paste if inpainting else None
        return Start(latents, mask, beside, overlays, paste, pictures)

    def _start_of(self, pictures: list[Image.Image]) -> Start:
        """From pictures of the size that is rendered, all of each painted anew."""
        latents = torch.cat([self._encode(picture) for picture in pictures])
        beside = None
        if self.checkpoint.kind.inpainting:
            beside = self._beside(pictures, None, latents)
        return Start(latents, None, beside, [], None, pictures)

    def _fitted(self, picture: Image.Image, field: str) -> Image.Image:
        """As `resize_mode` says; in mode 3 it is the latents that are resized."""
        params = self.params
        if params.resize_mode != 3:
            return fit(picture, params.width, params.height, params.resize_mode)
        if min(picture.size) < 8 or max(picture.size) > self.plan.studio.webui.max_side:
            raise JobFailure(
                f"{field}: got {picture.width}x{picture.height} pixels, allowed in resize_mode 3"
                f" are sides from 8 to {self.plan.studio.webui.max_side}"
            )
        return picture

    def _inpainting(self, size: tuple[int, int]) -> masks.Inpainting | None:
        """`size`: of the picture that the mask belongs to."""
        params = self.params
        if not params.mask:
            return None
        mask = read_picture(params.mask, "mask")
        inpainting = masks.prepare(
            mask if mask.size == size else mask.resize(size),
            (params.width, params.height),
            invert=params.inpainting_mask_invert,
            blur=params.blur,
            whole=not params.inpaint_full_res,
            padding=params.inpaint_full_res_padding,
            resize_mode=params.resize_mode % 3,  # in mode 3 the picture is stretched, in the end
        )
        if inpainting is None:
            self._warn("mask: nothing in it is masked, so the whole picture was painted anew")
            return None
        if params.inpainting_mask_invert:
            self.extra["Mask mode"] = "Inpaint not masked"
        blur_x, blur_y = params.blur
        if blur_x or blur_y:
            self.extra["Mask blur"] = blur_x if blur_x == blur_y else f"{blur_x}x{blur_y}"
        if params.inpaint_full_res:
            self.extra["Inpaint area"] = "Only masked"
            self.extra["Masked area padding"] = params.inpaint_full_res_padding
        content = ("fill", None, "latent noise", "latent nothing")[params.inpainting_fill]
        if content:
            self.extra["Masked content"] = content
        return inpainting

    def _latent_mask(self, inpainting: masks.Inpainting, latents: Tensor) -> Mask:
        height, width = latents.shape[2:]
        small = inpainting.mask.convert("RGB").resize((width, height))
        painted = np.around(np.asarray(small, np.float32)[..., 0] / 255)
        keep = (1 - torch.from_numpy(painted)).to(latents).expand_as(latents)
        if self.params.inpainting_fill == 2:
            seeds, _ = all_seeds(self.params, len(latents))
            channels, height, width = latents.shape[1:]
            drawn = Noise(
                (channels, height, width),
                seeds[: len(latents)],
                latents.device,
                source=self.settings.noise_source,
            ).first()
            latents = latents * keep + drawn * (1 - keep)
        elif self.params.inpainting_fill == 3:
            latents = latents * keep
        return Mask(latents, keep)

    def _beside(
        self,
        pictures: Sequence[Image.Image],
        inpainting: masks.Inpainting | None,
        latents: Tensor,
    ) -> Tensor:
        """What inpainting models see: the mask, and the picture without what is masked."""
        rows = []
        for picture in pictures:
            pixels = _pixels(picture)
            masked = torch.ones_like(pixels[:, :1])
            if inpainting is not None:
                levels = np.asarray(inpainting.mask.convert("L").resize(picture.size), np.float32)
                masked = torch.from_numpy(levels / 255).round()[None, None]
            weight = self.settings.inpainting_mask_weight
            seen = torch.lerp(pixels, pixels * (1 - masked), weight)
            small = torch.nn.functional.interpolate(masked, latents.shape[2:])
            encoded = self._encode_pixels(seen)
            if encoded.shape[2:] != latents.shape[2:]:
                encoded = torch.nn.functional.interpolate(encoded, latents.shape[2:])
            rows.append(torch.cat([small.to(latents), encoded], 1))
        self.extra["Conditional mask weight"] = self.settings.inpainting_mask_weight
        return torch.cat(rows)

    def _nothing_beside(self, run: Pass, count: int) -> Tensor:
        """For an inpainting model that paints everything: all is masked, nothing is seen."""
        grey = self._encode_pixels(torch.zeros(1, 3, run.height, run.width))
        row = torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
        self.extra["Conditional mask weight"] = self.settings.inpainting_mask_weight
        return row.expand(count, -1, -1, -1)

    # The VAE

    def _encode(self, picture: Image.Image) -> Tensor:
        """(1, 4, height / 8, width / 8)"""
        return self._encode_pixels(_pixels(picture))

    @torch.no_grad()
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """The middle of what the VAE gives, so that no seed has a part in it. `pixels`: -1 to 1."""
        vae = self.vae
        with self.plan.studio.vae_lock:
            self._tile_vae()
            latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return latents.float() * float(vae.config.scaling_factor)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Image.Image:
        vae = self.vae
        scaled = latents / vae.config.scaling_factor
        with self.plan.studio.vae_lock:
            self._tile_vae()
            pixels: Tensor = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            if not torch.isfinite(pixels).all() and vae.dtype == torch.float16:
                vae.float()  # some VAEs leave the range of halves; this one stays in full precision
                pixels = vae.decode(scaled.float(), return_dict=False)[0]
        unit = (pixels[0].float() * 0.5 + 0.5).clamp(0, 1)
        rows = (unit * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(rows)

    def _tile_vae(self) -> None:
        if getattr(self.vae, "tiles", False) != self.params.tiling:
            set_tiling(self.vae, self.params.tiling)
            self.vae.tiles = self.params.tiling

    # Results

    def _finisher(
        self, latents: Tensor, start: Start | None, number: int, text: str, stem: str
    ) -> Callable[[], tuple[ResultImage, Image.Image | None]]:
        def finish() -> tuple[ResultImage, Image.Image | None]:
            picture = self._finished(latents, self._source)
            if start is not None and start.overlays:
                picture = masks.lay_over(picture, start.overlays[number], start.paste)
            image = self._packed(stem, picture, text)
            return image, picture if self.settings.return_grid else None

        return finish

    def _finished(self, latents: Tensor, source: Source) -> Image.Image:
        """Of one picture: what was rendered, without what is laid over it."""
        picture = self.plan.controls.finish(self._decode(latents), source)
        if self.plan.face_restorer is not None:
            picture, count = self.plan.face_restorer.restore(picture)
            self._found_faces |= count > 0
        return picture

    def _with_grid(
        self,
        images: list[ResultImage],
        pictures: Sequence[Image.Image | None],
        texts: list[str],
    ) -> tuple[list[ResultImage], list[str]]:
        """The grid comes first, as in the webui."""
        whole = grid([p for p in pictures if p is not None])
        text = self._infotext(self.params.seed, self.params.subseed)
        return [self._packed("grid", whole, text), *images], [text, *texts]

    def _packed(self, stem: str, picture: Image.Image, text: str) -> ResultImage:
        usual = self.plan.studio.format
        image, warnings = packed_as_asked(stem, picture, text, self.settings, usual)
        for warning in warnings:
            self._warn(warning)
        return image

    def _infotext(self, seed: int, subseed: int) -> str:
        params = self.params
        return infotext(
            params.prompt,
            params.negative_prompt,
            self._fields(seed, subseed) | self.extra | self.plan.controls.infotext(),
            version=self.settings.add_version_to_infotext,
        )

    def _fields(self, seed: int, subseed: int) -> dict[str, object]:
        params, settings, plan = self.params, self.settings, self.plan
        hashes, names = settings.add_model_hash_to_info, settings.add_model_name_to_info
        varied = params.subseed_strength != 0
        resized = params.seed_resize_from_w > 0 and params.seed_resize_from_h > 0
        strength = params.denoising_strength if params.init_images or params.enable_hr else None
        clip_skip = settings.CLIP_stop_at_last_layers
        fields: dict[str, object] = {
            "Steps": params.steps,
            **self._fields_of_sampler(),
            "CFG scale": params.cfg_scale,
            "Seed": seed,
            "Face restoration": plan.face_restorer.name if plan.face_restorer else None,
            "Size": f"{params.width}x{params.height}",
            "Model hash": self._hash(plan.checkpoint)[:10] if hashes else None,
            "Model": plan.checkpoint.stem if names else None,
            "VAE hash": self._hash(plan.vae)[:10] if plan.vae and hashes else None,
            "VAE": plan.vae.name if plan.vae and names else None,
            "Variation seed": subseed if varied else None,
            "Variation seed strength": params.subseed_strength if varied else None,
            "Seed resize from": f"{params.seed_resize_from_w}x{params.seed_resize_from_h}"
            if resized
            else None,
            "Denoising strength": strength,
            "Clip skip": clip_skip if clip_skip > 1 else None,
            "ENSD": settings.eta_noise_seed_delta or None,
            "RNG": settings.noise_source,
            "NGMS": params.least_uncond or None,
            "NGMS all steps": settings.s_min_uncond_all or None if params.least_uncond else None,
            "Skip Early CFG": settings.skip_early_cond or None,
            "Emphasis": self._emphasis,
            "Tiling": "True" if params.tiling else None,
        }
        return fields | self._fields_of_sampling() | self._fields_of_passes() | self._hashes()

    def _fields_of_sampler(self) -> dict[str, object]:
        """As of 1.9 the schedule type has a field of its own."""
        sampler = self.params.sampler
        if not self.params.is_later:
            return {"Sampler": sampler.name}
        kind = "automatic" if sampler.levels else self.params.spread(sampler).kind
        return {"Sampler": sampler.plain_name, "Schedule type": LABELS[kind]}

    @property
    def _emphasis(self) -> str | None:
        mode, params = self.settings.emphasis_mode, self.params
        texts = params.prompt + params.negative_prompt
        if params.enable_hr:
            texts += params.hr_prompt + params.hr_negative_prompt
        return mode if mode != "Original" and ("(" in texts or "[" in texts) else None

    def _fields_of_sampling(self) -> dict[str, object]:
        params, settings, sampler = self.params, self.settings, self.params.sampler
        churns, noises = sampler.churns, sampler.uses_s_noise
        eta = params.eta if params.eta is not None else settings.eta_ancestral
        ddim = sampler.name == "DDIM"
        if ddim:
            eta = params.eta if params.eta is not None else settings.eta_ddim
        kind, spread = settings.k_sched_type, params.spread(sampler)
        if sampler.levels:
            kind, spread = "automatic", sampler.spread
        of_kind: dict[str, object] = {}
        if params.is_later:
            of_kind = self._fields_of_sampler()
        elif kind.lower() != "automatic":
            of_kind = {"Schedule type": kind}
        return {
            "Eta DDIM" if ddim else "Eta": eta
            if sampler.uses_eta and eta not in (None, 0 if ddim else 1)
            else None,
            "Sigma churn": params.s_churn or None if churns else None,
            "Sigma tmin": params.s_tmin or None if churns else None,
            "Sigma tmax": params.s_tmax or None if churns and params.highest_churn < 1e9 else None,
            "Sigma noise": params.s_noise if noises and params.s_noise != 1 else None,
            **of_kind,
            "Beta schedule alpha": spread.alpha if spread.kind == "beta" else None,
            "Beta schedule beta": spread.beta if spread.kind == "beta" else None,
            "Schedule max sigma": spread.sigma_max or None,
            "Schedule min sigma": spread.sigma_min or None,
            "Schedule rho": spread.rho or None,
            "Discard penultimate sigma": settings.always_discard_next_to_last_sigma or None,
            "SGM noise multiplier": settings.sgm_noise_multiplier or None,
            "Noise multiplier": params.noise_multiplier
            if params.init_images and params.noise_multiplier != 1
            else None,
            "Extra noise": settings.img2img_extra_noise or None
            if params.init_images or params.enable_hr
            else None,
            "Pad conds": settings.pad_cond_uncond or None,
        }

    def _fields_of_passes(self) -> dict[str, object]:
        params, plan = self.params, self.plan
        fields: dict[str, object] = {}
        if params.enable_hr:
            if plan.hr_checkpoint is not None:
                fields["Hires checkpoint"] = self._title(plan.hr_checkpoint)
            fields |= self._fields_of_hr_sampler()
            if params.hr_prompt and params.hr_prompt != params.prompt:
                fields["Hires prompt"] = params.hr_prompt
            if params.hr_negative_prompt != params.negative_prompt:
                fields["Hires negative prompt"] = params.hr_negative_prompt
            if params.hr_resize_x or params.hr_resize_y:
                fields["Hires resize"] = f"{params.hr_resize_x}x{params.hr_resize_y}"
            else:
                fields["Hires upscale"] = params.hr_scale
            fields["Hires steps"] = params.hr_second_pass_steps or None
            fields["Hires upscaler"] = plan.upscaler.name if plan.upscaler else params.hr_upscaler
        if plan.refiner is not None:
            passes = self.settings.hires_fix_refiner_pass
            if params.enable_hr and passes != "second pass":
                fields["Hires refiner"] = passes
            fields["Refiner"] = self._title(plan.refiner)
            fields["Refiner switch at"] = params.refiner_switch_at
            if params.is_later and params.refiner_by_steps:
                fields["Refiner switch by sampling steps"] = True
        return fields

    def _fields_of_hr_sampler(self) -> dict[str, object]:
        params = self.params
        first, second = params.sampler, params.hr_sampler
        if not params.is_later:
            return {"Hires sampler": second.name} if second.name != first.name else {}
        fields: dict[str, object] = {}
        if second.plain_name != first.plain_name:
            fields["Hires sampler"] = second.plain_name
        kinds = [LABELS[params.spread(one).kind] for one in (first, second)]
        if not second.levels and kinds[0] != kinds[1]:
            fields["Hires schedule type"] = kinds[1]
        return fields

    def _title(self, file: ModelFile) -> str:
        return f"{file.stem} [{self._hash(file)[:10]}]"

    def _hashes(self) -> dict[str, object]:
        """Of networks, by the names that the prompt has for them, and of embeddings, in the form
        that the webui compares."""
        loras = ", ".join(
            f"{network.name.replace(',', '')}: {self._network_hash(file)[:12]}"
            for file, network in self.plan.networks
        )
        embeddings = {**self.plan.embeddings, **self.plan.hr_embeddings}
        words = ", ".join(
            f"{word}: {self._hash(source.file)[:12]}"
            for word, source in embeddings.items()
            if not source.bundled  # the network's hash stands for it
        )
        return {"Lora hashes": loras or None, "TI hashes": words or None}

    def _hash(self, file: ModelFile) -> str:
        return self.library.hashes.sha256(file.path)

    def _network_hash(self, file: ModelFile) -> str:
        noted = file.header.metadata.get("sshs_model_hash")
        if noted:
            return noted
        if file.is_pickle:
            return self._hash(file)
        return self.library.hashes.of_tensors(file.path)

    def _info(
        self, texts: list[str], seeds: list[int], subseeds: list[int], with_grid: bool
    ) -> dict[str, Any]:
        """The fields of the webui's `Processed.js()`."""
        params, plan = self.params, self.plan
        count = len(seeds)
        fields = self._fields_of_sampling() | self._fields_of_passes() | self._hashes() | self.extra
        fields |= plan.controls.infotext()
        return {
            "prompt": params.prompt,
            "all_prompts": [params.prompt] * count,
            "negative_prompt": params.negative_prompt,
            "all_negative_prompts": [params.negative_prompt] * count,
            "seed": params.seed,
            "all_seeds": seeds,
            "subseed": params.subseed,
            "all_subseeds": subseeds,
            "subseed_strength": params.subseed_strength,
            "width": params.width,
            "height": params.height,
            "sampler_name": self._fields_of_sampler()["Sampler"],
            "cfg_scale": params.cfg_scale,
            "steps": params.steps,
            "batch_size": count // params.n_iter,
            "restore_faces": plan.face_restorer is not None,
            "face_restoration_model": plan.face_restorer.name if plan.face_restorer else None,
            "sd_model_name": plan.checkpoint.stem,
            "sd_model_hash": self._hash(plan.checkpoint)[:10],
            "sd_vae_name": plan.vae.name if plan.vae else None,
            "sd_vae_hash": self._hash(plan.vae)[:10] if plan.vae else None,
            "seed_resize_from_w": params.seed_resize_from_w,
            "seed_resize_from_h": params.seed_resize_from_h,
            "denoising_strength": params.denoising_strength,
            "extra_generation_params": {k: v for k, v in fields.items() if v is not None},
            "index_of_first_image": int(with_grid),
            "infotexts": texts,
            "styles": params.styles,
            "job_timestamp": timestamp(datetime.now(UTC)),
            "clip_skip": self.settings.CLIP_stop_at_last_layers,
            "is_using_inpainting_conditioning": plan.kind.inpainting,
        }


def packed_as_asked(
    stem: str, picture: Image.Image, text: str, settings: OverrideSettings, usual: Format
) -> tuple[ResultImage, list[str]]:
    """A picture as a file with its infotext, as `settings` say, and warnings."""
    name = settings.samples_format.lower().replace("jpeg", "jpg") or usual.name
    form = Format(name, settings.jpeg_quality, settings.webp_lossless)
    notes = {"parameters": text} if settings.enable_pnginfo else {}
    return result_image(stem, picture, notes, form)


def all_seeds(params: PaintingParams, batch_size: int) -> tuple[list[int], list[int]]:
    """The seeds and variation seeds of all pictures of a job, as the webui counts them."""
    numbers = range(batch_size * params.n_iter)
    varied = params.subseed_strength != 0
    seeds = [params.seed + (0 if varied else number) for number in numbers]
    return seeds, [params.subseed + number for number in numbers]


def img2img_steps(steps: int, strength: float, all_steps: bool) -> tuple[int, int]:
    """(steps of a whole run, how many of them, the last ones, are run)."""
    if all_steps and strength > 0:
        return min(MOST_STEPS, int(steps / min(strength, 0.999))), steps
    return steps, int(min(strength, 0.999) * steps) + 1


def _pixels(picture: Image.Image) -> Tensor:
    """(1, 3, height, width), -1 to 1."""
    levels = torch.from_numpy(np.array(picture.convert("RGB")))
    return levels.permute(2, 0, 1)[None].float() / 127.5 - 1
