"""The GPU of a worker, asked by way of NVML, which comes with NVIDIA's driver: no context on the
GPU is made for it, and an engine that hangs does not keep it from answering."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import msgspec

LIBRARY = "libnvidia-ml.so.1"


class Gpu(msgspec.Struct, frozen=True):
    """`busy`: from 0 to 1."""

    uuid: str
    used_bytes: int
    total_bytes: int
    busy: float


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Utilization(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class GpuError(Exception):
    """NVML answered with an error code."""


def read_gpu(device: str) -> Gpu | None:
    """`device`: cpu (None), cuda or cuda:1, counted among those of CUDA_VISIBLE_DEVICES. Raises
    OSError without the driver, GpuError for a GPU that does not answer."""
    if not device.startswith("cuda"):
        return None
    nvml = _open()
    handle = _handle(nvml, int(device.partition(":")[2] or 0))
    memory, utilization = _Memory(), _Utilization()
    uuid = ctypes.create_string_buffer(96)
    _call(nvml.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory))
    _call(nvml.nvmlDeviceGetUUID, handle, uuid, ctypes.c_uint(len(uuid)))
    busy = 0.0
    if not nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)):
        busy = utilization.gpu / 100  # a slice of a GPU does not tell
    return Gpu(uuid.value.decode(), memory.used, memory.total, busy)


@cache
def _open() -> Any:
    nvml = ctypes.CDLL(LIBRARY)
    _call(nvml.nvmlInit_v2)
    return nvml


def _handle(nvml: Any, number: int) -> ctypes.c_void_p:
    """CUDA counts the GPUs that it may see, NVML all of them, in the order of the bus (which is
    CUDA's too where all are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = named[number] if number < len(named) else str(number)
    handle = ctypes.c_void_p()
    if name.startswith(("GPU-", "MIG-")):
        _call(nvml.nvmlDeviceGetHandleByUUID, name.encode(), ctypes.byref(handle))
    else:
        index = ctypes.c_uint(int(name or number))
        _call(nvml.nvmlDeviceGetHandleByIndex_v2, index, ctypes.byref(handle))
    return handle


def _call(function: Any, *arguments: Any) -> None:
    if code := function(*arguments):
        raise GpuError(f"{function.__name__}: {code}")
