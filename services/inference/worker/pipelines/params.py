"""AUTOMATIC1111 webui bodies -> typed params.

Bodies come as the webui's clients send them: bare `Infinity` and `NaN`, nulls for "default",
numbers as text, and many keys that mean nothing here. What is out of range is refused with the
field, what was got and what is allowed; what the webui knows and this version does not do goes to
the warnings.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.samplers import SAMPLERS, Sampler, find_sampler

Text = Annotated[str, Meta(max_length=20_000)]
Side = Annotated[int, Meta(ge=64, le=2048)]
Level = Annotated[int, Meta(ge=0, le=255)]


class OverrideSettings(msgspec.Struct, frozen=True):
    """`sd_model_checkpoint`: which of the job's checkpoints, where it names several."""

    CLIP_stop_at_last_layers: Annotated[int, Meta(ge=1, le=12)] = 1
    sd_model_checkpoint: str = ""


class PaintingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a txt2img or img2img body that this version acts on; defaults as the webui's.

    The job makes `batch_size * n_iter` pictures; picture i has the seed `seed + i`.
    """

    prompt: Text = ""
    negative_prompt: Text = ""
    steps: Annotated[int, Meta(ge=1, le=150)] = 50
    sampler_name: str = ""
    sampler_index: str | int = ""
    scheduler: str = ""
    cfg_scale: Annotated[float, Meta(ge=1, le=30)] = 7.0
    seed: Annotated[int, Meta(ge=-1, le=2**53 - 1)] = -1
    width: Side = 512
    height: Side = 512
    batch_size: Annotated[int, Meta(ge=1, le=8)] = 1
    n_iter: Annotated[int, Meta(ge=1, le=16)] = 1
    init_images: list[str] = []
    resize_mode: Annotated[int, Meta(ge=0, le=3)] = 0
    denoising_strength: Annotated[float, Meta(ge=0, le=1)] = 0.75
    override_settings: OverrideSettings = OverrideSettings()

    @property
    def sampler(self) -> Sampler:
        """With its `scheduler` (a field of webui 1.9) where the webui 1.7 has a name for both.

        Raises JobFailure for a name that nobody knows.
        """
        index = self.sampler_index if isinstance(self.sampler_index, str) else ""
        name = self.sampler_name or index or "Euler"
        sampler = find_sampler(name)
        if sampler is None:
            known = ", ".join(SAMPLERS)
            raise JobFailure(f"sampler_name: got {short(name)}, allowed is one of {known}")
        return find_sampler(f"{sampler.name} {self.scheduler}") or sampler


class CuttingParams(msgspec.Struct, frozen=True, kw_only=True):
    """A rembg body. `return_mask` is the webui extension's name for `only_mask`."""

    input_image: str = ""
    model: str = ""
    only_mask: bool = False
    return_mask: bool = False
    post_process_mask: bool = False
    alpha_matting: bool = False
    alpha_matting_foreground_threshold: Level = 240
    alpha_matting_background_threshold: Level = 10
    alpha_matting_erode_size: Annotated[int, Meta(ge=0, le=255)] = 10
    bgcolor: Annotated[list[Level], Meta(min_length=3, max_length=4)] | str | None = None


_HARMLESS: dict[str, tuple[object, ...]] = {
    "enable_hr": (False,),
    "eta": (),
    "image_cfg_scale": (0, 1.5),
    "initial_noise_multiplier": (0, 1),
    "mask": ("",),
    "refiner_checkpoint": ("", "None"),
    "restore_faces": (False,),
    "s_churn": (0,),
    "s_min_uncond": (0,),
    "s_noise": (1,),
    "script_name": ("", "None"),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "styles": ([],),
    "subseed_strength": (0,),
    "tiling": (False,),
}
"""Fields without effect in this version, each with the values that ask for nothing."""

_HARMLESS_SETTINGS: dict[str, tuple[object, ...]] = {"sd_vae": ("", "None", "Automatic")}

P = TypeVar("P", bound=msgspec.Struct)


def parse(body: bytes, params: type[P]) -> tuple[P, dict[str, Any]]:
    """The typed params, and the whole body as it came (less its nulls). Raises JobFailure."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise JobFailure(f"the params are no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise JobFailure(f"the params are no JSON object but {short(raw)}")
    raw = _clean(raw)
    try:
        return msgspec.convert(raw, params, strict=False), raw
    except msgspec.ValidationError as error:
        raise JobFailure(_explain(str(error), raw, params)) from None


def parse_painting(body: bytes, task_type: str) -> tuple[PaintingParams, dict[str, Any], list[str]]:
    """As `parse`, and the warnings."""
    params, raw = parse(body, PaintingParams)
    warnings = _ignored(raw)
    if task_type == "img2img" and not params.init_images:
        raise JobFailure(
            "init_images: got none, allowed is a list of at least one picture in base64"
        )
    if len(params.init_images) > params.batch_size:
        raise JobFailure(
            f"init_images: got {len(params.init_images)} pictures,"
            f" allowed is up to batch_size ({params.batch_size})"
        )
    if params.resize_mode == 3:
        warnings.append("resize_mode 3 (latent upscale): the picture was resized as in mode 0")
    sampler = params.sampler
    if sampler.nearest:
        warnings.append(f"sampler {sampler.name}: approximated by {sampler.nearest}")
    scheduler = params.scheduler.lower()
    if scheduler not in ("", "automatic") and not sampler.name.lower().endswith(scheduler):
        warnings.append(f"scheduler {params.scheduler}: no effect on {sampler.name}")
    if isinstance(params.sampler_index, int) and not params.sampler_name:
        warnings.append(
            f"sampler_index {params.sampler_index}: not a name, {sampler.name} was used"
        )
    sides = {}
    for field in ("width", "height"):
        got = getattr(params, field)
        sides[field] = got - got % 8
        if got % 8:
            warnings.append(f"{field} {got}: rounded to {sides[field]}, a multiple of 8")
    return msgspec.structs.replace(params, **sides), raw, warnings


def printable(raw: dict[str, Any]) -> dict[str, Any]:
    """A body as strict JSON can carry it back, without its pictures."""
    pictures = ("init_images", "mask", "input_image", "image")
    return {
        key: _finite(value)
        for key, value in raw.items()
        if key not in pictures and key != "alwayson_scripts"
    }


def short(value: object, limit: int = 60) -> str:
    """A value as an error message may quote it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _clean(value: Any) -> Any:
    """Without nulls in objects, and without half characters (`"\\ud800"`) in texts, which neither a
    tokenizer nor a log takes."""
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ignored(raw: dict[str, Any]) -> list[str]:
    warnings = [
        f"{field}: no effect in this version"
        for field, harmless in _HARMLESS.items()
        if field in raw and raw[field] not in harmless
    ]
    settings = raw.get("override_settings", {})
    known = msgspec.structs.fields(OverrideSettings)
    warnings += [
        f"override_settings.{name}: no effect in this version"
        for name, value in settings.items()
        if name not in {field.name for field in known}
        and value not in _HARMLESS_SETTINGS.get(name, ())
    ]
    scripts = raw.get("alwayson_scripts")
    if isinstance(scripts, dict) and scripts:
        names = ", ".join(sorted(scripts))
        warnings.append(f"alwayson_scripts: no effect in this version ({short(names)})")
    return warnings


def _explain(message: str, raw: dict[str, Any], params: type[msgspec.Struct]) -> str:
    """msgspec's `… - at `$.steps`` -> field, what was got, what is allowed."""
    found = re.search(r"at `\$\.(.+)`", message)
    path = found[1] if found else ""
    got: Any = raw
    kind: msgspec.inspect.Type = msgspec.inspect.type_info(params)
    for name, position in re.findall(r"(\w+)|\[(\d+)\]", path):
        if name and isinstance(kind, msgspec.inspect.StructType):
            got = got[name]
            kind = next(field.type for field in kind.fields if field.name == name)
        elif position and isinstance(got, list):
            got = got[int(position)]
            kind = kind.item_type if isinstance(kind, msgspec.inspect.ListType) else kind
    # A reason goes to the logs; prompts do not.
    shown = short(got) if "prompt" not in path else f"another value ({type(got).__name__})"
    if isinstance(got, str) and len(got) > 60:
        shown = f"{len(got)} characters"
    return f"{path}: got {shown}, allowed is {_allowed(kind)}"


def _allowed(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.IntType(ge=int(low), le=int(high)):
            return f"a whole number from {low} to {high}"
        case msgspec.inspect.FloatType(ge=(int() | float()) as low, le=(int() | float()) as high):
            return f"a number from {low:g} to {high:g}"
        case msgspec.inspect.StrType(max_length=int(limit)):
            return f"a text of up to {limit} characters"
        case msgspec.inspect.StrType():
            return "a text"
        case msgspec.inspect.IntType():
            return "a whole number"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.ListType(item_type=item, min_length=least, max_length=most):
            count = f"{least} to {most} items" if most is not None else "items"
            return f"a list of {count}, each {_allowed(item)}"
        case msgspec.inspect.UnionType(types=kinds):
            named = [_allowed(k) for k in kinds if not isinstance(k, msgspec.inspect.NoneType)]
            return " or ".join(named)
        case _:
            return "an object"
