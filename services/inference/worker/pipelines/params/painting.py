"""Bodies of txt2img and img2img jobs, and the webui's settings that a job may override."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.params.control import ControlUnit, parse_units
from services.inference.worker.pipelines.params.reading import (
    Body,
    Share,
    convert,
    ignored,
    short,
)
from services.inference.worker.pipelines.params.scripts import apply_scripts
from services.inference.worker.pipelines.sampling.names import (
    LABELS,
    SAMPLERS,
    SPREADS,
    Sampler,
    find_sampler,
)
from services.inference.worker.pipelines.sampling.noise import RandnSource
from services.inference.worker.pipelines.sampling.schedules import Spread
from shared.webui.body_names import PLOT, SD_UPSCALE
from shared.webui.settings import Emphasis, WebuiSettings
from shared.webui.styles import NO_STYLE, read_styles, written

SCRIPTS = {"txt2img": (PLOT,), "img2img": (PLOT, SD_UPSCALE)}
"""That there are, by the webui's names in lower case."""
LEAST_SIDE = 64
HIGHEST_SEED = 2**64 - 1
Side = Annotated[int, Meta(ge=LEAST_SIDE)]
Target = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=-(2**63))]
Sigma = Annotated[float, Meta(ge=0, le=1000)]
HighestSigma = Annotated[float, Meta(ge=0)]
Churn = Annotated[float, Meta(ge=0, le=1000)]
NoiseScale = Annotated[float, Meta(ge=0, le=10)]
Eta = Annotated[float, Meta(ge=0)]
Pixels = Annotated[int, Meta(ge=0, le=16_384)]
Blur = Annotated[int, Meta(ge=0, le=1024)]
BetaShape = Annotated[float, Meta(ge=0.01, le=10)]
LEAST_RHO = 0.1
LEVELS = {
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "rho": "rho",
    "beta_dist_alpha": "alpha",
    "beta_dist_beta": "beta",
}
"""Settings of how the levels of noise are spread, and what a spread calls them."""


class OverrideSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The webui's settings that act here, under the webui's names.

    `sd_model_checkpoint`: which of the job's checkpoints, where it names several. `sd_vae`: which
    of its VAEs; Automatic: the one that is named like the checkpoint; None: the checkpoint's own.
    """

    CLIP_stop_at_last_layers: Annotated[int, Meta(ge=1, le=12)] = 1
    add_model_hash_to_info: bool = True
    add_model_name_to_info: bool = True
    add_version_to_infotext: bool = True
    always_discard_next_to_last_sigma: bool = False
    beta_dist_alpha: BetaShape = 0.6
    beta_dist_beta: BetaShape = 0.6
    code_former_weight: Share = 0.5
    comma_padding_backtrack: Annotated[int, Meta(ge=0, le=74)] = 20
    emphasis: Emphasis = "Original"
    enable_emphasis: bool = True
    enable_pnginfo: bool = True
    enable_prompt_comments: bool = True
    eta_ancestral: Eta | None = None
    eta_ddim: Eta | None = None
    eta_noise_seed_delta: Seed = 0
    face_restoration: bool = False
    face_restoration_model: str = ""
    hires_fix_refiner_pass: Literal["first pass", "second pass", "both passes"] = "second pass"
    img2img_background_color: str = "#ffffff"
    img2img_extra_noise: NoiseScale = 0.0
    img2img_fix_steps: bool = False
    initial_noise_multiplier: NoiseScale = 1.0
    inpainting_mask_weight: Share = 1.0
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] = 80
    k_sched_type: str = "Automatic"
    pad_cond_uncond: bool = False
    randn_source: Literal["", "CPU", "GPU", "NV"] = ""
    refiner_switch_by_sample_steps: bool | None = None
    return_grid: bool = False
    rho: Annotated[float, Meta(ge=0, le=100)] = 0.0
    s_churn: Churn = 0.0
    s_min_uncond: Sigma = 0.0
    s_min_uncond_all: bool = False
    s_noise: NoiseScale = 1.0
    s_tmax: HighestSigma = 0.0
    s_tmin: Sigma = 0.0
    samples_format: str = ""
    sd_model_checkpoint: str = ""
    sd_vae: str = ""
    sdxl_crop_left: Pixels = 0
    sdxl_crop_top: Pixels = 0
    sdxl_refiner_high_aesthetic_score: Annotated[float, Meta(ge=0, le=10)] = 6.0
    sdxl_refiner_low_aesthetic_score: Annotated[float, Meta(ge=0, le=10)] = 2.5
    sgm_noise_multiplier: bool = False
    sigma_max: Sigma = 0.0
    sigma_min: Sigma = 0.0
    skip_early_cond: Share = 0.0
    uni_pc_order: Annotated[int, Meta(ge=1, le=5)] = 3
    webp_lossless: bool = False

    @property
    def emphasis_mode(self) -> Emphasis:
        """`enable_emphasis` is what the webui 1.7 has in place of `emphasis`."""
        return self.emphasis if self.enable_emphasis else "None"

    @property
    def noise_source(self) -> RandnSource:
        """What the webui draws on an NVIDIA GPU is what NV draws."""
        return "NV" if self.randn_source in ("NV", "GPU") else "CPU"


class PaintingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a txt2img or img2img body that act here; defaults as the webui's API.

    A job makes `batch_size * n_iter` pictures. Picture i has the seed `seed + i`; with variations
    (`subseed_strength`) all have `seed`, and picture i the variation seed `subseed + i`.
    """

    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] = []
    steps: Annotated[int, Meta(ge=1)] = 50
    sampler_name: str = ""
    sampler_index: str | int = ""
    scheduler: str = ""
    cfg_scale: Annotated[float, Meta(ge=-1000, le=1000)] = 7.0
    seed: Seed = -1
    subseed: Seed = -1
    subseed_strength: Annotated[float, Meta(ge=-10, le=10)] = 0.0
    seed_resize_from_h: int = 0
    seed_resize_from_w: int = 0
    width: Side = 512
    height: Side = 512
    batch_size: Annotated[int, Meta(ge=1)] = 1
    n_iter: Annotated[int, Meta(ge=1)] = 1
    eta: Eta | None = None
    s_churn: Churn = 0.0
    s_tmin: Sigma = 0.0
    s_tmax: HighestSigma = 0.0
    s_noise: NoiseScale = 1.0
    s_min_uncond: Sigma | None = None
    tiling: bool = False
    disable_extra_networks: bool = False
    do_not_save_grid: bool = False
    override_settings: OverrideSettings = OverrideSettings()
    restore_faces: bool | None = None
    refiner_checkpoint: str = ""
    refiner_switch_at: Share | None = None
    script_name: str = ""
    script_args: list[Any] = []

    enable_hr: bool = False
    hr_scale: Annotated[float, Meta(ge=0.01, le=64)] = 2.0
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: Target = 0
    hr_resize_x: Target = 0
    hr_resize_y: Target = 0
    hr_checkpoint_name: str = ""
    hr_sampler_name: str = ""
    hr_scheduler: str = ""
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    firstphase_width: Target = 0
    firstphase_height: Target = 0

    init_images: list[str] = []
    resize_mode: Literal[0, 1, 2, 3] = 0
    denoising_strength: Share = 0.75
    mask: str = ""
    mask_blur: Blur | None = None
    mask_blur_x: Blur = 4
    mask_blur_y: Blur = 4
    inpainting_fill: Literal[0, 1, 2, 3] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Pixels = 0
    inpainting_mask_invert: bool = False
    initial_noise_multiplier: NoiseScale | None = None

    units: list[ControlUnit] = []
    """From `alwayson_scripts`; no field of a body."""
    webui_version: str = "1.7"
    """Of the deployment; no field of a body."""

    @property
    def sampler(self) -> Sampler:
        """Raises JobFailure for a name that nobody knows."""
        index = self.sampler_index if isinstance(self.sampler_index, str) else ""
        field = "sampler_index" if index and not self.sampler_name else "sampler_name"
        return _sampler(self.sampler_name or index or "Euler", field, self.scheduler)

    @property
    def hr_sampler(self) -> Sampler:
        first, scheduler = self.sampler, self.scheduler
        if self.is_later:  # the schedule type of a name is that of the first pass
            scheduler = first.schedule_type or scheduler
        if _words(self.hr_scheduler) not in ("", "use same scheduler"):
            scheduler = self.hr_scheduler
            first = _sampler(first.plain_name, "hr_scheduler", scheduler)
        if self.hr_sampler_name in ("", "Use same sampler"):
            return first
        return _sampler(self.hr_sampler_name, "hr_sampler_name", scheduler)

    @property
    def is_later(self) -> bool:
        """Whether what 1.9 changed is to be as there."""
        return self.webui_version != "1.7"

    @property
    def restores_faces(self) -> bool:
        """`restore_faces`, or what the settings say where a body leaves it out."""
        given = self.restore_faces
        return self.override_settings.face_restoration if given is None else given

    def spread(self, sampler: Sampler) -> Spread:
        """How the levels of a run are spread: the sampler's own way, but for what is overridden.
        As in the webui 1.7, nothing chooses their ends who does not choose a schedule type."""
        settings = self.override_settings
        spread = sampler.spread
        kind = SPREADS.get(settings.k_sched_type.lower(), "automatic")
        if self.is_later and sampler.schedule_type:
            kind = "automatic"
        if kind != "automatic":
            spread = msgspec.structs.replace(spread, kind=kind)
        elif self.is_later and spread.kind == "automatic":
            spread = msgspec.structs.replace(spread, kind=sampler.later_kind)
        chosen = kind != "automatic" or sampler.schedule_type not in _TYPES_IN_NAMES
        if chosen or self.is_later or _words(self.scheduler) not in ("", "automatic"):
            ends = {of: getattr(settings, name) for name, of in LEVELS.items()}
            ends = {of: value for of, value in ends.items() if spread.follows(of)}
            spread = msgspec.structs.replace(spread, **ends)
        return msgspec.structs.replace(
            spread,
            drop_last_but_one=spread.drop_last_but_one
            or settings.always_discard_next_to_last_sigma,
        )

    @property
    def least_uncond(self) -> float:
        given = self.s_min_uncond
        return self.override_settings.s_min_uncond if given is None else given

    @property
    def refiner_by_steps(self) -> bool:
        given = self.override_settings.refiner_switch_by_sample_steps
        return not self.is_later if given is None else given

    @property
    def noise_multiplier(self) -> float:
        given = self.initial_noise_multiplier
        return self.override_settings.initial_noise_multiplier if given is None else given

    @property
    def blur(self) -> tuple[int, int]:
        if self.mask_blur is not None:
            return self.mask_blur, self.mask_blur
        return self.mask_blur_x, self.mask_blur_y

    @property
    def highest_churn(self) -> float:
        return self.s_tmax or math.inf

    @property
    def hires_size(self) -> tuple[int, int, int, int]:
        """(width, height to scale to, latent columns, rows to cut off then)."""
        x, y = self.hr_resize_x, self.hr_resize_y
        if not x and not y:
            return int(self.width * self.hr_scale), int(self.height * self.hr_scale), 0, 0
        if not y:
            return x, x * self.height // self.width, 0, 0
        if not x:
            return y * self.width // self.height, y, 0, 0
        if self.width / self.height < x / y:
            width, height = x, x * self.height // self.width
        else:
            width, height = y * self.width // self.height, y
        return width, height, (width - x) // 8, (height - y) // 8


_TYPES_IN_NAMES = ("", "Karras", "Exponential")
"""Schedule types that 1.7 has as parts of names."""


def _sampler(name: str, field: str, scheduler: str) -> Sampler:
    """With `scheduler` (a field of webui 1.9) where there is such a variant; a name that already
    has one goes before it, as there."""
    sampler = find_sampler(name)
    if sampler is None:
        known = ", ".join(SAMPLERS)
        raise JobFailure(f"{field}: got {short(name)}, allowed is one of {known}")
    return find_sampler(f"{sampler.name} {_words(scheduler)}") or sampler


def _words(scheduler: str) -> str:
    """`SGM Uniform` goes by `sgm_uniform`, too."""
    return scheduler.lower().replace("_", " ")


_NO_FIELDS = ("units", "webui_version")
"""Of params, that are not of the body."""
_HARMLESS: dict[str, tuple[object, ...]] = {
    "alwayson_scripts": (),
    "comments": ({},),
    "do_not_save_samples": (True, False),
    "firstpass_image": ("",),
    "force_task_id": ("",),
    "image_cfg_scale": (0, 1.5),
    "include_init_images": (False,),
    "infotext": ("",),
    "latent_mask": ("",),
    "override_settings_restore_afterwards": (True, False),
    "save_images": (False,),
    "send_images": (True,),
}
_HARMLESS_SETTINGS: dict[str, tuple[object, ...]] = {
    "face_restoration_unload": (True, False),
    "grid_only_if_multiple": (True,),
}
_IMG2IMG_ONLY = (
    "init_images",
    "resize_mode",
    "mask",
    "mask_blur",
    "mask_blur_x",
    "mask_blur_y",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
    "initial_noise_multiplier",
)
_TXT2IMG_ONLY = (
    "enable_hr",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "firstphase_width",
    "firstphase_height",
)
_FORMATS = ("", "png", "jpg", "jpeg", "webp")


def parse_painting(
    raw: Body, task_type: str, webui: WebuiSettings
) -> tuple[PaintingParams, list[str]]:
    """The typed params, and the warnings. Raises JobFailure."""
    raw, about_scripts = apply_scripts(raw)
    body = {name: value for name, value in raw.items() if name not in _NO_FIELDS}
    params = _as_deployed(convert(body, PaintingParams, most=_most(webui)), webui)
    units, warnings = parse_units(raw.get("alwayson_scripts"))
    warnings = _ignored(raw, task_type) + about_scripts + warnings
    params = _with_styles(_as_task(params, task_type), webui, warnings)
    _check(params, task_type, webui)
    warnings += _about_samplers(params)
    return msgspec.structs.replace(_rounded(params, warnings), units=units), warnings


def _most(webui: WebuiSettings) -> dict[str, float]:
    """What the deployment allows of the fields of a body."""
    sides = "width height hr_resize_x hr_resize_y firstphase_width firstphase_height"
    noise_sides = "seed_resize_from_w seed_resize_from_h"
    etas = "eta override_settings.eta_ancestral override_settings.eta_ddim"
    prompts = "prompt negative_prompt hr_prompt hr_negative_prompt"
    seeds = "seed subseed override_settings.eta_noise_seed_delta"
    return {
        "batch_size": webui.max_batch_size,
        "n_iter": webui.max_n_iter,
        **dict.fromkeys(("steps", "hr_second_pass_steps"), webui.max_steps),
        **dict.fromkeys(f"{sides} {noise_sides}".split(), webui.max_side),
        **dict.fromkeys(etas.split(), webui.max_eta),
        **dict.fromkeys(seeds.split(), HIGHEST_SEED),
        **dict.fromkeys(prompts.split(), webui.max_prompt_length),
    }


def script_of(raw: Body) -> str:
    """Of a body, in lower case."""
    return str(raw.get("script_name", "")).lower()


def _as_deployed(params: PaintingParams, webui: WebuiSettings) -> PaintingParams:
    """With what the deployment says where the body says nothing."""
    settings = params.override_settings
    settings = msgspec.structs.replace(
        settings, randn_source=settings.randn_source or webui.randn_source
    )
    return msgspec.structs.replace(
        params, override_settings=settings, webui_version=webui.webui_version
    )


def _as_task(params: PaintingParams, task_type: str) -> PaintingParams:
    """Without what belongs to the other task; with what the settings have in place of fields, and
    the size that the first pass has."""
    other = _TXT2IMG_ONLY if task_type == "img2img" else _IMG2IMG_ONLY
    usual = PaintingParams()
    changed = {name: getattr(usual, name) for name in other}
    for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
        setting = getattr(params.override_settings, name)
        if setting != getattr(usual, name):
            changed[name] = setting
    params = msgspec.structs.replace(params, **changed)
    if params.firstphase_width or params.firstphase_height:
        return msgspec.structs.replace(
            params,
            width=params.firstphase_width or params.width,
            height=params.firstphase_height or params.height,
            hr_resize_x=params.width,
            hr_resize_y=params.height,
        )
    return params


def _with_styles(
    params: PaintingParams, webui: WebuiSettings, warnings: list[str]
) -> PaintingParams:
    """With its prompts as they are rendered: with those of its styles, and written as the webui
    writes them. Raises JobFailure."""
    known = read_styles(webui.styles)
    warnings += [
        f"styles {short(name)}: no effect, this deployment has no style of that name"
        for name in params.styles
        if name not in (*known, "", NO_STYLE)
    ]
    styles = [known[name] for name in params.styles if name in known]
    positive = [style.prompt for style in styles]
    negative = [style.negative_prompt for style in styles]

    def rendered(prompt: str, additions: list[str]) -> str:
        try:
            return written(
                prompt,
                additions,
                webui.webui_version,
                longest=webui.max_prompt_length,
                comments=params.override_settings.enable_prompt_comments,
            )
        except ValueError as error:
            raise JobFailure(f"prompt: {error}") from None

    hr_prompt, hr_negative_prompt = params.hr_prompt, params.hr_negative_prompt
    return msgspec.structs.replace(
        params,
        prompt=rendered(params.prompt, positive),
        negative_prompt=rendered(params.negative_prompt, negative),
        hr_prompt=hr_prompt and rendered(hr_prompt, positive),
        hr_negative_prompt=hr_negative_prompt and rendered(hr_negative_prompt, negative),
    )


def _check(params: PaintingParams, task_type: str, webui: WebuiSettings) -> None:
    """Raises JobFailure."""
    settings = params.override_settings
    if task_type == "img2img" and not params.init_images:
        raise JobFailure(
            "init_images: got none, allowed is a list of at least one picture in base64"
        )
    if params.script_name.lower() not in ("", "none", *SCRIPTS[task_type]):
        raise JobFailure(
            f"script_name: got {short(params.script_name)}, allowed in {task_type} is one of"
            f" {', '.join(SCRIPTS[task_type])}"
        )
    if len(params.init_images) > params.batch_size:
        raise JobFailure(
            f"init_images: got {len(params.init_images)} pictures,"
            f" allowed is up to batch_size ({params.batch_size})"
        )
    for field in ("firstphase_width", "firstphase_height"):
        if 0 < getattr(params, field) < LEAST_SIDE:
            raise JobFailure(
                f"{field}: got {getattr(params, field)}, allowed is a whole number from"
                f" {LEAST_SIDE} to {webui.max_side}, or 0"
            )
    pictures = params.batch_size * params.n_iter
    if pictures > webui.max_pictures:
        raise JobFailure(
            f"batch_size and n_iter: got {params.batch_size} x {params.n_iter} pictures,"
            f" allowed are {webui.max_pictures} in all"
        )
    for field in ("seed", "subseed"):
        if getattr(params, field) + pictures - 1 > HIGHEST_SEED:
            raise JobFailure(
                f"{field}: got {getattr(params, field)} for the first of {pictures} pictures,"
                f" allowed is up to {HIGHEST_SEED} for the last"
            )
    if settings.samples_format.lower() not in _FORMATS:
        raise JobFailure(
            f"override_settings.samples_format: got {short(settings.samples_format)},"
            " allowed is one of png, jpg, webp"
        )
    if settings.k_sched_type.lower() not in SPREADS:
        raise JobFailure(
            f"override_settings.k_sched_type: got {short(settings.k_sched_type)},"
            f" allowed is one of {', '.join(LABELS.values())}"
        )
    if 0 < settings.rho < LEAST_RHO:
        raise JobFailure(
            f"override_settings.rho: got {settings.rho}, allowed is a number from {LEAST_RHO} to"
            " 100, or 0 for the usual one"
        )
    if settings.sigma_min and settings.sigma_max and settings.sigma_min >= settings.sigma_max:
        raise JobFailure("override_settings.sigma_min: allowed is what is below sigma_max")
    params.sampler  # noqa: B018, raises for an unknown name
    if params.enable_hr:
        params.hr_sampler  # noqa: B018
        width, height, _, _ = params.hires_size
        if min(width, height) < LEAST_SIDE or max(width, height) > webui.max_side:
            raise JobFailure(
                f"hires fix: got a size of {width}x{height}, allowed are sides from {LEAST_SIDE} to"
                f" {webui.max_side}"
            )


def _about_samplers(params: PaintingParams) -> list[str]:
    sampler = params.sampler
    warnings = _about_scheduler("scheduler", params.scheduler, sampler, not params.init_images)
    if params.enable_hr and _words(params.hr_scheduler) != "use same scheduler":
        hr_sampler = params.hr_sampler
        warnings += _about_scheduler("hr_scheduler", params.hr_scheduler, hr_sampler, False)
    if isinstance(params.sampler_index, int) and not params.sampler_name:
        warnings.append(
            f"sampler_index {params.sampler_index}: not a name, {sampler.name} was used"
        )
    settings = params.override_settings
    spread = None if sampler.levels else params.spread(sampler)
    kind = SPREADS[settings.k_sched_type.lower()]
    if kind != "automatic" and not (spread and spread.kind == kind):
        warnings.append(f"override_settings.k_sched_type: no effect on {sampler.name}")
    hint = "; name a k_sched_type" if spread == sampler.spread else ""
    asked_levels = {name: getattr(settings, name) for name in LEVELS}
    warnings += [
        f"override_settings.{name}: no effect on the levels of {sampler.name}{hint}"
        for name, value in asked_levels.items()
        if value != getattr(OverrideSettings(), name)
        and not (spread and getattr(spread, LEVELS[name]) == value)
    ]
    samplers = [sampler, params.hr_sampler] if params.enable_hr else [sampler]
    names = " and ".join(dict.fromkeys(one.name for one in samplers))
    churns = any(one.churns for one in samplers)
    asked = {
        "s_churn": (params.s_churn != 0, churns),
        "s_tmin": (params.s_tmin != 0, churns),
        "s_tmax": (params.highest_churn < math.inf, churns),
        "s_noise": (params.s_noise != 1, any(one.uses_s_noise for one in samplers)),
        "eta": (params.eta not in (None, 0), any(one.uses_eta for one in samplers)),
    }
    return warnings + [
        f"{field}: no effect on {names}"
        for field, (asks, acts) in asked.items()
        if asks and not acts
    ]


def _about_scheduler(field: str, given: str, sampler: Sampler, whole_run: bool) -> list[str]:
    if _words(given) in ("", "automatic"):
        return []
    acts = sampler.spread.kind == SPREADS.get(_words(given)) and sampler.levels is None
    if acts and not (sampler.own_steps and whole_run):
        return []
    return [f"{field} {short(given)}: no effect on {sampler.name}"]


def _rounded(params: PaintingParams, warnings: list[str]) -> PaintingParams:
    sides = {}
    for field in ("width", "height"):
        got = getattr(params, field)
        sides[field] = got - got % 8
        if got % 8:
            warnings.append(f"{field} {got}: rounded to {sides[field]}, a multiple of 8")
    return msgspec.structs.replace(params, **sides)


def _ignored(raw: Body, task_type: str) -> list[str]:
    known = {field.name for field in msgspec.structs.fields(PaintingParams)} - set(_NO_FIELDS)
    other, usual = (_TXT2IMG_ONLY if task_type == "img2img" else _IMG2IMG_ONLY), PaintingParams()
    harmless = {**_HARMLESS, **{name: (getattr(usual, name), 0, "", None) for name in other}}
    mine = {key: value for key, value in raw.items() if key != "alwayson_scripts"}
    warnings = ignored(mine, harmless, known - set(other))
    settings = raw.get("override_settings", {})
    known_settings = (field.name for field in msgspec.structs.fields(OverrideSettings))
    warnings += ignored(settings, _HARMLESS_SETTINGS, known_settings, "override_settings.")
    return warnings
