"""Memory of a device: what a piece of work takes of it, what is free, and giving it back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error)
    )


class Memory:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"

    def measure(self, work: Callable[[], T]) -> tuple[T, int]:
        """What it gives, and the bytes that it took beyond what was taken before, at its peak."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            result = work()
            return result, torch.cuda.max_memory_allocated(self._device) - before
        _reset_peak()
        before = _of_process("VmRSS")
        result = work()
        return result, max(0, _of_process("VmHWM") - before)

    def free(self) -> int:
        """Bytes that could still be taken; a tenth is left alone."""
        if self._on_gpu:
            free, _ = torch.cuda.mem_get_info(self._device)
            reserved = torch.cuda.memory_reserved(self._device)
            return int((free + reserved - torch.cuda.memory_allocated(self._device)) * 0.9)
        return int(_available() * 0.9)

    def taken(self) -> int:
        """Bytes that are taken of a GPU, by whomever, or of the machine by this process."""
        if self._on_gpu:
            free, total = torch.cuda.mem_get_info(self._device)
            return int(total - free)
        return _of_process("VmRSS")

    def release(self) -> None:
        """Gives back what the libraries keep for later."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # then the peak is older, and fewer rows are thought to fit
        _REFERENCES.write_text("5")


def _of_process(field: str) -> int:
    return _field(_STATUS, field)


def _available() -> int:
    """Of the machine, or of the container if that has less."""
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # none, or "max"
        return free


def _field(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    kilobytes = next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "0")
    return int(kilobytes) * 1024
