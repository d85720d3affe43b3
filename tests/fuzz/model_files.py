"""Random model files, as the registry looks at them and as a worker uses them.

    python -m tests.fuzz.model_files SEED SECONDS      looks for faults, prints the shares
    python -m tests.fuzz.model_files SEED 0 NUMBER     one case again

A file is a whole one of a kind, with tensors, metadata or bytes changed at random. Whatever it is,
the registry accepts or refuses it, and a worker makes a picture or refuses it; a reason that is an
exception's, and anything that takes too long, is a fault. A worker is given what the registry
refused as well: it trusts nobody.
"""

from __future__ import annotations

import io
import json
import math
import random
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.models import layouts
from services.models import inspection, unpacking
from services.models.domain import Harmful, Unfit
from shared.contracts.models import CheckpointFile
from tests.unit.pipelines import tiny
from tests.unit.pipelines.bench import Bench, base64_of, photo
from tests.unit.pipelines.tiny import Tensors

LONGEST = 60
"""Seconds that a file may take."""
FAULTS = ("stumble", "Error(", "Exception(")
"""What a reason has in it that nobody wrote."""
KEPT = 100
"""Cases after which the engine gives its memory back."""

CHECKPOINTS = {name: tiny.CHECKPOINTS[name] for name in ("SD 1.x", "SD 2.x", "SDXL")}
OTHERS = ("SD 1.x inpainting", "SD 1.x LCM", "SDXL refiner")


class Case(msgspec.Struct, frozen=True):
    """A file of a `type` and what was done to it. `base`: the kind of checkpoint that it is used
    with."""

    type: str
    name: str
    data: bytes
    base: str
    story: list[str]


class Outcome(msgspec.Struct, frozen=True):
    """`registry`, `worker`: empty where it was accepted, else the reason. `fault`: what went wrong
    that should not."""

    registry: str
    worker: str
    fault: str = ""


# What there is


@cache
def model_of(kind: str) -> tiny.Tiny:
    return tiny.CHECKPOINTS[kind]()


@cache
def checkpoint_tensors(kind: str) -> Tensors:
    return model_of(kind).tensors()


def pick_checkpoint(chance: random.Random) -> tuple[str, Tensors, Any]:
    kind = chance.choice([*CHECKPOINTS, *OTHERS])
    return kind, dict(checkpoint_tensors(kind)), model_of(kind).configs


def pick_lora(chance: random.Random) -> tuple[str, Tensors, Any]:
    base = chance.choice([*CHECKPOINTS])
    model = model_of(base)
    layers = {
        f"{component}.{name}": layer
        for component in ("unet", "text_encoder", "text_encoder_2")
        if getattr(model, component) is not None
        for name, layer in getattr(model, component).named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    chosen = chance.sample(sorted(layers), chance.randint(1, 12))
    forms = [tiny.lora, tiny.loha, tiny.lokr, tiny.full, tiny.ia3, tiny.ia3_on_input]
    form: Any = chance.choice(forms)
    if chance.random() < 0.3 and form not in (tiny.ia3, tiny.ia3_on_input):
        form = tiny.dora(form, of=chance.choice(["inputs", "outputs", "PEFT"]))
    key_of: Any = chance.choice([partial(_kohya, base), _diffusers])
    tensors: Tensors = {}
    for name in chosen:
        try:
            tensors |= tiny.network({name: layers[name]}, form, key_of)[0]
        except RuntimeError:  # a layer that a form does not divide
            continue
    if chance.random() < 0.3:
        vectors = torch.randn(chance.randint(1, 4), chance.choice([32, 40, 48, 768]))
        part = chance.choice(["string_to_param.*", "clip_l", "clip_g", "emb_params", "?"])
        tensors[f"bundle_emb.sparkle.{part}"] = vectors
    return base, tensors, None


def _kohya(base: str, name: str) -> str:
    component, _, layer = name.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_text_model_"}.get(component)
    if prefix is None or base == "SD 2.x":
        prefix = prefix if component == "unet" else "lora_te_text_model_"
    return f"{prefix}{layer.removeprefix('text_model.').replace('.', '_')}"


def _diffusers(name: str) -> str:
    return name


def pick_vae(chance: random.Random) -> tuple[str, Tensors, Any]:
    base = chance.choice([*CHECKPOINTS])
    model = model_of(base)
    state = dict(model.vae.state_dict())
    if chance.random() < 0.3:
        return base, state, None
    return base, layouts.to_original(state, layouts.vae_sources(model.configs["vae"], "")), None


@cache
def controlnet_of(base: str) -> tuple[Any, Any]:
    return tiny.controlnet(model_of(base))


def pick_controlnet(chance: random.Random) -> tuple[str, Tensors, Any]:
    base = chance.choice([*CHECKPOINTS])
    model, config = controlnet_of(base)
    layout = chance.choice(["original", "bare", "diffusers"])
    return base, dict(tiny.controlnet_tensors(model, config, layout)), config


def pick_embedding(chance: random.Random) -> tuple[str, Tensors, Any]:
    base = chance.choice([*CHECKPOINTS])
    count = chance.choice([1, 2, 75, 76])
    widths = {"SD 1.x": [32], "SD 2.x": [40], "SDXL": [32, 48]}[base]
    if len(widths) == 1:
        name = chance.choice(["emb_params", "string_to_param.*", "<word>", "clip_l"])
        return base, {name: torch.randn(count, widths[0])}, None
    names = ("clip_l", "clip_g")
    return base, {n: torch.randn(count, w) for n, w in zip(names, widths, strict=True)}, None


def pick_upscaler(chance: random.Random) -> tuple[str, Tensors, Any]:
    return "SD 1.x", dict(tiny.esrgan(chance.randint(1, 5))), None


PICKS: dict[str, Callable[[random.Random], tuple[str, Tensors, Any]]] = {
    "Stable-diffusion": pick_checkpoint,
    "Lora": pick_lora,
    "VAE": pick_vae,
    "ControlNet": pick_controlnet,
    "embeddings": pick_embedding,
    "Upscaler": pick_upscaler,
}


# What is done to it


DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def other_shape(tensor: Tensor, chance: random.Random) -> Tensor:
    flat = tensor.flatten()
    match chance.randrange(7):
        case 0:
            return flat
        case 1:
            return tensor[..., None]
        case 2:
            return tensor[None]
        case 3:
            return flat[: max(0, len(flat) - 1)]
        case 4:
            return tensor[:0] if tensor.ndim else torch.zeros(0)
        case 5:
            return tensor.T if tensor.ndim == 2 else flat[:1][None]
        case _:
            return torch.zeros(chance.choices([1, 2, 3, 16, 32], k=chance.randrange(6)))


def changed_tensors(tensors: Tensors, chance: random.Random, story: list[str]) -> Tensors:
    """With one to a few changes of the same sort."""
    tensors = dict(tensors)
    names = sorted(tensors)
    some = chance.sample(names, min(len(names), chance.choice([1, 1, 2, len(names)])))
    what = chance.choice(
        ["drop", "rename", "type", "shape", "fill", "swap", "add", "prefix", "mix", "case"]
    )
    story.append(f"{what} {len(some)} tensors, {some[:1]}")
    for name in some:
        match what:
            case "drop":
                del tensors[name]
            case "rename":
                at = chance.randrange(len(name) + 1)
                piece = chance.choice([".", "_", "0", "weight", "é", "", ".alpha", "lora_"])
                tensors[name[:at] + piece + name[at + 1 :]] = tensors.pop(name)
            case "type":
                tensors[name] = tensors[name].to(chance.choice(DTYPES))
            case "shape":
                tensors[name] = other_shape(tensors[name], chance)
            case "fill":
                value = chance.choice([math.nan, math.inf, -1e30, 0.0, 1e-40])
                tensors[name] = torch.full_like(tensors[name].float(), value)
            case "swap":
                other = chance.choice(names)
                tensors[name], tensors[other] = tensors[other].clone(), tensors[name]
            case "add":
                end = chance.choice(
                    [".alpha", ".weight", ".dora_scale", ".foo", ".lora_mid.weight"]
                )
                place = chance.choice([name, name.rpartition(".")[0], "model_ema", "loss"])
                tensors[place + end] = torch.randn(
                    chance.choices([1, 4, 16], k=chance.randrange(4))
                )
            case "prefix":
                prefix = chance.choice(["model.", "module.", "base_model.model.", "unet.", "lora_"])
                tensors[prefix + name] = tensors.pop(name)
            case "mix":
                _, others, _ = chance.choice([*PICKS.values()])(chance)
                for other in chance.sample(sorted(others), min(3, len(others))):
                    tensors[other] = others[other].clone()
            case _:
                tensors[name.upper()] = tensors.pop(name)
    return tensors


STRANGE: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    3,
    1e9,
    2**40,
    0.5,
    "",
    "é",
    True,
    [],
    {},
    [0],
    [16, 32, 64],
    ["DownBlock2D"],
    {"a": 1},
)


def changed_config(config: Any, chance: random.Random, story: list[str]) -> Any:
    """With one value, at any depth, that is another or gone."""
    config = json.loads(json.dumps(config))
    part = config
    while isinstance(part, dict) and part:
        key = chance.choice(sorted(part))
        if isinstance(part[key], dict) and part[key] and chance.random() < 0.9:
            part = part[key]
            continue
        if chance.random() < 0.2:
            del part[key]
            story.append(f"config without {key}")
        else:
            part[key] = chance.choice(STRANGE)
            story.append(f"config with {key} = {part[key]!r}")
        break
    return config


def changed_bytes(data: bytes, chance: random.Random, story: list[str]) -> bytes:
    what = chance.choice(["cut", "flip", "header", "append", "length", "type", "shape"])
    story.append(f"bytes: {what}")
    changed = bytearray(data)
    length = min(len(data), 8 + struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0])
    match what:
        case "cut":
            return data[: chance.randrange(len(data) + 1)]
        case "append":
            return data + chance.randbytes(chance.choice([1, 512, 4096]))
        case "length":
            return struct.pack("<Q", chance.choice([0, 1, 2**63, len(data), 10])) + data[8:]
        case "type":
            types = [b"F4", b"F6_E2M3", b"F8_E8M0", b"U16", b"U32", b"U64", b"C64", b"I16", b"X"]
            return data.replace(
                b'"F32"', b'"' + chance.choice(types) + b'"', chance.choice([1, -1])
            )
        case "shape":
            return data.replace(
                b'"shape":[', b'"shape":[' + chance.choice([b"1,", b"0,", b"-1,"]), 1
            )
        case _:
            end = length if what == "header" else len(data)
            for _ in range(chance.choice([1, 3, 50])):
                changed[chance.randrange(max(1, end)) % len(changed)] = chance.randrange(256)
            return bytes(changed)


def packed(tensors: Tensors, config: Any, chance: random.Random, story: list[str]) -> bytes:
    if chance.random() < 0.75:
        metadata = {"format": "pt"}
        if config is not None:
            metadata["darkroom.config"] = config if isinstance(config, str) else json.dumps(config)
        plain: bytes = save({name: t.clone().contiguous() for name, t in tensors.items()}, metadata)
        return plain
    held: Any = chance.choice([tensors, {"state_dict": tensors}, {"epoch": 1, "params": tensors}])
    new = chance.random() < 0.7
    story.append(f"a pickle of {'now' if new else 'old'}")
    target = io.BytesIO()
    torch.save(held, target, _use_new_zipfile_serialization=new)
    return target.getvalue()


def archived(name: str, data: bytes, chance: random.Random, story: list[str]) -> bytes:
    target = io.BytesIO()
    form = chance.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=target, mode="w", format=form) as archive:
        for _ in range(chance.choice([1, 1, 2])):
            path = chance.choice(["models/Lora/", "/", "../", "", "a\\", "ü/" * 60]) + name
            info = tarfile.TarInfo(path)
            info.size = len(data)
            info.type = chance.choice([tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.CHRTYPE])
            archive.addfile(info, io.BytesIO(data))
    story.append("a tar")
    return target.getvalue()


def make_case(seed: int, number: int) -> Case:
    chance = random.Random(f"{seed}-{number}")
    torch.manual_seed(number)
    type_ = chance.choice([*PICKS, "Lora", "Stable-diffusion"])
    base, tensors, config = PICKS[type_](chance)
    story = [f"{type_} for {base}"]
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        tensors = changed_tensors(tensors, chance, story)
    if config is not None and chance.random() < 0.25:
        config = changed_config(config, chance, story)
    data = packed(tensors, config, chance, story)
    if chance.random() < 0.1:
        data = archived("x.safetensors", data, chance, story)
    if chance.random() < 0.2:
        data = changed_bytes(data, chance, story)
    suffix = chance.choice([".safetensors"] * 4 + [".ckpt", ".pt", ".vae.pt", ".bin", ""])
    return Case(type_, f"x{suffix}", data, base, story)


# What becomes of it


def registry_says(case: Case) -> tuple[str, list[bytes]]:
    """The reason of a refusal, and the files that lie in the upload."""
    file = CheckpointFile(filename=case.name, key="a/b/x", size=len(case.data))
    try:
        members = unpacking._list_members(io.BytesIO(case.data), file)
        held = [case.data[one.offset : one.offset + one.size] for one in members] or [case.data]
        for data in held:
            of = msgspec.structs.replace(file, size=len(data))
            inspection.look_at_opened(io.BytesIO(data), of, case.type)
    except (Unfit, Harmful) as refusal:
        return str(refusal), []
    return "", held


class Fuzz:
    def __init__(self, folder: Path) -> None:
        self._bench = Bench(folder)
        self._folder = folder
        self._bases: dict[str, Path] = {}
        self._count = 0

    def try_case(self, case: Case) -> Outcome:
        registry, held = "", [case.data]
        worker = fault = ""
        try:
            with limited():
                registry, held = registry_says(case)
        except Exception as error:
            return Outcome("", "", f"the registry: {error!r}")
        try:
            with limited():
                worker = self._use(case, (held or [case.data])[0])
        except Exception as error:
            fault = f"the worker: {error!r}"
        reasons = registry, worker
        fault = fault or next((r for r in reasons if any(sign in r for sign in FAULTS)), "")
        return Outcome(registry, worker, fault)

    def _use(self, case: Case, data: bytes) -> str:
        """The reason of a refusal; empty where there was a picture."""
        self._count += 1
        if self._count % KEPT == 0:
            self._bench.engine.library.forget()
        path = self._folder / case.name
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            self._render(case, path)
        except JobFailure as refusal:
            return str(refusal)
        return ""

    def _render(self, case: Case, path: Path) -> None:
        usual: dict[str, Any] = {"steps": 1, "sampler_name": "Euler"}
        if case.type == "Stable-diffusion":
            self._bench.paint(path, **usual)
            return
        if case.base not in self._bases:
            file = self._folder / f"base-{len(self._bases)}.safetensors"
            self._bases[case.base] = model_of(case.base).save(file)
        word = path.stem
        bodies: dict[str, dict[str, Any]] = {
            "Lora": {"prompt": f"a sparkle <lora:{word}:0.8>"},
            "embeddings": {"prompt": f"a {word}"},
            "VAE": {},
            "ControlNet": {"alwayson_scripts": {"controlnet": {"args": [_unit(word)]}}},
            "Upscaler": {
                "enable_hr": True,
                "hr_upscaler": word,
                "hr_scale": 1.25,
                "denoising_strength": 0.1,
            },
        }
        body = {**usual, **bodies[case.type]}
        self._bench.paint(self._bases[case.base], beside={path: case.type}, **body)


def _unit(model: str) -> dict[str, Any]:
    return {"model": model, "module": "none", "image": base64_of(photo())}


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    seed, seconds = int(sys.argv[1]), float(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        if len(sys.argv) > 3:
            case = make_case(seed, int(sys.argv[3]))
            print(*case.story, fuzz.try_case(case), sep="\n")
            return
        until, number = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            case = make_case(seed, number)
            outcome = fuzz.try_case(case)
            if outcome.fault:
                print(f"{seed} 0 {number}: {'; '.join(case.story)} -> {outcome.fault[:300]}")
            elif outcome.registry and not outcome.worker:
                print(f"  stricter at intake, {seed} 0 {number}: {outcome.registry[:200]}")
            counts["fault" if outcome.fault else _short(outcome)] += 1
            number += 1
    for what, count in counts.most_common():
        print(f"{count:7} {100 * count / number:6.2f}%  {what}")


def _short(outcome: Outcome) -> str:
    if not outcome.worker:
        return "a picture, though refused at intake" if outcome.registry else "a picture"
    return "refused at intake" if outcome.registry else "accepted, refused by the worker"


if __name__ == "__main__":
    main()
