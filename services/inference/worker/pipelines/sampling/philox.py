"""The noise of `torch.randn` on NVIDIA's GPUs, drawn on the CPU: Philox 4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3") and the Box-Muller transform, as the webui
draws it with its setting "random number generator source: NV", to the last bit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_UNIT, _TURN = np.float32(2.3283064e-10), np.float32(2.3283064e-10 * 6.2831855)
"""2^-32, and 2π of it, as the floats that CUDA multiplies with."""


class PhiloxGenerator:
    """`seed`: taken modulo 2^64. Each tensor that is drawn is the next one of the seed."""

    def __init__(self, seed: int) -> None:
        self._key = seed % 2**32, seed // 2**32 % 2**32
        self._offset = 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """float32, on the CPU."""
        count = math.prod(shape)
        counter = (
            np.full(count, self._offset, np.uint32),
            np.zeros(count, np.uint32),
            np.arange(count, dtype=np.uint32),
            np.zeros(count, np.uint32),
        )
        self._offset += 1
        first, second = _philox(counter, self._key)
        return torch.from_numpy(_normal(first, second)).reshape(shape)


def _philox(counter: tuple[Words, ...], key: tuple[int, int]) -> tuple[Words, Words]:
    """The first two of the four words that each counter and the key make."""
    one, two, three, four = counter
    for number in range(_ROUNDS):
        keys = (np.uint32((k + number * w) % 2**32) for k, w in zip(key, _WEYL, strict=True))
        products = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]
        (low, high), (other_low, other_high) = (_halves(product) for product in products)
        one, two, three, four = (
            other_high ^ two ^ next(keys),
            other_low,
            high ^ four ^ next(keys),
            low,
        )
    return one, two


def _halves(product: NDArray[np.uint64]) -> tuple[Words, Words]:
    """The low and the high 32 bits."""
    return product.astype(np.uint32), (product >> np.uint64(32)).astype(np.uint32)


def _normal(first: Words, second: Words) -> NDArray[np.float32]:
    radius = np.sqrt(-2.0 * np.log(first * np.float64(_UNIT) + np.float64(_UNIT / 2)))
    angle = second * np.float64(_TURN) + np.float64(_TURN / 2)
    drawn: NDArray[np.float32] = (radius * np.sin(angle)).astype(np.float32)
    return drawn
