"""Which GPUs a worker gets, for launchers whose machine does not count them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from services.endpoints.domain import InstanceType
from services.endpoints.launchers import LaunchFailed, NoRoomYet


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker holds; `leaving` if it is being stopped or has ended."""

    gpus: list[str]
    shared: bool = False
    leaving: bool = False


def pick_gpus(type: InstanceType, gpus: Sequence[str], held: Iterable[Held]) -> list[str]:
    """Those of `gpus` that are nobody's; for a type that shares, those that fewest share. Raises
    LaunchFailed, or NoRoomYet if there are enough once those that leave are gone."""
    if not type.gpu_count:
        return []
    held = list(held)
    if len(free := _free(type, gpus, held)) >= type.gpu_count:
        return free[: type.gpu_count]
    reason = f"out of GPUs: {type.gpu_count} wanted, {len(free)} of {len(gpus)} free"
    staying = [worker for worker in held if not worker.leaving]
    if len(_free(type, gpus, staying)) >= type.gpu_count:
        raise NoRoomYet(reason)
    raise LaunchFailed(reason)


def _free(type: InstanceType, gpus: Sequence[str], held: list[Held]) -> list[str]:
    owned = {gpu for worker in held if not worker.shared for gpu in worker.gpus}
    shared = Counter(gpu for worker in held if worker.shared for gpu in worker.gpus)
    if type.share_gpus:
        return sorted((gpu for gpu in gpus if gpu not in owned), key=lambda gpu: shared[gpu])
    return [gpu for gpu in gpus if gpu not in owned and not shared[gpu]]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here: what it names for us already, else all there are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    count = len([file for file in Path("/dev").glob("nvidia*") if file.name[6:].isdigit()])
    return [str(number) for number in range(count)]
