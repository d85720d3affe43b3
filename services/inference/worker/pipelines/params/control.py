"""ControlNet units, as the webui's extension sd-webui-controlnet takes them over the API."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.params.reading import (
    Share,
    checked,
    convert,
    ignored,
    short,
)
from shared.webui.values import as_whole

MOST_UNITS = 10
RESIZE_MODES = ("Just Resize", "Crop and Resize", "Resize and Fill")
CONTROL_MODES = ("Balanced", "My prompt is more important", "ControlNet is more important")
_OTHER_NAMES = {
    "scale to fit (inner fit)": "Crop and Resize",
    "inner fit (scale to fit)": "Crop and Resize",
    "envelope (outer fit)": "Resize and Fill",
    "outer fit (shrink to fit)": "Resize and Fill",
    "resizemode.resize": "Just Resize",
    "resizemode.inner_fit": "Crop and Resize",
    "resizemode.outer_fit": "Resize and Fill",
    "controlmode.balanced": "Balanced",
    "controlmode.prompt": "My prompt is more important",
    "controlmode.control": "ControlNet is more important",
}
"""Of modes: what older versions of the extension call them, and what Python calls its enums."""
Threshold = Annotated[float, Meta(ge=-1, le=1000)]


class ControlUnit(msgspec.Struct, frozen=True, kw_only=True):
    """`module` makes the hint from `image`; `model` is a checkpoint of type ControlNet. It acts
    from `guidance_start` to `guidance_end`, in shares of the steps. `processor_res`: the shorter
    side that `module` works at; `pixel_perfect` chooses it. Without `image`, img2img's own picture
    is the one."""

    enabled: bool = True
    module: str = "none"
    model: str = "None"
    weight: Annotated[float, Meta(ge=-10, le=10)] = 1.0
    image: str | dict[str, str] = ""
    input_image: str | dict[str, str] = ""
    mask: str = ""
    resize_mode: int | str = 1
    processor_res: Annotated[int, Meta(ge=-1, le=2048)] = -1
    threshold_a: Threshold = -1
    threshold_b: Threshold = -1
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    control_mode: int | str = 0
    pixel_perfect: bool = False
    number: int = 0
    """Its place among the units of the body, those that are not enabled included; no field of
    the body."""

    @property
    def picture(self) -> str:
        given = self.image or self.input_image
        return given.get("image", "") if isinstance(given, dict) else given

    @property
    def picture_mask(self) -> str:
        given = self.image or self.input_image
        return self.mask or (given.get("mask", "") if isinstance(given, dict) else "")


_RENAMED = {"preprocessor": "module", "mask_image": "mask", "guidance": "guidance_end"}
_HARMLESS: dict[str, tuple[object, ...]] = {
    "hr_option": ("Both", "HiResFixOption.BOTH", 0),
    "low_vram": (True, False),
    "lowvram": (True, False),
    "save_detected_map": (True, False),
    "loopback": (False,),
    "batch_images": ("", []),
    "input_mode": ("simple", "InputMode.SIMPLE"),
    "inpaint_crop_input_image": (True, False),
    "use_preview_as_input": (False,),
    "is_ui": (True, False),
    "output_dir": ("",),
    "generated_image": ("",),
    "union_control_type": ("Unknown", "ControlNetUnionControlType.UNKNOWN"),
}


def parse_units(scripts: Any) -> tuple[list[ControlUnit], list[str]]:
    """The enabled units of `alwayson_scripts`, and warnings. Nothing else is looked at in a unit
    that is not enabled."""
    units: list[ControlUnit] = []
    warnings: list[str] = []
    if scripts is None:
        return units, warnings
    for name, script in checked(scripts, dict, "alwayson_scripts").items():
        if name.strip().lower() != "controlnet":
            continue
        at = "alwayson_scripts.controlnet"
        given = checked(script, dict, at).get("args", [])
        for number, raw in enumerate(checked(given, list, f"{at}.args")):
            where = f"{at}.args[{number}]."
            checked(raw, dict, where[:-1])
            switch = {key: value for key, value in raw.items() if key == "enabled"}
            if not convert(switch, ControlUnit, where).enabled:
                continue
            raw = {_RENAMED.get(key, key): value for key, value in raw.items()}
            known = {field.name for field in msgspec.structs.fields(ControlUnit)} - {"number"}
            fields = {key: value for key, value in raw.items() if key in known}
            unit = convert(fields, ControlUnit, where)
            warnings += ignored(raw, _HARMLESS, known, where)
            if unit.mask and "inpaint" not in unit.module.lower():
                warnings.append(f"{where}mask: no effect here but with a module for inpainting")
            units.append(
                msgspec.structs.replace(
                    unit,
                    number=number,
                    resize_mode=_choice(unit.resize_mode, RESIZE_MODES, f"{where}resize_mode"),
                    control_mode=_choice(unit.control_mode, CONTROL_MODES, f"{where}control_mode"),
                )
            )
    if len(units) > MOST_UNITS:
        raise JobFailure(
            f"alwayson_scripts.controlnet: got {len(units)} units, allowed are {MOST_UNITS}"
        )
    return units, warnings


def _choice(given: int | str, names: tuple[str, ...], where: str) -> int:
    """A mode as the number that the extension's API has always had for it."""
    given = as_whole(given)
    if isinstance(given, str):
        wanted = _OTHER_NAMES.get(given.lower(), given).lower()
        for number, name in enumerate(names):
            if wanted == name.lower():
                return number
    elif 0 <= given < len(names):
        return given
    listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    raise JobFailure(f"{where}: got {short(given)}, allowed is one of {listed}")
