"""Which file a title means: `folder/name.safetensors [0123456789]`, and the other names that the
webui knows a model by.

The whole title is looked for first, then what is left without a hash at its end: a name may have
brackets of its own. A name goes before an alias, and both before a hash.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

CHECKPOINT, LORA, UPSCALER = "Stable-diffusion", "Lora", "Upscaler"

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
UPSCALERS = {
    "r-esrgan 4x+": "RealESRGAN_x4plus",
    "r-esrgan 4x+ anime6b": "RealESRGAN_x4plus_anime_6B",
    "r-esrgan 2x+": "RealESRGAN_x2plus",
    "r-esrgan general 4xv3": "realesr-general-x4v3",
    "r-esrgan general wdn 4xv3": "realesr-general-wdn-x4v3",
    "r-esrgan animevideo": "realesr-animevideov3",
    "esrgan_4x": "ESRGAN",
    "swinir 4x": "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN",
    "swinir_4x": "003_realSR_BSRGAN_DFOWMFC_s64w8_SwinIR-L_x4_GAN",
    "scunet": "scunet_color_real_gan",
    "scunet gan": "scunet_color_real_gan",
    "scunet psnr": "scunet_color_real_psnr",
    "dat x2": "DAT_x2",
    "dat x3": "DAT_x3",
    "dat x4": "DAT_x4",
}
"""What the webui calls the files that it fetches by itself, and their names where they lie."""

_DIGITS = re.compile(r"[0-9a-f]{8,64}", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{10,64}", re.IGNORECASE)


class File(Protocol):
    """`name`: of the file, with its suffix. `sha256`: empty where nobody knows it. `alias`: what
    its author called it (`ss_output_name` of a LoRA's metadata), empty without one. The last two
    are asked for only where names do not decide."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def alias(self) -> str: ...


F = TypeVar("F", bound=File)


def stem_of(title: str) -> str:
    """Without folder and suffix: `folder/name.safetensors` -> `name`."""
    name = _base_of(title)
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def find(type_: str, title: str, files: Sequence[F]) -> F | None:
    """The one of these files, all of a type, that a title means; the first where names are equal.

    With or without folder and suffix, in upper or lower case if it comes to that; a hash in
    brackets decides between files of one name, and is no reason to refuse one. A checkpoint also
    by the first 10 digits of its SHA-256 or more of them, alone; the webui's old hashes of 8 digits
    are made of other bytes and find nothing. A LoRA also by its alias, an upscaler by the name that
    the webui shows for it. An alias that several have, as the stages of one training do, means the
    last of them."""
    for name, digits in _readings(title):
        if found := _named(type_, name, files):
            return next((one for one in found if digits and _has_hash(one, digits)), found[0])
    digits = hash_in(type_, title)
    return next((one for one in files if digits and _has_hash(one, digits)), None)


def keys_of(type_: str, title: str) -> list[str]:
    """In lower case, all stems and aliases of files that `find` may choose for a title, for who
    keeps an index of those. By its hash it may choose others: see `hash_in`."""
    keys: list[str] = []
    for name, _ in _readings(title):
        known = UPSCALERS.get(name.lower(), "") if type_ == UPSCALER else ""
        for key in (_base_of(name), stem_of(name), name, known):
            keys += [key.lower()] * bool(key and key.lower() not in keys)
    return keys


def hash_in(type_: str, title: str) -> str:
    """The digits by which a title without a name means a checkpoint, in lower case; else empty."""
    digits = title.strip().removeprefix("[").removesuffix("]")
    return digits.lower() if type_ == CHECKPOINT and _HASH.fullmatch(digits) else ""


def _readings(title: str) -> Iterator[tuple[str, str]]:
    """What may be the name, and the hash behind it."""
    title = title.strip()
    yield title, ""
    name, bracket, digits = title.removesuffix("]").rpartition("[")
    if bracket and title.endswith("]") and _DIGITS.fullmatch(digits):
        yield name.strip(), digits.lower()


def _named(type_: str, name: str, files: Sequence[F]) -> list[F]:
    """Those that fit equally well, and better than all others."""
    base, stem = _base_of(name), stem_of(name)
    if not base:
        return []
    ways = [
        (base, lambda one: _base_of(one.name)),
        (base, lambda one: stem_of(one.name)),
        (stem, lambda one: stem_of(one.name)),
    ]
    if found := _equal(ways, files):
        return found
    if type_ == UPSCALER and name.lower() in UPSCALERS:
        return _equal([(UPSCALERS[name.lower()], lambda one: stem_of(one.name))], files)
    if type_ == LORA and (found := _equal([(name, lambda one: one.alias)], files)):
        return sorted(found, key=lambda one: one.name.lower(), reverse=True)
    return []


def _equal(ways: Sequence[tuple[str, Callable[[F], str]]], files: Sequence[F]) -> list[F]:
    for folded in (str, str.lower):
        for wanted, told in ways:
            if found := [one for one in files if folded(told(one)) == folded(wanted)]:
                return found
    return []


def _has_hash(one: File, digits: str) -> bool:
    return one.sha256.lower().startswith(digits)


def _base_of(title: str) -> str:
    return title.strip().replace("\\", "/").rpartition("/")[2]
