"""Which models a body names, told from the body alone: for who finds them before the job runs.

Only what acts is a name: a field that the worker passes over, or a unit that is switched off, needs
no model. What is wrong with a body is the worker's to say, so what can't be read names nothing.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import msgspec

from shared.webui.settings import WebuiSettings
from shared.webui.styles import read_styles, written
from shared.webui.titles import CHECKPOINT, LORA, UPSCALER, stem_of
from shared.webui.values import as_flag, as_number, as_whole
from shared.weights.kinds import CODEFORMER, FACE_RESTORATION, GFPGAN

VAE, EMBEDDING, CONTROLNET, REMBG = "VAE", "embeddings", "ControlNet", "rembg"
PAINTING = ("txt2img", "img2img")
NO_MODEL = {
    CHECKPOINT: ("", "none", "use same checkpoint"),
    VAE: ("", "none", "automatic"),
    UPSCALER: (
        *("", "none", "lanczos", "nearest"),
        *("latent", "latent (antialiased)", "latent (bicubic)", "latent (bicubic antialiased)"),
        *("latent (nearest)", "latent (nearest-exact)"),
    ),
    CONTROLNET: ("", "none"),
}
"""What stands for a choice and not for a file, in lower case."""
LONGEST_PROMPT, MOST_CHARACTERS = 100_000, 5_000_000
"""Of a prompt, and of all that a plot makes of one: far more than the worker takes."""
MOST_STYLES = 1000
"""Of a prompt."""
MOST_NAMED = 2000
"""Titles that are told of a body."""


class NamedModel(msgspec.Struct, frozen=True):
    """`title`: as the body has it, see `shared.webui.titles`; of a model that restores faces it may
    be its kind. `field`: where. `by_default`: the body leaves it open, so any that the job lists
    will do as well."""

    type: str
    title: str
    field: str
    by_default: bool = False


class BodyNames(msgspec.Struct, frozen=True):
    """`prompts`: texts in which names of embeddings may stand. `has_checkpoint`: the body itself
    says which checkpoint every picture begins with."""

    models: list[NamedModel] = []
    prompts: list[str] = []
    has_checkpoint: bool = False


class _Body(TypedDict, total=False):
    """What is looked at; pictures, which make a body large, are passed over."""

    prompt: Any
    negative_prompt: Any
    hr_prompt: Any
    hr_negative_prompt: Any
    enable_hr: Any
    disable_extra_networks: Any
    override_settings: Any
    refiner_checkpoint: Any
    hr_checkpoint_name: Any
    hr_upscaler: Any
    styles: Any
    restore_faces: Any
    script_name: Any
    script_args: Any
    alwayson_scripts: Any
    upscaler_1: Any
    upscaler_2: Any
    extras_upscaler_2_visibility: Any
    gfpgan_visibility: Any
    codeformer_visibility: Any
    model: Any
    vitmatte: Any
    vitmatte_model: Any


def names_in(task_type: str, body: bytes, webui: WebuiSettings) -> BodyNames | None:
    """Of a body in any form of JSON that the worker reads; None for one that it will refuse. Takes
    some ten milliseconds where it is as large as it may be."""
    raw = _read(body)
    if raw is None:
        return None
    if task_type in PAINTING:
        return _of_painting(raw, task_type, webui)
    found = _of_rembg(raw) if task_type == "rembg" else _of_upscaling(raw)
    return BodyNames(_distinct(found))


def _read(body: bytes) -> _Body | None:
    """Quickly what is plain JSON in UTF-8; NaN, other encodings and halves of characters as the
    standard library reads them."""
    try:
        return msgspec.json.decode(body, type=_Body)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None  # type: ignore[return-value]


# txt2img, img2img


def _of_painting(raw: _Body, task_type: str, webui: WebuiSettings) -> BodyNames:
    axes = plot_axes(raw, task_type, webui)
    hires = task_type == "txt2img" and _flag(raw.get("enable_hr"))
    settings = _object(raw.get("override_settings"))
    checkpoint = _either(axes, "checkpoint name", settings.get("sd_model_checkpoint"))
    refiner, upscaler = raw.get("refiner_checkpoint"), raw.get("hr_upscaler")
    fields = [
        (CHECKPOINT, "override_settings.sd_model_checkpoint", checkpoint),
        (VAE, "override_settings.sd_vae", _either(axes, "vae", settings.get("sd_vae"))),
        (CHECKPOINT, "refiner_checkpoint", _either(axes, "refiner checkpoint", refiner)),
    ]
    if hires:
        fields += [
            (CHECKPOINT, "hr_checkpoint_name", [raw.get("hr_checkpoint_name")]),
            (UPSCALER, "hr_upscaler", _either(axes, "hires upscaler", upscaler)),
        ]
    fields += _of_sd_upscale(raw, task_type)
    prompts = _prompts(raw, axes, webui, hires=hires)
    acting = [] if _flag(raw.get("disable_extra_networks")) else prompts
    networks = (
        NamedModel(LORA, name, f"{field}: <{kind}:…>")
        for field, text in acting
        if "negative" not in field
        for kind, name in networks_in(text)
    )
    found = itertools.chain(_models(fields), _of_faces(raw, axes), _of_scripts(raw), networks)
    plain = (NETWORK.sub("", text) for _, text in prompts)
    return BodyNames(
        _distinct(found),
        list(dict.fromkeys(filter(None, plain))),
        any(_text(title) for title in checkpoint),
    )


def _prompts(raw: _Body, axes: Axes, webui: WebuiSettings, *, hires: bool) -> list[tuple[str, str]]:
    """All that is rendered, of all cells of a plot, each with the field that it comes from."""
    known = read_styles(webui.styles)
    own = [name for name in _list(raw.get("styles")) if isinstance(name, str)]
    chosen = [
        [*own[:MOST_STYLES], *value.split(",")][:MOST_STYLES]
        for value in _either(axes, "styles", "")
    ]
    styles = [[known[name] for name in names if name in known] for names in chosen]
    positive = [[style.prompt for style in some] for some in styles]
    negative = [[style.negative_prompt for style in some] for some in styles]
    settings = _object(raw.get("override_settings"))
    comments = _flag(settings.get("enable_prompt_comments"), usually=True)
    fields = {"prompt": positive, "negative_prompt": negative}
    if hires:
        fields |= {"hr_prompt": positive, "hr_negative_prompt": negative}
    found = []
    for field, additions in fields.items():
        given = raw.get(field)
        given = given if isinstance(given, str) and len(given) <= LONGEST_PROMPT else ""
        if field.startswith("hr_") and not given:
            continue  # it is the first pass's
        texts = [given] if field.startswith("hr_") else _replaced(given, axes)
        rendered = (
            _written(text, some, webui.webui_version, comments=comments)
            for text, some in itertools.product(texts, additions)
        )
        found += [(field, text) for text in _within_bounds(rendered)]
    return found


def _written(text: str, additions: list[str], webui_version: str, *, comments: bool) -> str:
    try:
        return written(text, additions, webui_version, longest=LONGEST_PROMPT, comments=comments)
    except ValueError:
        return ""


def _within_bounds(texts: Iterable[str]) -> Iterator[str]:
    """As many as are not too much together; a short one has its price, too."""
    room = MOST_CHARACTERS
    for text in texts:
        room -= 100 + len(text)
        if room < 0:
            return
        yield text


def _models(fields: Iterable[tuple[str, str, list[Any]]]) -> Iterator[NamedModel]:
    for type_, field, titles in fields:
        for title in map(_text, titles):
            if title.lower() not in NO_MODEL[type_]:
                yield NamedModel(type_, title, field)


def _of_scripts(raw: _Body) -> Iterator[NamedModel]:
    refines = raw.get("refiner_checkpoint") is None  # the field goes before the script
    for title, script in _object(raw.get("alwayson_scripts")).items():
        name = title.strip().lower()
        arguments = _list(script.get("args") if isinstance(script, dict) else script)
        where = f"alwayson_scripts.{name}.args"
        if name == "controlnet":
            for number, unit in enumerate(map(_object, arguments)):
                if _flag(unit.get("enabled"), usually=True):
                    yield from _models(
                        [(CONTROLNET, f"{where}[{number}].model", [unit.get("model")])]
                    )
        elif name == "refiner" and refines and _flag(next(iter(arguments), None)):
            yield from _models([(CHECKPOINT, where, arguments[1:2])])


FACE_RESTORERS = {"gfpgan": GFPGAN, "codeformer": CODEFORMER}
"""By their names in a plot; a GFPGAN is looked for where nothing names one."""


def _of_faces(raw: _Body, axes: Axes) -> Iterator[NamedModel]:
    settings = _object(raw.get("override_settings"))
    given = raw.get("restore_faces")
    restores = _flag(settings.get("face_restoration") if given is None else given)
    for value in _either(axes, "face restore", "true" if restores else ""):
        named = FACE_RESTORERS.get(value.lower(), "")
        if named or _flag(value):
            title = named or _text(settings.get("face_restoration_model"))
            yield NamedModel(
                FACE_RESTORATION,
                title or GFPGAN,
                "restore_faces",
                by_default=not title,
            )


SD_UPSCALE = "sd upscale"
"""The webui's name of the script, in lower case; its upscaler is the third value."""


def _of_sd_upscale(raw: _Body, task_type: str) -> list[tuple[str, str, list[Any]]]:
    given = raw.get("script_args")
    runs = task_type == "img2img" and _text(raw.get("script_name")).lower() == SD_UPSCALE
    if not runs or not isinstance(given, list):
        return []
    return [(UPSCALER, "script_args: upscaler", given[2:3])]


NETWORK = re.compile(r"<(\w+):([^<>]+)>")
NETWORKS = ("lora", "lyco")
"""The kinds that act."""


def networks_in(prompt: str) -> list[tuple[str, str]]:
    """`<lora:name:…>` -> its kind and name, of the kinds that act."""
    return [
        (kind, name)
        for kind, arguments in NETWORK.findall(prompt)
        if kind in NETWORKS and (name := arguments.partition(":")[0].strip())
    ]


# X/Y/Z plot

PLOT = "x/y/z plot"
"""The webui's name of the script, in lower case."""
MODEL_AXES = {
    "prompt s/r": {"txt2img": 7, "img2img": 7},
    "checkpoint name": {"txt2img": 11, "img2img": 10},
    "hires upscaler": {"txt2img": 26},
    "vae": {"txt2img": 27, "img2img": 26},
    "styles": {"txt2img": 28, "img2img": 27},
    "face restore": {"txt2img": 30, "img2img": 29},
    "refiner checkpoint": {"txt2img": 35, "img2img": 34},
}
"""Those that put names of models into a body, and the numbers that the webui 1.7 gives them."""
_SHIFTED = ("hires upscaler", "vae", "styles", "face restore", "refiner checkpoint")
"""In 1.10 these stand behind two more."""
_TYPED = ("prompt s/r", "face restore")
"""Those whose values are typed; those of the others are chosen from a list."""


Axes = list[tuple[str, list[str]]]
"""Of a plot: what each is called, and its values."""


def model_axes(task_type: str, webui_version: str) -> dict[str, int]:
    """The axes of a task that put names of models into a body, and their numbers."""
    return {
        label: numbers[task_type] + 2 * (webui_version != "1.7" and label in _SHIFTED)
        for label, numbers in MODEL_AXES.items()
        if task_type in numbers
    }


def plot_axes(raw: _Body, task_type: str, webui: WebuiSettings) -> Axes:
    """The axes of models, and as many of their values as a plot may have pictures: for the body of
    a plot, else none."""
    given = raw.get("script_args")
    if _text(raw.get("script_name")).lower() != PLOT or not isinstance(given, list):
        return []
    rest = given[13:] if len(given) < 17 else given[16:]
    csv_mode = len(rest) > 1 and _flag(rest[1])
    axes = []
    for type_, typed, chosen in zip(*[iter(given[:9])] * 3, strict=False):
        for label, number in model_axes(task_type, webui.webui_version).items():
            if as_whole(type_) == number or _text(type_).lower() == label:
                choose = chosen and not csv_mode and label not in _TYPED
                axes.append((label, _values(chosen if choose else typed, webui.max_pictures)))
    return axes


def _values(given: Any, most: int) -> list[str]:
    if not isinstance(given, str):
        return [str(one) for one in _list(given)[:most]]
    if len(given) > MOST_CHARACTERS:
        return []
    try:
        values = (one.strip() for row in csv.reader(io.StringIO(given)) for one in row)
        return [*itertools.islice(values, most)]
    except csv.Error:
        return []


def _either(axes: Axes, label: str, own: Any) -> list[Any]:
    """What the cells of a plot have in a field, or the body's own."""
    cells = [value for name, values in axes if name == label for value in values]
    return cells or [own]


def _replaced(prompt: str, axes: Axes) -> list[str]:
    """What a prompt becomes in the cells of a plot, by Prompt S/R."""
    texts = [prompt]
    for label, values in axes:
        if label == "prompt s/r" and values:
            pairs = itertools.product(texts, values)
            texts = [*_within_bounds(_with(text, values[0], value) for text, value in pairs)]
    return texts


def _with(text: str, searched: str, value: str) -> str:
    length = len(text) + text.count(searched) * (len(value) - len(searched))
    return text.replace(searched, value) if length <= LONGEST_PROMPT else ""


# rembg, extra-single-image

SAM = ("sam_vit_b_01ec64.encoder.onnx", "sam_vit_b_01ec64.decoder.onnx")
VITMATTE = "vitmatte-small-distinctions-646"
"""What `vitmatte` takes without a `vitmatte_model`."""


def _of_rembg(raw: _Body) -> Iterator[NamedModel]:
    session = _text(raw.get("model"))
    if not session.endswith("_custom"):  # of those the job itself names the file
        titles = SAM if stem_of(session) == "sam" else (session,)
        yield from (NamedModel(REMBG, title, "model") for title in titles if title)
    if _flag(raw.get("vitmatte")):
        given = _text(raw.get("vitmatte_model"))
        yield NamedModel(REMBG, f"vitmatte-{given}" if given else VITMATTE, "vitmatte_model")


def _of_upscaling(raw: _Body) -> Iterator[NamedModel]:
    fields = [(UPSCALER, "upscaler_1", [raw.get("upscaler_1")])]
    if _number(raw.get("extras_upscaler_2_visibility")) > 0:
        fields.append((UPSCALER, "upscaler_2", [raw.get("upscaler_2")]))
    yield from _models(fields)
    for field, title in (("gfpgan_visibility", GFPGAN), ("codeformer_visibility", CODEFORMER)):
        if _number(raw.get(field)) > 0:
            yield NamedModel(FACE_RESTORATION, title, field)


# Embeddings

_WORD = re.compile(r"[^\W\d_]+|\d|[^\s\w]|_")


def squeezed(prompt: str) -> str:
    """In lower case and without spaces and escapes. A text that has the name of an embedding has
    the name's letters in this."""
    return "".join(_lowered(prompt).split())


def words_of(text: str) -> str:
    """In lower case with one space around each, in the sense of CLIP's tokenizer: runs of letters,
    single digits and signs."""
    return " ".join(["", *_WORD.findall(_lowered(text)), ""])


def has_words(words: str, name: str) -> bool:
    """Whether a name stands among the `words_of` prompts. What stands for it may still be another,
    longer name: the worker, which has the tokens, decides."""
    wanted = words_of(name)
    return bool(wanted.strip()) and wanted in words


def _lowered(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\\", "")).lower()


# Values, as leniently as the worker takes them


def _object(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _text(given: Any) -> str:
    return given.strip() if isinstance(given, str) else ""


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def _flag(given: Any, *, usually: bool = False) -> bool:
    return usually if given is None else as_flag(given) is True


def _number(given: Any) -> float:
    number = as_number(given)
    return number if isinstance(number, int | float) else 0.0


def _distinct(found: Iterable[NamedModel]) -> list[NamedModel]:
    """One of each title, where it stands first; no more than MOST_NAMED."""
    by_title: dict[tuple[str, str], NamedModel] = {}
    for one in found:
        by_title.setdefault((one.type, one.title), one)
        if len(by_title) == MOST_NAMED:
            break
    return [*by_title.values()]
