"""`alwayson_scripts` but ControlNet: every script of an installation adds its arguments to the
bodies that come from there, most of them switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.params.reading import (
    Body,
    checked,
    convert,
    short,
)
from shared.webui.values import as_flag

CONTROLNET = "controlnet"


class SeedArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The webui's "Seed": what follows on `seed_checkbox` counts if that is set."""

    seed: int = -1
    seed_checkbox: bool = False
    subseed: int = -1
    subseed_strength: float = 0.0
    seed_resize_from_w: int = 0
    seed_resize_from_h: int = 0

    def fields(self) -> Body:
        extra = ("subseed", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h")
        return {name: getattr(self, name) for name in ("seed", *(extra * self.seed_checkbox))}


class RefinerArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The webui's "Refiner"."""

    enable_refiner: bool = False
    refiner_checkpoint: str = ""
    refiner_switch_at: float = 0.8

    def fields(self) -> Body:
        if not self.enable_refiner or self.refiner_checkpoint.lower() in ("", "none"):
            return {}
        names = ("refiner_checkpoint", "refiner_switch_at")
        return {name: getattr(self, name) for name in names}


class SamplerArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The "Sampler" of webui 1.9."""

    steps: int | None = None
    sampler_name: str = ""
    scheduler: str = ""

    def fields(self) -> Body:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value}


WORKING: dict[str, type[SeedArgs | RefinerArgs | SamplerArgs]] = {
    "seed": SeedArgs,
    "refiner": RefinerArgs,
    "sampler": SamplerArgs,
}
"""By the titles of scripts in lower case, as all below."""


def _first(args: list[Any], raw: Body) -> bool:
    """Whether the first argument is no switch that is off, and there is anything at all."""
    return bool(args) and any(args) and as_flag(args[0]) is not False


def _second(args: list[Any], raw: Body) -> bool:
    return len(args) > 1 and as_flag(args[1]) is not False


def _any(args: list[Any], raw: Body) -> bool:
    return bool(args)


def _never(args: list[Any], raw: Body) -> bool:
    return False


def _adetailer(args: list[Any], raw: Body) -> bool:
    """`[enabled, skip_img2img, {"ad_model": …}, …]`, without the flags if it is enabled."""
    tabs = [one for one in args if isinstance(one, dict)]
    on = [one for one in tabs if as_flag(one.get("ad_tab_enable", True)) is not False]
    models = {str(one.get("ad_model", "None")).lower() for one in on}
    return bool(models - {"", "none"}) and as_flag(args[0]) is not False


def _dynamic_prompts(args: list[Any], raw: Body) -> bool:
    """It is on as it is installed, and does something where a prompt has its syntax."""
    prompts = " ".join(str(raw.get(name, "")) for name in ("prompt", "negative_prompt"))
    return _first(args, raw) and ("{" in prompts or "__" in prompts)


ASKS: dict[str, Callable[[list[Any], Body], bool]] = {
    # webui: settings by their places in an installation's list of them
    "extra options": _any,
    # webui 1.7, 1.9: no arguments, they follow settings
    "hypertile": _never,
    "comments": _never,
    # Forge: only how memory is used
    "never oom integrated": _never,
    # sd-webui-lora-block-weight: acts on what a LoRA's own arguments say, of which is warned
    "lora block weight": _never,
    # adetailer
    "adetailer": _adetailer,
    # sd-webui-reactor, sd-webui-roop: a picture, then the switch
    "reactor": _second,
    "roop": _second,
    # sd-dynamic-prompts
    "dynamic prompts": _dynamic_prompts,
}
"""When a script asks for something. Any other does if its first argument is no switch that is off:
so it is with Tiled Diffusion, Tiled VAE, Dynamic Thresholding, FreeU, Kohya HRFix, Self Attention
Guidance, Soft Inpainting, Regional Prompter, …, in the webui, in Forge and as extensions."""

REFUSED = ("adetailer", "reactor", "roop", "faceswaplab", "animatediff")
"""They make another picture than the one that a body describes: it is not to be taken for it."""


def apply_scripts(raw: Body) -> tuple[Body, list[str]]:
    """The body with what its scripts say, in place of fields that it has not, and the warnings.
    Raises JobFailure."""
    warnings: list[str] = []
    said: Body = {}
    for title, script in checked(raw.get("alwayson_scripts", {}), dict, "alwayson_scripts").items():
        name, where = title.strip().lower(), f"alwayson_scripts.{_key(title)}"
        if name == CONTROLNET:
            continue
        args = script.get("args", []) if isinstance(script, dict) else script
        if name in WORKING:
            said |= _fields(WORKING[name], checked(args, list, f"{where}.args"), where)
        elif _asks(name, args if isinstance(args, list) else [args], raw):
            if name.startswith(REFUSED):
                raise JobFailure(
                    f"{where}: got one that is enabled, allowed is none that is: it does not run"
                    " here, and would have made another picture"
                )
            warnings.append(f"{where}: no effect here")
    return {**said, **raw}, warnings


def _fields(
    script: type[SeedArgs | RefinerArgs | SamplerArgs], args: list[Any], where: str
) -> Body:
    names = script.__struct_fields__
    given = {n: value for n, value in zip(names, args, strict=False) if value is not None}
    return convert(given, script, f"{where}.args.").fields()


def _asks(name: str, args: list[Any], raw: Body) -> bool:
    for title, asks in ASKS.items():
        if name.startswith(title):
            return asks(args, raw)
    units = [one for one in args if isinstance(one, dict)]
    if units and units[0] is args[0]:
        return not all(_is_off(unit, name) for unit in units)
    return _first(args, raw)


def _is_off(unit: Body, name: str) -> bool:
    """Of arguments with names. `name`: the script's, which some switches have."""
    switches = ("enabled", "enable", "is_enabled", "active", name)
    return any(as_flag(unit[key]) is False for key in unit if key.lower() in switches)


def _key(title: str) -> str:
    return title if title.isidentifier() else short(title)
