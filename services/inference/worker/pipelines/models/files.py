"""Model files: the names, shapes and tensors in them.

Safetensors are mapped, and read ahead of who uses them. A pickle (.ckpt, .pt, .pth, .bin) is
scanned first and then read by a loader that knows tensors and containers and can call nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.inference.worker.pipelines import JobFailure
from services.inference.worker.pipelines.memory import is_out_of_memory
from shared.webui.titles import stem_of
from shared.weights import BrokenFile, UnsafeFile
from shared.weights.headers import is_pickle, read_header
from shared.weights.pickles import LEFT_BY_TRAINING, Pickle, flatten, read_pickle

AHEAD = 1024**2
"""Bytes of one request: the kernel cuts larger ones short."""


class ModelFile:
    """One file and what it is called. Its header is read at once, tensors when asked for.

    Raises JobFailure for what is no complete and harmless model file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._identity = identity_of(path)
        with path.open("rb") as file:
            self.is_pickle = is_pickle(file.read(9))
            try:
                if self.is_pickle:
                    self._pickle = read_pickle(file)
                    self.header = self._pickle.header
                else:
                    self.header = read_header(file, path.stat().st_size)
            except BrokenFile as error:
                raise JobFailure(f"broken checkpoint: {name}: {error}") from error
            except UnsafeFile as error:
                raise JobFailure(_refused(name, str(error))) from error

    @property
    def stem(self) -> str:
        return stem_of(self.name)

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
            yield _load_pickle(self.path, self.name, self._pickle)
            return
        threading.Thread(target=_read_ahead, args=(self.path,), daemon=True).start()
        try:
            with safe_open(self.path, framework="pt", device=str(device or "cpu")) as file:
                yield _Lazy(file)
        except SafetensorError as error:
            raise JobFailure(f"broken checkpoint: {self.name}: {error}") from None

    def read(self) -> dict[str, Tensor]:
        """All of it, on the CPU."""
        with self.reading() as tensors:
            return {name: tensors[name] for name in self.header.tensors}


def _read_ahead(path: Path) -> None:
    """Has the kernel fetch a file that is to be used now. By faults it would come in small pieces,
    in the order of a model's layers, and never while one is being converted."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        for start in range(0, os.fstat(file.fileno()).st_size, AHEAD):
            os.posix_fadvise(file.fileno(), start, AHEAD, os.POSIX_FADV_WILLNEED)


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


def _refused(name: str, would: str) -> str:
    return (
        f"{name} is refused: it is a pickle that {would}; if you trust its author, convert it to"
        " .safetensors and upload that"
    )


def _load_pickle(path: Path, name: str, pickle: Pickle) -> dict[str, Tensor]:
    """With torch's loader that knows tensors and containers, and calls nothing else. The tensors of
    a ZIP are mapped; not in a file called .safetensors, which torch would take by its name."""
    inert = [(_Inert, one) for one in pickle.called if one.startswith(LEFT_BY_TRAINING)]
    misnamed = path.suffix.lower() == ".safetensors"
    in_zip = pickle.prefix is not None
    try:
        with torch.serialization.safe_globals(inert), path.open("rb") as opened:  # type: ignore[arg-type]
            loaded = torch.load(
                opened if misnamed else path,
                map_location="cpu",
                weights_only=True,
                mmap=in_zip and not misnamed,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # What it raises depends on where it stumbles over what a stranger wrote.
        line = next(iter(str(error).splitlines()), "")[:200]
        raise JobFailure(
            f"{name} is refused: it is a pickle that can't be read as plain tensors: {line};"
            " convert it to .safetensors"
        ) from error
    tensors = flatten(loaded, lambda value: isinstance(value, Tensor))
    if tensors is None:
        raise JobFailure(f"broken checkpoint: {name} holds no tensors by name")
    return tensors


class _Inert:
    """In place of an object that training left: it takes what it is given, and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state
