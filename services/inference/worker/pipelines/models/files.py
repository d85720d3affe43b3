"""Model files: the names, shapes and tensors in them, and their SHA-256.

Safetensors are mapped: pages come in as they are used. A pickle (.ckpt, .pt, .pth, .bin) is scanned
first and then read by a loader that knows tensors and containers and can call nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.inference.worker.pipelines import JobFailure

MAX_HEADER = 100_000_000
"""Bytes; the bound that the safetensors library has, too."""


class Header(msgspec.Struct, frozen=True):
    """`shapes`: tensor name -> shape. `metadata`: what the author of the file wrote down."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = {}


class ModelFile:
    """One file and what it is called. Its header is read at once, tensors when asked for.

    Raises JobFailure for what is no complete and harmless model file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._identity = identity_of(path)
        self.is_pickle = _is_pickle(path)
        if self.is_pickle:
            tensors = _unpickle(path, name)
            self.header = Header({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        else:
            self.header = read_header(path, name)

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def identity(self) -> tuple[object, ...]:
        """Of the file as it was opened; one that was changed since has another."""
        return self._identity

    @contextmanager
    def reading(self, device: torch.device | None = None) -> Iterator[Mapping[str, Tensor]]:
        """The tensors by name, straight to `device`. Mapped ones may be used after the end."""
        if self.is_pickle:
            yield _unpickle(self.path, self.name)
            return
        try:
            with safe_open(self.path, framework="pt", device=str(device or "cpu")) as file:
                yield _Lazy(file)
        except SafetensorError as error:
            raise JobFailure(f"broken checkpoint: {self.name}: {error}") from None

    def read(self) -> dict[str, Tensor]:
        """All of it, on the CPU."""
        with self.reading() as tensors:
            return {name: tensors[name] for name in self.header.shapes}


def identity_of(path: Path) -> tuple[object, ...]:
    stat = path.stat()
    return (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_header(path: Path, name: str) -> Header:
    """Raises JobFailure for what is no complete safetensors file; `name` is what the user calls it.

    The format: eight bytes (little endian) tell the length of a JSON object, which tells of each
    tensor its dtype, shape and place in the bytes that follow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, max(size - 8, 0)):
            raise JobFailure(f"broken checkpoint: {name} is no safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = {key: str(text) for key, text in entries.pop("__metadata__", {}).items()}
        shapes = {key: tuple(map(int, entry["shape"])) for key, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, ArithmeticError):
        raise JobFailure(f"broken checkpoint: the header of {name} can't be read") from None
    if 8 + length + end != size:
        raise JobFailure(
            f"broken checkpoint: {name} has {size} bytes where its header tells of"
            f" {8 + length + end}; it was cut off or changed on the way, upload it again"
        )
    return Header(shapes, metadata)


def _is_pickle(path: Path) -> bool:
    """A ZIP of pickles, or a bare one, as torch has written them. A safetensors file may begin with
    the same bytes: there they are the length of the JSON that follows."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80")


def _unpickle(path: Path, name: str) -> dict[str, Tensor]:
    from picklescan.scanner import SafetyLevel, scan_file_path

    refused = f"{name} is refused: it is a pickle that"
    try:
        found = scan_file_path(str(path)).globals
    except Exception as error:
        # The scanner walks whatever bytes a stranger wrote.
        raise JobFailure(f"{refused} can't be scanned ({type(error).__name__})") from error
    for called in found:
        if called.safety == SafetyLevel.Dangerous:
            raise JobFailure(_would_run(f"{called.module}.{called.name}", name))
    names = {f"{called.module}.{called.name}": called.safety for called in found}
    inert = [(_Inert, one) for one in names if one.startswith(_LEFT_BY_TRAINING)]
    try:
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path)
            )
    except MemoryError:
        raise
    except Exception as error:
        # So does the loader: what it raises depends on where it stumbles.
        for one, safety in names.items():
            if safety == SafetyLevel.Suspicious and not one.startswith(_KNOWN):
                raise JobFailure(_would_run(one, name)) from error
        line = next(iter(str(error).splitlines()), "")[:200]
        raise JobFailure(
            f"{refused} can't be read as plain tensors: {line}; convert it to .safetensors"
        ) from error
    return _flatten(loaded, name)


def _would_run(called: str, name: str) -> str:
    return (
        f"{name} is refused: it is a pickle that would run {called} when it is opened; if you trust"
        " its author, convert it to .safetensors and upload that"
    )


_LEFT_BY_TRAINING = (
    "lightning.",
    "numpy.",
    "omegaconf.",
    "pytorch_lightning.",
    "torch.nn.modules.container.ParameterDict",
)
"""Objects that training leaves in a file beside its tensors."""
_KNOWN = (*_LEFT_BY_TRAINING, "_codecs.encode")
"""The last is how pickles of Python 2 write bytes."""


class _Inert:
    """In place of such an object: it takes whatever it is given, and does nothing."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _can_be_mapped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _flatten(loaded: Any, name: str) -> dict[str, Tensor]:
    """`{"state_dict": {name: tensor}}`, `{"string_to_param": {"*": tensor}}`, `{name: tensor}`."""
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    for wrapper in ("params_ema", "params-ema", "params"):  # of upscalers
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise JobFailure(f"broken checkpoint: {name} holds no tensors by name")
    tensors: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if isinstance(value, _Inert):
            value = vars(value).get("_parameters")  # of embeddings from before torch 1.12
        if isinstance(value, Tensor):
            tensors[str(key)] = value
        elif isinstance(value, dict):
            parts = value.items()
            tensors |= {f"{key}.{part}": t for part, t in parts if isinstance(t, Tensor)}
    return tensors


class Hashes:
    """SHA-256 of files. Reading gigabytes takes seconds: answers are kept in a folder, by path,
    size and time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / ".sha256"

    def sha256(self, path: Path) -> str:
        return self._kept(path, "", 0)

    def of_tensors(self, path: Path) -> str:
        """Of a safetensors file without its header, as training tools note it in LoRA files."""
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        return self._kept(path, " tensors", 8 + length)

    def _kept(self, path: Path, what: str, start: int) -> str:
        stat = path.stat()
        known_by = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}{what}"
        kept = self._folder / hashlib.sha256(known_by.encode()).hexdigest()
        if kept.exists():
            return kept.read_text()
        with path.open("rb") as file:
            file.seek(start)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.replace(kept)
        return digest
